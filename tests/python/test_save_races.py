"""Racing savers: whatever the order of their operations, what is published is of one content."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rdmaload._prune import prune, remove
from rdmaload._save import save
from rdmaload.connectors import connector_for, registry
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import (
    AlreadyExistsError,
    AuthenticationError,
    LayoutMismatchError,
    NotFoundError,
    StaleGenerationError,
)
from rdmaload.state_dict import state_dict_model
from rdmaload.stats import SaveStats
from tests.support.stores import (
    Dawdle,
    Die,
    Killed,
    ScriptedConnector,
    keys_of,
    read_index,
    read_model,
)

CHUNK = 100
RANKS = 3

Outcome = SaveStats | BaseException
Script = Callable[[str, str, Callable[[], object]], object]


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def scheme(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], str]:
    """A new scheme whose stores run their operations through the script."""
    count = 0

    def register(script: Script) -> str:
        nonlocal count
        count += 1
        name = f"scripted{count}"
        cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(script)})
        monkeypatch.setitem(registry._registered, name, cls)
        return name

    return register


def state_of(group: str, rank: int) -> dict[str, torch.Tensor]:
    seed = 100 * ord(group) + rank
    generator = torch.Generator().manual_seed(seed)
    return {f"{group}.{n}": torch.randn(40, generator=generator) for n in range(3)}


def files_of(group: str, ranks: int = RANKS, sharded: bool = True) -> dict[str, bytes]:
    files = {}
    for rank in range(ranks):
        model = state_dict_model(state_of(group, rank), rank=rank if sharded else None, world_size=ranks)
        for file in model.files:
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
            files[file.path] = bytes(data)
    return files


def together(jobs: list[Callable[[], SaveStats]]) -> list[Outcome]:
    """Run the jobs at the same time; what each returned or raised."""
    outcomes: list[Outcome] = [RuntimeError("never ran")] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = jobs[number]()
        except BaseException as err:
            outcomes[number] = err

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def job(scheme: str, store: str, group: str, rank: int) -> Callable[[], SaveStats]:
    return lambda: save(
        state_of(group, rank),
        f"{scheme}://{store}/m",
        rank=rank,
        world_size=RANKS,
        save_id=f"group-{group}",
        chunk_bytes=CHUNK,
    )


@pytest.mark.parametrize("seed", range(25))
def test_two_groups_and_a_dead_rank(seed: int, scheme: Callable[[Script], str]) -> None:
    chosen = random.Random(seed)
    store = f"races-{seed}"
    jobs = [job(scheme(Dawdle(seed + n)), store, "a", n) for n in range(RANKS)]
    dead = chosen.randrange(RANKS)
    for rank in range(RANKS):
        # A rank without a part takes 11 operations at least: it never finishes.
        script: Script = Die(chosen.randint(1, 10)) if rank == dead else Dawdle(seed - rank - 1)
        jobs.append(job(scheme(script), store, "b", rank))
    chosen.shuffle(jobs)
    outcomes = together(jobs)
    assert sum(isinstance(outcome, Killed) for outcome in outcomes) == 1
    stats = [outcome for outcome in outcomes if isinstance(outcome, SaveStats)]
    assert len(stats) == 2 * RANKS - 1
    with connector_for(f"memory://{store}/m") as plain:
        assert read_model(plain) == files_of("a")
        assert {s.save_id for s in stats if s.published} == {"group-a"}
        # The dead rank comes back: now the other group is complete.
        assert job("memory", store, "b", dead)().published
        assert read_model(plain) == files_of("b")
    forget_store(store)


@pytest.mark.parametrize("seed", range(15))
def test_two_whole_groups_with_every_rank_started_twice(seed: int, scheme: Callable[[Script], str]) -> None:
    store = f"twice-{seed}"
    jobs = [
        job(scheme(Dawdle(seed * 100 + number)), store, group, rank)
        for number, (group, rank) in enumerate(
            (group, rank) for group in "ab" for rank in range(RANKS) for _ in range(2)
        )
    ]
    random.Random(seed).shuffle(jobs)
    outcomes = together(jobs)
    # An attempt that begins after the others have published waits for ranks that are done: it
    # neither publishes nor harms.
    assert all(isinstance(outcome, SaveStats) for outcome in outcomes), outcomes
    with connector_for(f"memory://{store}/m") as plain:
        published = read_model(plain)
        assert published in (files_of("a"), files_of("b"))
        prune(f"memory://{store}/m", force=True)
        assert read_model(plain) == published
    forget_store(store)


@pytest.mark.parametrize("seed", range(25))
def test_two_contents_under_one_save_id(seed: int, scheme: Callable[[Script], str]) -> None:
    store = f"one-id-{seed}"
    outcomes = together(
        [whole(scheme(Dawdle(seed * 10 + n)), store, group, save_id="same") for n, group in enumerate("abab")]
    )
    for outcome in outcomes:
        assert isinstance(outcome, (SaveStats, AlreadyExistsError)), outcome
    with connector_for(f"memory://{store}/m") as plain:
        allowed = [files_of(group, 1, sharded=False) for group in "ab"]
        assert read_model(plain) in allowed
    forget_store(store)


def whole(
    scheme: str, store: str, group: str, *, save_id: str | None = None, overwrite: bool = True
) -> Callable[[], SaveStats]:
    return lambda: save(
        state_of(group, 0),
        f"{scheme}://{store}/m",
        save_id=save_id,
        overwrite=overwrite,
        chunk_bytes=CHUNK,
    )


class Interject:
    """Runs `action` once, before the first operation of this kind on a key with this ending."""

    def __init__(self, kind: str, ending: str, action: Callable[[], object]) -> None:
        self._wanted = (kind, ending)
        self._action: Callable[[], object] | None = action
        self._lock = threading.Lock()
        self.after: Callable[[], object] | None = None

    def __call__(self, kind: str, key: str, effect: Callable[[], object]) -> object:
        hit = kind == self._wanted[0] and key.endswith(self._wanted[1])
        with self._lock:
            action = self._action if hit else None
            if action is not None:
                self._action = None
        if action is not None:
            action()
        result = effect()
        if action is not None and self.after is not None:
            self.after()
        return result


def test_the_second_publisher_takes_the_index_of_the_first(scheme: Callable[[Script], str], model: str) -> None:
    expected = files_of("a", 1, sharded=False)

    def attempt(name: str) -> SaveStats:
        return save(state_of("a", 0), f"{name}://races/{model}", save_id="s", chunk_bytes=CHUNK)

    with connector_for(f"memory://races/{model}") as plain:
        first: list[SaveStats] = []
        script = Interject("set", "/index", lambda: first.append(attempt("memory")))
        # Never, not even between the index and the manifest of the second.
        script.after = lambda: expected == read_model(plain) or pytest.fail("mixed")
        second = attempt(scheme(script))
        assert first[0].published
        assert not second.published
        assert first[0].generation == second.generation
        assert read_model(plain) == expected


def test_a_late_publisher_does_not_bring_the_old_model_back(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://races/{model}"

    def overtake() -> None:
        save(state_of("a", 0), url, save_id="s", chunk_bytes=CHUNK)
        save(state_of("b", 0), url, chunk_bytes=CHUNK)

    late = scheme(Interject("set", "/index", overtake))
    stats = save(state_of("a", 0), url.replace("memory", late, 1), save_id="s", chunk_bytes=CHUNK)
    assert not stats.published
    with connector_for(url) as plain:
        assert read_model(plain) == files_of("b", 1, sharded=False)


def test_a_late_attempt_does_not_write_into_what_is_published(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://{model}/m"

    def overtake() -> None:
        save(state_of("a", 0), url, save_id="s", chunk_bytes=CHUNK)

    # It has joined the save, and claims its first number when the other's claims are gone again.
    late = url.replace("memory", scheme(Interject("set", "/claims/0", overtake)), 1)
    with pytest.raises(AlreadyExistsError, match="overwrite"):
        save(state_of("b", 0), late, save_id="s", chunk_bytes=CHUNK, overwrite=False)
    with connector_for(url) as plain:
        assert read_model(plain) == files_of("a", 1, sharded=False)
    # Where it may replace the model, it starts anew.
    late = url.replace("memory", scheme(Interject("set", "/claims/0", overtake)), 1)
    assert save(state_of("b", 0), late, save_id="s", chunk_bytes=CHUNK).published
    with connector_for(url) as plain:
        assert read_model(plain) == files_of("b", 1, sharded=False)


def test_the_claims_go_after_the_generation_that_gives_them_meaning(
    scheme: Callable[[Script], str], model: str
) -> None:
    deletes: list[str] = []

    with connector_for(f"memory://{model}/m") as plain:

        def script(kind: str, key: str, effect: Callable[[], object]) -> object:
            result = effect()
            if kind == "delete" and key.startswith("m/saving/"):
                deletes.append(key)
                assert plain.get("m/saving/s/generation") is None
            return result

        save(state_of("a", 0), f"{scheme(script)}://{model}/m", save_id="s", chunk_bytes=CHUNK)
        assert len(deletes) > 1
        assert not list(plain.list("m/saving/"))


def test_prune_looks_again_before_it_removes(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://{model}/m"
    with connector_for(url) as plain:
        first = save(state_of("a", 0), url, chunk_bytes=CHUNK)
        manifest = plain.get("m/manifest")
        assert manifest is not None
        save(state_of("b", 0), url, chunk_bytes=CHUNK)
        note = f"superseded/{first.generation}"
        plain.set(f"m/{note}", b"2020-01-01T00:00:00Z")
        script = Interject("get", note, lambda: plain.set("m/manifest", manifest))
        prune(url.replace("memory", scheme(script), 1))
        assert read_model(plain) == files_of("a", 1, sharded=False)


def test_cleaning_up_leaves_the_next_save_of_that_id_alone(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://{model}/m"
    first = (state_of("a", 0), "s")

    def overtake() -> None:
        save(first[0], url, save_id=first[1], chunk_bytes=CHUNK)
        dying = url.replace("memory", scheme(Die(20)), 1)
        with pytest.raises(Killed):
            save(state_of("b", 0), dying, save_id=first[1], chunk_bytes=CHUNK)
        with connector_for(url) as plain:
            before.extend(plain.list("m/saving/"))

    before: list[str] = []
    late = url.replace("memory", scheme(Interject("set", "m/manifest", overtake)), 1)
    save(first[0], late, save_id=first[1], chunk_bytes=CHUNK)
    with connector_for(url) as plain:
        assert len(before) > 2
        assert set(before) <= set(plain.list("m/saving/"))
        assert read_model(plain) == files_of("a", 1, sharded=False)


class DieAfterIndex(Die):
    """Dies when the index is stored and the manifest is not."""

    def __call__(self, kind: str, key: str, effect: Callable[[], object]) -> object:
        if kind == "set" and key.endswith("/index"):
            self.at, self.after = self.count + 1, True
        return super().__call__(kind, key, effect)


def test_one_save_id_for_two_contents_is_an_error(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://{model}/m"
    dying = url.replace("memory", scheme(DieAfterIndex()), 1)
    with pytest.raises(Killed):
        save(state_of("a", 0), dying, save_id="s", chunk_bytes=CHUNK)
    with pytest.raises(AlreadyExistsError, match="other content"):
        save(state_of("b", 0), url, save_id="s", chunk_bytes=CHUNK)
    # What it stands for is finished.
    assert save(state_of("a", 0), url, save_id="s", chunk_bytes=CHUNK).published
    with connector_for(url) as plain:
        assert read_model(plain) == files_of("a", 1, sharded=False)


def test_a_save_that_was_removed_meanwhile_publishes_nothing(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://races/{model}"
    for kind, ending in (("set", "/index"), ("set", "/parts/0"), ("exists", "/parts/0"), ("get", "/parts/0")):
        late = scheme(Interject(kind, ending, lambda: remove(url)))
        with pytest.raises((StaleGenerationError, NotFoundError), match=r"(?i)published nothing|nothing was published"):
            save(state_of("a", 0), url.replace("memory", late, 1), chunk_bytes=CHUNK)
        with connector_for(url) as plain:
            assert read_model(plain) is None


def test_evicted_chunks_are_noticed_before_publishing(scheme: Callable[[Script], str], model: str) -> None:
    url = f"memory://races/{model}"
    with connector_for(url) as plain:
        save(state_of("b", 0), url, chunk_bytes=CHUNK)
        before = set(plain.list(model))

        def evict() -> None:
            plain.delete(*(key for key in plain.list(model) if "/chunks/" in key and key not in before))

        late = scheme(Interject("set", "/parts/0", evict))
        with pytest.raises(NotFoundError, match="evicts"):
            save(state_of("a", 0), url.replace("memory", late, 1), chunk_bytes=CHUNK)
        assert read_model(plain) == files_of("b", 1, sharded=False)


@pytest.mark.parametrize("kind", ["get", "set"])
def test_a_store_that_evicts_the_generation_ends_the_save(
    kind: str, scheme: Callable[[Script], str], model: str
) -> None:
    """At every look ("get"), or only once the save is at work ("set" of a claim)."""
    with connector_for(f"memory://races/{model}") as plain:
        seen: list[str] = []

        def script(operation: str, key: str, effect: Callable[[], object]) -> object:
            if operation == kind and key.endswith("/generation" if kind == "get" else "/claims/0"):
                seen.append(key)
                plain.delete(*(name for name in plain.list(model) if name.endswith("/generation")))
            return effect()

        with pytest.raises(NotFoundError, match=r"evicts values.*noeviction"):
            save(state_of("a", 0), f"{scheme(script)}://races/{model}", chunk_bytes=CHUNK)
        assert 1 <= len(seen) <= 20
        assert read_model(plain) is None


@pytest.mark.parametrize("ending", ["rdmaload:models", "saving/s/"])
def test_a_published_save_does_not_fail_for_its_cleaning_up(
    ending: str, scheme: Callable[[Script], str], model: str, caplog: pytest.LogCaptureFixture
) -> None:
    def script(kind: str, key: str, effect: Callable[[], object]) -> object:
        if kind in ("members_add", "list") and key.endswith(ending):
            raise AuthenticationError("NOPERM this user may not do that")
        return effect()

    url = f"{scheme(script)}://races/{model}"
    assert save(state_of("a", 0), url, save_id="s", chunk_bytes=CHUNK).published
    assert "is published, but" in caplog.text
    assert "NOPERM" in caplog.text
    with connector_for(f"memory://races/{model}") as plain:
        assert read_model(plain) == files_of("a", 1, sharded=False)


@pytest.mark.parametrize("seed", range(15))
def test_without_overwrite_exactly_one_of_several_saves_wins(seed: int, scheme: Callable[[Script], str]) -> None:
    store = f"once-{seed}"
    outcomes = together(
        [whole(scheme(Dawdle(seed * 10 + n)), store, group, overwrite=False) for n, group in enumerate("abc")]
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, SaveStats)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, AlreadyExistsError)]
    assert (len(winners), len(losers)) == (1, 2), outcomes
    with connector_for(f"memory://{store}/m") as plain:
        assert read_model(plain) == files_of("abc"[winners[0]], 1, sharded=False)
    forget_store(store)


def test_prune_beside_savers_never_harms(scheme: Callable[[Script], str]) -> None:
    for seed in range(10):
        store = f"prune-{seed}"
        pruner = scheme(Dawdle(seed))

        def sweep(url: str = f"{pruner}://{store}/m") -> SaveStats:
            for _ in range(15):
                prune(url, force=True)
            return SaveStats()

        jobs: list[Callable[[], SaveStats]] = [sweep]
        jobs += [job(scheme(Dawdle(seed + n + 1)), store, "a", n) for n in range(RANKS)]
        jobs += [job(scheme(Dawdle(seed + n + 9)), store, "b", n) for n in range(RANKS)]
        outcomes = together(jobs)
        assert isinstance(outcomes[0], SaveStats), outcomes[0]
        with connector_for(f"memory://{store}/m") as plain:
            content = read_model(plain)
            assert content in (files_of("a"), files_of("b"))
        # A rank of the other group may look for its generation when it was published, replaced and
        # pruned already; nobody of the published group fails.
        first_lost = 1 if content == files_of("b") else 1 + RANKS
        lost = outcomes[first_lost : first_lost + RANKS]
        for outcome in outcomes[1:]:
            allowed = (SaveStats, StaleGenerationError, NotFoundError) if outcome in lost else SaveStats
            assert isinstance(outcome, allowed), outcome
        forget_store(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chunk_bytes": CHUNK * 2}, "chunk size"), ({"world_size": 3}, None)],
)
def test_ranks_that_disagree_publish_nothing(change: dict[str, int], message: str | None, model: str) -> None:
    url = f"memory://races/{model}"

    def run(rank: int, **changed: int) -> SaveStats:
        arguments = {"world_size": 2, "chunk_bytes": CHUNK, **changed}
        return save(state_of("a", rank), url, rank=rank, save_id="s", **arguments)

    with connector_for(url) as plain:
        run(0)
        if message is None:
            assert not run(1, **change).published  # it waits for rank 2
            with pytest.raises(LayoutMismatchError, match="world size"):
                run(2, **change)
        else:
            with pytest.raises(LayoutMismatchError, match=message):
                run(1, **change)
        assert read_model(plain) is None


def test_weight_files_of_one_name_from_two_ranks_publish_nothing(tmp_path: Path, model: str) -> None:
    url = f"memory://races/{model}"
    for rank in range(2):
        root = tmp_path / str(rank)
        root.mkdir()
        save_file(state_of("a", rank), root / "model.safetensors")
    save(tmp_path / "0", url, rank=0, world_size=2, save_id="s")
    with pytest.raises(LayoutMismatchError, match="ranks 0 and 1"):
        save(tmp_path / "1", url, rank=1, world_size=2, save_id="s")
    with connector_for(url) as plain:
        assert read_model(plain) is None


def test_plain_files_that_several_ranks_have_are_those_of_the_lowest(tmp_path: Path, model: str) -> None:
    url = f"memory://{model}/m"
    for rank in range(2):
        root = tmp_path / str(rank)
        root.mkdir()
        save_file(state_of("a", rank), root / f"model-rank-{rank}-part-0.safetensors")
        (root / "config.json").write_text(f'{{"rank": {rank}}}')
        (root / f"only-{rank}.txt").write_text("x")
    stats = [save(tmp_path / str(rank), url, rank=rank, world_size=2, save_id="s") for rank in (1, 0)]
    assert [stat.published for stat in stats] == [False, True]
    with connector_for(url) as plain:
        content = read_model(plain)
        found = read_index(plain)
        assert content is not None
        assert found is not None
        assert content["config.json"] == b'{"rank": 0}'
        assert content.keys() == {
            "config.json",
            "only-0.txt",
            "only-1.txt",
            "model-rank-0-part-0.safetensors",
            "model-rank-1-part-0.safetensors",
        }
        manifest, index = found
        assert (manifest.kind, manifest.world_size) == ("sharded", 2)
        assert {file.path: file.rank for file in index.files if file.header} == {
            "model-rank-0-part-0.safetensors": 0,
            "model-rank-1-part-0.safetensors": 1,
        }
        # The other rank's copy is gone already.
        assert len(keys_of(plain)) == 3 + index.total_chunks
