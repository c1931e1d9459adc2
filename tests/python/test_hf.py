"""Models on a hub: its commits, its refusals, and the store that it redirects to."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import rdmaload
from rdmaload.connectors import FileConnector, connector_for
from rdmaload.connectors.hf import HfConnector
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    NotFoundError,
    NotSupportedError,
    UnavailableError,
    UrlError,
)
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint
from tests.support.hub import Hub, Repository
from tests.support.s3 import HttpObjects, Reply


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token and no proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def files(tiny_checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_checkpoint.directory.iterdir()} | {
        "a b/ä+#.txt": b"x",
        "empty": b"",
        ".gitattributes": b"*",
        ".cache/x": b"hidden",
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    repositories = {name: Repository() for name in ("org/model", "org/gated", "org/private")}
    repositories["org/gated"].gated = True
    repositories["org/private"].private = True
    for repository in repositories.values():
        repository.commit(files)
    with Hub(repositories) as server:
        yield server


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def test_a_model_is_loaded_natively_from_where_the_hub_redirects(
    hub: Hub, files: dict[str, bytes], tiny_checkpoint: Checkpoint
) -> None:
    stats = LoadStats()
    url = "hf://org/model"
    assert_loaded(rdmaload.load(url, endpoint_url=hub.endpoint, password="good", stats=stats), tiny_checkpoint)
    assert stats.path == "http"
    assert hub.store_requests
    assert not [request for request in hub.store_requests if "authorization" in request.headers]
    assert all(request.headers["authorization"] == "Bearer good" for request in hub.requests)
    pulled = rdmaload.pull_files(url, endpoint_url=hub.endpoint)
    for name in ("config.json", "a b/ä+#.txt", "empty", ".gitattributes"):
        assert (pulled / name).read_bytes() == files[name]
    assert not (pulled / ".cache").exists()


def test_signed_urls_that_expire_on_the_way_are_asked_for_anew(hub: Hub, tiny_checkpoint: Checkpoint) -> None:
    with rdmaload.open("hf://org/model", endpoint_url=hub.endpoint) as model:
        assert_loaded(model.load(), tiny_checkpoint)
        hub.expire()
        stats = LoadStats()
        assert_loaded(model.load(stats=stats), tiny_checkpoint)
        assert stats.retries == 0


def test_a_branch_that_moves_is_noticed_and_mixes_nothing(
    hub: Hub, files: dict[str, bytes], tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    repository = hub.repositories["org/model"]
    first = repository.branches["main"]
    with connector_for("hf://org/model", endpoint_url=hub.endpoint) as connector:
        assert isinstance(connector, HfConnector)
        model = rdmaload.Model(connector)
        assert connector.commit == first
        changed = {name: data[:-1] + b"\x7f" if name.endswith(".safetensors") else data for name, data in files.items()}
        second = repository.commit(changed)
        assert second != first
        with caplog.at_level(logging.WARNING, logger="rdmaload"):
            assert len(connector.list_files()) == len(files) - 1
        assert f"main has moved from commit {first} to {second}" in caplog.text
        assert_loaded(model.load(), tiny_checkpoint)
        model.close()
    for url in (f"hf://org/model@{first}", f"hf://org/model?revision={first}"):
        assert_loaded(rdmaload.load(url, endpoint_url=hub.endpoint), tiny_checkpoint)
    loaded = rdmaload.load("hf://org/model@main", endpoint_url=hub.endpoint)
    with pytest.raises(AssertionError):
        assert_loaded(loaded, tiny_checkpoint)


def test_revisions_and_folders(hub: Hub, files: dict[str, bytes], tiny_checkpoint: Checkpoint) -> None:
    hub.repositories["org/model"].commit({f"sub/dir/{name}": data for name, data in files.items()}, "refs/pr/1")
    assert_loaded(rdmaload.load("hf://org/model/sub/dir@refs/pr/1", endpoint_url=hub.endpoint), tiny_checkpoint)
    with pytest.raises(NotFoundError, match="no branch, tag or commit v9"):
        rdmaload.load("hf://org/model@v9", endpoint_url=hub.endpoint)
    with pytest.raises(NotFoundError, match="no files"):
        rdmaload.load("hf://org/model/other", endpoint_url=hub.endpoint)
    for text in ("hf://", "hf:///model", "hf://org/model@", "hf://org/../x", "hf://org/model@a?revision=b"):
        with pytest.raises(UrlError):
            connector_for(text)


@pytest.mark.parametrize(
    ("model", "token", "error", "words"),
    [
        ("org/gated", None, AuthenticationError, "gated, and without a token nobody may read it.*HF_TOKEN"),
        (
            "org/gated",
            "other",
            AuthenticationError,
            "the token that was given may not read it. Accept its conditions",
        ),
        ("org/private", None, AuthenticationError, "no such model, or without a token nobody"),
        ("org/private", "other", AuthenticationError, "refuses the token"),
        ("org/none", "good", NotFoundError, "no such model"),
        ("org/model", "hush-wrong", AuthenticationError, "refuses the token"),
    ],
)
def test_refusals_say_what_to_do_and_no_secret(
    hub: Hub, model: str, token: str | None, error: type, words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        rdmaload.load(f"hf://{model}", endpoint_url=hub.endpoint, password=token)
    assert "hush" not in str(caught.value)
    assert caught.value.url == f"hf://{model}"  # type: ignore[attr-defined]


def test_a_gated_model_is_read_by_those_who_may(
    hub: Hub, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_loaded(rdmaload.load("hf://org/gated", endpoint_url=hub.endpoint, password="good"), tiny_checkpoint)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert_loaded(rdmaload.load("hf://org/private", endpoint_url=hub.endpoint), tiny_checkpoint)
    with pytest.raises(AuthenticationError):
        rdmaload.load("hf://org/private", endpoint_url=hub.endpoint, unsigned=True)


def test_the_environment_names_the_hub(hub: Hub, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """huggingface_hub reads it once, when it is imported."""
    code = "import sys, rdmaload; print(sum(t.nbytes for t in rdmaload.load(sys.argv[1]).values()))"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "good", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "hf://org/gated"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(tensor.nbytes for tensor in rdmaload.load(tiny_checkpoint.directory).values())
    offline = subprocess.run(
        [sys.executable, "-c", code, "hf://org/gated"],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "HF_HUB_OFFLINE forbids to ask the hub: unset it, or load a directory" in offline.stderr


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'rdmaload\[hf\]'"):
        rdmaload.open("hf://org/model")


def test_what_is_no_hub_is_refused() -> None:
    with HttpObjects({}, lambda request, honest: Reply(200, {}, b'{"sha": "x", "siblings": []}')) as server:
        with pytest.raises(FormatError, match="does not answer as a hub"):
            rdmaload.open("hf://org/model", endpoint_url=server.endpoint)
        server.answer = lambda request, honest: Reply(200, {}, b"<html>")
        with pytest.raises(FormatError, match="does not answer as a hub"):
            rdmaload.open("hf://org/model", endpoint_url=server.endpoint)
        server.answer = lambda request, honest: Reply(503)
        with pytest.raises(UnavailableError, match="503"):
            rdmaload.open("hf://org/model", endpoint_url=server.endpoint, retry_timeout=0.1)


def test_nothing_is_saved(hub: Hub, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(NotSupportedError, match="hf upload"):
        rdmaload.save(tiny_checkpoint.directory, "hf://org/model", endpoint_url=hub.endpoint)
    assert hub.requests == []


def test_the_command_line_knows_hubs(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    from rdmaload.cli import main

    url = f"hf://org/model?endpoint_url={hub.endpoint}"
    assert main(["ls", url]) == 0
    assert "config.json" in capsys.readouterr().out
    missing = url.replace("/model", "/model@none")
    assert main(["ls", missing]) == 3
    assert missing.partition("?")[0] in capsys.readouterr().err
    assert main(["info", url]) == 0
    with connector_for(url) as connector:
        assert isinstance(connector, FileConnector)
