"""`corolla doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import json as json_format
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.findings import Finding, Verdict, show
from corolla.cli.logs import LogLevel
from corolla.cli.opening import secret_bytes

LOW_MEMORY = 2_000_000_000  # bytes available, for the default model and a session
LOW_DISK = 1_000_000_000  # bytes free at the cache, for the default model while it is converted
PYTHON = (3, 11)


def doctor(
    peers: options.Peers = None,
    secret: options.Secret = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    log_level: options.LogLevel = LogLevel.ERROR,
) -> None:
    """Say what this machine has, what is missing and what to do about it; with --peers, why a swarm cannot be reached.

    Exit code 1 where something required is missing, or something stands in the swarm's way.
    """
    logs.set_up(log_level, swarm=bool(peers))
    if peers:
        from corolla.cli.reach import examine_swarm

        findings = list(examine_swarm(peers, secret_bytes(secret)))
    else:
        findings = list(examine())
    fatal = sum(finding.fatal for finding in findings)
    if json:
        typer.echo(json_format.dumps([asdict(finding) for finding in findings], indent=2))
    elif peers:
        show(findings, "The swarm answers." if not fatal else "The swarm cannot be used from here; the lines in bold say what to do.")
    else:
        show(
            findings,
            f"{fatal} required thing{'s are' if fatal != 1 else ' is'} missing." if fatal else "Nothing that Corolla needs is missing.",
        )
    if fatal:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Everything that Corolla needs or can use, one finding each."""
    yield python(sys.version_info[:3])
    yield from libraries(metadata.requires("corolla") or [])
    if importlib.util.find_spec("torch") is not None:
        yield from compute()
    if importlib.util.find_spec("psutil") is not None:
        yield memory(*_memory())
    yield from cache()


def python(version: tuple[int, ...]) -> Finding:
    """Judge a version of Python, as (major, minor, micro)."""
    value = ".".join(map(str, version))
    if version < PYTHON:
        return Finding("python", value, Verdict.MISSING, f"install Python {PYTHON[0]}.{PYTHON[1]} or later")
    return Finding("python", f"{value} on {platform.system()} {platform.machine()}")


def libraries(requirements: list[str]) -> Iterator[Finding]:
    """Whether each of the `requirements` (as in a package's metadata, those of extras left out) is installed in a fitting version."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        advice = f"install it: {sys.executable} -m pip install '{requirement}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", Verdict.MISSING, advice)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version) if fits else Finding(requirement.name, version, Verdict.MISSING, advice)


def compute() -> Iterator[Finding]:
    """The processor and the accelerators, as torch sees them."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch imports", str(error), Verdict.MISSING, "reinstall torch for this machine's processor and operating system")
        return
    threads = torch.get_num_threads()
    yield Finding("processor", f"{_processor()}, {os.cpu_count()} cores, torch uses {threads} thread{'s' if threads != 1 else ''}")
    yield instructions(torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities())
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not devices:
        yield Finding("accelerator", "none: the processor computes")
    for index, device in enumerate(devices):
        yield Finding(f"cuda:{index}", f"{device.name}, {device.total_memory / 1e9:.0f} GB")


def instructions(capability: str, features: Mapping[str, object]) -> Finding:
    """Judge the processor's vector instructions: torch's name for what its kernels use, and the single `features`."""
    wanted = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "dotprod", "i8mm", "sve")
    present = [name for name in wanted if features.get(name)]
    value = ", ".join([f"torch's kernels: {capability}", *present])
    if any(name in present for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return Finding("instructions", value)
    return Finding("instructions", value, Verdict.WEAK, "no bfloat16 arithmetic here: --dtype float32 may be faster")


def memory(available: int, total: int) -> Finding:
    """Judge the memory, in bytes."""
    value = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if available < LOW_MEMORY:
        return Finding("memory", value, Verdict.WEAK, "close other programs, or use a smaller model or fewer blocks")
    return Finding("memory", value)


def cache() -> Iterator[Finding]:
    """Corolla's cache: whether it can be written, the room in it, and the default model."""
    from corolla.models import catalog

    directory = catalog.cache_directory()
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        advice = f"set {catalog.CACHE_VARIABLE} to a directory that you may write"
        yield Finding("cache", f"{directory} cannot be written", Verdict.MISSING, advice)
        return
    yield disk(directory, shutil.disk_usage(existing).free)
    if any(model.name == catalog.DEFAULT for model in catalog.installed()):
        yield Finding("default model", f"{catalog.DEFAULT} is here")
    elif importlib.util.find_spec("pip") is None:
        yield Finding("default model", "not fetched, and pip is missing", Verdict.WEAK, f"run: {sys.executable} -m ensurepip")
    else:
        yield Finding("default model", "not fetched yet", Verdict.WEAK, f"run: corolla models --fetch {catalog.DEFAULT}")


def disk(directory: Path, free: int) -> Finding:
    """Judge the room at the cache, in bytes."""
    value = f"{directory}, {free / 1e9:.1f} GB free"
    if free < LOW_DISK:
        return Finding("cache", value, Verdict.WEAK, "make room, or set COROLLA_CACHE to a directory on a larger disk")
    return Finding("cache", value)


def _memory() -> tuple[int, int]:
    import psutil

    found = psutil.virtual_memory()
    return found.available, found.total


def _processor() -> str:
    """The processor's name, where the system tells it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
