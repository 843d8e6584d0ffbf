"""Programs measured side by side: one child process each, taking turns.

Every child loads its weights, compiles and warms up, and then waits for requests, one JSON line each. The
parent asks one child at a time and changes the order from round to round, so a slow minute of the machine
falls on all of them.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A waiting OpenMP thread otherwise spins on the core that others need; torch then measures far slower.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class ChildFailed(RuntimeError):
    """A measured program ended early; the message holds the end of what it printed."""


class Child:
    """One worker process: `worker` is the script, `spec` the JSON-able description handed to it.

    `start` is what the worker reported once ready: idle memory, seconds to trace and compile, peak memory.
    """

    def __init__(self, worker: pathlib.Path, spec: Mapping[str, Any], environment: Mapping[str, str] | None = None):
        self.spec = dict(spec)
        threads = str(spec["threads"])
        env = {
            **os.environ,
            **QUIET_THREADS,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            **(environment or {}),
        }
        env.setdefault("JAX_PLATFORMS", "cpu")
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, str(worker), json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self.start = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer then reads why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the child by closing its input."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read()[-2000:]
        self.close()
        raise ChildFailed(f"the measured program {self.spec} ended with code {code}:\n{tail}")

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_turns(
    children: Mapping[str, Child],
    rounds: int,
    requests: Sequence[Mapping[str, Any]] = ({},),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[dict[str, Any]]]:
    """Samples of every child: each request goes to each child in turn, the order rotating."""
    names = list(children)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for request in requests:
            for name in names[shift:] + names[:shift]:
                samples[name].append(children[name].ask(**request))
        progress(f"round {number + 1} of {rounds}")
    return samples


def serve(start: Mapping[str, Any], sample: Callable[..., dict[str, Any]], stream: Any) -> None:
    """The worker's side: reports `start`, then answers requests with `sample(**request)` until input ends."""
    print(json.dumps(start), file=stream, flush=True)
    for line in sys.stdin:
        print(json.dumps(sample(**json.loads(line))), file=stream, flush=True)


def protocol_stream() -> Any:
    """The pipe to the parent; from here on, whatever a library prints goes to the error stream instead."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream
