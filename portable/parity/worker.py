"""The child process of `portable.parity.jobs`: builds and compiles one program after another."""

import hashlib
import importlib
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax

from portable.checks import Unavailable
from portable.parity import cost, hlo, jobs, loops, numbers, programs, roofline, targets, traffic
from portable.parity.store import Store, key

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu's two ways to say that a program is too big, and how much it would have needed.
_TOO_BIG = (
    re.compile(r"the total memory required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds"),
    re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm"),
)


def main() -> None:
    """Answers jobs, one JSON line each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
        jax.clear_caches()


def answer(target: str, task: str, build: str, kwargs: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Does one job; returns the fields of a `jobs.Result` that are not the job's own.

    What the compiler and the program are known to raise becomes a result. Anything else ends this process,
    and the parent reads the reason from its log.
    """
    place = targets.find(target)
    result: dict[str, Any] = {"memory_bytes": place.memory_bytes}
    try:
        if task in ("run", "interpret"):
            if build.endswith(":model"):
                return result | numbers.compare_model(**kwargs)
            return result | numbers.compare(interpret=task == "interpret", **kwargs)
        module, _, function = build.partition(":")
        program = getattr(importlib.import_module(module), function)(**kwargs)
        if task == "lower":
            return result | lower_program(place, program)
        return result | compile_program(place, program, Store(folder))
    except Unavailable as fault:
        return result | {"status": "cannot", "message": str(fault)}
    except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError) as fault:
        return result | {"status": "failed", "message": f"{type(fault).__name__}: {_first_line(fault)}"}


def lower_program(target: targets.Target, program: programs.Program) -> dict[str, Any]:
    """Lowers a program for a platform whose compiler is not here; returns the fields that describe it."""
    start = time.perf_counter()
    jax.jit(program.fn, donate_argnums=program.donate).trace(*program.args).lower(lowering_platforms=(target.family,))
    return {
        "status": "lowered",
        "message": f"there is no {target.family} compiler here",
        "lower_seconds": time.perf_counter() - start,
        "argument_bytes": _size(program.args),
    }


def compile_program(target: targets.Target, program: programs.Program, store: Store | None = None) -> dict[str, Any]:
    """Compiles a program for a target; returns the fields of a `jobs.Result` that describe it."""
    store = store or Store(None)
    start = time.perf_counter()
    with targets.capability(target):
        lowered = targets.lower_for(target, program.fn, *program.args, donate_argnums=program.donate)
    work = roofline.roofline(target, program.fn, *program.args)
    middle = time.perf_counter()
    found: dict[str, Any] = {
        "lower_seconds": middle - start,
        "argument_bytes": _size(program.args),
        "output_bytes": _size(lowered.out_info),
        "flops": sum(work.flops.values()),
        "moved_bytes": work.bytes,
        "roofline_seconds": work.seconds,
    }
    name = key(lowered.as_text(), target.name, targets.description(target), target.memory_bytes, source_of_results())
    kept = store.get(name) or {}
    if kept.get("status") in ("compiled", "does not fit") and set(kept) <= set(jobs.Result.__dataclass_fields__):
        return found | kept
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as fault:
        needed = too_big(str(fault))
        if needed is None:
            raise
        seconds = time.perf_counter() - middle
        message = _first_line(fault)
        given = {"status": "does not fit", "message": message, "needed_bytes": needed, "compile_seconds": seconds}
        store.put(name, given)
        return found | given
    seconds = time.perf_counter() - middle
    memory = hlo.memory(compiled)
    text = hlo.text(compiled)
    # XLA's CUDA compiler does not refuse a program that is too big; the sum tells.
    room = math.inf if target.memory_bytes is None else target.memory_bytes
    given = {
        "status": "compiled" if memory["needed"] <= room else "does not fit",
        "compile_seconds": seconds,
        "code_bytes": memory["generated_code"],
        "opcodes": hlo.opcodes(text),
        "custom_calls": hlo.custom_calls(text),
    }
    given |= {f"{key}_bytes": memory[key] for key in ("argument", "output", "alias", "temp", "needed", "peak")}
    try:
        given["accessed_bytes"] = traffic.accessed(text)
        given["estimated_seconds"] = cost.seconds(target, text)
    except loops.Uncounted as reason:
        given["uncounted"] = str(reason)
    store.put(name, given)
    return found | given


def source_of_results() -> str:
    """Returns a hash of the files that turn a compiled program into a result."""
    files = (hlo.__file__, cost.__file__, loops.__file__, traffic.__file__, __file__)
    return hashlib.sha256(b"".join(pathlib.Path(f).read_bytes() for f in files)).hexdigest()


def too_big(message: str) -> int | None:
    """Returns how many bytes a program would need, from a compiler's error that it is too big, or None."""
    if "RESOURCE_EXHAUSTED" in message:
        for pattern in _TOO_BIG:
            if found := pattern.search(message):
                return int(float(found[1]) * _UNITS[found[2]])
    return None


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _first_line(fault: Exception) -> str:
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), "(no message)")
