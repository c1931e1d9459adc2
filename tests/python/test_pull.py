"""pull_files: which files come, byte for byte, each whole or not at all."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdmaload
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.errors import IntegrityError, NotFoundError, StaleGenerationError
from rdmaload.stats import LoadStats, Progress
from tests.support.checkpoints import write_safetensors
from tests.support.servers import RedisServer

SIDE_FILES = {
    "config.json": b'{"model_type": "test"}',
    "empty.txt": b"",
    "tokenizer.model": random.Random(1).randbytes(50_000),
    "sub/deeper/vocab.txt": b"a\r\nb\0c\xff",
    "sub/config.json": b"{}",
    "chat template.jinja": "ünïcode".encode(),
}
WEIGHTS = ["extra/adapter.safetensors", "model.safetensors", "old.bin", "quantised.gguf", "sub/optimizer.pt"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for path, content in SIDE_FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    for path in WEIGHTS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".safetensors"):
            write_safetensors(root / path, {"a": ("F32", [1000])})
        else:
            (root / path).write_bytes(random.Random(path).randbytes(2000))
    return root


@pytest.fixture(params=["redis", "memory", "directory"])
def url(request: pytest.FixtureRequest, model: str, source: Path) -> Iterator[str]:
    if request.param == "directory":
        yield str(source)
        return
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        place = server.url(model)
    else:
        place = f"memory://{model}/m"
    rdmaload.save(source, place, chunk_bytes=1000)
    yield place
    forget_store(model)


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_all_but_weights_by_default(url: str, tmp_path: Path) -> None:
    stats = LoadStats()
    target = rdmaload.pull_files(url, tmp_path / "new" / "target", stats=stats)
    assert target == tmp_path / "new" / "target"
    assert content(target) == SIDE_FILES
    assert stats.bytes == sum(map(len, SIDE_FILES.values()))
    assert stats.read_bytes == stats.bytes


@pytest.mark.parametrize(
    ("allow", "ignore", "expected"),
    [
        ("*.json", None, ["config.json", "sub/config.json"]),  # * matches / as well
        (["config.json", "token*"], None, ["config.json", "tokenizer.model"]),
        ("*", None, [*SIDE_FILES, *WEIGHTS]),
        ("*.safetensors", None, ["extra/adapter.safetensors", "model.safetensors"]),
        ("model.safetensors", None, ["model.safetensors"]),
        (None, "sub/*", [path for path in SIDE_FILES if not path.startswith("sub/")]),
        (None, ["*.json", "*.txt"], ["tokenizer.model", "chat template.jinja"]),
        ("sub/*", "*.pt", ["sub/deeper/vocab.txt", "sub/config.json"]),
        ("*.json", "*", []),
        ([], None, []),
    ],
)
def test_patterns(url: str, tmp_path: Path, allow: object, ignore: object, expected: list[str], source: Path) -> None:
    target = tmp_path / "target"
    if not expected:
        with pytest.raises(NotFoundError, match="no file that matches"):
            rdmaload.pull_files(url, target, allow_pattern=allow, ignore_pattern=ignore)
        return
    rdmaload.pull_files(url, target, allow_pattern=allow, ignore_pattern=ignore)
    assert content(target) == {path: (source / path).read_bytes() for path in expected}


def test_the_case_of_a_pattern_matters(url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="CONFIG"):
        rdmaload.pull_files(url, tmp_path / "target", allow_pattern="CONFIG.JSON")


def test_without_a_target_it_makes_a_directory(url: str) -> None:
    target = rdmaload.pull_files(url, allow_pattern="config.json")
    try:
        assert content(target) == {"config.json": SIDE_FILES["config.json"]}
        assert target.is_absolute()
    finally:
        shutil.rmtree(target)


def test_a_pulled_copy_loads(url: str, source: Path, tmp_path: Path) -> None:
    rdmaload.pull_files(url, tmp_path / "copy", allow_pattern="*")
    assert content(tmp_path / "copy") == content(source)
    assert set(rdmaload.load(tmp_path / "copy")) == {"a"}


def test_it_replaces_files_and_leaves_others_alone(url: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_bytes(b"old, and longer than the new one" * 10)
    (target / "mine.txt").write_bytes(b"mine")
    rdmaload.pull_files(url, target, allow_pattern="config.json")
    assert content(target) == {"config.json": SIDE_FILES["config.json"], "mine.txt": b"mine"}


def test_a_relative_target_and_a_string(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rdmaload.pull_files(url, "here", allow_pattern="config.json")
    assert content(tmp_path / "here") == {"config.json": SIDE_FILES["config.json"]}


def test_progress(url: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    rdmaload.pull_files(url, tmp_path / "target", allow_pattern="*", progress=seen.append)
    assert {progress.operation for progress in seen} == {"pull"}
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert seen[-1].files_done == seen[-1].files_total == len(SIDE_FILES) + len(WEIGHTS)
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)


def test_a_large_file_comes_in_blocks(model: str, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(40 << 20)  # above the size of one block, not a multiple of it
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "big.dat").write_bytes(data)
    url = f"memory://{model}/m"
    rdmaload.save(tmp_path / "source", url)
    stats = LoadStats()
    rdmaload.pull_files(url, tmp_path / "target", stats=stats)
    forget_store(model)
    assert (tmp_path / "target" / "big.dat").read_bytes() == data
    assert stats.read_bytes == len(data)  # no chunk twice
    assert stats.verified_bytes == len(data)


class DamagedConnector(MemoryConnector):
    damaged: str

    def get_into(self, key: str, buffer: memoryview) -> int:
        if key.endswith(self.damaged):
            raise IntegrityError(f"{key} is damaged")
        return super().get_into(key, buffer)


def test_nothing_half_written_shows_after_a_failure(
    model: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rdmaload.save(source, f"memory://{model}/m", chunk_bytes=1000)
    with rdmaload.open(f"memory://{model}/m") as opened:
        number = next(file.number for file in opened.files if file.path == "tokenizer.model")
    cls = type("Damaged", (DamagedConnector,), {"damaged": f"/{number}/40"})
    monkeypatch.setitem(registry._registered, "damaged", cls)
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.model").write_bytes(b"the old one")
    with pytest.raises(IntegrityError, match=f"/{number}/40 is damaged") as caught:
        rdmaload.pull_files(f"damaged://{model}/m", target, allow_pattern="*", max_integrity_attempts=1)
    assert caught.value.key is not None
    forget_store(model)
    found = content(target)
    assert found.pop("tokenizer.model") == b"the old one"
    for path, data in found.items():  # files before it, whole; no temporary ones
        assert data == (source / path).read_bytes(), path
    assert not [path for path in target.rglob("*") if path.name.startswith(".rdmaload")]


def test_a_model_that_is_replaced_and_pruned_meanwhile(
    redis_server: RedisServer, redis_url: str, source: Path, tmp_path: Path
) -> None:
    rdmaload.save(source, redis_url)
    with rdmaload.open(redis_url) as opened:
        rdmaload.save(source, redis_url)
        rdmaload.prune(redis_url, force=True)
        with pytest.raises(StaleGenerationError, match="open the model again"):
            opened.pull_files(tmp_path / "target")
    assert content(tmp_path / "target") in ({}, {"empty.txt": b""})


def test_a_file_in_the_way_of_a_directory_is_a_clear_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "sub").write_bytes(b"a file")
    with pytest.raises(rdmaload.RdmaloadError, match="sub/"):
        rdmaload.pull_files(url, tmp_path / "target", allow_pattern="sub/*")
    assert (tmp_path / "target" / "sub").read_bytes() == b"a file"
