"""Compiles programs for many devices in child processes; one that crashes or hangs is one failed result."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Literal

from portable.parity import targets
from portable.parity.store import Store, key, source

Task = Literal["compile", "lower", "run", "interpret"]
Status = Literal["ran", "interpreted", "compiled", "lowered", "does not fit", "cannot", "failed"]
_GIB = 2**30
# The line of a crash that says what happened, among the addresses around it.
_FATAL = re.compile(r"^F\d{4} |^Fatal |Check fail|LLVM ERROR|terminate called|RET_CHECK|RESOURCE_EXHAUSTED")


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile for one target, described so that another process can build it.

    Attributes:
      name: what the result is called.
      target: a name in `targets.TARGETS`.
      build: "module:function" that returns a `programs.Program`; the child imports it.
      kwargs: its keyword arguments, as JSON can hold them.
      timeout: seconds after which the compiler is stopped.
      task: "compile" for the target; "lower" only; "run" on this process's device, or "interpret" a kernel on the CPU,
        against the reference in float64 (`kwargs` are then those of `numbers.compare`, and `build` is not used).
      labels: what the job is, by column of a table: op or model, case, implementation, dtype, part.
    """

    name: str
    target: str
    build: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 600.0
    task: Task = "compile"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a compiler said about a job.

    Attributes:
      job: the job's name.
      target: the target's name.
      status: "ran" (on this process's device) or "interpreted" (a kernel, on the CPU), with `error`; "compiled";
        "lowered" (no compiler for the target here); "does not fit" (an answer: the device is too small); "cannot" (not
        tried: `message` says why); "failed" (the compiler, the program or its numbers are wrong).
      message: a sentence or the first line of the error, "" where there is nothing to say.
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: the compiler's account; None where
        unknown.
      needed_bytes: what the program takes on the device in all. Where a TPU's compiler refused, its own
        total.
      peak_bytes: the compiler's own figure of the most that is alive at once.
      memory_bytes: what the device has; None for the CPU.
      lower_seconds, compile_seconds: time to trace and lower, and to compile.
      opcodes: instructions by operation. custom_calls: custom calls by target.
      flops, moved_bytes: of the work, see `roofline`; roofline_seconds: the least time they take on the device.
      accessed_bytes: read from and written to the device's memory by the compiled program, see `traffic`.
      estimated_seconds: the compiler's own estimate, loops as often as they run; None where it gives none, or where
        `uncounted` names a part of the program that it does not see.
      error: the largest of max|got - want| / max|want| over all results, `want` by the reference in float64.
      ulps: `error` in units of the results' precision (2^-23 in float32, 2^-7 in bfloat16).
      labels: those of the job.
    """

    job: str
    target: str
    status: Status
    message: str = ""
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temp_bytes: int | None = None
    code_bytes: int | None = None
    needed_bytes: int | None = None
    peak_bytes: int | None = None
    memory_bytes: int | None = None
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    opcodes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    custom_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    moved_bytes: int | None = None
    roofline_seconds: float | None = None
    accessed_bytes: int | None = None
    estimated_seconds: float | None = None
    uncounted: str = ""
    error: float | None = None
    ulps: float | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fraction(self) -> float | None:
        """The part of the roofline's speed that is reached by the compiler's estimate, or by what memory allows.

        Above 1 where the program uses a part of an argument only, which the roofline counts whole.
        """
        if not self.estimated_seconds or self.roofline_seconds is None:
            return None
        bandwidth = targets.find(self.target).bandwidth or math.inf
        return self.roofline_seconds / max(self.estimated_seconds, (self.accessed_bytes or 0) / bandwidth)

    @property
    def spare_bytes(self) -> int | None:
        """Memory of the device that the program leaves; negative when the device is short by so much."""
        if self.needed_bytes is None or self.memory_bytes is None:
            return None
        return self.memory_bytes - self.needed_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the device can hold the program; None where nobody knows."""
        if self.status == "does not fit":
            return False
        return None if self.spare_bytes is None else self.spare_bytes >= 0

    @property
    def verdict(self) -> str:
        """The result in a few words, for a table."""
        if self.status in ("failed", "cannot"):
            return f"{self.status}: {self.message}"
        if self.error is not None:
            return f"{self.status}, error {self.error:.1e}"
        if self.spare_bytes is None:
            return self.status if self.needed_bytes is None else f"needs {self.needed_bytes / _GIB:.2f} GiB"
        if self.fits:
            return f"fits, {self.spare_bytes / _GIB:.2f} GiB to spare"
        return f"does not fit, short by {-self.spare_bytes / _GIB:.2f} GiB"


def run(
    jobs: Iterable[Job],
    *,
    processes: int = 1,
    on_result: Callable[[Result], None] = lambda result: None,
    store: Store | None = None,
) -> list[Result]:
    """Compiles every job, each family of targets in child processes of its own.

    A child compiles job after job, because starting it is expensive. When it dies or takes too long, the job
    at hand has failed and another child goes on with the rest.

    Args:
      jobs: what to compile.
      processes: children at a time. One compiler uses several cores already.
      on_result: called in the calling thread with each result as it comes, for a progress bar.
      store: where results are looked up first and kept; failed ones are tried again.

    Returns:
      One result for each job, in the order of the jobs.

    Raises:
      ValueError: two jobs for one target have the same name, or a target is unknown.
    """
    jobs, store = list(jobs), store or Store(None)
    for name, count in collections.Counter((j.name, j.target) for j in jobs).items():
        if count > 1:
            raise ValueError(f"each job of a target needs its own name; got {name[0]!r} {count} times.")
    families = {j.target: targets.find(j.target).family for j in jobs}
    reasons = {f: targets.missing(f) for f in set(families.values())}
    done: dict[int, Result] = {}
    todo: collections.deque[int] = collections.deque()
    # A TPU belongs to one process: the first child alone runs what runs on this machine's accelerator.
    alone: collections.deque[int] = collections.deque()
    for i in sorted(range(len(jobs)), key=lambda i: families[jobs[i].target]):
        job = jobs[i]
        if reason := reasons[families[job.target]]:
            done[i] = Result(job.name, job.target, "cannot", reason, labels=job.labels)
        elif (kept := store.get(_key(job))) and set(kept) == set(Result.__dataclass_fields__):
            done[i] = Result(**kept)
        else:
            (alone if families[job.target] == "device" else todo).append(i)
            continue
        on_result(done[i])

    fresh: collections.deque[int] = collections.deque()
    changed = threading.Condition()
    stop = threading.Event()
    crew = [_Worker() for _ in range(max(1, min(processes, len(todo) + len(alone))))]

    def work(worker: _Worker) -> None:
        try:
            queues = (alone, todo) if worker is crew[0] else (todo,)
            while not stop.is_set() and (i := _next(*queues)) is not None:
                result = worker.run(jobs[i], families[jobs[i].target], store.folder)
                if result.status != "failed":
                    store.put(_key(jobs[i]), dataclasses.asdict(result))
                with changed:
                    done[i] = result
                    fresh.append(i)
                    changed.notify()
        finally:
            worker.close()
            with changed:
                changed.notify()

    threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in crew]
    try:
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads) or fresh:
            with changed:
                changed.wait_for(lambda: fresh or not any(t.is_alive() for t in threads), timeout=1.0)
            while fresh:
                on_result(done[fresh.popleft()])
    finally:
        stop.set()
        while any(t.is_alive() for t in threads):
            for worker in crew:
                worker.kill()  # again and again: one may just be starting its child
            threads[0].join(0.05)
    return [done[i] for i in range(len(jobs))]


def _key(job: Job) -> str:
    return key(dataclasses.asdict(job), source())


def _next(*queues: collections.deque[int]) -> int | None:
    for queue in queues:
        try:
            return queue.popleft()
        except IndexError:
            continue
    return None


class _Worker:
    """A child process of one family at a time, started when there is something to do."""

    def __init__(self) -> None:
        self._family = ""
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def run(self, job: Job, family: str, folder: pathlib.Path | None) -> Result:
        """Runs a job in the child, in a new one where there is none of that family."""
        if self._process is None or self._process.poll() is not None or family != self._family:
            self.close()
            self._start(family)
        process, log = self._process, self._log
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert log is not None
        log.seek(0, os.SEEK_END)
        since = log.tell()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(job.timeout, give_up)
        timer.start()
        try:
            order = {"target": job.target, "task": job.task, "build": job.build, "kwargs": dict(job.kwargs)}
            process.stdin.write(json.dumps(order | {"folder": folder and str(folder)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return Result(job.name, job.target, labels=job.labels, **json.loads(line))
        code = process.wait()
        log.seek(since)
        message = _last_words(log.read(), code)
        self.close()
        if late.is_set():
            message = f"no answer after {job.timeout:g} s."
        return Result(job.name, job.target, "failed", message, labels=job.labels)

    def _start(self, family: str) -> None:
        self._family = family
        self._log = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from portable.parity.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=targets.environment(family),
            start_new_session=True,  # so that what the compiler starts ends with it
        )

    def kill(self) -> None:
        """Ends the child at once, and what it has started."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the child and frees what belongs to it."""
        self.kill()
        if self._process is not None:
            self._process.communicate()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def _last_words(log: str, code: int) -> str:
    """Returns the line of a dead child's log that says why it died."""
    lines = log.splitlines()
    traces = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if traces:
        raised = [line for line in lines[traces[-1] + 1 :] if line and not line[0].isspace()]
        if raised:
            return raised[0]
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        ending += ", which is how a system that runs out of memory ends a process"
    fatal = [line.strip() for line in lines if _FATAL.search(line)]
    return f"the compiler ended with {ending}" + (f": {fatal[0]}" if fatal else ".")
