"""What the benchmark measures; each phase returns a plain dict for the results file, samples included."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from harness import children

WORKER = pathlib.Path(__file__).with_name("worker.py")
OURS = "portable"
# Chunk sizes each peer is tried at once; the best one runs beside the defaults in every round.
SWEEPS = {
    "decode": {"mamba2_jax": (8, 16, 32)},
    "prefill512": {"mamba2_jax": (32, 64, 128), "transformers": (32, 64, 128)},
    "prefill2048": {"mamba2_jax": (32, 64, 128), "transformers": (32, 64, 128)},
    "train512": {"mamba2_jax": (32, 64, 128), "transformers": (32, 64, 128)},
}


class Run(NamedTuple):
    """Settings of one run of the benchmark.

    Attributes:
      checkpoint: folder of weights.
      peers: which of "mamba2_jax", "transformers".
      rounds: samples of each program.
      threads: processors each program may use.
      tokens: decoded in one sample.
      sweep: whether to look for the peers' best chunk sizes.
      train: options of our training step.
      contexts, piece: two context lengths, multiples of `piece`, which is how many tokens are read at once.
      seeds, length: the sequences of tokens for the accuracy.
      vocab_size: of the checkpoint.
      say: takes a line of progress.
    """

    checkpoint: pathlib.Path
    peers: tuple[str, ...]
    rounds: int
    threads: int
    tokens: int
    sweep: bool
    train: dict[str, Any]
    contexts: tuple[int, int]
    piece: int
    seeds: tuple[int, ...]
    length: int
    vocab_size: int
    say: Callable[[str], None]

    def child(self, peer: str, task: str, *, warm: bool = True, x64: bool = False, **options: Any) -> children.Child:
        """Starts the worker of one peer and task."""
        spec = {
            "peer": peer,
            "task": task,
            "checkpoint": str(self.checkpoint),
            "threads": self.threads,
            "warm": warm,
            "options": options,
        }
        return children.Child(WORKER, spec, {"JAX_ENABLE_X64": "1"} if x64 else None)


def side_by_side(run: Run, task: str) -> dict[str, Any]:
    """All peers on one task, taking turns: {name: {start, samples}}; `peer@chunk_size` is a tuned one."""
    own = run.train if task.startswith("train") else {}
    wanted: dict[str, tuple[str, dict]] = {OURS: (OURS, own)} | {peer: (peer, {}) for peer in run.peers}
    sweeps = {}
    if run.sweep:
        for peer, sizes in SWEEPS[task].items():
            if peer in run.peers:
                sweeps[peer] = _sweep(run, task, peer, sizes)
                best = min(sweeps[peer], key=lambda size: sweeps[peer][size])
                wanted[f"{peer}@{best}"] = (peer, {"chunk_size": int(best)})
    with contextlib.ExitStack() as stack:
        started = {}
        for name, (peer, options) in wanted.items():
            run.say(f"{task}: starting {name}")
            started[name] = stack.enter_context(run.child(peer, task, tokens=run.tokens, **options))
        samples = children.take_turns(started, run.rounds, progress=lambda line: run.say(f"{task}: {line}"))
        results = {name: {"start": child.start, "samples": samples[name]} for name, child in started.items()}
    return {"sweeps_s": sweeps, "peers": results, "tokens": run.tokens, "train_options": own}


def _sweep(run: Run, task: str, peer: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """Seconds of one warmed-up sample at each chunk size."""
    found = {}
    for size in sizes:
        run.say(f"{task}: {peer} at chunk size {size}")
        with run.child(peer, task, chunk_size=size, tokens=min(16, run.tokens)) as child:
            found[str(size)] = child.ask()["wall"]
    return found


def roofline(run: Run) -> dict[str, Any]:
    """Our decode loop beside a loop of only its matrix-vector products, in one process."""
    run.say("roofline: starting")
    with run.child(OURS, "roofline", tokens=run.tokens) as child:
        samples = children.take_turns({OURS: child}, run.rounds, progress=lambda line: run.say(f"roofline: {line}"))
        return {"start": child.start, "samples": samples[OURS], "tokens": run.tokens}


def context(run: Run) -> dict[str, Any]:
    """Our decode loop after a short and a long context."""
    run.say(f"context: reading {max(run.contexts)} tokens")
    options = {"contexts": list(run.contexts), "piece": run.piece, "tokens": run.tokens}
    with run.child(OURS, "context", **options) as child:
        samples = children.take_turns({OURS: child}, run.rounds, progress=lambda line: run.say(f"context: {line}"))
        return {
            "start": child.start,
            "samples": samples[OURS],
            "contexts": list(run.contexts),
            "tokens": run.tokens,
        }


def compiling(run: Run) -> dict[str, Any]:
    """Seconds to trace and compile a decode step, and our loop, each in a fresh process without a cache."""
    wanted = {OURS: (OURS, "step"), "generate": (OURS, "decode")}
    if "mamba2_jax" in run.peers:
        wanted["mamba2_jax"] = ("mamba2_jax", "decode")
    found: dict[str, list] = {}
    for number in range(min(run.rounds, 3)):
        for name, (peer, task) in wanted.items():
            run.say(f"compile: {name}, process {number + 1}")
            with run.child(peer, task, warm=False, tokens=run.tokens) as child:
                found.setdefault(name, []).append(child.start)
    return found


def accuracy(run: Run) -> dict[str, Any]:
    """Largest and root mean square error of all logits against float64, for several sequences of tokens."""
    options: dict[str, Any] = {"length": run.length}
    judges = {
        "portable_float64": lambda: run.child(
            OURS, "logits", warm=False, x64=True, float64=True, implementation="reference", **options
        ),
        "numpy_float64": lambda: run.child("float64", "logits", warm=False, vocab_size=run.vocab_size, **options),
    }
    judged = {OURS: lambda: run.child(OURS, "logits", warm=False, **options)}
    for peer in run.peers:
        judged[peer] = lambda peer=peer: run.child(peer, "logits", warm=False, **options)
    errors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, start in (judges | judged).items():
            run.say(f"accuracy: {name}")
            with start() as child:
                for seed in run.seeds:
                    child.ask(seed=seed, path=_path(folder, name, seed))
        for seed in run.seeds:
            exact = np.load(_path(folder, "portable_float64", seed)).astype(np.float64)
            for name in ("numpy_float64", *judged):
                difference = np.load(_path(folder, name, seed)).astype(np.float64) - exact
                one = {"max": float(np.abs(difference).max()), "rms": float(np.sqrt(np.mean(difference**2)))}
                errors.setdefault(name, {})[str(seed)] = one
        largest = float(np.abs(exact).max())
    return {"errors": errors, "largest_logit": largest, "length": run.length}


def _path(folder: str, name: str, seed: int) -> str:
    return str(pathlib.Path(folder) / f"{name}-{seed}.npy")


def greedy(run: Run, smallest_margin: float = 1e-3, attempts: int = 8) -> dict[str, Any]:
    """Our greedy tokens beside transformers', which runs a full forward a token.

    The prompt is the first on which transformers is never less sure than `smallest_margin` of the best token
    over the
    second: where two logits tie, a different token is no error.
    """
    with run.child("transformers", "greedy", warm=False, tokens=run.tokens) as child:
        for seed in _seeds(attempts):
            run.say(f"greedy: transformers, prompt {seed}")
            theirs = child.ask(seed=seed)
            if theirs["smallest_margin"] > smallest_margin:
                break
    run.say("greedy: portable")
    with run.child(OURS, "greedy", warm=False, tokens=run.tokens) as child:
        ours = child.ask(seed=seed)
    return {"prompt_seed": seed, "transformers": theirs, "portable": ours}


def _seeds(attempts: int) -> Iterator[int]:
    yield from range(100, 100 + attempts)
