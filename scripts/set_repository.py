"""Writes the repository's address, known to pyproject.toml alone, wherever a reader or a notebook needs it.

python scripts/set_repository.py URL        sets the address, https://github.com/OWNER/NAME, everywhere
python scripts/set_repository.py            writes the address of pyproject.toml everywhere
python scripts/set_repository.py --check    exit code 1 and a list of what does not agree
"""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BADGES = re.compile(r"(?<=<!-- badges -->\n).*?(?=<!-- /badges -->)", re.DOTALL)
INSTALL = re.compile(r"(portable-jax(?:\[[\w,-]+\])? @ git\+)[^\s'\"\\]+")
REPO_URL = re.compile(r"(?m)^(repo_url: ).*$")


def address(root: Path = ROOT) -> str:
    """Returns the repository's address from pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def badges(root: Path, url: str) -> str:
    """Returns a line for each notebook: a badge that opens it in Colab."""
    path = url.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{path}/blob/main"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    names = sorted(p.name for p in (root / "notebooks").glob("*.ipynb"))
    return "".join(f"[![{n} in Colab]({image})]({colab}/notebooks/{n}) `{n}`\n" for n in names)


def rendered(root: Path, url: str) -> dict[Path, str]:
    """Returns the text each file should have."""
    texts = {}
    for path in sorted(
        [root / "README.md", root / "mkdocs.yml", *root.glob("docs/**/*.md"), *root.glob("notebooks/*.*")]
    ):
        if path.suffix in {".md", ".yml", ".py", ".ipynb"} and path.exists():
            text = INSTALL.sub(rf"\g<1>{url}", path.read_text())
            text = REPO_URL.sub(rf"\g<1>{url}", text) if path.name == "mkdocs.yml" else text
            texts[path] = BADGES.sub(lambda _: badges(root, url), text)
    return texts


def problems(root: Path = ROOT) -> list[str]:
    """Returns a sentence for each place that does not agree with pyproject.toml."""
    found = []
    for path, text in rendered(root, address(root)).items():
        if text != path.read_text():
            found.append(f"{path.relative_to(root)} has another address; run python scripts/set_repository.py.")
        if path.suffix == ".ipynb" and not INSTALL.search(_first_code_cell(text)):
            found.append(f"{path.relative_to(root)}: the first code cell must install portable-jax @ git+URL.")
    return found


def write(root: Path, url: str) -> None:
    """Sets the address in pyproject.toml and everything made from it."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"the address must be https://github.com/OWNER/NAME (Colab opens no other); got {url}.")
    project = root / "pyproject.toml"
    project.write_text(project.read_text().replace(f'Repository = "{address(root)}"', f'Repository = "{url}"'))
    for path, text in rendered(root, url).items():
        path.write_text(text)


def _first_code_cell(notebook: str) -> str:
    cells = json.loads(notebook)["cells"]
    return next(("".join(c["source"]) for c in cells if c["cell_type"] == "code"), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="https://github.com/OWNER/NAME")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if not args.check:
        try:
            write(ROOT, (args.url or address()).removesuffix("/").removesuffix(".git"))
        except ValueError as error:
            parser.error(str(error))
    found = problems()
    print("\n".join(found) or f"every place says {address()}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
