"""The rooms of docs/architecture.md: imports run one way, thin clients stay thin, nothing unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted((SOURCE / "corolla").rglob("*.py"))

# From the ground up. A room may import itself and any room on a line above its own.
FLOORS = (
    ("errors", "barrier"),
    ("types",),
    ("models",),
    ("engine", "swarm"),
    ("client",),
    ("chat",),
    ("remote", "data"),
    ("gateway", "tuning", "server"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

THIN = ("types", "errors", "barrier", "client", "chat", "swarm/transport", "swarm/frames", "swarm/wire", "cli/main")
HEAVY = ("torch", "transformers", "hivemind")


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, with the names it takes from it."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """`corolla.engine.page_pool` is in the room `engine`; the package itself (`corolla.__version__`) is in none."""
    return next((part for part in name.split(".")[1:2] if part in FLOOR_OF), "")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_run_downwards(file: Path) -> None:
    own = room(module_name(file))
    for name in imports(file):
        other = room(name) if name.split(".")[0] == "corolla" else ""
        assert other in ("", own) or FLOOR_OF[other] < FLOOR_OF[own], f"{own or 'corolla'} must not import {name}"


def test_every_room_has_its_floor() -> None:
    rooms = {file.relative_to(SOURCE / "corolla").parts[0].removesuffix(".py") for file in FILES}
    assert rooms - {"__init__", "__main__"} <= set(FLOOR_OF)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_unpickles(file: Path) -> None:
    names = set(imports(file))
    assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert "torch.load" not in names
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.package")), f"{file}:{node.lineno}"


def test_thin_clients_import_nothing_heavy() -> None:
    thin = [module_name(file) for file in FILES if file.relative_to(SOURCE / "corolla").as_posix().removesuffix(".py").startswith(THIN)]
    code = (
        "import importlib, sys\n"
        f"for name in {thin!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
