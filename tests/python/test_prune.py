"""What prune, remove and models take away, and above all what they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone

import pytest
import torch

from rdmaload._prune import models, prune, remove
from rdmaload._save import save
from rdmaload.connectors import KeyValueConnector, connector_for, registry
from rdmaload.errors import FormatError, IntegrityError, NotFoundError, NotSupportedError, UrlError
from tests.support.servers import RedisServer
from tests.support.stores import Die, Killed, ScriptedConnector, keys_of, read_model

CHUNK = 100
OTHER = "f" * 32


def state(number: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), float(number))}


def ago(seconds: float) -> bytes:
    moment = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ").encode()


@pytest.fixture
def url(model: str) -> str:
    return f"memory://prune/{model}"


@pytest.fixture
def plain(url: str) -> Iterator[KeyValueConnector]:
    with connector_for(url) as connector:
        assert isinstance(connector, KeyValueConnector)
        yield connector
        for key in list(connector.list("")):
            connector.delete(key)


def generations(plain: KeyValueConnector) -> set[str]:
    prefix = f"{plain.model}/chunks/"
    return {key.removeprefix(prefix).split("/")[0] for key in plain.list(prefix)}


def interrupted_save(
    monkeypatch: pytest.MonkeyPatch, url: str, number: int, at: int = 10, save_id: str = "dead"
) -> None:
    script: Callable[..., object] = Die(at)
    cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(script)})
    monkeypatch.setitem(registry._registered, "dying", cls)
    with pytest.raises(Killed):
        save(state(number), url.replace("memory", "dying", 1), chunk_bytes=CHUNK, save_id=save_id)


def test_a_replaced_generation_waits_for_its_grace(plain: KeyValueConnector, url: str) -> None:
    first = save(state(1), url, chunk_bytes=CHUNK)
    second = save(state(2), url, chunk_bytes=CHUNK)
    assert first.generation
    assert second.generation
    note = f"{plain.model}/superseded/{first.generation}"
    assert plain.get(note) is not None
    assert generations(plain) == {first.generation, second.generation}
    assert prune(url).to_json() == {"generations": 0, "saves": 0, "keys": 0, "waiting": 1}
    plain.set(note, ago(3500))
    assert prune(url).waiting == 1
    plain.set(note, ago(3700))
    stats = prune(url)
    assert (stats.generations, stats.waiting) == (1, 0)
    assert stats.keys == first.chunks + 3  # the index, its manifest and the note
    assert generations(plain) == {second.generation}
    assert keys_of(plain) == {key for key in keys_of(plain) if second.generation in key or key.endswith("/manifest")}
    content = read_model(plain)
    assert content is not None
    assert state(2)["w"].numpy().tobytes() in content["model.safetensors"]


def test_force_does_not_wait(plain: KeyValueConnector, url: str) -> None:
    for number in range(3):
        last = save(state(number), url, chunk_bytes=CHUNK)
    assert prune(url, force=True).generations == 2
    assert generations(plain) == {last.generation}
    assert read_model(plain) is not None
    assert prune(url, force=True).keys == 0


def test_a_generation_without_a_note_gets_one_first(plain: KeyValueConnector, url: str) -> None:
    save(state(1), url, chunk_bytes=CHUNK)
    plain.set(f"{plain.model}/chunks/{OTHER}/0/0", b"left over")
    assert prune(url, grace=0).waiting == 1
    note = f"{plain.model}/superseded/{OTHER}"
    assert plain.get(note) is not None
    plain.set(note, b"not a time")
    assert prune(url, grace=0).waiting == 1
    assert prune(url, grace=0).generations == 1
    assert OTHER not in generations(plain)
    assert plain.get(note) is None


def test_a_dead_save_goes_with_its_chunks_a_live_one_stays(
    plain: KeyValueConnector, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save(state(1), url, chunk_bytes=CHUNK)
    interrupted_save(monkeypatch, url, 2)
    assert len(generations(plain)) == 2
    before = keys_of(plain)
    for force in (False, True):
        assert prune(url, force=force).keys == 0  # it gave a sign of life just now
    assert keys_of(plain) == before
    beat = f"{plain.model}/saving/dead/beat"
    plain.set(beat, ago(600))
    assert prune(url).keys == 0
    assert prune(url, grace=600 - 60).saves == 1
    assert generations(plain) == {kept.generation}
    assert not list(plain.list(f"{plain.model}/saving/"))
    interrupted_save(monkeypatch, url, 3)
    plain.set(beat, ago(600))
    stats = prune(url, force=True)
    assert (stats.saves, stats.generations) == (1, 1)
    # A short grace is no reason to take a save for dead that is 60 s late.
    interrupted_save(monkeypatch, url, 3)
    plain.set(beat, ago(60))
    assert prune(url, grace=0).saves == 0


def test_a_save_without_a_readable_beat_starts_its_time_now(
    plain: KeyValueConnector, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_save(monkeypatch, url, 1)
    beat = f"{plain.model}/saving/dead/beat"
    for value in (b"\xff\xfe", b"", b"2026-13-77T00:00:00Z", b"9" * 1000):
        plain.set(beat, value)
        assert prune(url).saves == 0
        assert plain.get(beat) != value
    plain.set(beat, b"nonsense")
    assert prune(url, force=True).saves == 1


def test_a_published_save_that_died_before_cleaning_up_keeps_its_model(
    plain: KeyValueConnector, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Die()
    cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(probe)})
    monkeypatch.setitem(registry._registered, "dying", cls)
    save(state(1), "dying://prune-probe/m", chunk_bytes=CHUNK, save_id="dead")
    interrupted_save(monkeypatch, url, 1, at=probe.count - 1)
    content = read_model(plain)
    assert content is not None
    plain.set(f"{plain.model}/saving/dead/beat", ago(10_000))
    # Replaced just now: readers may have it open, whatever became of its save.
    save(state(2), url, chunk_bytes=CHUNK)
    stats = prune(url)
    assert (stats.saves, stats.generations, stats.waiting) == (1, 0, 1)
    assert not list(plain.list(f"{plain.model}/saving/"))


def test_a_dead_save_that_is_the_published_one_keeps_its_chunks(
    plain: KeyValueConnector, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = Die()
    cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(interrupted)})
    monkeypatch.setitem(registry._registered, "dying", cls)
    save(state(1), "dying://prune-probe2/m", chunk_bytes=CHUNK, save_id="dead")
    interrupted_save(monkeypatch, url, 1, at=interrupted.count - 1)
    content = read_model(plain)
    plain.set(f"{plain.model}/saving/dead/beat", ago(10_000))
    assert prune(url, force=True).saves == 1
    assert content is not None
    assert read_model(plain) == content


def test_orphans_in_the_published_generation(plain: KeyValueConnector, url: str) -> None:
    stats = save(state(1), url, chunk_bytes=CHUNK)
    content = read_model(plain)
    root = f"{plain.model}/chunks/{stats.generation}"
    orphans = [f"{root}/7/0", f"{root}/7/1", f"{root}/0/{stats.chunks}"]
    strange = [f"{root}/x/0", f"{root}/0/0/0", f"{root}/other"]
    for key in orphans + strange:
        plain.set(key, b"x")
    assert prune(url).keys == len(orphans)
    assert read_model(plain) == content
    assert all(plain.exists(key) for key in strange)  # not keys of ours


def test_a_note_about_the_published_generation_is_dropped(plain: KeyValueConnector, url: str) -> None:
    stats = save(state(1), url, chunk_bytes=CHUNK)
    plain.set(f"{plain.model}/superseded/{stats.generation}", ago(10_000))
    plain.set(f"{plain.model}/superseded/{OTHER}", ago(10))
    assert prune(url, force=True).keys == 2
    assert read_model(plain) is not None
    assert not list(plain.list(f"{plain.model}/superseded/"))


@pytest.mark.parametrize("value", [b"", b"garbage", None])
def test_nothing_is_pruned_when_the_manifest_is_damaged(
    plain: KeyValueConnector, url: str, value: bytes | None
) -> None:
    save(state(1), url, chunk_bytes=CHUNK)
    save(state(2), url, chunk_bytes=CHUNK)
    key = f"{plain.model}/manifest"
    if value is None:
        good = plain.get(key)
        assert good is not None
        value = good.replace(b"checkpoint", b"checkpoinT")
    plain.set(key, value)
    before = keys_of(plain)
    with pytest.raises((FormatError, IntegrityError)):
        prune(url, force=True)
    assert keys_of(plain) == before


def test_a_damaged_index_keeps_its_chunks(plain: KeyValueConnector, url: str) -> None:
    stats = save(state(1), url, chunk_bytes=CHUNK)
    plain.set(f"{plain.model}/chunks/{stats.generation}/index", b"garbage")
    before = keys_of(plain)
    prune(url, force=True)
    assert keys_of(plain) == before


def test_models_in_models_do_not_disturb_each_other(plain: KeyValueConnector, url: str) -> None:
    names = ["", "/b", "/b/c", "x", "/0"]
    for name in names:
        save(state(1), url + name, chunk_bytes=CHUNK)
        save(state(2), url + name, chunk_bytes=CHUNK)

    def contents() -> list[dict[str, bytes] | None]:
        found = []
        for name in names:
            with connector_for(url + name) as connector:
                found.append(read_model(connector))
        return found

    before = contents()
    assert None not in before
    assert prune(url, force=True).generations == 1
    with connector_for(f"{url}/b") as inner:
        assert len(generations(inner)) == 2
    assert contents() == before
    remove(url)
    assert contents() == [None, *before[1:]]
    remove(f"{url}/b")
    assert contents() == [None, None, *before[2:]]


def test_remove_takes_everything_of_ours(plain: KeyValueConnector, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state(1), url, chunk_bytes=CHUNK)
    save(state(2), url, chunk_bytes=CHUNK)
    interrupted_save(monkeypatch, url, 3)
    others = {f"{plain.model}/{name}" for name in ("other", f"chunks/{OTHER}/0/0/0", f"superseded/{OTHER}/x")}
    for key in others:
        plain.set(key, b"x")
    assert plain.model in models("memory://prune")
    keys = len(keys_of(plain))
    assert remove(url) == keys - len(others)
    assert keys_of(plain) == others
    assert plain.model not in models("memory://prune")
    with pytest.raises(NotFoundError):
        remove(url)


def test_models_are_listed_by_hint_and_by_scan(plain: KeyValueConnector, url: str) -> None:
    save(state(1), url, chunk_bytes=CHUNK)
    save(state(1), f"{url}/inner", chunk_bytes=CHUNK)
    names = [plain.model, f"{plain.model}/inner"]
    server = "memory://prune"
    assert models(server) == names == models(server, scan=True)
    for name in names:
        plain.members_remove("rdmaload:models", name)
    plain.members_add("rdmaload:models", "gone")
    plain.set("other/manifest", b"of another program")
    assert models(server) == []
    assert models(server, scan=True) == names == models(server)
    assert set(plain.members("rdmaload:models")) == set(names)


def test_against_a_server(redis_server: RedisServer, model: str) -> None:
    url = redis_server.url(model)
    save(state(1), url, chunk_bytes=CHUNK)
    save(state(1), f"{url}/inner", chunk_bytes=CHUNK)
    second = save(state(2), url, chunk_bytes=CHUNK)
    server = redis_server.url("x").removesuffix("/x")
    assert {model, f"{model}/inner"} <= set(models(server))
    assert {model, f"{model}/inner"} <= set(models(server, scan=True))
    assert prune(url).waiting == 1
    assert prune(url, force=True).generations == 1
    with connector_for(url) as plain:
        assert isinstance(plain, KeyValueConnector)
        assert generations(plain) == {second.generation}
        assert read_model(plain) is not None
        assert remove(url) == second.chunks + 3
        assert read_model(plain) is None
    with connector_for(f"{url}/inner") as inner:
        assert isinstance(inner, KeyValueConnector)
        assert read_model(inner) is not None
    remove(f"{url}/inner")
    assert model not in models(server)


def test_directories_have_nothing_to_prune(tmp_path: object) -> None:
    for action in (prune, remove):
        with pytest.raises(NotSupportedError):
            action(str(tmp_path))  # type: ignore[operator]


def test_a_grace_is_seconds(url: str) -> None:
    for grace in (-1.0, float("nan")):
        with pytest.raises(UrlError, match="grace"):
            prune(url, grace=grace)
