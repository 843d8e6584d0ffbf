"""Writing a file whole or not at all."""

import os
import threading
from pathlib import Path


def replace(path: Path, content: str | bytes | bytearray) -> None:
    """Writes a file so that a reader finds what was there or the new content, never a part, whatever happens.

    Raises:
      OSError: it cannot be written; what was there is unchanged, and nothing is left beside it.
    """
    # Of this thread: another may write the same file.
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
