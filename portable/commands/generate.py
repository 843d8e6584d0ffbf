"""`portable generate`: a model continues a text, which is shown as it is made."""

import argparse
import sys
import time
from typing import Any

from portable.checks import ConfigError, PortableError
from portable.commands import _models

EXAMPLES = """examples:
  portable generate runs/notes/model --prompt "Once upon a time"
  portable generate converted/mamba2-130m --prompt "Mamba is" --tokenizer tokenizer.json --dtype bfloat16
  portable generate MODEL --prompt "def " --temperature 0.8 --top-p 0.95 --seed 7
  portable generate MODEL --max-new-tokens 1000 --ignore-eos    # without a prompt: begins a document
  portable generate default --adapter runs/notes/adapter --prompt "Dear "    # what portable finetune wrote, or PEFT
  cat notes.txt | portable generate MODEL --prompt - > more.txt

A model reads bytes, unless there is a tokenizer.json in its folder or after --tokenizer. On a terminal the
prompt is shown before the text; elsewhere only the new text is written.
"""

# The filters of `portable.generate` that the command passes on as they are.
_FILTERS = {
    "top_k": (int, "N", "sample from the N most likely tokens"),
    "top_p": (float, "P", "sample from the most likely tokens that reach probability P together"),
    "min_p": (float, "P", "sample from tokens at least P times as likely as the most likely one"),
    "repetition_penalty": (float, "X", "above 1: make tokens less likely that have occurred"),
}
# What a terminal would obey is shown instead: a model may write escape sequences.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | dict.fromkeys(range(127, 160), 0xFFFD)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help=_models.HELP)
    parser.add_argument("--adapter", metavar="FOLDER", help="use the model with this LoRA or DoRA, in PEFT's format")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue; - reads standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (default %(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, if not the one in the folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the file's"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token (the default), 1 samples as the model says",
    )
    for name, (kind, metavar, line) in _FILTERS.items():
        sampling.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=line)
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")


def run(args: argparse.Namespace) -> int:
    """Generates, streaming the text to standard output and the speed to standard error."""
    import jax
    import numpy as np

    from portable import adapters, models
    from portable.generation import generate
    from portable.generation.text import TextStream

    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed must be in 0..{2**32 - 1}; got {args.seed}.")
    folder = _models.find(args.model)
    model = models.load(folder, args.dtype)
    size = model.config.vocab_size
    tokenizer = _models.tokenizer(folder, args.tokenizer, size)
    if args.adapter:
        adapters.load_peft(model, args.adapter)
        adapters.refresh(model)
    prompt = _prompt(args.prompt)
    tokens = np.asarray(tokenizer.encode(prompt), np.int32)
    if not tokens.size:
        tokens = np.array([_first(model.config.bos_token_id, tokenizer.separator, size)], np.int32)
    eos = model.config.eos_token_id
    ends = {*(eos if isinstance(eos, tuple) else (eos,)), tokenizer.separator}
    text = TextStream(tokenizer.decode, before=tokens)
    if sys.stdout.isatty():
        _write(prompt.decode("utf-8", errors="replace"))
    began = time.perf_counter()
    first = began

    def show(block: np.ndarray, start: int) -> None:
        nonlocal first
        if start == 0:
            first = time.perf_counter()
        _write(text.feed(i for i in block[0] if args.ignore_eos or i not in ends))

    done = generate(
        model,
        tokens[None],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        eos_id=None if args.ignore_eos else sorted(i for i in ends if i is not None and i < size),
        key=jax.random.key(args.seed),
        stream=show,
        **{name: getattr(args, name) for name in _FILTERS},
    )
    ended = time.perf_counter()
    _write(text.close() + "\n" * sys.stdout.isatty())
    print(_speed(int(done.lengths[0]), first - began, ended - first), file=sys.stderr)
    return 0


def _prompt(text: str) -> bytes:
    # What the shell passed that is not UTF-8 comes back as the bytes that it was.
    return sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", errors="surrogateescape")


def _first(bos: Any, separator: int, size: int) -> int:
    for token in (bos, separator):
        if token is not None and token < size:
            return token
    raise PortableError("this model has no token to begin a document with; give a text with --prompt.")


def _write(text: str) -> None:
    print(text.translate(_VISIBLE) if sys.stdout.isatty() else text, end="", flush=True)


def _speed(tokens: int, to_first: float, rest: float) -> str:
    line = f"{tokens} token{'s' * (tokens != 1)}; {to_first:.2f} s to the first, compiling included"
    return line if tokens == 1 else f"{line}; then {(tokens - 1) / rest:.1f} tokens/s"
