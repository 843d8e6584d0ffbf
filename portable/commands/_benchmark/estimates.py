"""What compilers expect of an op or a model on a device that is not here, beside what is least."""

from collections.abc import Iterable

from portable.checks import PortableError
from portable.parity import jobs, plan, store, targets

COLUMNS = {
    "case": "case",
    "implementation": "implementation",
    "part": "part",
    "estimated_us": "estimated us",
    "roofline_us": "roofline us",
    "fraction": "part of it",
    "temporary_mib": "temporary MiB",
    "note": "",
}


def of_op(op: str, cases: Iterable[str], implementations: Iterable[str], target: str) -> list[dict]:
    """Returns a row for the value and the gradients of each implementation on each case."""
    _check(target)
    work = [
        plan.op_job(target, op, case, name, part) for case in cases for name in implementations for part in plan.PARTS
    ]
    return _rows(work)


def of_model(name: str, target: str) -> list[dict]:
    """Returns a row for each piece of the matrix's work of a model."""
    _check(target)
    return _rows(plan.model_jobs([target], models=[m for m in plan.MODELS if name in m[:2]]))


def _check(target: str) -> None:
    known = [t.name for t in targets.TARGETS.values() if t.family in ("tpu", "cuda")]
    if target not in known:
        raise PortableError(f"bench: --estimate takes one of {', '.join(known)}; got {target!r}.")


def _rows(work: list[jobs.Job]) -> list[dict]:
    rows = []
    for result in jobs.run(work, processes=2, store=store.Store(store.default_folder())):
        seconds = (result.estimated_seconds, result.roofline_seconds)
        rows.append(
            dict(result.labels)
            | {
                key: None if s is None else 1e6 * s
                for key, s in zip(("estimated_us", "roofline_us"), seconds, strict=True)
            }
            | {
                "fraction": result.fraction,
                "temporary_mib": None if result.temp_bytes is None else result.temp_bytes / 2**20,
                "note": result.uncounted or (result.message if result.status in ("failed", "cannot") else ""),
            }
        )
    return rows
