"""The log of a run: one JSON line a step, each step once, whatever was killed in between."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from portable import files
from portable.checks import DataError


class Log:
    """`log.jsonl`, opened where a run continues.

    Each line is an object with `step` (from 1), `loss` (nats a token or an image), `learning_rate`, `gradient_norm`,
    and on some lines what was held out says (`held_out_bits_per_byte`; `held_out_accuracy`, `held_out_loss`) and the
    speed (`tokens_per_second`, `images_per_second`).
    """

    def __init__(self, path: str | Path, *, after: int):
        """Keeps the lines up to step `after` and drops the rest: those steps are about to be made again."""
        self.path = Path(path)
        self.records = [r for r in read_log(self.path) if r["step"] <= after]
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        try:
            files.replace(self.path, text)
            self._file = self.path.open("ab", buffering=0)  # nothing held back that a failed close could lose
        except OSError as error:
            raise self._refused(error) from error

    def write(self, records: Sequence[dict]) -> None:
        """Appends lines and brings them to the disk, so that no checkpoint is ever ahead of the log."""
        try:
            data = "".join(json.dumps(r) + "\n" for r in records).encode()
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self.records += records

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _refused(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path} could not be written: {error.strerror}; checkpoints already complete stay; "
            "make room there and run the same command again."
        )


def read_log(path: str | Path) -> list[dict]:
    """Returns the complete lines of a log, none if there is no file; a line cut off by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
