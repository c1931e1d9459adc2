"""How local files are read (`file_io`): the same bytes in every way, and `stats` says which way it was."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdmaload
from rdmaload import LoadStats, _core
from rdmaload.errors import IntegrityError, UrlError
from tests.support.checkpoints import TensorSpec, compare, make_checkpoint, read_safetensors

WAYS = ("auto", "buffered", "direct")


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@settings(max_examples=40, deadline=None)
@given(
    elements=st.lists(st.integers(0, 300_000), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from(["U8", "BF16", "F32", "I64"]), min_size=12, max_size=12),
    selected=st.sets(st.integers(0, 11)),
    way=st.sampled_from(WAYS),
    shift=st.integers(0, 700),
    cold=st.booleans(),
)
def test_every_way_gives_the_same_bytes(
    elements: list[int], dtypes: list[str], selected: set[int], way: str, shift: int, cold: bool
) -> None:
    specs = {f"t{i}": TensorSpec(dtypes[i], (count,)) for i, count in enumerate(elements)}
    with tempfile.TemporaryDirectory() as name:
        directory = make_checkpoint(Path(name) / "model", specs).directory
        expected = raw_tensors(directory / "model.safetensors")
        if cold:
            drop_from_cache(directory)
        include = [f"t{i}" for i in selected] or None
        stats = LoadStats()
        state = rdmaload.load(directory, include=include, file_io=way, stats=stats)
        assert state.keys() == {found for found in expected if include is None or found in include}
        for found, tensor in state.items():
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[found])
        # Into memory at any place.
        targets = {}
        for found, tensor in state.items():
            nbytes = tensor.numel() * tensor.itemsize
            memory = torch.zeros(shift * 8 + nbytes, dtype=torch.uint8)
            targets[found] = memory[shift * 8 :].view(tensor.dtype).view(tensor.shape)
        rdmaload.load_into(targets, directory, strict=False, file_io=way)
        for found, target in targets.items():
            assert torch.equal(target.reshape(-1).view(torch.uint8), expected[found])


def raw_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(numpy.frombuffer(raw, dtype=numpy.uint8).copy())
        for name, (_, raw) in read_safetensors(path).items()
    }


def large_checkpoint(directory: Path) -> Path:
    specs = {f"layer.{i}": TensorSpec("BF16", (3_000_001,)) for i in range(4)}
    return make_checkpoint(directory, specs).directory


def test_direct_reads_are_named_and_their_copies_counted(tmp_path: Path) -> None:
    directory = large_checkpoint(tmp_path / "model")
    stats = LoadStats()
    state = rdmaload.load(directory, file_io="direct", stats=stats)
    assert compare(state, directory) == stats.bytes
    assert stats.copied_bytes <= stats.bytes
    if stats.path == "file-direct":
        assert stats.fallback_reason is None
        assert stats.connections >= 8
    else:  # a file system without O_DIRECT
        assert stats.path == "file-buffered"
        assert stats.fallback_reason


def test_a_warm_or_a_small_file_is_read_through_the_page_cache(tmp_path: Path) -> None:
    directory = large_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").read_bytes()
    for way in ("auto", "buffered"):
        stats = LoadStats()
        rdmaload.load(directory, file_io=way, stats=stats)
        assert (stats.path, stats.fallback_reason, stats.copied_bytes) == ("file-buffered", None, 0)


def test_memory_file_systems_are_read_plainly() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.fail("no /dev/shm to try")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = large_checkpoint(Path(name) / "model")
        stats = LoadStats()
        state = rdmaload.load(directory, stats=stats)
        assert compare(state, directory) == stats.bytes
        assert (stats.path, stats.fallback_reason) == ("file-buffered", None)


@pytest.mark.parametrize(("way", "level"), [("direct", logging.WARNING), ("auto", logging.INFO)])
def test_what_was_given_up_is_in_stats_and_once_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str, level: int
) -> None:
    directory = large_checkpoint(tmp_path / "model")
    monkeypatch.setattr(_core.Transport, "fallback_reason", property(lambda self: "O_DIRECT was refused"))
    stats = LoadStats()
    with caplog.at_level(logging.INFO, logger="rdmaload"), rdmaload.open(directory, file_io=way) as model:
        model.load(stats=stats)
        model.load(stats=stats)
    assert stats.fallback_reason == "O_DIRECT was refused"
    assert [record.levelno for record in caplog.records if "O_DIRECT was refused" in record.message] == [level]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_replaced_or_truncated_is_an_error(tmp_path: Path, way: str) -> None:
    directory = large_checkpoint(tmp_path / "model")
    path = directory / "model.safetensors"
    with rdmaload.open(directory, file_io=way) as model:
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        with pytest.raises(IntegrityError, match="changed or replaced"):
            model.load()
    with rdmaload.open(directory, file_io=way) as model:
        os.truncate(path, path.stat().st_size - 1000)
        with pytest.raises(IntegrityError, match="truncated"):
            model.load()


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UrlError, match="auto, buffered, direct"):
        rdmaload.load(tmp_path, file_io="mmap")
