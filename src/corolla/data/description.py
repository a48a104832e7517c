"""What lies beside the sequences: metadata.yaml, metrics.json, the tokenizer and the sums."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from corolla.data.layout import METADATA, METRICS, PARTS, TOKENIZER, Part, part_files
from corolla.data.metrics import PackingMetrics
from corolla.data.saving import replacing, sha256, write_sums
from corolla.errors import DataError, StorageError
from corolla.models.json_files import read_json

# What the tokenizer and the models' own libraries read it from.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
)


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in a model's directory."""
    return [path for name in _TOKENIZER_FILES if (path := directory / name).is_file()]


def tokenizer_sums(directory: Path) -> dict[str, str]:
    """The SHA-256 sum of each of them. Raises `DataError` when one cannot be read."""
    return {path.name: sha256(path) for path in tokenizer_files(directory)}


def write_description(
    directory: Path, metadata: Mapping[str, Any], metrics: PackingMetrics, rows: Mapping[Part, Sequence[int]], tokenizer: Path
) -> None:
    """Write all of it, the sums last. `rows` are the numbers of sequences in each part's files. Raises `StorageError`."""
    counts = {
        f"{part}_{name}": getattr(metrics.parts[part], name)
        for part in rows
        for name in ("articles", "sequences", "prompt_tokens", "completion_tokens", "padding_tokens")
    }
    fewest = {f"max_batch_size_{part}": min(rows.get(part, ()), default=None) for part in PARTS if part != "test"}
    named = {"train": "training", "dev": "dev", "test": "test"}
    files = {f"number_of_{named[part]}_files": len(rows.get(part, ())) for part in PARTS}
    _write(directory / METADATA, yaml.safe_dump({**metadata, **files, **fewest, **counts}, sort_keys=False, allow_unicode=True))
    parts = {part: {**asdict(metrics.parts[part]), "utilization": round(metrics.parts[part].utilization, 6)} for part in rows}
    _write(directory / METRICS, json.dumps({"parts": parts, "left_out": metrics.left_out}, indent=2) + "\n")
    try:
        (directory / TOKENIZER).mkdir(exist_ok=True)
        for path in tokenizer_files(tokenizer):
            shutil.copyfile(path, directory / TOKENIZER / path.name)
    except OSError as error:
        raise StorageError(f"{directory / TOKENIZER} cannot be written: {error.strerror or error}") from None
    described = [directory / METADATA, directory / METRICS, *(directory / TOKENIZER).iterdir()]
    write_sums(directory, [*described, *(path for part in rows for path in part_files(directory, part))])


def read_metrics(directory: Path) -> dict[str, Any]:
    """What `METRICS` says: `parts` and `left_out`. Raises `DataError` when it is missing or damaged."""
    path = directory / METRICS
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path} is missing or damaged: prepare the data again")
    return content


def config_class(model_type: str) -> str:
    """The class of the model's configuration in transformers, as BLOOMChat's tools name the tokenizer's kind; else the type itself."""
    # Read, not imported: the library takes seconds and 200 MB to import, for one name.
    library = find_spec("transformers")
    assert library is not None, "it is declared"
    assert library.origin is not None, "it is a package"
    module = model_type.replace("-", "_")
    path = Path(library.origin).parent / "models" / module / f"configuration_{module}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
        if isinstance(node, ast.ClassDef) and _model_type(node) == model_type:
            return f"<class 'transformers.models.{module}.configuration_{module}.{node.name}'>"
    return model_type


def _model_type(node: ast.ClassDef) -> str | None:
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        value = getattr(line, "value", None)
        named = any(isinstance(target, ast.Name) and target.id == "model_type" for target in targets)
        if named and isinstance(value, ast.Constant):
            return str(value.value)
    return None


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
