from __future__ import annotations

import pytest

from corolla.cli.sizes import parse_size, short
from corolla.errors import InvalidSetting


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8_000_000_000), ("500MB", 500_000_000), ("1.5 GiB", 3 * 2**29), ("64kib", 65536), (" 1TB ", 10**12), ("7B", 7)],
)
def test_a_size_is_bytes(text: str, size: int) -> None:
    assert parse_size("memory", text) == size


@pytest.mark.parametrize("text", ["", "8", "8G", "GB", "-1GB", "0GB", "1e3GB", "8 potatoes", "nanGB", "٣GB", "1.GB"])
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"memory: .* is no size; give a number and .* as in 8GB"):
        parse_size("memory", text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (12345, "12.3k"),
        (131072, "131k"),
        (999_600, "1M"),
        (2.5e9, "2.5G"),
        (0.25, "0.25"),
        (2**53, "9.01P"),
    ],
)
def test_a_count_is_short(count: float, text: str) -> None:
    assert short(count) == text
