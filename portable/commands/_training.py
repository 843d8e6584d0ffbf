"""What `portable train` and `portable finetune` share."""

import argparse
import dataclasses
import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portable.checks import ConfigError
from portable.training.options import SCHEDULES, TrainOptions

HELP = {
    "steps": "optimizer steps of the whole run",
    "batch_size": "windows or images a step",
    "length": "tokens a window",
    "accumulate": "microbatches a step is computed in, to save memory",
    "learning_rate": "peak of the schedule",
    "warmup": "steps of linear warm-up (default: a tenth of the steps, at most 100)",
    "schedule": "decay of the learning rate",
    "final_fraction": "learning rate at the end, as a fraction of the peak",
    "weight_decay": "AdamW's, on matrices",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "epsilon": "AdamW's",
    "bias_rate": "step of the biases that balance the loads of experts, 0 to leave them",
    "clip": "bound on the global gradient norm, 0 for none",
    "seed": "of the weights and of the order of the data",
    "eval_every": "steps between held-out evaluations, 0 for one at the end",
    "eval_bytes": "held-out bytes looked at each time",
    "log_every": "steps between two looks at the losses",
    "checkpoint_every": "steps between checkpoints",
}


def add_options(
    group: Any, notes: Mapping[str, str], defaults: Mapping[str, Any] | None = None, without: tuple[str, ...] = ()
) -> None:
    """Adds every `TrainOptions` and --max-minutes to a group of arguments.

    Args:
      group: of a parser. notes: what to add to the help of an option. defaults: other than those of `TrainOptions`.
      without: options that the command does not have.
    """
    for field in dataclasses.fields(TrainOptions):
        if field.name in without:
            continue
        value = (defaults or {}).get(field.name, field.default)
        default = "" if field.name == "warmup" or value is None else f" (default {value}{notes.get(field.name, '')})"
        default = default or notes.get(field.name, "")
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            choices=SCHEDULES if field.name == "schedule" else None,
            metavar=None if field.name == "schedule" else "N" if isinstance(field.default, int) else "X",
            help=HELP[field.name] + default,
        )
    group.add_argument("--max-minutes", type=float, metavar="X", help="stop with a checkpoint after this time")


def options(args: argparse.Namespace, defaults: Mapping[str, Any]) -> TrainOptions:
    """Returns the options that were given, the others by default."""
    values = dict(defaults)
    for field in dataclasses.fields(TrainOptions):
        if (value := getattr(args, field.name, None)) is not None:
            values[field.name] = value
    values.setdefault("warmup", min(100, values.get("steps", TrainOptions.steps) // 10))
    return TrainOptions(**values)


def own_files(text: str, out: str) -> list[str]:
    """Returns a glob for the run's folder where it lies inside the folder of the text: it grows with every step."""
    folder, run = Path(text).resolve(), Path(out).resolve()
    return [glob.escape(run.relative_to(folder).as_posix()) + "/*"] if folder in run.parents else []


def check_vocabulary(what: str, config: Any, tokenizer: Any) -> None:
    """Raises ConfigError where a tokenizer has more tokens than a model."""
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{what} knows {config.vocab_size} tokens, but {tokenizer.name} has {tokenizer.vocab_size}: give the "
            "model's own --tokenizer."
        )


def left(done: Any, options: TrainOptions, show: Any) -> int:
    """Says how to go on with a run that is not finished; returns the exit code."""
    show.note(f"{done.status} after step {done.step} of {options.steps}; the same command continues from there.")
    return 130 if done.status == "stopped" else 0
