"""Thin clients stay thin, nothing unpickles, a class name means one thing. Layers and circles are contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted((SOURCE / "corolla").rglob("*.py"))

THIN = ("types", "errors", "barrier", "client", "chat", "swarm/transport", "swarm/frames", "messages", "cli/main")
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


def test_modules_are_imported_by_their_full_names_and_nothing_loads_pickles() -> None:
    """That no module imports pickle, and in which order packages import one another, are contracts in pyproject.toml."""
    for file in FILES:
        assert "torch.load" not in imports(file), file
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.package")), f"{file}:{node.lineno}"


def test_no_public_class_name_stands_in_two_modules() -> None:
    modules: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(module_name(file))
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


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
