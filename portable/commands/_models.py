"""A model by the name that a person gives it, and its tokenizer."""

from pathlib import Path
from typing import Any

from portable.checks import DataError

# Vocabularies up to this size can be bytes and a few special tokens.
_LARGEST_BYTE_VOCABULARY = 512
HELP = "folder of safetensors, owner/name on the hub, or the word default: the small model that comes with portable"


def find(name: str) -> Path:
    """Returns the folder of a model; a folder called default comes before the embedded model."""
    from portable import checkpoint, models

    return models.EMBEDDED if name == "default" and not Path(name).is_dir() else checkpoint.locate(name)


def tokenizer(folder: Path, file: str | None, size: int) -> Any:
    """Returns the tokenizer in a file, else the one in the model's folder, else that of bytes.

    Raises:
      DataError: there is none, and a vocabulary of this size is not bytes; or the file is no tokenizer.json.
    """
    from portable.training.tokens import load_tokenizer

    found = file or folder / "tokenizer.json"
    made = load_tokenizer(found if file or Path(found).is_file() else None)
    if made.name == "bytes" and size > _LARGEST_BYTE_VOCABULARY:
        raise DataError(
            f"{folder} has no tokenizer.json, and its model's {size} tokens are not bytes; "
            "give its tokenizer with --tokenizer tokenizer.json."
        )
    return made
