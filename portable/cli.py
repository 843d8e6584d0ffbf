"""The command line: finds the command, reads its arguments, and says a user's mistake in one sentence."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from portable.checks import PortableError

# Only the command that was asked for is imported.
COMMANDS = {
    "info": "versions, devices, and which implementation each op gets here",
    "explain": "why an op runs the implementation it runs, on every platform",
    "demo": "a small model of code learns prose by DoRA, in a minute",
    "generate": "continue a prompt with a model from a folder or the hub",
    "train": "train a model on text or images; the same command continues",
    "finetune": "train an adapter, such as DoRA; the same command continues",
    "convert": "read a checkpoint in one format and write it in another",
    "bench": "time ops and models on this machine",
    "plan": "what neighborhood attention will cost, and what a query sees",
    "parity": "every op and model on every device, run or compiled",
}
EPILOG = """examples:
  portable demo
  portable explain ssd
  portable COMMAND --help    the arguments of a command, with examples

A mistake is told in one sentence with exit code 2; PORTABLE_TRACEBACK=1 adds where it was found.
"""


class UsageError(PortableError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-sentence errors and help that is coloured on a terminal."""

    command: str | None = None  # the one whose help answers an error of the top parser

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        name = f"{self.prog} {self.command}" if self.command else self.prog
        raise UsageError(f"{message}; `{name} --help` shows what is understood.")

    def print_help(self, file: Any = None) -> None:
        from rich.console import Console
        from rich.text import Text

        text = Text(self.format_help())
        text.highlight_regex(r"(?m)^\S[^\n]*:$|^usage:", "bold")
        text.highlight_regex(r"(?<![\w-])--?[a-zA-Z][\w-]*", "cyan")
        text.highlight_regex(r"(?m)^ +portable [^\n#]*", "green")
        Console(file=file, highlight=False).print(text, soft_wrap=True, end="")


def offered() -> dict[str, str]:
    """Returns the commands of this installation with a line on each."""
    return {n: line for n, line in COMMANDS.items() if importlib.util.find_spec(f"portable.commands.{n}")}


def parser(command: str | None = None) -> Parser:
    """Returns the parser of the whole command line, in which only `command` knows its arguments."""
    top = Parser(
        prog="portable",
        description="JAX ops, layers and models that run unmodified on CPU, GPU and TPU.",
        epilog=EPILOG,
    )
    top.command = command
    top.add_argument("--version", action="version", version=f"portable {_version()}")
    found = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, line in offered().items():
        sub = found.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name == command:
            module = importlib.import_module(f"portable.commands.{name}")
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user's, 130 when interrupted.

    Args:
      argv: the arguments without the program's name; None reads `sys.argv`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _run(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            _say("stopped.", "yellow")
            return 130
        except BrokenPipeError:
            # The reader (head, less) left; what remains in the buffer must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (
            PortableError,
            OSError,
            ValueError,
            TypeError,
            ImportError,
            RuntimeError,
            AssertionError,
            MemoryError,
        ) as fault:
            sentence = _sentence(fault)
            if sentence is None:
                raise
            if os.environ.get("PORTABLE_TRACEBACK"):
                traceback.print_exc()
            _say(sentence, "bold red")
            return 2


def _run(argv: list[str]) -> int:
    # No option of the top parser takes a value, so the first word is the command.
    command = next((a for a in argv if not a.startswith("-")), None)
    if command is not None and command not in offered():
        raise UsageError(f"there is no command {command!r}; there are: {', '.join(offered())}.")
    args = parser(command).parse_args(argv)
    if args.command is None:
        parser().print_help()
        return 0
    return args.run(args)


def _sentence(fault: Exception) -> str | None:
    """Returns what to tell the user, or None where the fault is ours and its traceback is the message."""
    text = str(fault)
    if isinstance(fault, PortableError):
        return text
    if isinstance(fault, OSError) and fault.strerror:
        where = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, str | bytes | os.PathLike) else ""
        return f"{where}{fault.strerror[0].lower()}{fault.strerror[1:]}."
    if isinstance(fault, json.JSONDecodeError):
        return f"a file that must be JSON is not: {text}."
    if isinstance(fault, UnicodeDecodeError):
        return f"a file that must be UTF-8 text is not: {text}."
    if isinstance(fault, ModuleNotFoundError):
        extra = _extra_with(fault.name or "")
        return extra and f"this needs the package {fault.name!r}: pip install 'portable-jax[{extra}]'."
    if isinstance(fault, MemoryError):
        return f"there is not enough memory for this: {text or 'an allocation failed'}."
    *_, (frame, line) = traceback.walk_tb(fault.__traceback__)
    raised_in = frame.f_globals.get("__name__", "")
    if raised_in == "jax._src.xla_bridge" and (asked := os.environ.get("JAX_PLATFORMS")):
        return f"JAX_PLATFORMS={asked} asks for a device that jax cannot reach here; unset it, or set it to cpu."
    # One of portable's own checks, a `raise` statement: its text is the sentence to show.
    checked = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    ours = isinstance(fault, ValueError | TypeError) and raised_in.startswith("portable.") and checked
    return text if ours else None


def _extra_with(module: str) -> str | None:
    """Returns the extra of this distribution that installs a module."""
    for requirement in _requirements():
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if package and extra and package[0].replace("-", "_") == module.partition(".")[0]:
            return extra[1]
    return None


def _requirements() -> list[str]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.requires("portable-jax") or []
    return []


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("portable-jax")
    return "(run from a folder, not installed)"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _say(str(message), "yellow")


def _say(sentence: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text(f"portable: {sentence}", style=style), soft_wrap=True)
