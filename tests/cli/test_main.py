from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import corolla as package
from corolla.errors import ModelNotFound


def test_help_lists_every_command(corolla: Callable[..., Any]) -> None:
    result = corolla("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("chat", "generate", "models", "doctor"))


def test_version(corolla: Callable[..., Any]) -> None:
    assert corolla("--version").stdout == f"corolla {package.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["generate", "--help"], ["serve", "--help"], ["up", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {arguments!r}; import corolla.cli.main as main\n"
        "try:\n    main.app()\n"
        "finally:\n    assert not {'torch', 'transformers', 'tokenizers', 'hivemind'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("given", "kept"), [({}, "128"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, "9")])
def test_compiled_kernels_are_kept_within_bounds(given: dict[str, str], kept: str) -> None:
    """Before torch is loaded, which reads that once; whoever set it otherwise is obeyed."""
    code = (
        "import os, sys; sys.argv[1:] = ['models']; import corolla.cli.main as main\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    main.app()\n"
        "finally:\n    print('kept', os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    )
    others = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60, env=others | given)
    assert done.stdout.splitlines()[-1] == f"kept {kept}"


def test_an_error_is_one_line_and_exit_code_2(corolla: Callable[..., Any], model: Any) -> None:
    model.error = ModelNotFound("there is no model 'x'")
    result = corolla("generate", "x", "--prompt", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "error: there is no model 'x'\n")


def test_an_interruption_is_exit_code_130(corolla: Callable[..., Any], model: Any) -> None:
    model.error = KeyboardInterrupt()
    assert corolla("generate", "x", "--prompt", "hello").exit_code == 130


def test_an_unknown_command_is_exit_code_2(corolla: Callable[..., Any]) -> None:
    assert corolla("sing").exit_code == 2
