"""What `device=` means: "cpu", 0, "0,1", and their kin."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError


def device_of(device: Any) -> str:
    """Return a device as text, "cpu" or "0,1"; by default a GPU where there is one."""
    if device is None:
        return "0" if torch.cuda.is_available() else "cpu"
    return ",".join(map(str, device)) if isinstance(device, list | tuple) else str(device)


def devices(device: str | None) -> list[str]:
    """Return the single devices of "0", "0,1" (a process each), or "cpu,cpu" (two processes on the CPU).

    Raises:
        ConfigError: CPU and GPU are mixed, or one GPU is named twice.
    """
    names = [name.strip().removeprefix("cuda:") for name in str(device or "").split(",")]
    mixed = "cpu" in names and set(names) != {"cpu"}
    if mixed or (len(names) > 1 and "" in names) or ("cpu" not in names and len(set(names)) < len(names)):
        raise ConfigError(f"device='{device}' is not understood; give different GPUs, e.g. '0,1', or only 'cpu'")
    return names


def check_shares(device: str | None, batch: float) -> None:
    """Refuse a batch that several devices cannot share.

    Raises:
        ConfigError: It is none of their number's multiples.
    """
    count = len(devices(device))
    if count > 1 and (batch < 1 or batch % count):
        raise ConfigError(f"batch={batch} cannot be shared by {count} devices; give a multiple of {count}")


def count_devices(device: Any) -> tuple[int, bool]:
    """Return how many devices are meant, and whether they are GPUs, which need not be here."""
    names = devices("" if device is None else device_of(device))
    if strange := [n for n in names if n not in ("", "cpu", "cuda", "mps") and not n.removeprefix("-").isdigit()]:
        raise ConfigError(f"device='{strange[0]}' is not known; give 'cpu', or the number of a GPU: 0, or '0,1' for two")
    return len(names), names[0] != "cpu"
