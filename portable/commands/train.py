"""`portable train`: a language model from text files, or a model of images, resumable with the same command."""

import argparse
import dataclasses
from pathlib import Path

from portable.checks import ConfigError
from portable.commands import _train_images, _training
from portable.nn.stack import REMAT

EXAMPLES = """examples:
  portable train notes.txt --out runs/notes                     # bytes, a small Mamba-2, 1000 steps
  portable train src --include '*.py' --out runs/code --steps 4000 --hidden-size 256 --layers 8
  portable train book.txt --init MODEL_FOLDER --out runs/tuned --learning-rate 3e-4
  portable train corpus --tokenizer tokenizer.json --out runs/bpe --dtype bfloat16 --accumulate 4 --remat full
  portable train notes.txt --out runs/notes                     # the same command continues a run
  portable train notes.txt --model qwen3_moe --out runs/moe     # attention and experts; or llama, or a config.json
  portable train digits --task image --out runs/digits          # scikit-learn's digits, a tiny DiNAT
  portable train photos --task image --size 64 --flip --out runs/photos    # photos/cat/1.jpg, photos/dog/2.png, ...

Ctrl-C stops with a checkpoint. The folder of a run holds config.json, log.jsonl, loss.png, checkpoints/ and
at the end model/, for `portable generate`. Text is held out by a hash of its path (a single file: its last
twentieth) and quality is given in bits per byte of it.

Images lie in a folder for each class, named as the class. They are held out by a hash of their path too, unless there
are folders train/ and val/ or test/, and quality is given as accuracy; the pictures are curves.png and confusion.png.
"""

_SIZES = (
    ("--hidden-size", 192, "width"),
    ("--layers", 4, "blocks"),
    ("--state-size", 64, "of each head of mamba2"),
    ("--head-dim", 64, "channels a head"),
)
_MODELS = ("mamba2", "llama", "qwen3_moe")

# What only text has, and only images: given to the other task, they are refused.
_TEXT_ONLY = ("include", "exclude", "tokenizer", "length", "eval_bytes", "remat", "model", "bias_rate")
_TEXT_ONLY += tuple(name[2:].replace("-", "_") for name, _, _ in _SIZES)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "data", help="a text file, or a folder whose text files are found recursively; or images, see --task"
    )
    parser.add_argument(
        "--task",
        choices=("text", "image"),
        default="text",
        help="what DATA is: text (default), or a folder with a folder of images for each class, or the word digits",
    )
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--no-held-out", action="store_true", help="train on everything")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="only files that match, repeatable"
    )
    text.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="no files that match, repeatable")
    text.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; default: bytes")
    _train_images.configure(parser)
    model = parser.add_argument_group("model (default: a new byte-level Mamba-2 of about a million parameters)")
    model.add_argument("--init", metavar="FOLDER", help="start from this model (a folder or a name on the hub)")
    model.add_argument(
        "--model",
        metavar="NAME",
        help=f"a new model of this kind: {', '.join(_MODELS)} (default mamba2), or the config.json of any",
    )
    for name, default, line in _SIZES:
        model.add_argument(name, type=int, metavar="N", help=f"{line} (default {default})")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    model.add_argument("--remat", choices=REMAT, help="what the backward pass recomputes (default none)")
    model.add_argument("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the final weights")
    training = parser.add_argument_group("training")
    _training.add_options(training, {n: f"; images {v}" for n, v in _train_images.DEFAULTS.items()})
    parser.add_argument("--quiet", action="store_true", help="show nothing while training")


def run(args: argparse.Namespace) -> int:
    """Trains, or continues a run; returns 0, or 130 when stopped by Ctrl-C."""
    from portable import training
    from portable.training.progress import reporter

    foreign = _train_images.ONLY if args.task == "text" else _TEXT_ONLY
    if given := ["--" + name.replace("_", "-") for name in foreign if _given(getattr(args, name))]:
        other = "image" if args.task == "text" else "text"
        raise ConfigError(f"--task {args.task} has no use for {', '.join(given)}: leave out what --task {other} takes.")
    options = _training.options(args, {} if args.task == "text" else _train_images.DEFAULTS)
    if args.task == "image":
        return _train_images.run(args, options)
    tokenizer = training.load_tokenizer(args.tokenizer)
    exclude = [*args.exclude, *_training.own_files(args.data, args.out)]
    text = training.read_text(args.data, include=args.include, exclude=exclude, hold_out=not args.no_held_out)
    model = _model(args, tokenizer, options.seed)
    show = reporter(args.quiet)
    show.note(text.summary())
    show.note(f"{type(model).__name__} with {_train_images.parameters(model):,} parameters, {tokenizer.name}")
    done = training.fit(
        model,
        text,
        options,
        args.out,
        tokenizer=tokenizer,
        reporter=show,
        max_minutes=args.max_minutes,
        save_dtype=args.save_dtype,
    )
    folder = Path(args.out)
    if done.status != "finished":
        return _training.left(done, options, show)
    held = f", held out {done.held_out:.3f} bits per byte" if done.held_out is not None else ""
    show.note(f"finished{held}; model in {folder / 'model'}, loss curve in {folder / 'loss.png'}")
    return 0


def _given(value) -> bool:
    return value is not None and value is not False and value != []  # 0 is given too


def _model(args: argparse.Namespace, tokenizer, seed: int):
    import jax.numpy as jnp
    from flax import nnx

    from portable import models

    given = {name: getattr(args, name[2:].replace("-", "_")) for name, _, _ in _SIZES}
    sized = [name for name, value in given.items() if value is not None]
    loaded = None
    if args.init:
        if others := sized + ["--model"] * (args.model is not None):
            raise ConfigError(f"--init brings its own sizes, got {', '.join(others)} too: leave them out.")
        loaded = models.load(args.init, dtype=jnp.float32)
        config, make = loaded.config, type(loaded)
        if make not in {family.model for family in models.decoders().values()}:
            raise ConfigError(f"--init {args.init} is {make.__name__}, a model of images: give --task image.")
        _training.check_vocabulary(f"--init {args.init}", config, tokenizer)
    elif args.model is not None and args.model not in _MODELS:
        if sized:
            raise ConfigError(f"a config.json brings its own sizes, got {', '.join(sized)} too: leave them out.")
        config, make = _read_config(args.model, tokenizer)
    else:
        config = _new(args.model or "mamba2", given, tokenizer)
        make = models.MODELS[args.model or "mamba2"].model
    model = make(config, dtype=jnp.dtype(args.dtype), remat=args.remat or "none", rngs=nnx.Rngs(seed))
    if loaded is not None:
        nnx.update(model, nnx.state(loaded))
    return model


def _special(tokenizer) -> dict:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.separator)


def _read_config(name: str, tokenizer):
    """Returns the configuration in a file, with the tokenizer's special tokens, and its model's class."""
    from portable import checkpoint, models

    file = Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(f"--model must be one of {', '.join(_MODELS)} or a config.json; there is no file {name}.")
    contents = checkpoint.read_json(file)
    family = models.decoders().get(contents.get("model_type", ""))
    if family is None:
        raise ConfigError(
            f"{file}: model_type must be one of {', '.join(models.decoders())}; got {contents.get('model_type')!r}."
        )
    try:
        config = dataclasses.replace(family.config.from_dict(contents), **_special(tokenizer))
    except ConfigError as fault:
        raise ConfigError(f"{file}: {fault}") from fault
    _training.check_vocabulary(str(file), config, tokenizer)
    return config, family.model


def _new(kind: str, given: dict, tokenizer):
    """Returns the configuration of a small new model."""
    from portable.models.decoder import DecoderConfig
    from portable.models.mamba2 import Mamba2Config

    width, layers, state_size, head_dim = (default if given[n] is None else given[n] for n, default, _ in _SIZES)
    common = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "initializer_range": 0.02,
        **_special(tokenizer),
    }
    if kind == "mamba2":  # which refuses a head_dim of 0 itself
        heads = 2 * width // max(1, head_dim)
        return Mamba2Config(**common, num_heads=heads, state_size=state_size, rescale_prenorm_residual=True)
    if given["--state-size"] is not None:
        raise ConfigError(f"--model {kind} has no use for --state-size: leave it out.")
    common |= {"family": kind, "num_attention_heads": max(1, width // max(1, head_dim)), "tie_word_embeddings": True}
    inside = -(-8 * width // 3 // 64) * 64  # three matrices of this width have as many weights as two of 4 d
    if kind == "llama":
        return DecoderConfig(**common, intermediate_size=inside)
    return DecoderConfig(
        **common,
        qk_norm=True,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=-(-inside // 2 // 32) * 32,
        intermediate_size=inside,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
    )
