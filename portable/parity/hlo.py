"""Reading a compiled program: how many of each operation, which custom calls, which arrays it holds."""

import collections
import math
import re
from typing import Any, NamedTuple

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128}
# These name another instruction's buffer, or are the program's own inputs.
_NO_BUFFER = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
}
_MEMORY = ("argument", "output", "alias", "temp", "generated_code")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computations = dict[str, dict[str, Instruction]]


class Buffer(NamedTuple):
    """One array that a program writes to memory."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    opcode: str
    name: str


def text(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised HLO of a compiled program."""
    return compiled.as_text() or ""


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the compiler's account of a program's memory, in bytes.

    The keys: argument, output, alias (outputs that reuse an argument), temp, generated_code, peak (the
    compiler's own figure) and needed (argument + output - alias + temp + generated_code). An array that a TPU
    keeps in its VMEM is not in temp.

    Raises:
      ValueError: the compiler gives no account.
    """
    stats: Any = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this compiler gives no account of memory; ask on another target.")
    found = {k: int(getattr(stats, f"{k}_size_in_bytes")) for k in _MEMORY}
    found["peak"] = int(stats.peak_memory_in_bytes)
    found["needed"] = sum(found[k] for k in _MEMORY) - 2 * found["alias"]
    return found


def opcodes(hlo: str) -> dict[str, int]:
    """Counts the instructions of a program by operation, inside fusions and loop bodies too.

    A matrix product is a `dot`, on a TPU a `convolution`, or a custom call; see `custom_calls`.
    """
    found = (_INSTRUCTION.match(line) for line in hlo.splitlines())
    return dict(collections.Counter(m[4] for m in found if m).most_common())


def custom_calls(hlo: str) -> dict[str, int]:
    """Counts the custom calls of a program by target: a Pallas kernel on a TPU is `tpu_custom_call`."""
    return dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', hlo)).most_common())


def buffers(hlo: str) -> list[Buffer]:
    """Returns the arrays that a program writes to memory, the largest first.

    Instructions inside a fusion are left out, because they live in registers; so are arguments and mere
    views. Two arrays may share memory at different times: for the sum, ask `memory`.
    """
    computations, _ = parse(hlo)
    inner = set()
    for body in computations.values():
        for line in body.values():
            if line.opcode != "call":
                inner.update(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line.rest))
    out = []
    for name, body in computations.items():
        for line in body.values() if name not in inner else ():
            if line.opcode not in _NO_BUFFER:
                for size, dtype, shape in arrays(line.type):
                    out.append(Buffer(size, dtype, shape, line.opcode, line.name))
    return sorted(out, reverse=True)


def parse(hlo: str) -> tuple[Computations, str]:
    """Returns the instructions of each computation of an optimised program by name, and the entry's name.

    Raises:
      ValueError: the text has no entry.
    """
    computations: Computations = {}
    entry, inside = "", {}
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            inside = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", found[5].partition(")")[0]))
            inside[found[2]] = Instruction(found[2], found[3], found[4], operands, found[5], bool(found[1]))
    if not entry:
        raise ValueError("this is not the text of an optimised program: it has no ENTRY.")
    return computations, entry


def arrays(type: str) -> list[tuple[int, str, tuple[int, ...]]]:
    """Returns (bytes, dtype, shape) of each array in an instruction's type."""
    found = []
    for dtype, dims in _ARRAY.findall(type):
        shape = tuple(int(d) for d in dims.split(",") if d)
        found.append((_bits(dtype) * math.prod(shape) // 8, dtype, shape))
    return found


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0
