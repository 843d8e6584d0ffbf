"""Which programs the matrix holds: every op and model, what is done with it, and for which target."""

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from portable import selection
from portable.parity import programs, targets
from portable.parity.jobs import Job, Task

# Every accelerator, beside the device of this process.
ACCELERATORS = tuple(t for t in targets.TARGETS if t not in ("cpu", "device"))
# The published models that stand for the rest: the smallest in both precisions, the largest as it is served.
MODELS = (
    ("mamba2", "mamba2_130m", "float32"),
    ("mamba2", "mamba2_130m", "bfloat16"),
    ("mamba2", "mamba2_2_7b", "bfloat16"),
    ("nat", "nat_mini", "float32"),
    ("dinat", "dinat_mini", "float32"),
    ("dinat", "digits_dinat", "float32"),
)
# (work, rows, tokens of a row)
WORK = (("prefill", 1, 2048), ("decode", 1, 1), ("decode", 64, 1), ("train", 4, 2048))
# The same of models of images: (work, images, pixels a side).
IMAGE_WORK = {
    "nat_mini": (("forward", 1, 224),),
    "dinat_mini": (("forward", 1, 224),),
    "digits_dinat": (("train", 128, 8),),
}
# XLA:GPU of JAX 0.10 has no tile sizes for one product, f32[10, 5], of the gradient of 3 x 3 windows' biases.
REFUSED = {("digits_dinat", "cuda")}
# What a model's numbers are run on where it runs: published widths, and layers that the float64 definition bears.
NUMBERS = (("prefill", 1, 96), ("decode", 1, 96), ("train", 1, 96))
NUMBERS_LAYERS = 2
# Models take minutes to compile for a target: these stand for their families.
MODEL_TARGETS = ("tpu-v5e", "tpu-v6e", "tpu-7x", "cuda-sm80", "cuda-sm90")
PARTS = ("value", "gradients")
_BUILD = "portable.parity.programs"


def matrix(
    wanted: Iterable[str] = (),
    *,
    ops: Iterable[str] | None = None,
    models: Iterable[str] | None = None,
    quick: bool = False,
) -> list[Job]:
    """Returns the matrix's jobs.

    Args:
      wanted: names of targets; all unless given, "device" only where there is one.
      ops: names of ops; all unless given, none if only models are.
      models: configurations of models such as "mamba2_130m", or kinds such as "mamba2"; all unless given.
      quick: leave out the shapes of published models, values without gradients, and of the models all but the
        forward and decode step of the smallest language model and the training step of the smallest of images.
    """
    chosen = tuple(wanted) or ("cpu", *(["device"] if targets.accelerator() else []), *ACCELERATORS)
    given = ops is not None or models is not None
    named = selection.ops() if ops is None else tuple(ops)
    kinds = tuple(models or ())
    jobs = [] if given and ops is None else op_jobs(chosen, ops=named, sizes=not quick, values=not quick)
    if given and models is None:
        return jobs
    held = [m for m in MODELS if not kinds or m[0] in kinds or m[1] in kinds]
    places = [t for t in chosen if t in MODEL_TARGETS or (kinds and t not in ("cpu", "device"))]
    work = (("prefill", 1, 2048), ("decode", 1, 1)) if quick else WORK
    here = [t for t in chosen if t in ("cpu", "device")]
    if quick:
        held = [m for m in held if m[1] not in IMAGE_WORK or m[1] == "digits_dinat"]
    compiled = [m for m in held if m == held[0] or m[1] in IMAGE_WORK] if quick else held
    return jobs + number_jobs(here, models=held) + model_jobs(places, models=compiled, work=work)


def implementations(op: str, case: str, target: str) -> list[str]:
    """Returns the names that a cell of the matrix has an implementation for: the XLA forms, the target's kernels."""
    family, kernels = targets.find(target).family, selection.KERNEL_HOMES
    family = targets.accelerator() if family == "device" else family
    return [
        name
        for name in selection.implementations(op)
        if name.startswith("xla") or (name in kernels and (family in kernels[name][1] or family == "cpu"))
        or (name == "reference" and family == "cpu" and case in _module(op).CASES)
    ]  # fmt: skip


def op_jobs(
    wanted: Iterable[str], *, ops: Iterable[str] | None = None, sizes: bool = True, values: bool = True
) -> list[Job]:
    """Returns jobs for the value and for the gradients of the marked cases of ops, by every implementation.

    On the device of this process the numbers are run (kernels of other devices interpreted), elsewhere the programs are
    compiled, for ROCm lowered.

    Args:
      wanted: names of targets.
      ops: names of ops; all unless given.
      sizes: also the cases at the shapes of published models, which are compiled and not run.
      values: also the value alone. The program of the gradients computes the value too.
    """
    jobs = []
    for target in wanted:
        family = targets.find(target).family
        for op in selection.ops() if ops is None else ops:
            for case in _module(op).MATRIX:
                small = case in _module(op).CASES
                if (not small and not sizes) or (family in ("cpu", "device") and not small):
                    continue
                for name in implementations(op, case, target):
                    for part in PARTS if values else PARTS[1:]:
                        jobs.append(op_job(target, op, case, name, part))
    return jobs


def op_job(target: str, op: str, case: str, implementation: str, part: str) -> Job:
    """Returns the job of one implementation of an op on one of its cases; `part` is one of `PARTS`."""
    family = targets.find(target).family
    kwargs: dict[str, Any] = {"name": op, "case": case, "gradients": part == "gradients"}
    kwargs["implementation"] = implementation
    task: Task = "compile"
    if family == "rocm":
        task = "lower"
    elif family == "device":
        task = "run"
    elif family == "cpu":
        task = "interpret" if implementation in selection.KERNEL_HOMES else "run"
    labels = {"kind": "op", "name": op, "case": case, "implementation": implementation, "part": part}
    labels["dtype"] = dtype_of(op, case)
    name = f"{op}/{case}/{implementation}/{part}"
    return Job(name, target, f"{_BUILD}:op", kwargs, timeout=300, task=task, labels=labels)


def dtype_of(op: str, case: str) -> str:
    """Returns the dtype of the first argument of a case."""
    args, _ = jax.eval_shape(lambda: _arrays(programs.cases(op)[case](0)))
    return str(args[0].dtype)


def _arrays(case: tuple) -> tuple:
    args, kwargs = case
    return args, {k: v for k, v in kwargs.items() if hasattr(v, "dtype")}


def _module(op: str) -> Any:
    selection.package(op)
    return importlib.import_module(f"portable.ops._{op}.cases")


def model_jobs(
    wanted: Iterable[str],
    *,
    models: Iterable[tuple[str, str, str]] = MODELS,
    work: Iterable[tuple[str, int, int]] = WORK,
) -> list[Job]:
    """Returns a job for every piece of work of every model on every target.

    Args:
      wanted: names of targets.
      models: (kind, configuration, dtype), as `programs.model` takes them.
      work: (work, rows, tokens of a row) of language models.
    """
    jobs = []
    for target in wanted:
        task: Task = "lower" if targets.find(target).family == "rocm" else "compile"
        for kind, config, dtype in models:
            if (config, targets.find(target).family) in REFUSED:
                continue
            for what, batch, length in IMAGE_WORK.get(config, work):
                # Without recomputation, the activations of a large model alone exceed any one device.
                remat = {"remat": "full"} if what == "train" and dtype == "bfloat16" else {}
                kwargs = {"kind": kind, "config": config, "work": what, "dtype": dtype, **remat}
                kwargs |= {"batch": batch, "length": length}
                case = _case(config, batch, length)
                labels = {"kind": "model", "name": config, "case": case, "implementation": "xla", "part": what}
                labels["dtype"] = dtype
                name = f"{config}/{dtype}/{what} {case}"
                jobs.append(Job(name, target, f"{_BUILD}:model", kwargs, 3600, task, labels))
    return jobs


def number_jobs(wanted: Iterable[str], *, models: Iterable[tuple[str, str, str]] = MODELS) -> list[Job]:
    """Returns a job for the numbers of every piece of work of the smaller models, with few layers, where they run."""
    jobs = []
    for target in wanted:
        for kind, config, dtype in models:
            if config not in (MODELS[0][1], *IMAGE_WORK):
                continue
            for what, batch, length in IMAGE_WORK.get(config, NUMBERS):
                kwargs = {"kind": kind, "config": config, "work": what, "dtype": dtype, "batch": batch}
                kwargs |= {"length": length, "layers": NUMBERS_LAYERS}
                case = f"{_case(config, batch, length)}, {NUMBERS_LAYERS} layers"
                labels = {"kind": "model", "name": config, "case": case, "implementation": "xla", "part": what}
                labels["dtype"] = dtype
                name = f"{config}/{dtype}/{what} {case}"
                jobs.append(Job(name, target, f"{_BUILD}:model", kwargs, 600, "run", labels))
    return jobs


def _case(config: str, batch: int, length: int) -> str:
    if config in IMAGE_WORK:
        return f"{batch}x{length}x{length}"
    return f"{batch}" + (f"x{length}" if length > 1 else "")


def known_models() -> Sequence[str]:
    """Returns what `matrix` understands as models."""
    return tuple(dict.fromkeys([m[0] for m in MODELS] + [m[1] for m in MODELS]))
