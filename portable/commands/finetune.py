"""`portable finetune`: an adapter for a model from texts, prompts with responses, or conversations."""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from portable.checks import ConfigError
from portable.commands import _models, _training
from portable.nn.stack import REMAT
from portable.training.examples import LINES

EXAMPLES = """examples:
  portable finetune default notes.txt --out runs/notes               # DoRA of the small model that comes along
  portable finetune MODEL answers.jsonl --out runs/answers --rank 32 --alpha 64 --epochs 2
  portable finetune MODEL chats.jsonl --out runs/chats --adapter lora --target-modules q_proj v_proj --lora-plus 16
  portable finetune MODEL src --include '*.py' --out runs/code --accumulate 4 --remat full --merge
  portable finetune MODEL answers.jsonl --out runs/s2ft --adapter s2ft --channels 32 --merge
  portable finetune MODEL answers.jsonl --out runs/answers --rank 32 --alpha 64 --epochs 2   # continues a run

DATA is a text file, or a folder whose text files are found recursively; or a .jsonl file with an object a line:
  {"prompt": "...", "response": "..."}    the response is learned
  {"messages": [{"role": "user", "content": "..."}, ...]}    by the chat template of the model's tokenizer;
                                                             what the assistant says is learned
  {"text": "..."}    all is learned

Examples share rows of --length tokens and do not see each other there. Ctrl-C stops with a checkpoint, and the same
command continues. The folder holds config.json, log.jsonl, loss.png, checkpoints/ and at the end adapter/, which PEFT
reads too (`portable generate MODEL --adapter DIR/adapter` uses it); with --merge also model/, without an adapter.
"""

DEFAULTS: dict[str, Any] = {"learning_rate": 2e-4, "weight_decay": 0.0}
_KINDS = ("dora", "lora", "s2ft", "esft")
# Which options of an adapter each kind has, beside those that all have.
_LOW_RANK = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "dropout", "dropout_mode", "lora_plus", "init")
_OWN = {
    "dora": (*_LOW_RANK, "norm", "no_detach"),
    "lora": _LOW_RANK,
    "s2ft": ("channels", "side"),
    "esft": ("experts",),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    from portable.adapters.config import INITS
    from portable.ops._dora_linear.api import DROPOUTS, NORMS

    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help=_models.HELP)
    parser.add_argument("data", metavar="DATA", help="a text file, a folder of texts, or JSON lines")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--no-held-out", action="store_true", help="train on everything")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out JSON lines that cannot be used")
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="of a folder only files that match, repeatable"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no files that match, repeatable"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, if not the one in the model's folder")
    parser.add_argument("--no-packing", action="store_true", help="give each example a row of its own")

    group = parser.add_argument_group("adapter (the words of PEFT)")
    group.add_argument("--adapter", choices=_KINDS, default="dora", help="kind (default %(default)s)")
    group.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="what is adapted: ends of names, a regular expression, or all-linear (default: linear layers but heads, "
        "routers, and what PEFT refuses; for esft the experts)",
    )
    group.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="the same, of names that are left out")
    group.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="modules that are trained whole")
    group.add_argument("--layers-to-transform", nargs="+", type=int, metavar="N", help="only layers of these numbers")
    group.add_argument("--layers-pattern", nargs="+", metavar="NAME", help="the name in front of those numbers")
    group.add_argument("--rank", type=int, metavar="N", help="of dora and lora (default 16)")
    group.add_argument(
        "--alpha", type=float, metavar="X", help="the update counts alpha / rank (default twice the rank)"
    )
    group.add_argument("--rslora", action="store_true", help="it counts alpha / sqrt(rank)")
    for name in ("rank", "alpha"):
        metavar = f"NAME={'N' if name == 'rank' else 'X'}"
        group.add_argument(f"--{name}-pattern", nargs="+", metavar=metavar, help=f"another {name} for some modules")
    group.add_argument("--dropout", type=float, metavar="P", help="share of an adapter's inputs dropped (default 0)")
    group.add_argument(
        "--dropout-mode", choices=DROPOUTS, help="of dora: as PEFT, or of the update alone, which is cheap"
    )
    group.add_argument("--init", choices=INITS, help="how A and B are drawn (default peft)")
    group.add_argument("--norm", choices=NORMS, help="of dora: form of the norms (default auto)")
    group.add_argument("--no-detach", action="store_true", help="of dora: the norms are differentiated too")
    group.add_argument("--lora-plus", type=float, metavar="RATIO", help="B learns this much faster (LoRA+; try 16)")
    group.add_argument("--channels", type=int, metavar="N", help="of s2ft: channels of each matrix (default 8)")
    group.add_argument("--side", choices=("in", "out"), help="of s2ft: which channels (default in)")
    group.add_argument("--experts", nargs="+", type=int, metavar="N", help="of esft: numbers of experts")
    group.add_argument("--merge", action="store_true", help="write the merged model too (s2ft and esft: only that)")

    how = parser.add_argument_group("computation")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model's weights; default: the file's")
    how.add_argument("--remat", choices=REMAT, default="none", help="what the backward pass recomputes (default none)")
    how.add_argument("--save-dtype", choices=("float32", "bfloat16"), help="of the merged model; default: --dtype")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, metavar="X", help="passes over the data (default 3), unless --steps")
    _training.add_options(training, {}, DEFAULTS | {"steps": None}, without=("bias_rate",))
    parser.add_argument("--quiet", action="store_true", help="show nothing while training")


def run(args: argparse.Namespace) -> int:
    """Fine-tunes, or continues a run; returns 0, or 130 when stopped by Ctrl-C."""
    from flax import nnx

    from portable import adapters, models, training
    from portable.training.progress import reporter

    _check(args)
    # How many steps the epochs are is known when the rows are.
    options = _training.options(args, DEFAULTS | ({"steps": 10**9} if args.steps is None else {}))
    folder = _models.find(args.model)
    model = models.load(folder, args.dtype)
    if type(model) not in {family.model for family in models.decoders().values()}:
        raise ConfigError(f"{args.model} is {type(model).__name__}, which reads no text; give a language model.")
    tokenizer = _models.tokenizer(folder, args.tokenizer, model.config.vocab_size)
    _training.check_vocabulary(args.model, model.config, tokenizer)
    examples = _examples(args, tokenizer, folder)
    model.remat = args.remat
    config = _config(args, model)
    matched = adapters.apply(model, config, rngs=nnx.Rngs(options.seed))
    task = training.AdapterTask(
        examples,
        config,
        lora_plus=args.lora_plus,
        packed=not args.no_packing,
        merge=args.merge or args.adapter in ("s2ft", "esft"),
        base=str(folder) if folder == models.EMBEDDED else args.model,
        source=folder,
    )
    rows = task.rows(options.length)
    if args.steps is None:
        steps = max(1, math.ceil((args.epochs or 3) * len(rows) / options.batch_size))
        warmup = min(100, steps // 10) if args.warmup is None else args.warmup
        options = dataclasses.replace(options, steps=steps, warmup=warmup)
    show = reporter(args.quiet)
    for note in (examples.summary(), rows.summary(), _about(args, model, config, matched)):
        show.note(note)
    done = training.fit(
        model, task, options, args.out, reporter=show, max_minutes=args.max_minutes, save_dtype=args.save_dtype
    )
    if done.status != "finished":
        return _training.left(done, options, show)
    made, out = [], Path(args.out)
    if task.low_rank:
        made.append(f"adapter in {out / 'adapter'} (portable generate {args.model} --adapter {out / 'adapter'})")
    if task.merge:
        made.append(f"merged model in {out / 'model'}")
    held = f", held out {done.held_out:.3f} bits per byte" if done.held_out is not None else ""
    show.note(f"finished{held}; {', '.join(made)}, loss curve in {out / 'loss.png'}")
    return 0


def _check(args: argparse.Namespace) -> None:
    lines = args.data.lower().endswith(LINES)
    foreign = [name for name in (("include", "exclude") if lines else ("skip_bad_lines",)) if getattr(args, name)]
    if foreign:
        kind = "a file of JSON lines" if lines else "text"
        raise ConfigError(f"{kind} has no use for {_options(foreign)}: leave it out.")
    others = {name for names in _OWN.values() for name in names} - set(_OWN[args.adapter])
    if given := sorted(n for n in others if getattr(args, n) is not None and getattr(args, n) is not False):
        raise ConfigError(f"--adapter {args.adapter} has no use for {_options(given)}: leave it out.")
    if args.adapter == "esft" and not args.experts:
        raise ConfigError("--adapter esft trains chosen experts: give their numbers with --experts.")
    if args.steps is not None and args.epochs is not None:
        raise ConfigError("--steps and --epochs both say how long to train: give one of them.")
    if args.epochs is not None and not 0 < args.epochs < math.inf:
        raise ConfigError(f"--epochs must be positive; got {args.epochs}.")


def _options(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _examples(args: argparse.Namespace, tokenizer: Any, folder: Path) -> Any:
    from portable import training

    if args.data.lower().endswith(LINES):
        template, skip = training.ChatTemplate.load(folder), args.skip_bad_lines
        hold_out = not args.no_held_out
        return training.read_examples(args.data, tokenizer, template=template, skip_bad_lines=skip, hold_out=hold_out)
    exclude = [*args.exclude, *_training.own_files(args.data, args.out)]
    text = training.read_text(args.data, include=args.include, exclude=exclude, hold_out=not args.no_held_out)
    return training.text_examples(text, tokenizer)


def _config(args: argparse.Namespace, model: Any) -> Any:
    """Returns the configuration of the adapter that the arguments describe."""
    from portable import adapters

    rank = 16 if args.rank is None else args.rank
    where: dict[str, Any]
    if args.target_modules:
        where = {"target_modules": _names(args.target_modules)}
    elif args.adapter == "esft":
        where = adapters.expert_targets(model)
    else:
        where = adapters.default_targets(model, rank=rank if args.adapter in ("dora", "lora") else 1)
    if args.exclude_modules:
        # A choice of one's own replaces what is left out by default.
        where["exclude_modules"] = _names(args.exclude_modules)
    where |= {"modules_to_save": args.modules_to_save, "layers_to_transform": args.layers_to_transform}
    where["layers_pattern"] = args.layers_pattern
    if args.adapter == "s2ft":
        return adapters.S2FTConfig(
            channels=8 if args.channels is None else args.channels, side=args.side or "in", **where
        )
    if args.adapter == "esft":
        return adapters.ESFTConfig(experts=args.experts, **where)
    make = adapters.DoRAConfig if args.adapter == "dora" else adapters.LoRAConfig
    own = {"norm": args.norm or "auto", "detach": not args.no_detach} if args.adapter == "dora" else {}
    return make(
        rank=rank,
        alpha=2 * rank if args.alpha is None else args.alpha,
        rslora=args.rslora,
        rank_pattern=_pattern(args.rank_pattern, int),
        alpha_pattern=_pattern(args.alpha_pattern, float),
        dropout=args.dropout or 0.0,
        dropout_mode=args.dropout_mode or "peft",
        init=args.init or "peft",
        **own,
        **where,
    )


def _names(given: list[str]) -> str | list[str]:
    """Returns names as they are; a single word that is no name is an expression, and all-linear stands for itself."""
    if len(given) == 1 and (given[0] == "all-linear" or not re.fullmatch(r"[\w.-]+", given[0])):
        return given[0]
    return given


def _pattern(given: list[str] | None, kind: type) -> dict[str, Any]:
    found = {}
    for word in given or ():
        name, _, number = word.rpartition("=")
        try:
            found[name] = kind(number)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"a pattern is NAME=NUMBER, such as q_proj=8; got {word!r}.")
    return found


def _about(args: argparse.Namespace, model: Any, config: Any, matched: list[str]) -> str:
    """Returns a line on the adapter: kind, size, what is left out by default."""
    import jax
    from flax import nnx

    from portable import adapters

    trained, total = (
        sum(x.size for x in jax.tree.leaves(nnx.state(model, kind))) for kind in (adapters.AdapterParam, nnx.Param)
    )
    size = f" of rank {config.rank}" if hasattr(config, "rank") else ""
    line = f"{args.adapter}{size} on {len(matched)} matrices: {trained:,} parameters are trained, "
    line += f"{trained / (total - trained):.1%} of the model's {total - trained:,}"
    if not args.target_modules and not args.exclude_modules and config.exclude_modules:
        line += f"; left out by default: {', '.join(config.exclude_modules)}"
    return line
