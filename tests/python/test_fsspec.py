"""What goes through fsspec: which urls do, its options, and file systems that fail."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

import rdmaload
from rdmaload.connectors import FileConnector, connector_for
from rdmaload.connectors.fsspec import FsspecConnector
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.stats import LoadStats


class Failing(MemoryFileSystem):
    """Memory that fails as a test says."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[BaseException]] = []
    """Raised one by one by reads and renames."""
    given: ClassVar[dict[str, Any]] = {}
    lock = threading.Lock()

    def __init__(self, *args: Any, **given: Any) -> None:
        type(self).given = given
        if given.get("refuse"):
            raise TypeError("unexpected keyword hush-secret")
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("failing://").strip("/")

    def _fail(self) -> None:
        with self.lock:
            if self.failures:
                raise self.failures.pop()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        self._fail()
        return super().cat_file(path, start=start, end=end, **more)

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **more)


@pytest.fixture
def url() -> Iterator[str]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.store.clear()
    Failing.failures.clear()
    yield "failing://host/m"
    Failing.failures.clear()


def test_a_model_goes_there_and_back_through_python(url: str) -> None:
    source = {"a": torch.arange(3_000_000.0), "b": torch.ones(7, dtype=torch.bfloat16)}
    rdmaload.save(source, url)
    rdmaload.save(source, url)  # over what is there, where a rename replaces nothing
    stats = LoadStats()
    loaded = rdmaload.load(url, stats=stats)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())
    assert stats.path == "python"
    assert not [name for name in Failing.store if ".rdmaload-" in name]


def test_failures_that_pass_are_tried_again(url: str) -> None:
    rdmaload.save({"a": torch.arange(1000.0)}, url)
    Failing.failures.extend([ConnectionResetError("reset"), TimeoutError("slow")])
    with rdmaload.open(url) as model:
        assert Failing.failures == []
        Failing.failures.append(OSError("a moment"))
        stats = LoadStats()
        assert model.load(stats=stats)["a"].sum() == 499500
    with connector_for(url) as connector:
        assert isinstance(connector, FileConnector)
        Failing.failures.extend([OSError("a moment")] * 2)
        connector.read_into("model.safetensors", 0, memoryview(bytearray(8)))
        assert connector.retries == 2


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (FileNotFoundError("gone"), NotFoundError),
        (PermissionError("who?"), AuthenticationError),
        (TimeoutError("slow"), LoadTimeoutError),
        (OSError("broken"), UnavailableError),
        (NotImplementedError("never"), NotSupportedError),
        (KeyError("odd"), RdmaloadError),
    ],
)
def test_failures_that_stay_are_named(url: str, failure: BaseException, error: type) -> None:
    rdmaload.save({"a": torch.arange(1000.0)}, url)
    Failing.failures.extend([failure] * 20)
    with pytest.raises(error, match=type(failure).__name__) as caught:
        rdmaload.open(url)
    assert caught.value.key == "model.safetensors"  # type: ignore[attr-defined]
    assert url in str(caught.value)


def test_options_reach_the_file_system_and_no_text(url: str) -> None:
    rdmaload.save({"a": torch.zeros(1)}, url)
    with connector_for(url, storage_options={"token": "hush-token", "deep": {"key": "hush-key"}}) as connector:
        assert isinstance(connector, FsspecConnector)
        connector.list_files()
        assert Failing.given["token"] == "hush-token"
        Failing.failures.extend([OSError("with hush-token and hush-key")] * 9)
        with pytest.raises(UnavailableError) as caught:
            connector.read_into("model.safetensors", 0, memoryview(bytearray(8)))
        assert "hush" not in str(caught.value)
        Failing.failures.clear()
    with connector_for("failing://me:hush@host/m") as connector:
        assert isinstance(connector, FileConnector)
        connector.list_files()
        assert (Failing.given["username"], Failing.given["password"]) == ("me", "hush")
        assert "hush" not in repr(connector)
    with pytest.raises(UrlError, match="does not take these options"):
        rdmaload.open(url, storage_options='{"refuse": true}')


def test_a_write_is_whole_or_not_there(url: str) -> None:
    with connector_for(url) as connector:
        assert isinstance(connector, FileConnector)
        connector.write("a", 3, [memoryview(b"old")])

        def breaks() -> Iterator[memoryview]:
            yield memoryview(b"ne")
            raise RuntimeError("the source broke")

        with pytest.raises(RuntimeError, match="broke"):
            connector.write("a", 3, breaks())
        with pytest.raises(ValueError, match="for a file of 3"):
            connector.write("a", 3, [memoryview(b"ne")])
        assert [(info.path, info.size) for info in connector.list_files()] == [("a", 3)]
        assert [name for name in Failing.store if "rdmaload" in name] == []
        assert connector.delete("a") is True
        assert connector.delete("a") is False
        with pytest.raises(FormatError):
            connector.write("../a", 0, [])


def test_a_file_that_changes_while_it_is_read_is_an_error(url: str) -> None:
    rdmaload.save({"a": torch.arange(1000.0)}, url)
    with rdmaload.open(url) as model:
        rdmaload.save({"a": torch.arange(1000.0) + 1}, url)
        with pytest.raises(IntegrityError, match="replaced"):
            model.load()


def test_a_path_that_is_a_file_and_one_that_is_nothing(url: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(NotFoundError, match="is a file"):
        rdmaload.open(f"fsspec+local://{tmp_path}/x")
    with pytest.raises(NotFoundError, match="there is nothing at"):
        rdmaload.open(f"fsspec+local://{tmp_path}/none")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotSupportedError, match="no connector for nowhere"):
        connector_for("nowhere://host/m")
    with pytest.raises(NotSupportedError, match="no connector for fsspec"):
        connector_for("fsspec+nowhere://host/m")
    monkeypatch.setitem(known_implementations, "lacking", {"class": "no_such.X", "err": "Install X"})
    with pytest.raises(NotSupportedError, match="fsspec, which lacks something: Install X"):
        connector_for("lacking://host/m")
    monkeypatch.setitem(sys.modules, "fsspec.registry", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'rdmaload\[fsspec\]'"):
        connector_for("fsspec+sftp://host/m")
    with pytest.raises(NotSupportedError, match=r"'rdmaload\[fsspec\]' brings"):
        connector_for("lacking://host/m")
