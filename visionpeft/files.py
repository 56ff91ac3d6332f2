"""Files that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError


def write(path: str | Path, content: bytes | str) -> Path:
    """Write `content` to `path` so that no reader, and no crash, ever sees half of it.

    Raises:
        ConfigError: The folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    return replace(path, lambda temporary: temporary.write_bytes(data))


def replace(path: str | Path, produce: Callable[[Path], object]) -> Path:
    """Let `produce` write a temporary file beside `path`, sync it, and rename it to `path`.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = Path(path)
    folder = writable(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=folder)
    os.close(handle)
    temporary = Path(name)
    try:
        produce(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the rename itself survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return path


def writable(folder: str | Path) -> Path:
    """Create `folder` where needed and return it.

    Raises:
        ConfigError: It cannot be created, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot write to {folder} ({reason}); give another folder with project=...") from error
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
