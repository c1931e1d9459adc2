"""Directories of models' files for engines: pinned, shared by processes, cleaned up; headers instead of weights."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import rdmaload
from rdmaload.errors import LoadTimeoutError, NotFoundError
from rdmaload.integrations import metadata
from rdmaload.integrations.metadata import resolve_model
from tests.support.servers import RedisServer


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cache"
    path.mkdir()
    yield path
    metadata.release()


@pytest.fixture
def url(tmp_path: Path) -> str:
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    save_file({"w": torch.arange(1000.0)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "more.json").write_text("[]")
    url = f"memory://{tmp_path.name}/m"
    rdmaload.save(directory, url)
    return url


def test_files_and_headers_but_no_weights(url: str, root: Path) -> None:
    found = resolve_model(url, root=root)
    assert sorted(path.relative_to(found.directory).as_posix() for path in found.directory.rglob("*.*")) == [
        *("config.json", "model.safetensors", "sub/more.json")
    ]
    weights = found.directory / "model.safetensors"
    content = weights.read_bytes()
    assert len(content) == 8 + int.from_bytes(content[:8], "little") < 1000
    with pytest.raises(safetensors.SafetensorError, match="incomplete metadata"):
        safetensors.safe_open(weights, "pt")


def test_a_generation_has_one_directory(url: str, root: Path, tmp_path: Path) -> None:
    first = resolve_model(url, root=root)
    assert resolve_model(url, root=root) == first
    assert resolve_model(first.url, root=root) == first
    (tmp_path / "checkpoint" / "config.json").write_text('{"new": 1}')
    rdmaload.save(tmp_path / "checkpoint", url)
    second = resolve_model(url, root=root)
    assert second.directory != first.directory
    assert (first.directory / "config.json").read_text() == "{}"
    again = resolve_model(first.url, root=root)  # pinned, and replaced since
    assert (again.directory / "config.json").read_text() == "{}"


def test_a_directory_of_plain_files_follows_them(tmp_path: Path, root: Path) -> None:
    model = tmp_path / "plain"
    model.mkdir()
    save_file({"w": torch.ones(2)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    first = resolve_model(f"file://{model}", root=root)
    (model / "config.json").write_text('{"a": 1}')
    second = resolve_model(f"file://{model}", root=root)
    assert (second.directory / "config.json").read_text() == '{"a": 1}'
    assert first.directory != second.directory
    assert first.url == f"file://{model}"


def test_many_threads_pull_once(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls = []
    original = metadata._fill
    monkeypatch.setattr(metadata, "_fill", lambda directory, model: (pulls.append(1), original(directory, model)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: resolve_model(url, root=root).directory, range(16)))
    assert len(set(found)) == len(pulls) == 1
    assert not list(root.glob("*.partial-*"))


def test_a_pull_that_fails_leaves_nothing(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_write_headers", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        resolve_model(url, root=root)
    assert not [path for path in root.iterdir() if path.is_dir()]
    with pytest.raises(NotFoundError):
        resolve_model(f"{url}-not", root=root)


def test_waiting_for_another_process_ends(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve_model(url, root=root).directory
    (directory / "config.json").unlink()
    shutil.rmtree(directory)
    with (root / f"{directory.name}.pull").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(metadata, "_PULL_SECONDS", 0.1)
        with pytest.raises(LoadTimeoutError, match="RDMALOAD_CACHE_DIR"):
            resolve_model(url, root=root)
    assert resolve_model(url, root=root).directory == directory


def _old(root: Path, key: str) -> Path:
    (root / key).mkdir()
    (root / key / "config.json").write_text("{}")
    (root / f"{key}.use").touch()
    long_ago = time.time() - 30 * 86400
    os.utime(root / f"{key}.use", (long_ago, long_ago))
    return root / key


def test_old_directories_go_unless_a_process_uses_them(url: str, root: Path) -> None:
    used = _old(root, "used")
    _old(root, "unused")
    (root / "unused.partial-x").mkdir()
    with (root / "used.use").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        found = resolve_model(url, root=root)
        assert used.is_dir()
        assert not list(root.glob("unused*"))
        assert not list(root.glob("doomed-*"))
        assert found.directory.is_dir()
    resolve_model(url, root=root)
    assert not used.exists()


def test_too_many_directories_go_oldest_first(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (root / f"m{number}").mkdir()
        (root / f"m{number}.use").touch()
        os.utime(root / f"m{number}.use", (time.time() - 100 + number,) * 2)
    monkeypatch.setattr(metadata, "_KEEP_ENTRIES", 3)
    resolve_model(url, root=root)
    assert sorted(path.name for path in root.glob("m?")) == ["m2", "m3"]


def test_a_directory_stays_as_long_as_its_process(tmp_path: Path, root: Path) -> None:
    with RedisServer() as server:
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
        url = server.url("m")
        rdmaload.save(tmp_path, url)
        code = "import sys; from pathlib import Path; from rdmaload.integrations.metadata import resolve_model as r; "
        code += "print(r(sys.argv[1], root=Path(sys.argv[2])).directory, flush=True); sys.stdin.read()"
        command = [sys.executable, "-W", "ignore", "-c", code, url, str(root)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            directory = Path(process.stdout.readline().strip())
            metadata._remove(root, directory.name)
            assert directory.is_dir()
            process.communicate()
        metadata._remove(root, directory.name)
        assert not directory.exists()


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "given"))
    assert metadata.cache_root() == tmp_path / "given" / "engines"
    monkeypatch.delenv("RDMALOAD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    root = metadata.cache_root()
    assert root == tmp_path / "xdg" / "rdmaload" / "engines"
    root.chmod(0o777)  # code that an engine may run must not be anybody's to write
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    other = metadata.cache_root()
    assert other != root
    assert other.stat().st_mode & 0o777 == 0o700
    assert "others may write" in caplog.text
