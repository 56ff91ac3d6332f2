"""Files that are either whole or absent: written beside their place, synced, then renamed. And YAML, read with care."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from .errors import ConfigError, DiskFull, VisionpeftError

_LEAST = 1 << 20  # bytes; with less, a disk is full
_TEMPORARY = re.compile(
    r"\..+\.[a-z0-9_]{8}\.(pt|safetensors|json|csv|jpg|png)"
)  # what `replace` calls a run's files at first
_MOST, _DEEPEST = 1_000_000, 50  # values in a YAML file, and lists in lists


def write(path: str | Path, content: bytes | str) -> Path:
    """Write `content` to `path` so that no reader, and no crash, ever sees half of it.

    Raises:
        ConfigError: The folder cannot be written.
        DiskFull: There is no room; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    return replace(path, lambda temporary: temporary.write_bytes(data))


def replace(path: str | Path, produce: Callable[[Path], object]) -> Path:
    """Let `produce` write a temporary file beside `path`, sync it, and rename it to `path`.

    Raises:
        ConfigError: The folder cannot be written.
        DiskFull: There is no room; `path` is as it was.
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
    except Exception as error:
        if full(error, folder):
            raise DiskFull(f"the disk is full: {path} cannot be written; free some space, and try again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the rename itself survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return path


def folder(path: str | Path, contents: Mapping[str, bytes | str], exist_ok: bool = False) -> Path:
    """Write a folder of files, whole or not at all.

    Args:
        path: The folder.
        contents: Of its files, by name.
        exist_ok: Replace a folder that is there and holds nothing but files of these names.

    Raises:
        ConfigError: It is there, or holds something else, or its parent cannot be written.
        DiskFull: There is no room; what was there still is.
    """
    path = Path(path)
    if path.exists() and not (exist_ok and path.is_dir()):
        kind = "exists" if path.is_dir() else "is a file"
        raise ConfigError(f"{path} {kind}; give another folder{', or exist_ok=True to replace it' * path.is_dir()}")
    if others := sorted(f.name for f in path.iterdir() if f.name not in contents) if path.exists() else []:
        raise ConfigError(f"{path} holds something else ({others[0]}), which would be lost; give another folder")
    parent = writable(path.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        for name, content in contents.items():
            write(new / name, content)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    return path


@contextmanager
def locked(folder: str | Path, taken: str) -> Iterator[None]:
    """Hold a folder, through a file "lock" in it. However this process ends, its hold ends, too.

    Args:
        folder: It is created where needed.
        taken: What to say where somebody else holds it.

    Raises:
        ConfigError: Somebody does, or the folder cannot be written.
    """
    lock = FileLock(writable(folder).resolve() / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(taken) from None
    except NotImplementedError:  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        lock.release()


def clear(folder: str | Path) -> None:
    """Remove the temporary files of killed writers from a folder. It must be locked: others may be writing."""
    for file in Path(folder).glob(".*"):
        if _TEMPORARY.fullmatch(file.name) and file.is_file():
            file.unlink()


def read_yaml(text: str) -> Any:
    """Return the plain values that a YAML text holds.

    Raises:
        YAMLError: It is no YAML, or names what is no plain value, or nests or repeats values beyond measure: a few aliases
            of aliases stand for more values than any memory holds.
    """
    sizes: dict[str, int] = {}  # of what an alias can stand for
    within = [("", 0)]  # the lists and mappings around the current value: their names, and what they hold so far
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the former where it was built
        name, size = getattr(event, "anchor", None) or "", 1
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((name, 1))
            if len(within) > _DEEPEST:
                raise yaml.YAMLError(f"it nests more than {_DEEPEST} lists or mappings")
            continue
        if isinstance(event, yaml.AliasEvent):
            size, name = sizes.get(name, _MOST), ""  # what is not known yet holds itself
        elif isinstance(event, yaml.CollectionEndEvent):
            name, size = within.pop()
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if name:
            sizes[name] = size
        within[-1] = within[-1][0], within[-1][1] + size
        if within[-1][1] > _MOST:
            raise yaml.YAMLError("its aliases stand for too many values; write them out")
    try:
        return yaml.safe_load(text)
    except ValueError as error:  # a number of thousands of digits, a date that there is not
        raise yaml.YAMLError(str(error)) from error


def full(error: Exception, folder: str | Path) -> bool:
    """Return whether an error in writing to `folder` means that the disk is full: libraries say so in many ways."""
    told = isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
    return told or (not isinstance(error, VisionpeftError) and shutil.disk_usage(folder).free < _LEAST)


def writable(folder: str | Path) -> Path:
    """Create `folder` where needed and return it.

    Raises:
        ConfigError: It cannot be created, or nothing can be written there.
        DiskFull: There is no room.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full: nothing can be written to {folder}; free some space first") from error
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot write to {folder} ({reason}); give another folder") from error
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
