"""Racing savers: whatever the order of their operations, what is published is wholly one content."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from rdmaload.connectors import connector_for, registry
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import AlreadyExistsError, LayoutMismatchError, NotFoundError, RdmaloadError
from rdmaload.errors import StaleGenerationError
from rdmaload.journal import SaveKeys
from rdmaload.prune import prune, remove
from rdmaload.save import save
from rdmaload.state_dict import state_dict_model
from rdmaload.stats import SaveStats
from tests.support.stores import Dawdle, Die, Killed, ScriptedConnector, read_model

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
        model = state_dict_model(
            state_of(group, rank), rank=rank if sharded else None, world_size=ranks
        )
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
def test_two_whole_groups_with_every_rank_started_twice(
    seed: int, scheme: Callable[[Script], str]
) -> None:
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
        [
            lambda group=group, name=scheme(Dawdle(seed * 10 + n)): save(  # type: ignore[misc]
                state_of(group, 0), f"{name}://{store}/m", save_id="same", chunk_bytes=CHUNK
            )
            for n, group in enumerate("abab")
        ]
    )
    for outcome in outcomes:
        assert isinstance(outcome, (SaveStats, AlreadyExistsError)), outcome
    with connector_for(f"memory://{store}/m") as plain:
        allowed = [files_of(group, 1, sharded=False) for group in "ab"]
        assert read_model(plain) in allowed
    forget_store(store)


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


def test_the_second_publisher_takes_the_index_of_the_first(
    scheme: Callable[[Script], str], model: str
) -> None:
    expected = files_of("a", 1, sharded=False)

    def attempt(name: str) -> SaveStats:
        return save(state_of("a", 0), f"{name}://races/{model}", save_id="s", chunk_bytes=CHUNK)

    with connector_for(f"memory://races/{model}") as plain:
        first: list[SaveStats] = []
        script = Interject("set", "/index", lambda: first.append(attempt("memory")))
        # Never, not even between the index and the manifest of the second.
        script.after = lambda: expected == read_model(plain) or pytest.fail("mixed")
        second = attempt(scheme(script))
        assert first[0].published and not second.published
        assert first[0].generation == second.generation
        assert read_model(plain) == expected


def test_a_late_publisher_does_not_bring_the_old_model_back(
    scheme: Callable[[Script], str], model: str
) -> None:
    url = f"memory://races/{model}"

    def overtake() -> None:
        save(state_of("a", 0), url, save_id="s", chunk_bytes=CHUNK)
        save(state_of("b", 0), url, chunk_bytes=CHUNK)

    late = scheme(Interject("set", "/index", overtake))
    stats = save(state_of("a", 0), url.replace("memory", late, 1), save_id="s", chunk_bytes=CHUNK)
    assert not stats.published
    with connector_for(url) as plain:
        assert read_model(plain) == files_of("b", 1, sharded=False)


def test_a_save_that_was_removed_meanwhile_publishes_nothing(
    scheme: Callable[[Script], str], model: str
) -> None:
    url = f"memory://races/{model}"
    for ending in ("/index", "/parts/0"):
        late = scheme(Interject("set", ending, lambda: remove(url)))
        with pytest.raises((StaleGenerationError, NotFoundError), match="nothing was published|Nothing"):
            save(state_of("a", 0), url.replace("memory", late, 1), chunk_bytes=CHUNK)
        with connector_for(url) as plain:
            assert read_model(plain) is None


def test_evicted_chunks_are_noticed_before_publishing(
    scheme: Callable[[Script], str], model: str
) -> None:
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


@pytest.mark.parametrize("seed", range(15))
def test_without_overwrite_exactly_one_of_several_saves_wins(
    seed: int, scheme: Callable[[Script], str]
) -> None:
    store = f"once-{seed}"
    outcomes = together(
        [
            lambda group=group, name=scheme(Dawdle(seed * 10 + n)): save(  # type: ignore[misc]
                state_of(group, 0), f"{name}://{store}/m", overwrite=False, chunk_bytes=CHUNK
            )
            for n, group in enumerate("abc")
        ]
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
        assert all(isinstance(outcome, SaveStats) for outcome in outcomes), outcomes
        with connector_for(f"memory://{store}/m") as plain:
            assert read_model(plain) in (files_of("a"), files_of("b"))
        forget_store(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"world_size": 3}, None),
        (lambda: {"chunk_bytes": CHUNK * 2}, "chunk size"),
        (lambda: {"kind": "checkpoint"}, "world size|kind"),
    ],
)
def test_ranks_that_disagree_publish_nothing(
    change: Callable[[], dict[str, object]], message: str | None, model: str
) -> None:
    url = f"memory://races/{model}"
    arguments: dict[str, object] = {"world_size": 2, "chunk_bytes": CHUNK}
    kind = change().pop("kind", None)
    save(state_of("a", 0), url, rank=0, save_id="s", **arguments)  # type: ignore[arg-type]
    with connector_for(url) as plain:
        if kind:
            # As rank 1 of a save that says it is a whole checkpoint.
            keys = SaveKeys(model, "s")
            save(state_of("a", 1), f"memory://races/{model}-other", save_id="s", chunk_bytes=CHUNK)
            generation = plain.get(keys.generation)
            assert generation is not None
            part = plain.get(keys.part(generation.decode(), 0))
            assert part is not None
            from rdmaload.journal import decode_part, encode_part
            from rdmaload.publish import manifest_of

            manifest, index = decode_part(part, url=url, key="k")
            encoded = index.encode()
            fields = manifest_of(index, encoded, manifest.generation, manifest)
            wrong = type(fields)(**{**fields.__dict__, "kind": "checkpoint", "world_size": 1})
            plain.set(keys.part(generation.decode(), 0), encode_part(wrong, encoded))
        else:
            arguments |= change()
        if message is None:
            stats = save(state_of("a", 1), url, rank=1, save_id="s", **arguments)  # type: ignore[arg-type]
            assert not stats.published  # it waits for rank 2
        else:
            with pytest.raises(LayoutMismatchError, match=message):
                save(state_of("a", 1), url, rank=1, save_id="s", **arguments)  # type: ignore[arg-type]
        assert read_model(plain) is None


def test_errors_are_ours() -> None:
    assert issubclass(StaleGenerationError, RdmaloadError)
