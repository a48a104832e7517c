"""Amounts of memory as people type and read them."""

from __future__ import annotations

import re

from corolla.errors import InvalidSetting

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", re.IGNORECASE | re.ASCII)


def parse_size(setting: str, text: str) -> int:
    """Bytes, from "8GB", "500 MB" or "1.5GiB". Raises `InvalidSetting`, naming the `setting`, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size < 1:
        raise InvalidSetting(setting, f"{text!r} is no size; give a number and B, KB, MB, GB, TB or KiB, MiB, GiB, TiB, as in 8GB")
    return size


def short(count: float) -> str:
    """A number of at least 0 in at most 5 characters, as far as it is below 10**21: 0.3, 999, 12.3k, 131k, 1.5M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}E"
