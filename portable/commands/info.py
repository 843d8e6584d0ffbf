"""`portable info`: what this installation is and where it runs."""

import argparse

from portable import reports
from portable.commands._report import show

EXAMPLES = """examples:
  portable info
  portable info --json                      # for a bug report or a script
  JAX_PLATFORMS=cpu portable info           # as if the machine had no accelerator
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints versions, devices and the implementation of each op here."""
    show([reports.info()], as_json=args.json)
    return 0
