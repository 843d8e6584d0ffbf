"""Child process of `benchmarks/mamba2.py`: one peer, one task (see `harness.children`)."""

import importlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from harness import children, measure


def main() -> None:
    """Loads the weights, notes the idle memory, prepares (compiles), warms up, then serves samples."""
    spec = json.loads(sys.argv[1])
    measure.limit_threads(spec["threads"])
    stream = children.protocol_stream()
    task = importlib.import_module(f"mamba2_peers.peer_{spec['peer']}").build(spec)
    measure.reset_peak()
    start = {"idle_mb": measure.memory().get("now_mb")}
    start.update(task.prepare())
    start["prepare_peak_mb"] = measure.memory().get("peak_mb")
    measure.reset_peak()
    if spec.get("warm", True):
        start["warm"] = task.sample()
        start["peak_mb"] = measure.memory().get("peak_mb")
    children.serve(start, task.sample, stream)


if __name__ == "__main__":
    main()
