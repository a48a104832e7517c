import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from corolla.cli import doctor
from corolla.cli.doctor import Finding, Verdict

app = typer.Typer()
app.command()(doctor.doctor)


def test_this_machine_has_what_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    for word in (
        "python",
        "torch",
        "processor",
        "memory",
        "cache",
        "corolla models --fetch smollm2",
        "Nothing that Corolla needs is missing",
    ):
        assert word in result.output


def test_json_lists_the_findings() -> None:
    findings = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert {"python", "torch", "instructions", "cache"} <= {finding["name"] for finding in findings}
    assert {finding["verdict"] for finding in findings} <= {"good", "weak"}


def test_something_missing_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "set COROLLA_CACHE to a directory that you may write" in " ".join(result.output.split())
    assert "1 required thing is missing." in result.output


def test_an_old_python() -> None:
    assert doctor.python((3, 10, 2)) == Finding("python", "3.10.2", Verdict.MISSING, "install Python 3.11 or later")


def test_libraries_that_are_missing_or_too_old() -> None:
    found = list(doctor.libraries(["no-such-library>=1", "typer>=1000", "typer>=0.1", 'mypy>=1000; extra == "dev"']))
    assert [(finding.name, finding.verdict) for finding in found] == [
        ("no-such-library", Verdict.MISSING),
        ("typer", Verdict.MISSING),
        ("typer", Verdict.GOOD),
    ]
    assert "pip install 'typer>=1000'" in found[1].advice


def test_instructions_without_bfloat16() -> None:
    assert doctor.instructions("AVX512", {"avx2": True, "avx512_bf16": True}).verdict is Verdict.GOOD
    old = doctor.instructions("AVX2", {"avx2": True, "cpu_name": "old"})
    assert (old.value, old.verdict) == ("torch's kernels: AVX2, avx2", Verdict.WEAK)


def test_little_memory_and_little_disk() -> None:
    assert doctor.memory(8_000_000_000, 16_000_000_000).verdict is Verdict.GOOD
    assert doctor.memory(500_000_000, 16_000_000_000).verdict is Verdict.WEAK
    assert doctor.disk(Path("/cache"), 90_000_000_000).verdict is Verdict.GOOD
    assert doctor.disk(Path("/cache"), 90_000_000).verdict is Verdict.WEAK
