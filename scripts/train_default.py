"""Trains the embedded model: a small byte-level Mamba-2 on the source of Python's standard library.

    python scripts/train_default.py --out runs/default             train, or continue; then score the held-out files
    python scripts/train_default.py --out runs/default --install   and put the weights into the package
    python scripts/train_default.py --score portable/assets/default

A twentieth of the files, chosen by a hash of their path, is never trained on. The score is bits per byte
over those files, each read whole from an empty state, its end predicted too; zlib -9 and xz -9e compress the
same files one by one.
"""

import argparse
import dataclasses
import lzma
import platform
import shutil
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from portable import models, training
from portable.checks import PortableError
from portable.models.mamba2 import Mamba2Config, Mamba2LM
from portable.training.progress import reporter
from portable.training.stdlib import describe, stdlib_text, unlike
from portable.training.text import Text

ASSETS = Path(__file__).resolve().parent.parent / "portable" / "assets"
CONFIG = Mamba2Config(
    vocab_size=256,
    hidden_size=256,
    num_hidden_layers=6,
    num_heads=8,
    head_dim=64,
    state_size=64,
    initializer_range=0.02,
    rescale_prenorm_residual=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
# A long cosine schedule left early, then a short linear decay to zero from the rate reached: most of the gain of the
# decay for a fraction of its steps (the shape of warmup-stable-decay schedules, Hu et al. 2024, arXiv 2404.06395).
OPTIONS = training.TrainOptions(
    steps=2200,
    batch_size=4,
    length=512,
    learning_rate=4e-3,
    warmup=100,
    weight_decay=0.1,
    eval_every=200,
    checkpoint_every=100,
)
UNTIL = 1000
DECAY = dataclasses.replace(OPTIONS, steps=250, learning_rate=2.5e-3, warmup=0, schedule="linear", seed=1)


def score(model: nnx.Module, text: Text) -> str:
    """Returns a table of bits per byte on the held-out files."""
    files = text.held_out
    size = sum(len(d.data) for d in files)
    ours = training.bits_per_byte(model, files).bits_per_byte
    rivals = {
        "zlib -9": sum(len(zlib.compress(d.data, 9)) for d in files),
        "xz -9e": sum(len(lzma.compress(d.data, preset=9 | lzma.PRESET_EXTREME)) for d in files),
    }
    rows = {"this model": ours} | {name: 8 * total / size for name, total in rivals.items()}
    table = ["| | bits per byte |", "| --- | --- |", *(f"| {name} | {bits:.3f} |" for name, bits in rows.items())]
    return "\n".join(["", f"{len(files)} held-out files, {size:,} bytes:", "", *table])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder of the run")
    parser.add_argument("--max-minutes", type=float, help="stop with a checkpoint after this time")
    parser.add_argument("--install", action="store_true", help="write weights and file list into the package")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="only score the model in this folder")
    args = parser.parse_args()
    text = stdlib_text()
    print(text.summary())
    listed = ASSETS / "default_corpus.json"
    if listed.exists() and (other := unlike(text, listed.read_text())):
        print(f"{len(other)} files differ from {listed.name} (written with another Python), such as {other[0]}")
    if args.score:
        print(score(models.load(args.score, compute_dtype=jnp.float32), text))
        return 0
    run = training.Run("", 0, None, None, args.out, Mamba2LM(CONFIG, rngs=nnx.Rngs(OPTIONS.seed)))
    for name, options, until in (("stable", OPTIONS, UNTIL), ("decay", DECAY, DECAY.steps)):
        options = {"max_minutes": args.max_minutes, "until": until, "save_dtype": "bfloat16", "options": options}
        run = training.fit(run.model, text, folder=args.out / name, reporter=reporter(), **options)
        if run.step < until:
            print(f"{run.status} after step {run.step} of {until} ({name}); the same command continues from there.")
            return 0
    print(score(models.load(run.folder / "model", compute_dtype=jnp.float32), text))
    if args.install:
        shutil.copytree(run.folder / "model", ASSETS / "default", dirs_exist_ok=True)
        listed.write_text(describe(text, platform.python_version()))
        print(f"installed in {ASSETS}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PortableError as error:
        sys.exit(f"train_default: {error}")
