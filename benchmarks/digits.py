"""A tiny DiNAT on scikit-learn's digits: held-out accuracy and time of `portable train`, three seeds.

Each seed is the command as a user types it, in a process of its own without a compilation cache: imports, compilation,
evaluations, checkpoints and pictures are part of its time. A third of the images, stratified, is held out.

    pip install -e '.[train]'
    python benchmarks/digits.py            # some minutes on two cores; writes results/digits_cpu.json
    python benchmarks/digits.py --show     # the table of the committed results
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "digits_cpu.json"
BAR, LIMIT = 0.98, 300.0


def run(seed: int) -> dict:
    """Trains with one seed; returns its accuracy, and its seconds of wall and processor time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "digits", "--task", "image", "--out", f"{folder}/run", "--seed", str(seed), "--quiet"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        subprocess.run([sys.executable, "-m", "portable", *command], env=env, check=True)
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in pathlib.Path(folder, "run", "log.jsonl").read_text().splitlines()]
        training = json.loads(pathlib.Path(folder, "run", "config.json").read_text())["training"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seed": seed,
        "accuracy": lines[-1]["held_out_accuracy"],
        "loss": lines[-1]["held_out_loss"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "curve": [[r["step"], r["held_out_accuracy"]] for r in lines if "held_out_accuracy" in r],
        "training": training,
    }


def show(results: dict) -> None:
    """Prints the table."""
    print("seed  held-out accuracy  seconds  processor seconds")
    for row in results["runs"]:
        print(f"{row['seed']:4}  {row['accuracy']:17.2%}  {row['seconds']:7.0f}  {row['processor_seconds']:17.0f}")
    mean = statistics.mean(row["accuracy"] for row in results["runs"])
    seconds = sum(row["seconds"] for row in results["runs"])
    processor = sum(row["processor_seconds"] for row in results["runs"])
    print(f"mean  {mean:17.2%}  {seconds:7.0f}  {processor:17.0f}")
    load = results["machine"]["load_average_at_start"][0]
    cores = results["machine"]["cores"]
    print(f"accuracy of at least {BAR:.0%}: {'reached' if mean >= BAR else 'MISSED'}")
    verdict = "reached" if seconds <= LIMIT else "MISSED"
    print(f"all in {LIMIT:.0f} s: {verdict}, on {cores} cores; load average when it began {load:.1f}")
    if load > cores / 2:
        print("The machine was doing other work: the times are provisional.")


def main() -> None:
    """Runs the seeds, or shows what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--show", action="store_true", help="print the committed results")
    args = parser.parse_args()
    if args.show:
        return show(json.loads(RESULTS.read_text()))
    from harness import measure

    machine = measure.machine()
    results = {"machine": machine, "runs": []}
    for seed in range(args.seeds):
        results["runs"].append(run(seed))
        print(f"seed {seed}: {results['runs'][-1]['accuracy']:.2%}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
