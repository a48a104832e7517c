import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from corolla.errors import CheckpointError, ModelNotFound
from corolla.models import catalog
from corolla.models.checkpoint import write_checksums

LLAMA = {"model_type": "llama", "num_hidden_layers": 3, "dtype": "float32"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def put_model(directory: Path, config: object = LLAMA) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(bytes(1000))
    return directory


def test_cache_directory_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("COROLLA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert catalog.cache_directory() == Path("/home/ada/.cache/corolla")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big")
    assert catalog.cache_directory() == Path("/big/corolla")
    monkeypatch.setenv("COROLLA_CACHE", "~/mine")
    assert catalog.cache_directory() == Path("/home/ada/mine")


def test_resolve_a_local_directory(tmp_path: Path) -> None:
    directory = put_model(tmp_path / "model")
    assert catalog.resolve(str(directory)) == directory


def test_resolve_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        catalog.resolve(str(tmp_path))


def test_resolve_an_alias_that_is_here(cache: Path) -> None:
    directory = put_model(cache / "models" / "smollm2")
    assert catalog.resolve("smollm2") == directory


def test_resolve_names_a_file_with_a_flipped_byte(cache: Path) -> None:
    directory = put_model(cache / "models" / "smollm2")
    write_checksums(directory)
    (directory / "model.safetensors").write_bytes(bytes(999) + b"\1")
    for name in ("smollm2", str(directory)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            catalog.resolve(name)


@pytest.mark.parametrize("name", ["smolm", "", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_resolve_an_unknown_name_lists_the_aliases(name: str) -> None:
    with pytest.raises(ModelNotFound, match="aliases: smollm2"):
        catalog.resolve(name)


def test_resolve_a_hub_id_without_a_network_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="connect to a network, or name a model's local directory or one of the aliases: smollm2"):
        catalog.resolve("org/name")


def test_installed_reads_both_caches(cache: Path, tmp_path: Path) -> None:
    assert catalog.installed() == []
    put_model(cache / "models" / "smollm2")
    (cache / "models" / ".smollm2-partial-x").mkdir()
    hub = tmp_path / "hub" / "models--org--bloom"
    snapshot = put_model(hub / "snapshots" / ("0" * 40), {"model_type": "bloom", "n_layer": 24})
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    bloom, smollm2 = catalog.installed()
    assert (bloom.name, bloom.directory, bloom.family, bloom.blocks, bloom.dtype) == ("org/bloom", snapshot, "bloom", 24, None)
    assert (smollm2.name, smollm2.family, smollm2.blocks, smollm2.dtype) == ("smollm2", "llama", 3, "float32")
    assert smollm2.nbytes == 1000 + (smollm2.directory / "config.json").stat().st_size


@pytest.mark.parametrize("config", [[], {}, {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}}])
def test_installed_lists_what_it_cannot_read_in_full(cache: Path, config: object) -> None:
    put_model(cache / "models" / "odd", config)
    (model,) = catalog.installed()
    assert model.blocks == (2 if config and "text_config" in config else None)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: the list of one repository's files, and the files."""

    FILES = (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "model.safetensors.index.json",
        "onnx/config.json",
    )
    COMMIT = "a" * 40
    given: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(json.dumps(LLAMA).encode(), "application/octet-stream")

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/name/revision/"):
            files = [{"rfilename": name} for name in self.FILES]
            self._answer(json.dumps({"id": "org/name", "sha": self.COMMIT, "siblings": files}).encode(), "application/json")
        elif self.path.startswith("/api/models/org/name/tree/"):
            files = [{"type": "file", "path": name, "size": 10, "oid": "b" * 40} for name in self.FILES]
            self._answer(json.dumps(files).encode(), "application/json")
        else:
            self.given.append(self.path.rpartition(self.COMMIT + "/")[2])
            self.do_HEAD()

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", len(body)),
            ("ETag", f'"{hash(self.path) % 2**64:x}"'),
            ("X-Repo-Commit", self.COMMIT),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(Hub, "given", [])
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_client_fetches_no_weights_and_a_server_then_only_what_is_missing(cache: Path, hub: type[Hub]) -> None:
    directory = catalog.resolve("org/name", weights=False)
    assert {path.name for path in directory.iterdir()} == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert catalog.installed() == []
    hub.given.clear()
    assert catalog.resolve("org/name") == directory
    assert sorted(hub.given) == ["model.safetensors", "model.safetensors.index.json"]


def test_a_client_needs_no_weights_in_a_local_directory(tmp_path: Path) -> None:
    directory = put_model(tmp_path / "model")
    write_checksums(directory)
    (directory / "model.safetensors").unlink()
    assert catalog.resolve(str(directory), weights=False) == directory
    with pytest.raises(CheckpointError):
        catalog.resolve(str(directory))
