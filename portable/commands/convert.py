"""`portable convert`: reads a checkpoint in one format and dtype and writes it in another."""

import argparse

EXAMPLES = """examples:
  portable convert state-spaces-folder out                      # as transformers reads it
  portable convert owner/name out --dtype bfloat16              # from the hub, which needs portable-jax[hf]
  portable convert folder out --to state-spaces                 # Mamba-2 as mamba_ssm names its tensors
  portable convert folder out --to shi-labs                     # NAT and DiNAT as their authors name them
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SRC", help="folder of safetensors files, or owner/name on the hub")
    parser.add_argument("target", metavar="DST", help="folder to write; other files in it stay")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; without it they keep theirs"
    )
    parser.add_argument(
        "--to",
        choices=("transformers", "state-spaces", "shi-labs"),
        help="format to write; without it transformers', if that can hold the model",
    )


def run(args: argparse.Namespace) -> int:
    """Converts, and says what was written."""
    from portable import models
    from portable.checkpoint import Checkpoint

    model = models.load(args.source, dtype=args.dtype)
    models.save(model, args.target, format=args.to)
    written = Checkpoint(args.target).entries
    kinds = ", ".join(sorted({entry.dtype for entry in written.values()}))
    files = len({entry.file for entry in written.values()})
    print(f"{args.target}: config.json and {len(written)} tensors ({kinds}) in {files} file{'s' * (files > 1)}.")
    return 0
