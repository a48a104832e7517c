"""The model that most tests of the engine run on; a module that needs another one has a fixture of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.models.span import SpanModel, load_span
from tests.models import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(directory: Path) -> SpanModel:
    return load_span(directory, dtype="float32")
