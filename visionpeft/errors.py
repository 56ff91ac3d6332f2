"""The mistakes a user can make, each said in one sentence: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

_MOST = 600  # letters of a sentence: what was given may be a whole module
# control characters, line separators, what turns the order of letters, halves of characters
_HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Return a name from a file on one line, with nothing in it that steers a terminal: such signs are written as \\x1b."""
    return _HARMFUL.sub(lambda sign: ascii(sign[0])[1:-1], str(text))


class VisionpeftError(ValueError):
    """A mistake that one sentence explains. The command line prints it and exits with code 2."""

    def __init__(self, sentence: object):
        said = printable(re.sub(r"\s*\n\s*", " ", str(sentence)))
        super().__init__(said if len(said) <= _MOST else f"{said[: _MOST // 2]} … {said[-_MOST // 2 :]}")


class ConfigError(VisionpeftError):
    """An option that does not exist, does not fit, or contradicts another."""


class DiskFull(VisionpeftError):
    """No room for what is to be written; nothing that was there is touched."""


class ModelError(VisionpeftError):
    """A model that is not known, cannot be read, or cannot be adapted."""


class DataError(VisionpeftError):
    """Images or labels that are missing, broken or at odds with each other."""


class DeltaError(VisionpeftError):
    """A delta file that is damaged, too new, or made for another base."""


class MismatchError(DeltaError):
    """A delta file that was altered, or does not belong to the base given."""


class TrainingError(VisionpeftError):
    """A run that cannot go on (a loss that is not a number, nothing to resume)."""


class OutOfMemory(TrainingError):
    """A run that needs more memory than there is."""


class Interrupted(TrainingError):
    """A run that was stopped by hand.

    Attributes:
        said: What happened.
        folder: Of the run, where it can be resumed.
        code: The exit code of the command line.
    """

    code = 130

    def __init__(self, said: str, folder: Path | None = None):
        super().__init__(f"{said}; go on with resume='{folder}'" if folder else said)
        self.said, self.folder = said, folder


class Stopped(Interrupted):
    """A run that a signal ended. Its code is 75 ("try again") where it can be resumed, else 128 and the signal's number.

    Attributes:
        signal: That number.
    """

    def __init__(self, said: str, folder: Path | None, signal: int):
        super().__init__(said, folder)
        self.signal, self.code = signal, 75 if folder else 128 + signal


def need(package: str, extra: str, what: str) -> None:
    """Refuse to go on without a package, and name the extra of visionpeft that brings it.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install 'visionpeft[{extra}]'")


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `words`, or an empty string where none is close."""
    close = difflib.get_close_matches(str(word).lower(), list(words), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_line(text: object, most: int = 400) -> str:
    """Return a text for a sentence: without line breaks, and cut where it is long."""
    words = " ".join(str(text).split())
    return words if len(words) < most else f"{words[:most]}…"


def out_of_memory(error: Exception) -> OutOfMemory:
    """Return what is said where a GPU's memory is full."""
    return OutOfMemory(
        f"the GPU's memory is full ({str(error).split('.')[0]}); give a smaller batch or imgsz, or freeze more stages"
    )
