"""Keeps the pages true: the README's two commands, and every table that a command printed.

python scripts/readme.py demo          prints the command that installs and runs the demo
python scripts/readme.py tests         prints the command that installs and passes the tests
python scripts/readme.py fill          runs the command of every block and writes what it prints
python scripts/readme.py fill WORDS    the same for the blocks whose command holds one of the words
python scripts/readme.py check         exit code 1 where a block is empty, or an `output of` block is stale

A block stands between `<!-- output of: COMMAND -->` (a command that prints the same each time, and soon) or
`<!-- measured by: COMMAND -->` (a measurement, not repeated by check) and `<!-- end of output -->`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (output of|measured by): (.+?) -->\n)(.*?)(<!-- end of output -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """Returns the pages that people read."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("models/*/README.md")])


def command(name: str, text: str) -> str:
    """Returns the bash block that follows `<!-- command: name -->`."""
    found = re.search(rf"<!-- command: {name} -->\n+```bash\n(.*?)```", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no bash block after <!-- command: {name} -->.")
    return found[1].strip()


def output(line: str) -> str:
    """Runs a block's command from the root, with this Python first on the path; returns what it prints."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(line, shell=True, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{line}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip() + "\n"


def fill(page: Path, words: list[str]) -> None:
    """Replaces the blocks whose command holds one of the words, or all without words, by what they print."""

    def new(block: re.Match[str]) -> str:
        chosen = not words or any(word in block[3] for word in words)
        return f"{block[1]}{output(block[3])}{block[5]}" if chosen else block[0]

    page.write_text(BLOCK.sub(new, page.read_text()))


def problems(page: Path) -> Iterator[str]:
    """Yields a sentence for each block that is not what it says."""
    where = os.path.relpath(page)
    for block in BLOCK.finditer(page.read_text()):
        if not block[4].strip():
            yield f"{where}: the block of `{block[3]}` is empty; run python scripts/readme.py fill."
        elif block[2] == "output of" and block[4] != output(block[3]):
            yield f"{where}: `{block[3]}` now prints something else; run python scripts/readme.py fill."


def main(argv: list[str]) -> int:
    """Runs one of the commands above and returns the exit code."""
    match argv:
        case ["demo" | "tests" as name]:
            print(command(name, README.read_text()))
        case ["fill", *words]:
            for page in pages():
                fill(page, words)
        case ["check"]:
            found = [sentence for page in pages() for sentence in problems(page)]
            print("\n".join(found) or "every block is what its command prints")
            return 1 if found else 0
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
