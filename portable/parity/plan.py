"""Which programs are compiled for which targets."""

from collections.abc import Iterable

from portable import selection
from portable.parity import programs
from portable.parity.jobs import Job

# What is compiled for, beside the device of this process.
TARGETS = ("tpu-v5e", "tpu-v6e", "tpu-7x", "cuda-sm80", "cuda-sm90")
# The published models that stand for the rest: the smallest as it was trained, the largest as it is served.
MODELS = (("mamba2", "mamba2_130m", "float32"), ("mamba2", "mamba2_2_7b", "bfloat16"))
# (work, rows, tokens of a row)
WORK = (("forward", 1, 2048), ("prefill", 1, 2048), ("decode", 1, 1), ("decode", 64, 1), ("train", 4, 2048))
_BUILD = "portable.parity.programs"


def op_jobs(targets: Iterable[str], *, sizes: bool = True, values: bool = True) -> list[Job]:
    """Returns jobs for the value and for the gradients of every case of every op on every target.

    Args:
      targets: names of targets.
      sizes: also the cases at the shapes of published models.
      values: also the value alone. The program of the gradients computes the value too.
    """
    jobs = []
    for target in targets:
        for op in selection.ops():
            for case in programs.cases(op, sizes=sizes):
                for gradients in (False, True) if values else (True,):
                    name = f"{op}/{case}/{'gradients' if gradients else 'value'}"
                    kwargs = {"name": op, "case": case, "gradients": gradients}
                    jobs.append(Job(name, target, f"{_BUILD}:op", kwargs, timeout=300))
    return jobs


def model_jobs(
    targets: Iterable[str],
    *,
    models: Iterable[tuple[str, str, str]] = MODELS,
    work: Iterable[tuple[str, int, int]] = WORK,
) -> list[Job]:
    """Returns a job for every piece of work of every model on every target.

    Args:
      targets: names of targets.
      models: (kind, configuration, dtype), as `programs.model` takes them.
      work: (work, rows, tokens of a row).
    """
    jobs = []
    for target in targets:
        for kind, config, dtype in models:
            for what, batch, length in work:
                # Without recomputation, the activations of a large model alone exceed any one device.
                remat = {"remat": "full"} if what == "train" and dtype == "bfloat16" else {}
                kwargs = {"kind": kind, "config": config, "work": what, "dtype": dtype, **remat}
                kwargs |= {"batch": batch, "length": length}
                name = f"{config}/{dtype}/{what} {batch}" + (f"x{length}" if length > 1 else "")
                jobs.append(Job(name, target, f"{_BUILD}:model", kwargs, timeout=3600))
    return jobs
