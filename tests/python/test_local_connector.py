"""Local directories: links, hidden directories, unfinished writes and errors of the file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import AuthenticationError, FormatError, NotFoundError, RdmaloadError, UrlError
from rdmaload.urls import parse_url


@pytest.fixture
def connector(tmp_path: Path) -> Iterator[LocalConnector]:
    (tmp_path / "model").mkdir()
    with LocalConnector(parse_url(tmp_path / "model")) as connector:
        yield connector


def paths(connector: LocalConnector) -> list[str]:
    return [info.path for info in connector.list_files()]


def test_links_to_files_are_followed_and_links_to_directories_are_not(
    connector: LocalConnector,
) -> None:
    blobs = connector.root.parent / "blobs"
    blobs.mkdir()
    (blobs / "b1").write_bytes(b"weights")
    (connector.root / "model.safetensors").symlink_to("../blobs/b1")
    (connector.root / "loop").symlink_to(".")
    (connector.root / "outside").symlink_to(blobs)
    (info,) = connector.list_files()
    assert (info.path, info.size) == ("model.safetensors", 7)
    buffer = bytearray(7)
    assert connector.read_into("model.safetensors", 0, memoryview(buffer)) == 7
    assert buffer == b"weights"


def test_a_link_to_nothing_is_an_incomplete_model(connector: LocalConnector) -> None:
    (connector.root / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(NotFoundError, match="incomplete") as caught:
        connector.list_files()
    assert caught.value.key == "model.safetensors"


def test_a_write_replaces_a_link_and_leaves_its_target(connector: LocalConnector) -> None:
    target = connector.root.parent / "target"
    target.write_bytes(b"old")
    (connector.root / "a").symlink_to(target)
    connector.write("a", 3, [memoryview(b"new")])
    assert (connector.root / "a").read_bytes() == b"new"
    assert target.read_bytes() == b"old"


def test_hidden_directories_unfinished_writes_and_odd_things_are_left_out(
    connector: LocalConnector,
) -> None:
    for hidden in (".git", ".cache", "sub/.hidden"):
        (connector.root / hidden).mkdir(parents=True)
        (connector.root / hidden / "file").touch()
    (connector.root / ".rdmaload-0123.tmp").touch()
    (connector.root / "sub" / ".rdmaload-0123.tmp").touch()
    (connector.root / ".gitattributes").touch()
    os.mkfifo(connector.root / "pipe")
    assert paths(connector) == [".gitattributes"]


def test_a_name_that_is_not_unicode_is_refused(connector: LocalConnector) -> None:
    Path(os.fsdecode(os.fsencode(connector.root) + b"/\xff")).touch()
    with pytest.raises(FormatError, match="not Unicode"):
        connector.list_files()


def test_the_order_is_that_of_the_paths(connector: LocalConnector) -> None:
    for name in ("b", "a/z", "a-b", "B", "a/b/c"):
        (connector.root / name).parent.mkdir(parents=True, exist_ok=True)
        (connector.root / name).touch()
    assert paths(connector) == sorted(["b", "a/z", "a-b", "B", "a/b/c"])


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in (("none", "no directory"), ("file", "is a file; a model is a directory")):
        with (
            LocalConnector(parse_url(tmp_path / name)) as connector,
            pytest.raises(NotFoundError, match=says),
        ):
            connector.list_files()


def test_a_write_makes_the_directories(tmp_path: Path) -> None:
    with LocalConnector(parse_url(tmp_path / "new" / "model")) as connector:
        connector.write("sub/a", 1, [memoryview(b"1")])
        assert paths(connector) == ["sub/a"]
        assert (connector.root / "sub/a").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def test_errors_of_the_file_system_are_ours(connector: LocalConnector) -> None:
    (connector.root / "file").touch()
    (connector.root / "directory").mkdir()
    with pytest.raises(RdmaloadError, match="cannot write file/a in"):
        connector.write("file/a", 0, [])
    with pytest.raises(RdmaloadError, match="cannot write directory in"):
        connector.write("directory", 0, [])
    with pytest.raises(RdmaloadError, match=r"cannot read directory in .*: Is a directory"):
        connector.read_into("directory", 0, memoryview(bytearray(1)))
    with pytest.raises(RdmaloadError, match="cannot remove directory in"):
        connector.delete("directory")
    assert paths(connector) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(connector: LocalConnector) -> None:
    (connector.root / "a").touch(mode=0)
    with pytest.raises(AuthenticationError, match="Permission denied"):
        connector.read_into("a", 0, memoryview(bytearray(1)))


def test_an_error_of_the_source_that_is_ours_passes_unchanged(connector: LocalConnector) -> None:
    ours = NotFoundError("a chunk is gone", key="m/chunks/1")

    def blocks() -> Iterator[memoryview]:
        raise ours
        yield

    with pytest.raises(NotFoundError) as caught:
        connector.write("a", 1, blocks())
    assert caught.value is ours


def test_a_relative_url_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with LocalConnector(parse_url("./here")) as connector:
        monkeypatch.chdir("/")
        connector.write("a", 0, [])
    assert (tmp_path / "here" / "a").exists()


def test_options_of_a_file_url_are_read(tmp_path: Path) -> None:
    with LocalConnector(parse_url(f"file://{tmp_path}?threads=7")) as connector:
        assert connector.options.threads == 7
    with pytest.raises(UrlError, match="unknown option thread "):
        LocalConnector(parse_url(f"file://{tmp_path}?thread=7"))
