"""Loading into tensors that exist: what is written where, what is refused first, and what a failure leaves."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

import rdmaload
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.errors import DeviceError, IntegrityError, LayoutMismatchError, NotFoundError, PartialLoadError
from rdmaload.model import Model
from rdmaload.stats import LoadStats, Progress
from rdmaload.targets import Targets
from tests.support.checkpoints import Checkpoint, compare


class WatchedConnector(MemoryConnector):
    """Knows which chunks were read; those in `damaged` fail."""

    reads: list[str]
    damaged: set[str]

    def get_into(self, key: str, buffer: memoryview) -> int:
        self.reads.append(key)
        if key in self.damaged:
            raise IntegrityError(f"{key} is damaged")
        return super().get_into(key, buffer)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[WatchedConnector]:
    cls = type("Watched", (WatchedConnector,), {"reads": [], "damaged": set()})
    monkeypatch.setitem(registry._registered, "watched", cls)
    return cls


@pytest.fixture
def url(model: str, watched: type[WatchedConnector]) -> Iterator[str]:
    yield f"watched://{model}/m"
    forget_store(model)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30, dtype=dtype)
        self.second = nn.Linear(30, 40, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(40, dtype=dtype)


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def zeroed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            tensor.zero_()
    return module


def assert_equal(target: nn.Module, source: nn.Module) -> None:
    expected = source.state_dict()
    found = target.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_module_is_filled_in_place(url: str, watched: type[WatchedConnector]) -> None:
    source = Net()
    rdmaload.save(source, url)
    target = zeroed(Net())
    places = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    stats = LoadStats()
    seen: list[Progress] = []
    assert rdmaload.load_into(target, url, stats=stats, progress=seen.append) is stats
    assert_equal(target, source)
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == places
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in target.parameters())
    assert stats.bytes == sum(tensor.nbytes for tensor in source.state_dict().values())
    assert stats.path == "python"
    assert stats.verified_bytes == stats.read_bytes
    assert seen[-1].bytes_done == seen[-1].bytes_total


@pytest.mark.parametrize("kind", ["redis", "directory"])
def test_every_native_store_fills_a_mapping(redis_url: str, tiny_checkpoint: Checkpoint, kind: str) -> None:
    place: str | Path = tiny_checkpoint.directory
    if kind == "redis":
        rdmaload.save(tiny_checkpoint.directory, redis_url, chunk_bytes=100_000)
        place = redis_url
    target = {name: torch.full(spec.shape, 7, dtype=torch.bfloat16) for name, spec in tiny_checkpoint.tensors.items()}
    stats = rdmaload.load_into(target, place)
    assert compare(target, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert stats.bytes == tiny_checkpoint.bytes
    assert stats.copied_bytes <= stats.read_bytes - tiny_checkpoint.bytes  # received in place


def test_every_dtype(all_dtypes_checkpoint: Checkpoint) -> None:
    target = {name: torch.empty_like(tensor) for name, tensor in rdmaload.load(all_dtypes_checkpoint.directory).items()}
    for tensor in target.values():
        if tensor.numel():
            tensor.reshape(-1).view(torch.uint8).fill_(0xA5)
    rdmaload.load_into(target, all_dtypes_checkpoint.directory)
    assert compare(target, all_dtypes_checkpoint.directory) == all_dtypes_checkpoint.bytes


def test_progress_counts_what_is_received_in_place_and_what_is_not(url: str) -> None:
    rdmaload.save({f"t{i}": torch.ones(1000) for i in range(6)}, url, chunk_bytes=900)
    target = {f"t{i}": torch.zeros(1000) if i % 2 else torch.zeros(2000)[::2] for i in range(6)}
    seen: list[Progress] = []
    rdmaload.load_into(target, url, progress=seen.append, window_bytes=8000)
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].bytes_total
    assert len({progress.bytes_total for progress in seen}) == 1


def test_non_contiguous_targets(url: str) -> None:
    source = {"t": torch.randn(20, 30), "s": torch.randn(100), "c": torch.randn(5, 6)}
    rdmaload.save(source, url, chunk_bytes=64)
    base = torch.zeros(200)
    target = {"t": torch.zeros(30, 20).t(), "s": base[::2], "c": torch.zeros(5, 6)}
    stats = rdmaload.load_into(target, url)
    for name, tensor in source.items():
        assert torch.equal(target[name], tensor), name
    assert torch.equal(base[1::2], torch.zeros(100))
    assert stats.copied_bytes >= source["t"].nbytes + source["s"].nbytes
    assert stats.bytes == sum(tensor.nbytes for tensor in source.values())


def test_slices_of_one_buffer(url: str) -> None:
    # How engines keep fused weights: neighbours must not be touched.
    source = {"q": torch.randn(4, 8), "v": torch.randn(4, 8)}
    rdmaload.save(source, url, chunk_bytes=7)
    fused = torch.full((12, 8), 9.0)
    rdmaload.load_into({"q": fused[0:4], "v": fused[8:12]}, url)
    assert torch.equal(fused[0:4], source["q"])
    assert torch.equal(fused[4:8], torch.full((4, 8), 9.0))
    assert torch.equal(fused[8:12], source["v"])


@pytest.mark.parametrize(
    "views",
    [
        [(0, 4), (2, 6)],
        [(2, 6), (0, 4)],
        [(0, 6), (2, 4)],
        [(2, 4), (0, 6)],
        [(0, 4), (4, 8), (2, 6)],
        [(0, 4), (2, 6), (5, 8)],  # the last overlaps only one that is staged
    ],
)
def test_overlapping_views_are_never_a_mix(url: str, views: list[tuple[int, int]]) -> None:
    wide = 20_000
    source = {f"t{i}": torch.full((end - begin, wide), i + 1.0) for i, (begin, end) in enumerate(views)}
    rdmaload.save(source, url, chunk_bytes=10_000)
    base, expected = torch.zeros(8, wide), torch.zeros(8, wide)
    target = {f"t{i}": base[begin:end] for i, (begin, end) in enumerate(views)}
    for i, (begin, end) in enumerate(views):
        expected[begin:end] = i + 1.0
    stats = rdmaload.load_into(target, url)
    assert torch.equal(base, expected)  # the later one, as in load_state_dict
    assert stats.copied_bytes >= min(tensor.nbytes for tensor in source.values())


def test_a_view_with_gaps_does_not_win_over_a_later_one(url: str) -> None:
    rdmaload.save({"a": torch.ones(50), "b": torch.full((10,), 2.0)}, url)
    base = torch.zeros(100)
    rdmaload.load_into({"a": base[::2], "b": base[10:20]}, url)
    assert base[8:22].tolist() == [1.0, 0.0, *[2.0] * 10, 1.0, 0.0]


def test_which_targets_are_free_is_what_a_search_of_all_says() -> None:
    random = Random(1)
    names = [str(i) for i in range(400)]
    base = torch.zeros(3000)
    spans = [(begin, begin + random.randrange(12)) for begin in (random.randrange(2900) for _ in names)]
    targets = Targets({name: base[slice(*span)] for name, span in zip(names, spans, strict=True)}, {}, "u")
    for i, (begin, end) in enumerate(spans):
        taken = any(max(begin, one) < min(end, other) for one, other in spans[:i])
        assert targets.claim(names[i]) == (not taken)


def test_many_targets_are_claimed_soon() -> None:
    base = torch.zeros(20_000)
    order = Random(1).sample(range(20_000), 20_000)
    targets = Targets({str(i): base[i : i + 1] for i in order}, {}, "u")
    begin = time.perf_counter()
    assert all(targets.claim(name) for name in targets)
    assert time.perf_counter() - begin < 10  # well below a second; comparing all pairs takes a minute


# ---- tied ------------------------------------------------------------------------------------------------------------


def test_tied_in_both(url: str) -> None:
    source = TiedNet()
    rdmaload.save(source, url)
    target = zeroed(TiedNet())
    stats = rdmaload.load_into(target, url)
    assert_equal(target, source)
    assert target.head.weight is target.embed.weight
    assert stats.bytes == source.embed.weight.nbytes


def test_tied_in_the_store_only(url: str) -> None:
    source = TiedNet()
    rdmaload.save(source, url)
    target = {"embed.weight": torch.zeros(50, 8), "head.weight": torch.zeros(50, 8)}
    rdmaload.load_into(target, url)
    for tensor in target.values():
        assert torch.equal(tensor, source.embed.weight)


def test_tied_in_the_target_only(url: str) -> None:
    # A checkpoint without the tied name, as most are: the tied target counts as loaded.
    source = TiedNet()
    rdmaload.save({"embed.weight": source.embed.weight.detach().clone()}, url)
    target = zeroed(TiedNet())
    rdmaload.load_into(target, url)
    assert_equal(target, source)


def test_stored_twice_and_tied_in_the_target(url: str) -> None:
    weight = torch.randn(50, 8)
    rdmaload.save({"embed.weight": weight, "head.weight": weight.clone()}, url)
    target = zeroed(TiedNet())
    rdmaload.load_into(target, url)
    assert torch.equal(target.embed.weight, weight)


def test_stored_twice_with_other_bytes_and_tied_in_the_target_is_never_a_mix(url: str) -> None:
    shape = (500, 1000)
    rdmaload.save({"embed.weight": torch.ones(shape), "head.weight": torch.full(shape, 2.0)}, url, chunk_bytes=10_000)
    shared = torch.zeros(shape)
    stats = rdmaload.load_into({"embed.weight": shared, "head.weight": shared}, url)
    assert bool((shared == 2).all())  # the later one, as in load_state_dict
    assert stats.copied_bytes >= shared.nbytes


@pytest.mark.parametrize("swap", [False, True])
def test_tied_names_with_targets_of_different_dtypes(url: str, swap: bool) -> None:
    weight = torch.randn(50, 8)
    rdmaload.save({"a": weight, "b": weight}, url)
    dtypes = (torch.float16, torch.float32) if swap else (torch.float32, torch.float16)
    target = {name: torch.zeros(50, 8, dtype=dtype) for name, dtype in zip("ab", dtypes, strict=True)}
    with pytest.raises(TypeError, match="cast=True"):
        rdmaload.load_into(target, url)
    assert not any(tensor.any() for tensor in target.values())
    rdmaload.load_into(target, url, cast=True)
    for tensor in target.values():
        assert torch.equal(tensor, weight.to(tensor.dtype))


# ---- refused before anything is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_a_shape_that_differs(url: str, watched: type[WatchedConnector], strict: bool) -> None:
    rdmaload.save({"a": torch.ones(3), "b": torch.ones(4, 2)}, url)
    target = {"a": torch.zeros(3), "b": torch.zeros(2, 4)}
    with pytest.raises(LayoutMismatchError, match=r"b has shape \[4, 2\], its target \[2, 4\]"):
        rdmaload.load_into(target, url, strict=strict)
    assert watched.reads == []
    assert not target["a"].any()


def test_a_dtype_that_differs(url: str, watched: type[WatchedConnector]) -> None:
    rdmaload.save({"a": torch.randn(3), "b": torch.randn(4).to(torch.bfloat16)}, url)
    target = {"a": torch.zeros(3), "b": torch.zeros(4)}
    with pytest.raises(TypeError, match=r"b is stored as torch.bfloat16, its target is torch.float32; cast=True"):
        rdmaload.load_into(target, url)
    assert watched.reads == []
    assert not target["a"].any()
    stats = rdmaload.load_into(target, url, cast=True)
    stored = rdmaload.load(url)
    assert torch.equal(target["a"], stored["a"])
    assert torch.equal(target["b"], stored["b"].float())
    assert stats.copied_bytes >= 8


def test_strict_names_what_only_one_side_has(url: str, watched: type[WatchedConnector]) -> None:
    rdmaload.save({name: torch.ones(2) for name in ("a", "b", "c")}, url)
    target = {name: torch.zeros(2) for name in ("b", "c", "d")}
    with pytest.raises(LayoutMismatchError, match=r"1 not stored \(d\); 1 not in the target \(a\); strict=False"):
        rdmaload.load_into(target, url)
    assert watched.reads == []
    stats = rdmaload.load_into(target, url, strict=False)
    assert [bool(target[name].any()) for name in "bcd"] == [True, True, False]
    assert stats.bytes == 16


def test_many_names_are_shortened(url: str) -> None:
    rdmaload.save({f"a{i}": torch.ones(1) for i in range(100)}, url)
    with pytest.raises(LayoutMismatchError, match=r"100 not in the target \(.*, \.\.\.\)") as caught:
        rdmaload.load_into({}, url)
    assert len(str(caught.value)) < 300


def test_a_filtered_load_leaves_targets_out_on_purpose(url: str) -> None:
    source = Net()
    rdmaload.save(source, url)
    target = zeroed(Net())
    rdmaload.load_into(target, url, include="first.*")
    assert torch.equal(target.first.weight, source.first.weight)
    assert not target.second.weight.any()
    rdmaload.load_into(target, url, exclude="first.*")
    assert_equal(target, source)


def test_a_filtered_load_reads_only_what_it_needs(redis_url: str) -> None:
    rdmaload.save({f"t{i}": torch.ones(250_000) for i in range(8)}, redis_url)
    target = {"t3": torch.zeros(250_000)}
    stats = rdmaload.load_into(target, redis_url, include="t3")
    assert stats.read_bytes <= 1_000_000 + 2 * 2**20
    assert torch.equal(target["t3"], torch.ones(250_000))
    # Without a filter but not strict: what has no target is not read either.
    assert rdmaload.load_into(target, redis_url, strict=False).read_bytes == stats.read_bytes


def test_a_meta_target_is_told_to_be_materialised(url: str, watched: type[WatchedConnector]) -> None:
    rdmaload.save({"a": torch.ones(3)}, url)
    with pytest.raises(DeviceError, match="to_empty"):
        rdmaload.load_into({"a": torch.empty(3, device="meta")}, url)
    assert watched.reads == []


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (torch.zeros(3, 1, dtype=torch.complex64).expand(3, 4), "share memory"),
        (torch.zeros(6, 1, dtype=torch.complex64)[::2].expand(3, 4), "share memory"),
        (torch.zeros(10, dtype=torch.complex64).as_strided((3, 4), (1, 1)), "share memory"),
        (torch.zeros(3, 4, dtype=torch.complex64).conj(), "conjugated"),
        (torch._neg_view(torch.zeros(3, 4, dtype=torch.complex64)), "negated"),
        (torch.zeros(3, 4, dtype=torch.complex64).to_sparse(), "sparse"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_target_that_cannot_hold_what_is_stored(
    url: str, watched: type[WatchedConnector], target: torch.Tensor, why: str, strict: bool
) -> None:
    rdmaload.save({"a": torch.ones(3), "b": torch.ones(3, 4, dtype=torch.complex64)}, url)
    other = torch.zeros(3)
    with pytest.raises(LayoutMismatchError, match=f"the target of b .*{why}"):
        rdmaload.load_into({"a": other, "b": target}, url, strict=strict)
    assert watched.reads == []
    assert not other.any()


def test_ranks(url: str) -> None:
    for rank in range(2):
        rdmaload.save({"w": torch.full((4,), rank + 1.0)}, url, rank=rank, world_size=2, save_id="j")
    target = {"w": torch.zeros(4)}
    with pytest.raises(LayoutMismatchError, match="sharded over 2 ranks"):
        rdmaload.load_into(target, url)
    rdmaload.load_into(target, url, rank=1)
    assert target["w"].tolist() == [2.0] * 4


def test_a_target_under_no_grad_inference_mode_and_a_leaf_with_grad(url: str) -> None:
    rdmaload.save({"a": torch.ones(3), "b": torch.ones(3, 2)}, url)
    leaf = torch.zeros(3, requires_grad=True)
    strided = torch.zeros(2, 3, requires_grad=True)
    rdmaload.load_into({"a": leaf, "b": strided.t()}, url)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.tolist() == [1.0] * 3
    assert bool((strided == 1).all())


# ---- failures --------------------------------------------------------------------------------------------------------


def chunk_keys(url: str, watched: type[WatchedConnector]) -> list[str]:
    """The chunks of the model's one weight file, in order."""
    with rdmaload.open(url) as opened:
        (file,) = (file for file in opened.files if file.header is not None)
        count = file.chunk_count(opened._index.chunk_bytes)
        return [f"m/chunks/{opened.generation}/{file.number}/{chunk}" for chunk in range(count)]


def test_a_failure_in_the_middle_says_exactly_what_is_loaded(url: str, watched: type[WatchedConnector]) -> None:
    source = {f"t{i:02}": torch.full((100,), i + 1.0) for i in range(40)} | {"zz": torch.zeros(0)}
    rdmaload.save(source, url, chunk_bytes=1000)
    keys = chunk_keys(url, watched)
    watched.damaged.add(keys[len(keys) // 2])
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    with pytest.raises(PartialLoadError, match=r"of 41 tensors were loaded, then: ") as caught:
        rdmaload.load_into(target, url, threads=1, connections=1, max_integrity_attempts=1)
    loaded = caught.value.loaded
    assert caught.value.key == keys[len(keys) // 2]
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert len(loaded) == len(set(loaded))
    assert 10 <= len(loaded) < 40
    for name in loaded:
        assert torch.equal(target[name], source[name]), name
    for name in set(source) - set(loaded):
        assert not torch.equal(target[name], source[name]), name


@pytest.mark.parametrize("staged", ["cast", "strided"])
def test_a_failure_among_staged_targets(url: str, watched: type[WatchedConnector], staged: str) -> None:
    source = {f"t{i:02}": torch.full((100,), i + 1.0) for i in range(40)}
    rdmaload.save(source, url, chunk_bytes=400)
    keys = chunk_keys(url, watched)
    target = {
        name: torch.zeros(100, dtype=torch.float64) if staged == "cast" else torch.zeros(200)[::2] for name in source
    }
    target["t00"] = torch.zeros(100)  # received in place
    watched.damaged.add(keys[len(keys) // 2])
    with pytest.raises(PartialLoadError) as caught:
        rdmaload.load_into(
            target, url, cast=True, window_bytes=4000, threads=1, connections=1, max_integrity_attempts=1
        )
    loaded = caught.value.loaded
    assert 10 <= len(loaded) < 40
    for name, tensor in target.items():
        assert torch.equal(tensor, source[name].to(tensor.dtype)) == (name in loaded), name


def test_a_failure_before_the_first_byte_loads_nothing(redis_url: str, tiny_checkpoint: Checkpoint) -> None:
    from tests.support.servers import RedisServer

    with RedisServer() as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        target = {name: torch.zeros(s.shape, dtype=torch.bfloat16) for name, s in tiny_checkpoint.tensors.items()}
        with rdmaload.open(server.url("m"), connect_timeout=0.2, retry_timeout=0.2) as opened:
            server.kill()
            with pytest.raises(PartialLoadError, match="0 of") as caught:
                opened.load_into(target)
            assert caught.value.loaded == []
            assert not any(tensor.any() for tensor in target.values())
            server.restart()  # empty
            rdmaload.save(tiny_checkpoint.directory, server.url("m"))
        rdmaload.load_into(target, server.url("m"))
        assert compare(target, tiny_checkpoint.directory) == tiny_checkpoint.bytes


@pytest.mark.parametrize("target", [{"a": [0.0] * 3}, {"a": None}, [torch.zeros(3)], torch.zeros(3), None])
def test_wrong_targets_are_type_errors(url: str, target: object) -> None:
    rdmaload.save({"a": torch.ones(3)}, url)
    with pytest.raises(TypeError, match="the target"):
        rdmaload.load_into(target, url)  # type: ignore[arg-type]


def test_what_is_no_tensor_and_not_stored_is_left_alone(url: str) -> None:
    # Modules may keep any object in their extra state.
    rdmaload.save({"a": torch.ones(3)}, url)
    target = {"a": torch.zeros(3), "_extra_state": {"scale": 1}}
    rdmaload.load_into(target, url)  # type: ignore[arg-type]
    assert target["a"].tolist() == [1.0] * 3


# ---- the function weight_iterator, which opens and closes the model --------------------------------------------------


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models that were closed."""
    models: list[Model] = []
    close = Model.close

    def noted(self: Model) -> None:
        models.append(self)
        close(self)

    monkeypatch.setattr(Model, "close", noted)
    return models


def test_the_iterating_function_passes_progress_on_and_closes(url: str, closed: list[Model]) -> None:
    rdmaload.save({f"t{i}": torch.ones(1000) for i in range(6)}, url)
    seen: list[Progress] = []
    iterator = rdmaload.weight_iterator(url, window_bytes=8000, progress=seen.append)
    assert not closed
    assert len(list(iterator)) == 6
    assert closed
    assert seen[-1].bytes_done == seen[-1].bytes_total == 24_000
    assert list(iterator) == []


def test_the_iterating_function_fails_at_the_call(url: str, closed: list[Model]) -> None:
    with pytest.raises(NotFoundError):
        rdmaload.weight_iterator(url)
    for rank in range(2):
        rdmaload.save({"a": torch.ones(3)}, url, rank=rank, world_size=2, save_id="j")
    closed.clear()
    with pytest.raises(LayoutMismatchError, match="sharded over 2 ranks"):
        rdmaload.weight_iterator(url)
    assert closed


@pytest.mark.parametrize("taken", [0, 1])
def test_a_dropped_iterator_closes_its_model(url: str, closed: list[Model], taken: int) -> None:
    rdmaload.save({"a": torch.ones(3), "b": torch.ones(3)}, url)
    iterator = rdmaload.weight_iterator(url)
    for _ in range(taken):
        next(iterator)
    assert not closed
    del iterator
    gc.collect()
    assert closed


def test_a_failed_read_closes_the_model(url: str, watched: type[WatchedConnector], closed: list[Model]) -> None:
    rdmaload.save({"a": torch.ones(3)}, url)
    watched.damaged.update(chunk_keys(url, watched))
    closed.clear()
    iterator = rdmaload.weight_iterator(url, max_integrity_attempts=1)
    with pytest.raises(IntegrityError):
        next(iterator)
    assert closed
