"""A model's directory of safetensors: which tensors there are, and one of them at a time.

Opening reads the headers of the shards and nothing else: a missing, truncated or pickled file is found before any
memory is taken. `Checkpoint.tensor` then reads just the tensor it is asked for, so a span costs its own blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from corolla.errors import CheckpointError, UnsupportedModel
from corolla.models.json_files import read_json

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from transformers import PretrainedConfig

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(stage, done, total)`, in bytes; a `total` of None is not known beforehand."""

CHECKSUMS = "SHA256SUMS"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # bytes; safetensors' own bound
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "U16": 16, "I16": 16, "F32": 32, "U32": 32,
         "I32": 32, "F64": 64, "U64": 64, "I64": 64, "C64": 64}  # fmt: skip
_LOOKED_AT = 16  # values at each end of a tensor
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: Path
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint:
    """The tensors and the configuration in a model's `directory`.

    Names are as stored: whether they begin with `model.` or `transformer.` is the family's to know.
    Raises `CheckpointError` for files that are missing, damaged or pickled.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0  # of the tensors handed out, as stored
        self._config: PretrainedConfig | None = None
        self._handles: dict[Path, Any] = {}
        self._entries = _entries(self.directory)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        self._handles.clear()

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration. Raises `CheckpointError` or, for a family unknown to transformers, `UnsupportedModel`."""
        if self._config is None:
            self._config = read_config(self.directory)
        return self._config

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header. Raises `CheckpointError` where there is no such tensor."""
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor as it is stored, from the header. Raises `CheckpointError` where there is no such tensor."""
        return self._entry(name).nbytes

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, in `dtype` (None: as stored), of the given `shape` where one is given.

        It may be a view of the mapped file. Raises `CheckpointError` for a tensor that is missing, of another shape, or made of integers
        where a floating `dtype` is asked for: those are codes, and `quantized_files` reads them.
        """
        from safetensors import SafetensorError, safe_open

        entry = self._entry(name)
        if shape is not None and entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.shard}: tensor {name} has shape {list(entry.shape)} where the configuration asks for {list(shape)}: "
                "config.json and the weights are not of the same model"
            )
        try:
            if entry.shard not in self._handles:
                self._handles[entry.shard] = safe_open(entry.shard, framework="pt")
            found: torch.Tensor = self._handles[entry.shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.shard} is damaged ({error}): fetch it again") from error
        self.bytes_read += entry.nbytes
        if dtype is not None and dtype.is_floating_point:
            self._check_values(name, found)
        return found if dtype is None else found.to(dtype)

    def values(self, name: str, *, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor of floating values, as stored. Raises `CheckpointError` like `tensor`."""
        found = self.tensor(name, shape=shape)
        self._check_values(name, found)
        return found

    def digest(self) -> str:
        """Sixteen hex digits that tell these weights from others of the same configuration, a fine-tune's for example.

        Of each tensor its name, shape, dtype, and first and last values are looked at, so that gigabytes need not be read.
        """
        import torch

        whole = hashlib.blake2b(digest_size=8, person=b"corolla-weights")
        for name in sorted(self._entries):
            read = self.bytes_read
            values = self.tensor(name).flatten()
            self.bytes_read = read
            whole.update(f"{name} {list(self.shape(name))} {values.dtype}\n".encode())
            for part in (values[:_LOOKED_AT], values[-_LOOKED_AT:]):
                whole.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def _check_values(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self._entry(name).shard}: tensor {name} holds {str(tensor.dtype).removeprefix('torch.')} codes where values are "
                "expected: it is quantized in a way that is not read here; take the model as it was before"
            )

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory}: there is no tensor {name}; the checkpoint is incomplete or of another family"
            ) from None


def verify(directory: Path, progress: Progress | None = None) -> int:
    """Read every file that `directory`'s SHA256SUMS names and compare; how many were compared (0 where there is no SHA256SUMS).

    Raises `CheckpointError` naming the first file that is damaged or missing.
    """
    sums = _checksums(directory / CHECKSUMS)
    sizes = {name: _size(directory / name) for name in sums}
    done, total = 0, sum(sizes.values())
    for name, expected in sums.items():
        path = directory / name
        if sha256(path, progress, "verifying", done, total) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one in {CHECKSUMS}; replace it, or remove {directory} and fetch the model again"
            )
        done += sizes[name]
    return len(sums)


def sha256(path: Path, progress: Progress | None = None, stage: str = "checking", done: int = 0, total: int | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal; `progress` goes on from `done`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(stage, done, total)
    return digest.hexdigest()


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS over the files in `directory`, in the format of the `sha256sum` command."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != CHECKSUMS)
    (directory / CHECKSUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")


def _entries(directory: Path) -> dict[str, _Entry]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: name the directory that holds config.json and the safetensors")
    if (directory / SINGLE).exists():
        return _header(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise CheckpointError(_no_safetensors(directory))
    weight_map = _weight_map(directory / INDEX)
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing, though {INDEX} names it: fetch the model again")
    headers = {shard: _header(directory / shard) for shard in set(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{directory / shard} does not hold tensor {name}, though {INDEX} says so: fetch the model again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _no_safetensors(directory: Path) -> str:
    pickled = next((path.name for pattern in PICKLES for path in sorted(directory.glob(pattern))), None)
    if pickled is None:
        return f"{directory} holds neither {SINGLE} nor {INDEX}: name a model's directory with its weights as safetensors"
    return (
        f"{directory} holds its weights pickled ({pickled}), which are never read because a pickle can run any code: get the model as "
        "safetensors or, if you trust the file, convert it with transformers' from_pretrained(...).save_pretrained(...)"
    )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_is_plain_name(shard) for shard in weight_map.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map does not name a file beside it for each tensor; fetch the model again")
    return weight_map


def _is_plain_name(name: object) -> bool:
    # A name from a file that others wrote must not lead out of the directory.
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


class _Described(msgspec.Struct):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _header(path: Path) -> dict[str, _Entry]:
    """What a safetensors file says about its tensors: 8 bytes of length, a JSON object, then the data it points into."""
    size = _size(path)
    damaged = f"{path} is damaged: it is no whole safetensors file; fetch it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(damaged)
        if length > _MOST_HEADER:
            raise CheckpointError(f"{path} has a header of {length} bytes, and {_MOST_HEADER} are the most that is read: fetch it again")
        try:
            parts = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])  # nothing is built of what is not asked for
            described = {name: msgspec.json.decode(part, type=_Described) for name, part in parts.items() if name != "__metadata__"}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(damaged) from error
    end = max((tensor.data_offsets[1] for tensor in described.values()), default=0)
    if not all(_is_sound(tensor, end) for tensor in described.values()):
        raise CheckpointError(damaged)
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is truncated or damaged: it has {size} bytes and its header says {8 + length + end}; fetch it again")
    return {name: _Entry(path, tuple(tensor.shape), _nbytes(tensor)) for name, tensor in described.items()}


def _is_sound(tensor: _Described, end: int) -> bool:
    """Whether a tensor's bytes lie in the file and are as many as its shape takes."""
    bits, count = _BITS.get(tensor.dtype), math.prod(tensor.shape)
    inside = 0 <= tensor.data_offsets[0] <= tensor.data_offsets[1] <= end and min(tensor.shape, default=0) >= 0
    return inside and (bits is None or count * bits == 8 * _nbytes(tensor))


def _nbytes(tensor: _Described) -> int:
    return tensor.data_offsets[1] - tensor.data_offsets[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: fetch the model again") from None


def _checksums(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition(" ")
        name = name[1:]  # one more blank, or `*` for a binary file
        if len(digest) != 64 or not _is_plain_name(name):
            raise CheckpointError(f"{path} is damaged: {line!r} is no line of sha256sum; fetch the model again")
        sums[name] = digest.lower()
    return sums


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's directory. Raises `CheckpointError` where there is none."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a model's directory holds it beside the weights") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return value


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration of the model in a directory, as `Checkpoint.config` gives it; the weights need not be there."""
    path = directory / "config.json"
    family = json_object(path).get("model_type")
    if not isinstance(family, str):
        raise CheckpointError(f"{path} does not say its model_type: the model's family cannot be told")

    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        raise UnsupportedModel(f"{path}: the installed transformers knows no model_type {family}, and code beside a model is never run")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not valid for the family {family}: {reason}") from error
    return config
