"""`portable demo`: the embedded model writes code, learns prose by DoRA for a minute, and writes again."""

import argparse
import shlex
import time
from pathlib import Path

from portable.checks import DataError
from portable.training.options import TrainOptions

EXAMPLES = """examples:
  portable demo                             # from code to prose: the reference manual inside Python
  portable demo notes.txt                   # from a text of yours, or a folder of texts
  portable demo notes.txt --prompt "Dear "  # continues these words instead
"""

RANK = 16
OPTIONS = TrainOptions(
    steps=60,
    batch_size=4,
    length=256,
    learning_rate=1e-2,
    warmup=5,
    schedule="cosine",
    weight_decay=0.0,
    eval_every=0,
    eval_bytes=16384,
    log_every=5,
    checkpoint_every=30,
)
# Less does not fill a window of training and leave something to hold out.
_LEAST_BYTES = 2048
CODE = "def read_lines(path):\n"
PROSE = 'The "with" statement '  # of the manual, on which it has not been trained as prose


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="file or folder to learn from (default: Python's manual)"
    )
    parser.add_argument(
        "--prompt", help="words to continue, before and after (default: a line of code, or of the text)"
    )
    parser.add_argument("--out", type=Path, default=Path("portable-demo"), metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="of learning at most (default 1)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo in a new folder."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from rich.console import Console

    import portable
    from portable import adapters, models, training
    from portable.training.metrics import sample
    from portable.training.tokens import ByteTokenizer

    console = Console(highlight=False)
    text = _text(args.text)
    if (size := sum(len(document.data) for document in (*text.train, *text.held_out))) < _LEAST_BYTES:
        raise DataError(f"{args.text} has too little text to learn from: {size} bytes; give at least {_LEAST_BYTES}.")
    folder = _new_folder(args.out)
    model = models.load(models.EMBEDDED, jnp.float32)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    console.print(
        f"[bold]A Mamba-2 language model of {size / 1e6:.1f} million parameters[/], trained on the source of "
        f"Python's standard library. It runs here on: {jax.devices()[0].device_kind}."
    )

    prompts = {CODE: "code, which it has seen"} if args.prompt is None else {args.prompt: "your words"}
    if args.prompt is None:
        own = PROSE if args.text is None else _first_words(text)
        prompts[own] = "the text that it has not learned yet"
    for prompt, about in prompts.items():
        _write(console, model, prompt, f"It continues {about}")

    held = sample(text.held_out, 16384)
    before = training.bits_per_byte(model, held).bits_per_byte
    console.rule("[bold]It learns by DoRA", align="left")
    console.print(text.summary(), markup=False)
    config = adapters.DoRAConfig(rank=RANK, alpha=2 * RANK, **adapters.default_targets(model, rank=RANK))
    adapters.apply(model, config)
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, adapters.AdapterParam)))
    console.print(f"Its weights stay as they are; {trained / size:.1%} as many more learn beside them.")
    task = training.AdapterTask(training.text_examples(text, ByteTokenizer()), config, base=str(models.EMBEDDED))
    done = training.fit(
        model, task, OPTIONS, folder, reporter=training.reporter(), max_minutes=args.minutes, save_dtype=None
    )
    learned = done.model
    if done.status != "finished":  # what there is can be used
        task.save(learned, folder, None)
    adapters.refresh(learned)
    after = training.bits_per_byte(learned, held).bits_per_byte
    console.print(
        f"Bits per byte on a part of it that was held out, read as a whole: [red]{before:.3f}[/] before, "
        f"[green]{after:.3f}[/] after {done.step} steps."
    )
    for prompt in list(prompts)[-1:]:
        _write(console, learned, prompt, "It continues the same words")

    console.rule("[bold]What ran", align="left")
    used = {row[0]: row[1] for row in portable.info().rows}
    names = ("causal_conv1d", "dora_linear", "linear", "rms_norm", "ssd", "ssd_step")  # of this model
    for op in names:
        console.print(f"  {op:14}  implementation [cyan]{used[op]}[/]   (portable explain {op} says why)")
    console.print(f"  loss curve      {folder / 'loss.png'}", markup=False)
    console.print(f"  adapter         {folder / 'adapter'}, as PEFT writes one", markup=False)
    console.rule("[bold]Go on", align="left")
    last = shlex.quote(list(prompts)[-1])
    for line in (
        f"portable generate default --adapter {folder / 'adapter'} --prompt {last} --temperature 0.6",
        "portable finetune default YOUR_TEXT --out runs/mine        # longer, with any adapter, or another MODEL",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    return 0


def _text(path: str | None):
    from portable import training

    if path is not None:
        return training.read_text(path)
    from pydoc_data.topics import topics

    from portable.training.text import split

    manual = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return split([training.Document("Python's reference manual", manual.encode())])


def _first_words(text) -> str:
    """Returns the beginning of the held-out part, up to a word's end."""
    data = text.held_out[0].data if text.held_out else text.train[0].data
    line = data[:200].decode("utf-8", errors="ignore").lstrip()
    return line[:48].rsplit(" ", 1)[0] or line[:48]


def _new_folder(wanted: Path) -> Path:
    folder, number = wanted, 2
    while folder.exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


def _write(console, model, prompt: str, title: str) -> None:
    """Streams a completion with its speed."""
    import jax
    import numpy as np

    from portable.generation import generate
    from portable.generation.text import TextStream
    from portable.training.tokens import ByteTokenizer

    tokenizer = ByteTokenizer()
    console.rule(f"[bold]{title}", align="left")
    tokens = np.asarray(tokenizer.encode(prompt.encode()), np.int32)
    console.print(prompt, style="bold", end="", markup=False)
    stream = TextStream(tokenizer.decode, before=tokens)
    times = []

    def show(block: np.ndarray, start: int) -> None:
        times.append((time.perf_counter(), start + block.shape[1]))
        console.print(stream.feed(block[0]), end="", markup=False, soft_wrap=True)

    options = {"max_new_tokens": 240, "temperature": 0.6, "top_p": 0.95, "key": jax.random.key(1), "stream": show}
    generate(model, tokens[None], **options)
    console.print(stream.close(), markup=False)
    (began, first), (ended, last) = times[0], times[-1]
    if ended > began:
        console.print(f"[dim]{(last - first) / (ended - began):,.0f} tokens/s, each a byte[/]")
