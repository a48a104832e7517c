"""Fixtures that every room's tests may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the default model: fetched and converted once, then found in the user's cache."""
    from corolla.models.catalog import resolve

    return Path(resolve("smollm2"))
