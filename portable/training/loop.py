"""The training loop: steps, log, evaluations and checkpoints, resumable to the bit."""

import contextlib
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable.checkpoint.orbax import TrainingCheckpoints
from portable.checks import PortableError
from portable.nn import unstack
from portable.training.folder import claim, lock
from portable.training.log import Log
from portable.training.options import TrainOptions
from portable.training.progress import Report, Silent
from portable.training.step import init_state, make_step, parts
from portable.training.task import Task, TextTask
from portable.training.text import Text
from portable.training.tokens import Tokenizer

_AHEAD = 2  # steps the host may run ahead of the device


@dataclasses.dataclass(frozen=True)
class Run:
    """How a call of `fit` ended.

    Attributes:
      status: "finished", "stopped" (Ctrl-C, SIGTERM or `until`) or "out of time".
      step: steps done, all calls together.
      loss: of the last step, nats a token or an image; None if this call made none.
      held_out: bits per byte of held-out text, or accuracy on held-out images, at the end, if there are any and the
        run finished.
      folder: with config.json, log.jsonl, pictures of the curves, checkpoints/ and, when finished, model/ or adapter/.
      model: with the weights reached, layers as a list.
      details: of a finished run on images, the `Classification` of those held out.
    """

    status: str
    step: int
    loss: float | None
    held_out: float | None
    folder: Path
    model: nnx.Module
    details: Any = None


def fit(
    model: nnx.Module,
    data: Text | Task,
    options: TrainOptions,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    reporter: Silent | None = None,
    max_minutes: float | None = None,
    until: int | None = None,
    save_dtype: str | None = "float32",
) -> Run:
    """Trains a model on text or images, or continues the run in `folder` that the same arguments began.

    The batch is a pure function of the step, and checkpoints hold parameters, optimizer and step, so a run
    that is killed at any moment and called again goes through the same losses, bit for bit on the same
    machine and libraries.

    Args:
      model: a language model with a list of layers, or what else the task trains; its weights are the starting point.
      data: documents to train on and to hold out, or another task (`ImageTask`, `AdapterTask`).
      options: of the run.
      folder: of the run; new, empty, or the one of this very run.
      tokenizer: of text; the byte tokenizer by default.
      reporter: shows progress; nothing by default.
      max_minutes: stop with a checkpoint after this time.
      until: stop with a checkpoint after this step; the schedule is still that of all the steps.
      save_dtype: of the weights in `folder/model` at the end; None keeps each as it is.

    Raises:
      CheckpointError: the folder is another run's, or a checkpoint cannot be written or read.
      DataError: there is too little data, or the log cannot be written.
      PortableError: the loss is no longer finite.
    """
    began = time.monotonic()
    task = TextTask(data, tokenizer) if isinstance(data, Text) else data
    return _Loop(model, task, options, Path(folder), reporter or Silent()).run(
        began + 60 * max_minutes if max_minutes is not None else math.inf,
        options.steps if until is None else min(until, options.steps),
        save_dtype,
    )


class _Loop:
    def __init__(
        self,
        model: nnx.Module,
        task: Task,
        options: TrainOptions,
        folder: Path,
        reporter: Silent,
    ):
        self.options, self.folder, self.task, self.reporter = options, folder, task, reporter
        self.batches = task.batches(options)
        # Refused before the folder is this run's.
        self.graphdef, params, biases, self.rest = parts(task.prepare(model), task.trained)
        for note in claim(folder, _description(model, task, options), _information()):
            reporter.note(note)
        self.lock = lock(folder)
        self.state = init_state(params, biases, options, task.optimizer(options))
        self.step = 0
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []

    def run(self, deadline: float, until: int, save_dtype: str | None) -> Run:
        with contextlib.ExitStack() as cleanup:
            if self.lock is not None:
                cleanup.enter_context(self.lock)
            checkpoints = TrainingCheckpoints(self.folder / "checkpoints")
            cleanup.callback(checkpoints.close)
            self._resume(checkpoints)
            self.log = cleanup.enter_context(contextlib.closing(Log(self.folder / "log.jsonl", after=self.step)))
            self.reporter.start(self.step, self.options.steps)
            cleanup.callback(self.reporter.close)
            with _Stop() as stop:
                status = self._steps(checkpoints, stop, deadline, until)
                checkpoints.wait()
            return self._end(status, save_dtype)

    def _resume(self, checkpoints: TrainingCheckpoints) -> None:
        for name in checkpoints.interrupted:
            self.reporter.note(f"{name} in {checkpoints.folder} was interrupted while being written; it is ignored.")
        found = checkpoints.restore(jax.eval_shape(lambda: self.state))
        if found is not None:
            state, self.step, notes = found
            self.state = jax.tree.map(jnp.array, state)  # copies: the step donates them
            for note in notes:
                self.reporter.note(note)
            self.reporter.note(f"continuing after step {self.step} of {self.options.steps}")

    def _steps(self, checkpoints: TrainingCheckpoints, stop: "_Stop", deadline: float, until: int) -> str:
        options, first = self.options, self.step + 1
        task = self.task
        hooks = {"trained": task.trained, "refresh": task.refresh, "update": task.optimizer(options)}
        train = make_step(self.graphdef, self.rest, options, task.loss, **hooks)
        self.clock = time.monotonic()
        for step in range(first, until + 1):
            self.state, metrics = train(self.state, self.batches[step - 1])
            self.step = step
            self.pending.append((step, metrics))
            self.reporter.advance(step)
            # Waiting for an earlier step keeps the device busy, yet a signal or deadline acts soon.
            if len(self.pending) > _AHEAD:
                self.pending[-1 - _AHEAD][1]["loss"].block_until_ready()
            # Asked once a step: a request that comes later in the step must not end the run before its save.
            asked, late = stop.asked, time.monotonic() >= deadline
            if asked:
                self.reporter.note(f"stopping after step {step}; Ctrl-C again stops without a checkpoint")
            last = step == until
            due = bool(options.eval_every) and step % options.eval_every == 0
            save = last or asked or late or step % options.checkpoint_every == 0
            if save or due or step == first or step % options.log_every == 0:
                self._flush(rate=step != first, evaluate=due or last)
            if save:
                checkpoints.save(step, self.state)
            if not last and (asked or late):
                return "stopped" if asked else "out of time"
        return "finished" if self.step >= options.steps else "stopped"

    def _model(self) -> nnx.Module:
        return nnx.merge(self.graphdef, self.state.params, self.state.biases, self.rest)

    def _flush(self, *, rate: bool, evaluate: bool) -> None:
        """Fetches the losses since the last time, logs and shows them."""
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.pending]
        self.pending.clear()
        records = [
            {
                "step": step,
                "loss": float(m["loss"]),
                "learning_rate": float(m["learning_rate"]),
                "gradient_norm": float(m["gradient_norm"]),
            }
            for step, m in fetched
        ]
        speed = left = held = None
        if rate:
            seconds = max(time.monotonic() - self.clock, 1e-9)
            speed = sum(int(m["targets"]) for _, m in fetched) / seconds
            left = seconds / len(fetched) * (self.options.steps - self.step)
            records[-1][f"{self.task.unit}_per_second"] = round(speed, 1)
        bad = next((r for r in records if not math.isfinite(r["loss"])), None)
        if bad is None and evaluate:
            measured = self.task.evaluate(self._model(), self.options)
            records[-1] |= measured
            held = measured.get(self.task.measure)
        self.log.write(records)
        if bad is not None:
            raise PortableError(
                f"training diverged: the loss of step {bad['step']} is {bad['loss']}; start again in "
                f"another folder with a learning rate below {self.options.learning_rate:g}."
            )
        loss = sum(r["loss"] for r in records) / len(records)
        bits = None if self.task.bits_per_nat is None else loss * self.task.bits_per_nat
        self.reporter.report(Report(self.step, self.options.steps, loss, bits, speed, left, held, self.task.unit))
        self.clock = time.monotonic()

    def _end(self, status: str, save_dtype: str | None) -> Run:
        records = self.log.records
        model = unstack(self._model())
        held = details = None
        if status == "finished":
            self.task.save(model, self.folder, save_dtype)
            held = records[-1].get(self.task.measure) if records else None
            details = self.task.examine(model)
        self._plot(records, details)
        return Run(status, self.step, records[-1]["loss"] if records else None, held, self.folder, model, details)

    def _plot(self, records: Sequence[dict], details: Any) -> None:
        try:
            self.task.draw(records, details, self.folder, self.step)
        except ImportError:
            self.reporter.note("no loss curve was drawn: pip install 'portable-jax[train]' brings matplotlib.")
        except OSError as error:
            self.reporter.note(f"the loss curve could not be written to {self.folder}: {error.strerror}.")


class _Stop:
    """Turns the first Ctrl-C or SIGTERM into a request; the second Ctrl-C interrupts as usual."""

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():  # only there does Python allow handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True  # nothing is printed here: the signal may have come in the middle of a print

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _description(model: nnx.Module, task: Task, options: TrainOptions) -> dict:
    training = {name: value for name, value in options.trajectory().items() if name not in task.unused}
    return {
        "model": {"class": type(model).__name__} | dataclasses.asdict(model.config),  # pyright: ignore[reportAttributeAccessIssue]
        "initial_weights": _fingerprint(model),
        "compute_dtype": jnp.dtype(model.dtype).name,  # pyright: ignore[reportAttributeAccessIssue]
        "remat": getattr(model, "remat", "none"),
        "training": training,
    } | task.description()


def _fingerprint(model: nnx.Module) -> str:
    """Returns a word for the weights, from each array's mean magnitude to four digits.

    Weights that another device drew from the same seed differ in their last bits, and are the same weights.
    """
    arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
    means = [f"{np.abs(np.asarray(x, np.float32)).mean(dtype=np.float64) if x.size else 0:.3e}" for x in arrays]
    return hashlib.sha256(" ".join(means).encode()).hexdigest()[:12]


def _information() -> dict:
    return {"jax": jax.__version__, "platform": jax.default_backend()}
