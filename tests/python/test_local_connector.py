"""Local directories: links, hidden directories, unfinished writes and errors of the file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

import rdmaload
from rdmaload import _core
from rdmaload.connectors.local import LocalConnector
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    NotFoundError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from rdmaload.options import Options
from rdmaload.urls import parse_url

MIB = 1 << 20


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


def blocks_of(content: bytes, block_bytes: int, *, shift: int) -> Iterator[memoryview]:
    """As a save gives them: one buffer, filled again for each; `shift` bytes behind where a huge page begins."""
    buffer = memoryview(_core.HostArena(max(block_bytes + shift, 2 * MIB)))[shift : shift + block_bytes]
    for begin in range(0, len(content), block_bytes):
        part = content[begin : begin + block_bytes]
        buffer[: len(part)] = part
        yield buffer[: len(part)]


@pytest.mark.parametrize("file_io", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("shift", [0, 24])
@pytest.mark.parametrize("block_bytes", [2 * MIB, 1044480, 1_000_001])
@pytest.mark.parametrize("size", [0, 1, 4096, 5 * MIB, 5 * MIB + 4095, 4 * MIB - 1])
def test_every_byte_is_written_whatever_the_blocks(
    tmp_path: Path,
    size: int,
    block_bytes: int,
    shift: int,
    file_io: Literal["auto", "buffered", "direct"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = random.Random(size).randbytes(size)
    with LocalConnector(parse_url(tmp_path), Options(file_io=file_io)) as connector:
        connector.write("f", size, blocks_of(content, block_bytes, shift=shift))
    assert (tmp_path / "f").read_bytes() == content
    assert os.listdir(tmp_path) == ["f"]
    if shift == 0 and block_bytes % 4096 == 0:  # blocks as the disk wants them, up to the end of the file
        assert not caplog.records


def cached_pages(path: Path) -> int:
    """How many of a file's pages are read without waiting for the disk, of those at every 64 KiB."""
    found = 0
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, os.fstat(file.fileno()).st_size, 64 << 10):
            with contextlib.suppress(BlockingIOError):
                found += os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
    return found


def test_what_is_saved_goes_past_the_page_cache_and_what_is_pulled_stays_in_it(tmp_path: Path) -> None:
    """Where the disk of the tests has direct writes; on one in memory every page is cached."""
    state = {"large": torch.zeros(4 * MIB, dtype=torch.float16), "small": torch.zeros(3)}
    rdmaload.save(state, tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    pages = -(-saved.stat().st_size // (64 << 10))
    with open(saved, "rb") as file:
        direct = _core.is_local_disk(file.fileno())
    assert cached_pages(saved) <= (1 if direct else pages)  # the end of the file is no whole block
    rdmaload.pull_files(tmp_path / "saved", tmp_path / "pulled", allow_pattern="*")
    assert cached_pages(tmp_path / "pulled" / saved.name) == pages
    small = tmp_path / "small"
    with LocalConnector(parse_url(tmp_path)) as connector:
        connector.write("small", MIB, blocks_of(bytes(MIB), MIB, shift=0))
    assert cached_pages(small) == 16


def test_a_disk_that_refuses_direct_writes_gets_them_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = random.Random(1).randbytes(5 * MIB)
    written = os.write

    def refuses_the_second(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and os.lseek(descriptor, 0, os.SEEK_CUR) > 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, data[: MIB // 2])  # and others are short

    monkeypatch.setattr("rdmaload.connectors.output_file.os.write", refuses_the_second)
    ways: tuple[tuple[Literal["direct", "auto"], int], ...] = (("direct", 1), ("auto", 0))
    for file_io, warnings in ways:
        caplog.clear()
        with LocalConnector(parse_url(tmp_path), Options(file_io=file_io)) as connector:
            connector.write(file_io, len(content), blocks_of(content, MIB, shift=0))
        assert (tmp_path / file_io).read_bytes() == content
        assert [record.message.count("written through the page cache") for record in caplog.records] == [1] * warnings
    monkeypatch.setattr("rdmaload.connectors.output_file.fcntl.fcntl", _refuse_direct)
    with LocalConnector(parse_url(tmp_path), Options(file_io="direct")) as connector:
        connector.write("f", len(content), blocks_of(content, MIB, shift=0))
    assert (tmp_path / "f").read_bytes() == content
    assert "O_DIRECT was refused" in caplog.text


def _refuse_direct(descriptor: int, command: int, argument: int = 0) -> int:
    if argument & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return 0


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rdmaload.connectors.output_file.os.write", full)
    refused = pytest.raises(UnavailableError, match=r"cannot write f in .*No space left on device; free space")
    with LocalConnector(parse_url(tmp_path)) as connector, refused:
        connector.write("f", 5 * MIB, blocks_of(bytes(5 * MIB), MIB, shift=0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("chunk_bytes", "file_io", "path"),
    [
        (1044480, "auto", "file-buffered+file-direct"),  # the end of the file, and small files
        (500_001, "direct", "file-buffered+file-direct"),
        (8192, "direct", "file-buffered+file-direct"),
        (1044480, "buffered", "file-buffered"),
    ],
)
def test_a_save_says_how_it_wrote_and_writes_whole_blocks(
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chunk_bytes: int,
    file_io: str,
    path: str,
) -> None:
    state = {"large": torch.arange(5 * MIB, dtype=torch.int32)}
    stored = f"memory://{model}/m"
    rdmaload.save(state, stored, chunk_bytes=chunk_bytes)
    written = os.write
    direct: list[int] = []

    def note(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(len(data))
        return written(descriptor, data)

    monkeypatch.setattr("rdmaload.connectors.output_file.os.write", note)
    stats = rdmaload.save(stored, tmp_path, file_io=file_io)
    assert (stats.path, caplog.messages) == (path, [])
    assert len(direct) in ((0,) if file_io == "buffered" else (5, 6))  # 20 MiB and a header, in blocks of about 4 MiB
    assert torch.equal(rdmaload.load(tmp_path)["large"], state["large"])
    forget_store(model)


def test_odd_blocks_end_direct_writes_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = random.Random(2).randbytes(5 * MIB)
    with LocalConnector(parse_url(tmp_path), Options(file_io="direct")) as connector:
        connector.write("f", len(content), blocks_of(content, 1_000_001, shift=0))
        assert connector.write_path == "file-buffered+file-direct"
    assert (tmp_path / "f").read_bytes() == content
    assert "no multiples of 4096" in caplog.text


@pytest.mark.parametrize("size", [100, 5 * MIB])
def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_write_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            steps.append("sync directory")
        else:
            steps.append(f"sync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with LocalConnector(parse_url(tmp_path)) as connector:
        connector.write("f", size, blocks_of(bytes(size), MIB, shift=0))
    assert steps == [f"sync {size} bytes", "rename", "sync directory"]
