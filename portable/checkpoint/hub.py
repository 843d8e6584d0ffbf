"""Finds the folder of a checkpoint: one on this machine, or one downloaded from the Hugging Face hub."""

import os
import re
from pathlib import Path

from portable.checkpoint.folder import HOW_TO_CONVERT, PICKLES
from portable.checks import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(folder_or_hub_id: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint, downloading its safetensors and JSON files if it is a hub id.

    Raises:
      CheckpointError: there is no such folder, and it is no hub id or cannot be downloaded.
    """
    name = os.fspath(folder_or_hub_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise CheckpointError(f"{name} is a pickle. {HOW_TO_CONVERT}")
    if name and path.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds it and its config.json.")
    if not isinstance(folder_or_hub_id, str) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"there is no folder {name!r} (seen from {Path.cwd()}), and it is no hub id, which is owner/name."
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as fault:
        raise CheckpointError(
            f"there is no folder {hub_id}; reading it from the hub needs huggingface_hub: "
            "pip install 'portable-jax[hf]'."
        ) from fault
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as fault:
        reason = str(fault).strip().split("\n")[0]
        raise CheckpointError(
            f"there is no folder {hub_id}, and the hub did not give it ({type(fault).__name__}: {reason}); "
            "check the name, the network and, for a private or gated model, `hf auth login`."
        ) from fault
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{hub_id} has no safetensors file on the hub. If it has a pickle, "
            f"`hf download {hub_id} --local-dir weights` and work in that folder: {HOW_TO_CONVERT}"
        )
    return folder
