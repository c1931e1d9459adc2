"""What every store of objects or files promises, S3 and http servers, hubs and clouds alike: one suite over all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rdmaload
from rdmaload.connectors import FileConnector, connector_for
from rdmaload.connectors.objects import ObjectConnector
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, NotSupportedError, RdmaloadError
from rdmaload.stats import LoadStats
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint
from tests.support.servers import ServerError
from tests.support.shelves import SHELVES, Shelf, open_shelf


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials and proxies of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(params=SHELVES)
def shelf(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority) -> Iterator[Shelf]:
    directory = tmp_path / "shelf"
    directory.mkdir()
    try:
        opened = open_shelf(request.param, directory, authority)
        found = opened.__enter__()
    except ServerError as err:
        missing = "nginx" if "nginx" in request.param else "rclone"
        if "not found" not in str(err) or missing in os.environ.get("RDMALOAD_REQUIRE", ""):
            raise
        pytest.skip(str(err))
    try:
        yield found
    finally:
        opened.__exit__(None, None, None)


def fill(shelf: Shelf, checkpoint: Checkpoint) -> None:
    for path in sorted(checkpoint.directory.iterdir()):
        shelf.put(path.name, path.read_bytes())


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def test_plain_files_come_back_through_every_door(shelf: Shelf, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    fill(shelf, tiny_checkpoint)
    stats = LoadStats()
    assert_loaded(rdmaload.load(shelf.url, stats=stats, **shelf.options), tiny_checkpoint)
    assert stats.path == shelf.path
    counted = stats.verified_bytes if shelf.keeps_checksums else stats.unverified_bytes
    assert counted == stats.read_bytes >= stats.bytes > 0
    tensors = dict(rdmaload.weight_iterator(shelf.url, window_bytes=500_000, **shelf.options))
    assert_loaded(tensors, tiny_checkpoint)
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    rdmaload.load_into(target, shelf.url, **shelf.options)
    assert_loaded(target, tiny_checkpoint)
    pulled = rdmaload.pull_files(shelf.url, tmp_path / "pulled", allow_pattern="*", **shelf.options)
    assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_checkpoint.directory.iterdir()
    }
    if shelf.keeps_checksums:
        assert_loaded(rdmaload.load(shelf.url, verify="require", **shelf.options), tiny_checkpoint)
    else:
        with pytest.raises(IntegrityError, match="no checksums"):
            rdmaload.load(shelf.url, verify="require", **shelf.options)


def test_1500_files_and_names_with_spaces_unicode_and_nothing_in_them(shelf: Shelf, tmp_path: Path) -> None:
    odd = ["ä ö/日本 +&#%=.json", "plus+plus.bin", "a'b(c)!*,;$@.x", "a%20b.x", "x y/empty"]
    if not shelf.url.startswith("fsspec"):
        odd.append("what?.x")
    names = [*(f"files/nr {number}.txt" for number in range(1500)), *odd]
    for name in names:
        shelf.put(name, b"" if name.endswith("empty") else name.encode())
    shelf.put(".git/config", b"hidden")
    with connector_for(shelf.url, **shelf.options) as connector:
        assert isinstance(connector, FileConnector)
        listed = connector.list_files()
        assert [info.path for info in listed] == sorted(names)
        assert [info.size for info in listed] == [
            0 if name.endswith("empty") else len(name.encode()) for name in sorted(names)
        ]
        buffer = bytearray(3)
        assert connector.read_into("x y/empty", 0, memoryview(buffer)) == 0
        assert connector.read_into("a%20b.x", 2, memoryview(buffer)) == 3
        assert buffer == b"20b"
        assert connector.read_into("a%20b.x", 5, memoryview(buffer)) == 2
        assert connector.read_into("a%20b.x", 7, memoryview(buffer)) == 0
        assert connector.read_into("a%20b.x", 700, memoryview(buffer)) == 0
    pulled = rdmaload.pull_files(
        shelf.url, tmp_path / "pulled", allow_pattern=["[!f]*", "files/nr 149*"], **shelf.options
    )
    found = {str(path.relative_to(pulled)): path.read_text() for path in pulled.rglob("*") if path.is_file()}
    wanted = [*odd, *(name for name in names if name.startswith("files/nr 149"))]
    assert found == {name: "" if name.endswith("empty") else name for name in wanted}


def test_what_is_not_there_is_named(shelf: Shelf, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RdmaloadError) as caught:
        rdmaload.load(
            f"{shelf.url.partition('?')[0]}-none" + "?" * ("?" in shelf.url) + shelf.url.partition("?")[2],
            **shelf.options,
        )
    assert isinstance(caught.value, NotFoundError), caught.value
    assert "none" in str(caught.value)
    fill(shelf, tiny_checkpoint)
    with connector_for(shelf.url, **shelf.options) as connector:
        assert isinstance(connector, FileConnector)
        with pytest.raises(NotFoundError, match=r"no such/file\.bin") as missing:
            connector.read_into("no such/file.bin", 0, memoryview(bytearray(1)))
        assert (missing.value.url, missing.value.key) == (connector.url, "no such/file.bin")
        assert "hush" not in str(missing.value)
        assert connector.read_small("no.json") is None if connector.keeps_manifest else True


def test_a_file_that_is_replaced_after_the_open_is_an_error(shelf: Shelf, tiny_checkpoint: Checkpoint) -> None:
    fill(shelf, tiny_checkpoint)
    weights = sorted(tiny_checkpoint.directory.glob("*.safetensors"))[-1]
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    with rdmaload.open(shelf.url, **shelf.options) as model:
        shelf.put(weights.name, bytes(changed))
        with pytest.raises(IntegrityError, match="replaced") as caught:
            model.load()
        assert caught.value.key == weights.name
        assert "hush" not in str(caught.value)


def test_a_save_comes_back_verified_or_is_refused(shelf: Shelf, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    if not shelf.writable:
        with pytest.raises(NotSupportedError, match="can be read, not saved"):
            rdmaload.save(tiny_checkpoint.directory, shelf.url, **shelf.options)
        return
    big = bytes(range(256)) * (40 * 4096 + 7)  # three parts
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint.directory.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "ä b.bin").write_bytes(big)
    (source / "empty").touch()
    shelf.put("model-00009-of-00009.safetensors", b"of an older model")
    saved = rdmaload.save(source, shelf.url, **shelf.options)
    assert saved.published
    stats = LoadStats()
    verify = "require" if shelf.keeps_manifest else "auto"
    with rdmaload.open(shelf.url, verify=verify, **shelf.options) as model:
        assert_loaded(model.load(stats=stats), tiny_checkpoint)
        assert stats.verified_bytes == (stats.read_bytes if shelf.keeps_manifest else 0)
        pulled = model.pull_files(tmp_path / "pulled", allow_pattern="*")
    assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    with pytest.raises(rdmaload.AlreadyExistsError):
        rdmaload.save(source, shelf.url, overwrite=False, **shelf.options)
    rdmaload.save({"a": torch.zeros(3)}, shelf.url, **shelf.options)
    assert rdmaload.load(shelf.url, **shelf.options)["a"].tolist() == [0, 0, 0]


def names_at(shelf: Shelf) -> set[str]:
    """Every name below the model, also those that are no files of it."""
    with connector_for(shelf.url, **shelf.options) as connector:
        assert isinstance(connector, ObjectConnector)
        kept = {path for path, _ in connector.list_kept()}
        try:
            return kept | {info.path for info in connector.list_files()}
        except NotFoundError:
            return kept


def test_prune_takes_what_saves_left_and_remove_the_model_and_nothing_else(
    shelf: Shelf, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shelf.keeps_manifest:
        for remove in (rdmaload.prune, rdmaload.remove):
            with pytest.raises(NotSupportedError, match=r"keeps plain files|is read only"):
                remove(shelf.url, **shelf.options)
        return
    begun = time.time()
    fill(shelf, tiny_checkpoint)
    for remove in (rdmaload.remove, rdmaload.remove):  # what we did not save stays, however often one asks
        with pytest.raises(NotSupportedError, match="no manifest"):
            remove(shelf.url, **shelf.options)
    rdmaload.save(tiny_checkpoint.directory, shelf.url, **shelf.options)
    saved = names_at(shelf)
    left = {f".rdmaload/{'1' * 32}/index", f".rdmaload/saving/{'2' * 32}", f".rdmaload/parts/{'3' * 32}/0"}
    others = {"notes ä.md", "deeper/notes.md"}
    with connector_for(shelf.url, **shelf.options) as connector:  # rclone does not look again for what others put
        assert isinstance(connector, ObjectConnector)
        for name in [*left, *others, ".rdmaload/something-newer"]:
            connector.put(name, b"left")

    # Whatever clock the store has: to a machine whose own is far behind, all of it is young.
    monkeypatch.setattr("rdmaload.object_removal.time.time", lambda: 0.0)
    stats = rdmaload.prune(shelf.url, **shelf.options)
    assert (stats.generations, stats.saves, stats.keys, stats.waiting) == (0, 0, 0, 1)
    assert names_at(shelf) == saved | left | others | {".rdmaload/something-newer"}
    monkeypatch.setattr("rdmaload.object_removal.time.time", lambda: begun + 7200)
    stats = rdmaload.prune(shelf.url, **shelf.options)
    assert (stats.generations, stats.saves, stats.keys, stats.waiting) == (1, 2, 3, 0)
    assert names_at(shelf) == saved | others | {".rdmaload/something-newer"}
    assert_loaded(rdmaload.load(shelf.url, verify="require", **shelf.options), tiny_checkpoint)

    assert rdmaload.remove(shelf.url, **shelf.options) == len(saved) + 1
    assert names_at(shelf) == others
    with pytest.raises(NotSupportedError, match="no manifest"):
        rdmaload.remove(shelf.url, **shelf.options)


def test_a_file_is_removed_once(shelf: Shelf) -> None:
    shelf.put("config.json", b"{}")
    with connector_for(shelf.url, **shelf.options) as connector:
        assert isinstance(connector, FileConnector)
        if not shelf.writable:
            with pytest.raises(NotSupportedError):
                connector.delete("config.json")
            return
        assert connector.delete("config.json") is True
        assert connector.delete("config.json") is False
        with pytest.raises(FormatError, match=r"\.\."):
            connector.delete("../config.json")
