"""`cache_dir`: what was read once is read from this machine's disk, by every process, and is never wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload._core import crc32c
from rdmaload.connectors.local import LocalConnector
from rdmaload.disk_cache import cache_entries
from rdmaload.errors import IntegrityError
from rdmaload.file_manifest import FILE_MANIFEST, file_index_path
from rdmaload.index import Index, IndexFile, index_of_files
from rdmaload.manifest import Manifest
from rdmaload.stats import LoadStats
from rdmaload.urls import parse_url
from tests.support.checkpoints import Checkpoint, make_checkpoint
from tests.support.s3 import HttpObjects, Reply, Request, etag_of
from tests.support.servers import RedisServer

CHUNK_BYTES = 100_000
PAGE = 4096


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "made on first use"


def plain_objects(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {f"/bucket/m/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}


def saved_objects(checkpoint: Checkpoint) -> dict[str, bytes]:
    """As rdmaload saves it, in chunks of CHUNK_BYTES."""
    objects = plain_objects(checkpoint)
    with LocalConnector(parse_url(str(checkpoint.directory))) as connector:
        found = index_of_files(connector)
    files, crcs = [], b""
    for file in found.files:
        content = objects[f"/bucket/m/{file.path}"]
        files.append(IndexFile(file.path, file.size, file.number, file.rank, file.header, etag=etag_of(content)))
        for at in range(0, len(content), CHUNK_BYTES):
            crcs += crc32c(content[at : at + CHUNK_BYTES]).to_bytes(4, "little")
    value = Index.of(files, chunk_bytes=CHUNK_BYTES, crcs=crcs).encode()
    generation = "0" * 32
    manifest = Manifest.of(value, generation=generation, files=len(files), bytes=found.total_bytes, writer="test")
    objects[f"/bucket/m/{file_index_path(generation)}"] = value
    objects[f"/bucket/m/{FILE_MANIFEST}"] = manifest.encode()
    return objects


def url_of(server: HttpObjects) -> str:
    return f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1&username=testing&password=s3cr3t"


@pytest.fixture
def saved(tiny_checkpoint: Checkpoint) -> Iterator[HttpObjects]:
    with HttpObjects(saved_objects(tiny_checkpoint)) as server:
        yield server


def weights_read(server: HttpObjects) -> list[tuple[str, tuple[int, int] | None]]:
    """Ranges of weight files that were asked for; opening a plain file reads its header by one of them."""
    return [
        (request.path, request.range)
        for request in server.requests
        if request.method == "GET" and request.path.endswith(".safetensors")
    ]


def entries_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if len(path.name) == 64)


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def load(url: str, cache: Path, checkpoint: Checkpoint, **options: object) -> LoadStats:
    stats = LoadStats()
    assert_loaded(rdmaload.load(url, stats=stats, cache_dir=cache, **options), checkpoint)
    return stats


def test_the_second_load_asks_the_store_for_no_weights(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    first = load(url_of(saved), cache, tiny_checkpoint)
    assert (first.path, first.cached_bytes, first.fallback_reason) == ("http", 0, None)
    before = len(weights_read(saved))
    assert before > 10
    second = load(url_of(saved), cache, tiny_checkpoint, verify="require")
    assert len(weights_read(saved)) == before
    assert (second.path, second.fallback_reason) == ("cache-file-buffered", None)
    assert second.cached_bytes == second.read_bytes == second.verified_bytes == first.read_bytes


def test_plain_files_are_kept_too_and_stay_unverified(cache: Path, tiny_checkpoint: Checkpoint) -> None:
    with HttpObjects(plain_objects(tiny_checkpoint)) as server:
        load(url_of(server), cache, tiny_checkpoint)
        before = len(weights_read(server))
        stats = load(url_of(server), cache, tiny_checkpoint)
        # Opening plain files reads their headers, whose ETag says that the rest is still right.
        files = len(list(tiny_checkpoint.directory.glob("*.safetensors")))
        assert len(weights_read(server)) - before == files
    assert stats.cached_bytes == stats.read_bytes == stats.unverified_bytes


def test_every_door_fills_it_and_reads_it(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    url = url_of(saved)
    names = sorted(rdmaload.load(url))
    some = rdmaload.load(url, cache_dir=cache, include=names[:2])
    assert set(some) == set(names[:2])
    stats = LoadStats()
    iterated = dict(rdmaload.weight_iterator(url, cache_dir=cache, window_bytes=300_000, stats=stats))
    assert_loaded(iterated, tiny_checkpoint)
    assert 0 < stats.cached_bytes < stats.read_bytes
    assert stats.path == "http+cache-file-buffered"
    target = {name: torch.empty_like(tensor) for name, tensor in iterated.items()}
    stats = rdmaload.load_into(target, url, cache_dir=cache)
    assert stats.cached_bytes == stats.read_bytes
    assert_loaded(target, tiny_checkpoint)
    for _ in range(2):
        stats = LoadStats()
        pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern="*", cache_dir=cache, stats=stats)
        for path in tiny_checkpoint.directory.iterdir():
            assert (pulled / path.name).read_bytes() == path.read_bytes()
    assert stats.cached_bytes == stats.read_bytes


def test_a_replaced_object_is_never_served_old(cache: Path, tmp_path: Path) -> None:
    specs = {"w": ("F32", (100_000,))}
    old = make_checkpoint(tmp_path / "old", specs, seed=1)
    new = make_checkpoint(tmp_path / "new", specs, seed=2)
    with HttpObjects(plain_objects(old)) as server:
        load(url_of(server), cache, old)
        server.objects = plain_objects(new)
        assert load(url_of(server), cache, new).cached_bytes == 0
        server.objects = plain_objects(old)  # an older version, of which the cache still knows everything
        assert load(url_of(server), cache, old).cached_bytes > 0


def test_a_key_value_store_is_kept_by_its_generation(
    redis_server: RedisServer, model: str, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    url = redis_server.url(model)
    rdmaload.save(tiny_checkpoint.directory, url, chunk_bytes=CHUNK_BYTES)
    assert load(url, cache, tiny_checkpoint).path == "resp-tcp"
    stats = load(url, cache, tiny_checkpoint)
    assert stats.path == "cache-file-buffered"
    assert stats.cached_bytes == stats.read_bytes == stats.verified_bytes
    rdmaload.save(tiny_checkpoint.directory, url, chunk_bytes=CHUNK_BYTES)  # the same bytes, another generation
    assert load(url, cache, tiny_checkpoint).cached_bytes == 0


def test_what_has_no_version_is_not_kept(
    redis_server: RedisServer, model: str, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    url = redis_server.url(model)
    rdmaload.save(tiny_checkpoint.directory, url, layout="sglang")
    for _ in range(2):
        stats = LoadStats()
        rdmaload.load(url, cache_dir=cache, stats=stats)
        assert stats.cached_bytes == 0
        assert "nothing tells one version" in (stats.fallback_reason or "")


@pytest.mark.parametrize(
    "version", [None, 'W/"weak"', "Wed, 21 Oct 2026 07:28:00 GMT", "0f343b0931126a20f133d67c2b018a3b"]
)
def test_only_strong_tags_name_a_version(version: str | None, tmp_path: Path) -> None:
    """A date outlives a change within its second, and what is not in quotes may be one."""
    file = IndexFile("m.safetensors", 10, 0, etag=version)
    with LocalConnector(parse_url(str(tmp_path))) as connector:
        names, reason = cache_entries(connector, Index.of([file], chunk_bytes=None), None, PAGE)
        assert names == []
        assert "without a strong ETag" in reason
        names, reason = cache_entries(
            connector, Index.of([replace(file, etag='"strong"')], chunk_bytes=None), None, PAGE
        )
        assert (len(names), reason) == (1, "")


@pytest.mark.parametrize("kind", ["a flipped bit", "zeros", "a table that lies", "cut", "another header"])
def test_damage_on_the_disk_costs_a_read_and_no_byte(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint, kind: str
) -> None:
    load(url_of(saved), cache, tiny_checkpoint)
    path = max(entries_of(cache), key=lambda entry: entry.stat().st_size)
    content = bytearray(path.read_bytes())
    table = len(content) - len(content) % PAGE if len(content) % PAGE else len(content) - PAGE
    header = content.index(b"rdmacach")
    assert table == header + PAGE
    if kind == "a flipped bit":
        content[CHUNK_BYTES // 2] ^= 1
    elif kind == "zeros":  # what a crash of the machine leaves of bytes that were not written yet
        content[:CHUNK_BYTES] = bytes(CHUNK_BYTES)
    elif kind == "a table that lies":
        content[table] ^= 1
    elif kind == "cut":
        del content[len(content) // 2 :]
    else:
        content[header + 8] ^= 1
    path.write_bytes(content)
    stats = load(url_of(saved), cache, tiny_checkpoint)
    assert stats.cached_bytes < stats.read_bytes
    if kind in ("a flipped bit", "zeros", "a table that lies"):
        assert "1 block(s)" in (stats.fallback_reason or "")
        assert stats.read_bytes - stats.cached_bytes <= CHUNK_BYTES
    again = load(url_of(saved), cache, tiny_checkpoint)
    assert (again.cached_bytes, again.fallback_reason) == (again.read_bytes, None)


def test_wrong_bytes_of_the_store_are_not_kept(tiny_checkpoint: Checkpoint, cache: Path) -> None:
    def flip(request: Request, honest: Reply) -> Reply:
        if request.path.endswith(".safetensors") and honest.body:
            honest.body = bytes([honest.body[0] ^ 1]) + honest.body[1:]
        return honest

    with HttpObjects(saved_objects(tiny_checkpoint), flip) as server:
        with pytest.raises(IntegrityError):
            rdmaload.load(url_of(server), cache_dir=cache)
        server.answer = lambda request, honest: honest
        stats = load(url_of(server), cache, tiny_checkpoint)
        assert (stats.cached_bytes, stats.fallback_reason) == (0, None)


def test_failures_of_the_store_are_tried_again_through_the_cache(tiny_checkpoint: Checkpoint, cache: Path) -> None:
    def storm(request: Request, honest: Reply) -> Reply:
        if request.headers.get("user-agent") != "rdmaload":  # boto3's pauses are seconds long
            return honest
        if request.number % 3 == 1:
            return Reply(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        if request.number % 3 == 2:
            honest.cut, honest.then = len(honest.body) // 2, "reset"
        return honest

    for objects in (saved_objects(tiny_checkpoint), plain_objects(tiny_checkpoint)):
        with HttpObjects(objects, storm) as server:
            names = sorted(rdmaload.load(url_of(server)))
            rdmaload.load(url_of(server), cache_dir=cache, include=names[::3])
            assert load(url_of(server), cache, tiny_checkpoint).cached_bytes > 0
            stats = load(url_of(server), cache, tiny_checkpoint)
            assert stats.cached_bytes == stats.read_bytes


def test_the_limit_holds_and_the_least_recently_used_go_first(cache: Path, tmp_path: Path) -> None:
    limit = 3_000_000
    models = {
        name: make_checkpoint(tmp_path / name, {"w": ("U8", (900_000,))}, seed=seed) for seed, name in enumerate("abcd")
    }
    objects = {
        f"/bucket/{name}/{path.name}": path.read_bytes()
        for name, checkpoint in models.items()
        for path in checkpoint.directory.glob("*.safetensors")
    }
    with HttpObjects(objects) as server:

        def cached(name: str) -> bool:
            stats = load(url_of(server).replace("/m?", f"/{name}?"), cache, models[name], cache_bytes=limit)
            assert sum(path.stat().st_size for path in entries_of(cache)) <= limit
            for age, path in enumerate(sorted(entries_of(cache), key=lambda entry: -entry.stat().st_mtime_ns)):
                os.utime(path, (10**9 - age, 10**9 - age))  # in the same order, whatever the clock's grain
            return stats.cached_bytes > 0

        assert [cached(name) for name in "abc"] == [False] * 3
        assert cached("a")
        assert not cached("d")  # in the place of b, which nobody asked for since
        assert [cached(name) for name in "acd"] == [True] * 3
        assert not cached("b")


def test_what_is_larger_than_the_limit_is_read_and_not_kept(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = sorted(path.stat().st_size for path in tiny_checkpoint.directory.glob("*.safetensors"))
    for _ in range(2):
        stats = load(url_of(saved), cache, tiny_checkpoint, cache_bytes=sizes[0] // 2)
        assert stats.cached_bytes == 0
        assert "raise cache_bytes" in (stats.fallback_reason or "")
    assert "raise cache_bytes" in caplog.text
    assert entries_of(cache) == []


def test_files_in_use_are_not_removed(cache: Path, tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "a", {"w": ("U8", (900_000,))}, seed=1)
    second = make_checkpoint(tmp_path / "b", {"w": ("U8", (900_000,))}, seed=2)
    with HttpObjects(plain_objects(first)) as server, HttpObjects(plain_objects(second)) as other:
        with rdmaload.open(url_of(server), cache_dir=cache, cache_bytes=10**6) as model:
            assert_loaded(model.load(), first)
            stats = load(url_of(other), cache, second, cache_bytes=10**6)
            assert "no room" in (stats.fallback_reason or "")
            model.load()
            assert model.stats.cached_bytes == model.stats.read_bytes
        assert load(url_of(other), cache, second, cache_bytes=10**6).fallback_reason is None


@pytest.mark.parametrize("where", ["below a file", "not writable"])
def test_a_directory_that_cannot_be_used_is_said_and_costs_nothing(
    saved: HttpObjects, tmp_path: Path, tiny_checkpoint: Checkpoint, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "cache" if where == "below a file" else Path("/proc/cache")
    stats = load(url_of(saved), directory, tiny_checkpoint)
    assert stats.path == "http"
    assert "cache_dir: " in (stats.fallback_reason or "")
    assert "cache_dir: " in caplog.text


CHILD = """
import json, resource, signal, sys
import rdmaload
from rdmaload.stats import LoadStats
url, cache, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if "file_bytes" in settings:  # what a full disk does, for any user
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"], resource.RLIM_INFINITY))
stats = LoadStats()
state = rdmaload.load(url, cache_dir=cache, stats=stats, **settings.get("options", {}))
digest = {name: rdmaload._core.crc32c(tensor.reshape(-1).view(__import__("torch").uint8).numpy())
          for name, tensor in state.items()}
print(json.dumps({"digest": digest, "cached": stats.cached_bytes, "reason": stats.fallback_reason,
                  "read": stats.read_bytes}))
"""


def start_child(server: HttpObjects, cache: Path, **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, url_of(server), str(cache), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(Path(rdmaload.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def digest_of(checkpoint: Checkpoint) -> dict[str, int]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        state |= load_file(path)
    return {name: crc32c(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in state.items()}


def test_a_full_disk_ends_the_cache_and_not_the_load(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    # The file is longer than the limit, so that it cannot even be made; then it exists and grows up to the limit.
    for attempt in range(2):
        child = start_child(saved, cache, file_bytes=3 * CHUNK_BYTES)
        answer = json.loads(child.communicate()[0])
        assert child.returncode == 0
        assert answer["digest"] == digest_of(tiny_checkpoint)
        assert "File too large" in answer["reason"]
        if not attempt:
            rdmaload.load(url_of(saved), cache_dir=cache, include="nothing-of-this-name*")
            names = sorted(rdmaload.load(url_of(saved)))
            rdmaload.load(url_of(saved), cache_dir=cache, include=names[:1])
    stats = load(url_of(saved), cache, tiny_checkpoint)
    assert stats.fallback_reason is None
    stats = load(url_of(saved), cache, tiny_checkpoint)
    assert stats.cached_bytes == stats.read_bytes


def test_processes_that_load_at_once_read_the_store_once(tiny_checkpoint: Checkpoint, cache: Path) -> None:
    arrived = threading.Barrier(4)
    waited: set[int] = set()

    def slow(request: Request, honest: Reply) -> Reply:
        if request.path.endswith(FILE_MANIFEST):  # each process asks for it once: they go on together
            arrived.wait(60)
        waited.add(request.number)
        return honest

    with HttpObjects(saved_objects(tiny_checkpoint), slow) as server:
        children = [start_child(server, cache) for _ in range(4)]
        answers = [json.loads(child.communicate()[0]) for child in children]
        asked = weights_read(server)
    assert [child.returncode for child in children] == [0] * 4
    assert all(answer["digest"] == digest_of(tiny_checkpoint) for answer in answers)
    assert all(answer["reason"] is None for answer in answers)
    assert len(asked) == len(set(asked))  # no range was asked for twice
    assert sum(answer["cached"] for answer in answers) == 3 * answers[0]["read"]


def test_a_killed_process_leaves_what_it_has_read_and_blocks_nobody(tiny_checkpoint: Checkpoint, cache: Path) -> None:
    some = threading.Event()
    hold = threading.Event()
    served = 0
    lock = threading.Lock()

    def answer(request: Request, honest: Reply) -> Reply:
        nonlocal served
        if request.path.endswith(".safetensors") and not hold.is_set():
            with lock:
                served += 1
                late = served > 12
            if late:  # what it has so far is on the disk, or will be; these it waits for when it is killed
                some.set()
                hold.wait(60)
        return honest

    with HttpObjects(saved_objects(tiny_checkpoint), answer) as server:
        child = start_child(server, cache)
        assert some.wait(60)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        hold.set()
        stats = load(url_of(server), cache, tiny_checkpoint)
        assert stats.fallback_reason is None
        stats = load(url_of(server), cache, tiny_checkpoint)
        assert stats.cached_bytes == stats.read_bytes


def test_nobody_waits_for_ever_for_a_process_that_sleeps(tiny_checkpoint: Checkpoint, cache: Path) -> None:
    some, hold = threading.Event(), threading.Event()

    def answer(request: Request, honest: Reply) -> Reply:
        if request.path.endswith(".safetensors") and not some.is_set():
            some.set()
            hold.wait(60)
        return honest

    with HttpObjects(saved_objects(tiny_checkpoint), answer) as server:
        child = start_child(server, cache, options={"connections": 1})
        try:
            assert some.wait(60)
            child.send_signal(signal.SIGSTOP)  # with blocks that it holds and will not finish
            stats = load(url_of(server), cache, tiny_checkpoint, inactivity_timeout=0.3)
            assert stats.fallback_reason is None
        finally:
            hold.set()
            child.send_signal(signal.SIGCONT)
            answered = json.loads(child.communicate()[0])
    assert answered["digest"] == digest_of(tiny_checkpoint)


def test_the_directory_is_ours_alone_and_holds_no_secret(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    load(url_of(saved), cache, tiny_checkpoint)
    assert cache.stat().st_mode & 0o777 == 0o700
    for path in cache.iterdir():
        content = path.read_bytes()
        assert b"s3cr3t" not in content
        assert path.name == "lock" or b"s3://bucket/m" in content
    # Other credentials, the same bytes.
    other = url_of(saved).replace("testing", "somebody").replace("s3cr3t", "else")
    assert load(other, cache, tiny_checkpoint).cached_bytes > 0


def test_a_temporary_file_of_a_dead_process_is_removed(
    saved: HttpObjects, cache: Path, tiny_checkpoint: Checkpoint
) -> None:
    cache.mkdir(parents=True)
    (cache / f"tmp-{'0' * 64}").write_bytes(b"left")
    (cache / "notes.txt").write_bytes(b"not ours")
    load(url_of(saved), cache, tiny_checkpoint)
    assert not list(cache.glob("tmp-*"))
    assert (cache / "notes.txt").read_bytes() == b"not ours"
