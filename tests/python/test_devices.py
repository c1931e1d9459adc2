"""GPU loads: every byte in device memory, streams in order, memory bounded, errors clean.

On the fake driver, which can be made to fail, to be late and to show what was left behind; with RDMALOAD_REQUIRE=cuda,
on the GPUs of this machine instead, where what only the fake can do is skipped. A process has one driver.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import rdmaload
from benchmarks import device as device_benchmark
from rdmaload import _core, devices
from rdmaload.cli.host_checks import host_checks
from rdmaload.connectors import registry
from rdmaload.connectors.memory import MemoryConnector, forget_store
from rdmaload.devices import DeviceRoad
from rdmaload.errors import DeviceError, PartialLoadError
from rdmaload.options import Options
from rdmaload.reader import Batch, StoreReader
from tests.support.checkpoints import Checkpoint, make_checkpoint
from tests.support.fake_gpu import FakeGpu
from tests.support.real_gpu import RealGpu
from tests.support.torch_cuda import torch_cuda_on
from tests.support.web import RangedPython

ROOT = Path(__file__).resolve().parents[2]
ON_HARDWARE = "cuda" in os.environ.get("RDMALOAD_REQUIRE", "").split(",")
Gpu = FakeGpu | RealGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """In place of torch's allocator; nothing of the test may be left in the fake."""
    if ON_HARDWARE:
        real = RealGpu()
        monkeypatch.setattr(devices, "allocator", lambda: real)
        yield real
        return
    fake = FakeGpu()
    monkeypatch.setattr(devices, "allocator", lambda: fake)
    _core.release_pinned_memory()
    before = fake.state()
    yield fake
    gc.collect()
    _core.release_pinned_memory()
    after = fake.state()
    fake.close()
    for what in ("device_allocations", "host_allocations", "registrations", "events"):
        assert after[what] == before[what], f"{what} left behind"


@pytest.fixture
def fake_gpu(gpu: Gpu) -> FakeGpu:
    """For what only the fake can do."""
    if not isinstance(gpu, FakeGpu):
        pytest.skip("RDMALOAD_REQUIRE names cuda, and this takes the fake driver")
    return gpu


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Forty tensors of all the sizes that matter, 1.3 MB."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for number in range(40):
        size = (0, 1, 3, 1000, 40_000)[number % 5]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        tensors[f"t{number:02}"] = torch.randn(size, generator=generator).to(dtype)
    tensors["ids"] = torch.arange(1000)
    directory = tmp_path / "small"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


PATHS = {
    "file": "file-buffered",
    "direct": "file-direct",
    "redis": "resp-tcp",
    "unix": "resp-unix",
    "tls": "resp-tls",
    "server": "resp-tcp",
    "http": "http",
    "cache": "resp-tcp",
    "python": "python",
}


def url_of(source: str, directory: Path, model: str, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Where the directory's model can be read in this way, with the options for it."""
    if source in ("file", "direct"):
        # Direct reads of a machine with GPUDirect Storage are another test's.
        return str(directory), {"file_io": "direct", "gds": "off"} if source == "direct" else {}
    if source == "http":
        server = RangedPython(directory.parent)
        request.addfinalizer(server.close)
        return f"{server.endpoint}/{directory.name}/", {}
    if source == "python":
        url = f"memory://devices/{model}"
    else:
        fixture = {
            "redis": "redis_server",
            "cache": "redis_server",
            "unix": "unix_server",
            "tls": "tls_server",
            "server": "weight_server",
        }[source]
        if source == "tls" and ON_HARDWARE:
            pytest.importorskip("cryptography")
        url = request.getfixturevalue(fixture).url(model)
    rdmaload.save(directory, url, chunk_bytes=50_000)
    return url, {"cache_dir": str(directory.parent / "cache")} if source == "cache" else {}


@pytest.mark.parametrize("source", list(PATHS))
@pytest.mark.parametrize("verify", ["off", "on"])
def test_a_model_arrives_in_device_memory_byte_for_byte(
    source: str, verify: str, gpu: Gpu, small: Path, model: str, request: pytest.FixtureRequest
) -> None:
    url, options = url_of(source, small, model, request)
    gpu.late_fills = True
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(url, device="cuda:0", stats=stats, staging_bytes=300_000, verify_device=verify, **options)
    expected = stored(small)
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert tensor.numel() == 0 or gpu.ordinal_of(tensor) == 0
        assert same(gpu.seen(tensor), expected[name]), name
    assert stats.path == f"{PATHS[source]}+staged-gpu"
    assert stats.fallback_reason is None
    assert source in ("direct", "http") or stats.copied_bytes == 0  # the edges of a direct read are moved
    # Whether the store has checksums or not.
    assert stats.device_verified_bytes == (stats.read_bytes if verify == "on" else 0)
    assert stats.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert {address for address, _, _ in gpu.recorded} == {t.data_ptr() for t in loaded.values() if t.nbytes}
    assert len({stream for _, _, stream in gpu.recorded}) == 1


def test_without_an_index_the_current_device_is_meant(gpu: Gpu, small: Path) -> None:
    loaded = rdmaload.load(small, device="cuda", include="ids")
    assert gpu.ordinal_of(loaded["ids"]) == gpu.current_device()
    assert torch.equal(gpu.seen(loaded["ids"]), torch.arange(1000))


def test_all_dtypes_arrive(gpu: Gpu, all_dtypes_checkpoint: Checkpoint) -> None:
    loaded = rdmaload.load(all_dtypes_checkpoint.directory, device="cuda:0")
    for name, tensor in rdmaload.load(all_dtypes_checkpoint.directory).items():
        assert same(gpu.seen(loaded[name]), tensor), name


def test_tiny_tensors_are_placed_by_one_launch_per_read(gpu: Gpu, tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((number % 7,), number % 251, dtype=torch.uint8) for number in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = gpu.state() if gpu.is_fake else {}
    loaded = rdmaload.load(tmp_path, device=f"cuda:{gpu.ordinals[1]}")
    if gpu.is_fake:
        assert gpu.state()["launches"] - before["launches"] == 1
    for name, tensor in tensors.items():
        assert same(gpu.seen(loaded[name]), tensor)


def test_an_iterator_holds_no_more_than_its_window(fake_gpu: FakeGpu, small: Path) -> None:
    expected = stored(small)
    fake_gpu.late_fills = True
    before = fake_gpu.state()["device_bytes"]
    seen = {}
    for name, tensor in rdmaload.weight_iterator(small, device="cuda:0", window_bytes=400_000):
        seen[name] = fake_gpu.seen(tensor)
        del tensor
    assert seen.keys() == expected.keys()
    assert all(same(seen[name], expected[name]) for name in expected)
    peak = fake_gpu.state()["peak_device_bytes"] - before
    assert 0 < peak <= 400_000 + 160_000  # and one that the consumer holds


def test_an_iterator_that_is_dropped_gives_everything_back(gpu: Gpu, small: Path) -> None:
    iterator = rdmaload.weight_iterator(small, device="cuda:0", window_bytes=200_000)
    name, tensor = next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert same(gpu.seen(tensor), stored(small)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_converted_on_the_device(gpu: Gpu, small: Path, dtype: torch.dtype) -> None:
    before = gpu.state() if gpu.is_fake else {}
    loaded = rdmaload.load(small, device="cuda:0", dtype=dtype, device_extra_bytes=400_000)
    assert list(loaded) == list(rdmaload.load(small))
    final = 0
    for name, tensor in stored(small).items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert same(gpu.seen(loaded[name]), expected), name
        final += expected.nbytes
    if gpu.is_fake:
        assert gpu.state()["launches"] > before["launches"]
        assert gpu.state()["peak_device_bytes"] - before["device_bytes"] <= final + 400_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_larger_than_the_extra_memory_is_converted_on_the_host(
    fake_gpu: FakeGpu, small: Path, dtype: torch.dtype
) -> None:
    """The largest tensors take 80,000 and 160,000 bytes."""
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in stored(small).items()}
    fake_gpu.reset_peak()
    before = fake_gpu.state()["device_bytes"]
    stats = rdmaload.LoadStats()
    progress: list[int] = []
    loaded = rdmaload.load(
        small,
        device="cuda:0",
        dtype=dtype,
        device_extra_bytes=60_000,
        stats=stats,
        progress=lambda now: progress.append(now.bytes_done),
    )
    assert list(loaded) == list(rdmaload.load(small))
    for name, tensor in expected.items():
        assert same(fake_gpu.seen(loaded[name]), tensor), name
    final = sum(tensor.nbytes for tensor in expected.values())
    assert fake_gpu.state()["peak_device_bytes"] - before <= final + 60_000
    assert stats.bytes == sum(tensor.nbytes for tensor in stored(small).values())
    assert stats.fallback_reason is not None
    assert "device_extra_bytes" in stats.fallback_reason
    assert progress == sorted(progress)


def test_existing_tensors_on_two_devices_and_the_host_are_filled(gpu: Gpu, small: Path) -> None:
    expected = stored(small)
    targets = {}
    for number, (name, tensor) in enumerate(expected.items()):
        place = (None, *gpu.ordinals)[number % 3]
        targets[name] = torch.empty_like(tensor) if place is None else gpu.empty(tensor.shape, tensor.dtype, place)
    before = gpu.state() if gpu.is_fake else {}
    stats = rdmaload.load_into(targets, small)
    if gpu.is_fake:
        assert gpu.state()["device_bytes"] == before["device_bytes"]
    for name, tensor in expected.items():
        on_device = gpu.ordinal_of(targets[name]) is not None
        assert same(gpu.seen(targets[name]) if on_device else targets[name], tensor), name
    assert stats.copied_bytes == 0
    assert stats.bytes == sum(tensor.nbytes for tensor in expected.values())


def test_every_device_is_read_for_before_any_is_waited_for(
    fake_gpu: FakeGpu, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(small)
    targets = {
        name: torch.empty_like(tensor) if number % 3 == 2 else fake_gpu.empty(tensor.shape, tensor.dtype, number % 3)
        for number, (name, tensor) in enumerate(expected.items())
    }
    calls: list[str] = []
    start, finish = StoreReader.start, StoreReader.finish

    def started(self: StoreReader, *args: Any, **keywords: Any) -> Batch:
        calls.append("start")
        return start(self, *args, **keywords)

    def finished(self: StoreReader, *args: Any) -> None:
        calls.append("finish")
        finish(self, *args)

    monkeypatch.setattr(StoreReader, "start", started)
    monkeypatch.setattr(StoreReader, "finish", finished)
    progress: list[int] = []
    with rdmaload.open(small) as model:
        stats = model.load_into(targets, progress=lambda now: progress.append(now.bytes_done))
    assert calls == ["start"] * 3 + ["finish"] * 3
    assert progress == sorted(progress)
    assert stats.path == "file-buffered+staged-gpu"
    for name, tensor in expected.items():
        on_device = fake_gpu.ordinal_of(targets[name]) is not None
        assert same(fake_gpu.seen(targets[name]) if on_device else targets[name], tensor), name


def test_an_error_on_one_device_ends_the_load_on_all(fake_gpu: FakeGpu, small: Path) -> None:
    expected = stored(small)
    targets = {
        name: fake_gpu.empty(tensor.shape, tensor.dtype, number % 2)
        for number, (name, tensor) in enumerate(expected.items())
    }
    with rdmaload.open(small) as model:
        fake_gpu.fail_call("cuEventRecord", 3)
        with pytest.raises(PartialLoadError, match="CUDA_ERROR_OUT_OF_MEMORY") as raised:
            model.load_into(targets)
        for name in raised.value.loaded:
            assert same(fake_gpu.seen(targets[name]), expected[name]), name
        del raised
        model.load_into(targets)
    for name, tensor in expected.items():
        assert same(fake_gpu.seen(targets[name]), tensor), name


def test_windows_of_two_devices_stay_bounded_each(fake_gpu: FakeGpu, small: Path) -> None:
    expected = {name: tensor for name, tensor in stored(small).items() if tensor.is_floating_point()}
    targets = {
        name: fake_gpu.empty(tensor.shape, torch.float64, number % 2)
        for number, (name, tensor) in enumerate(expected.items())
    }
    fake_gpu.reset_peak()
    before = fake_gpu.state()["device_bytes"]
    rdmaload.load_into(targets, small, cast=True, strict=False, device_extra_bytes=400_000)
    assert 0 < fake_gpu.state()["peak_device_bytes"] - before <= 2 * 400_000
    for name, tensor in expected.items():
        assert torch.equal(fake_gpu.seen(targets[name]), tensor.to(torch.float64)), name


def test_extra_device_memory_has_a_bound_for_blocks_too(fake_gpu: FakeGpu, tmp_path: Path, model: str) -> None:
    tensors = {f"t{number}": torch.full((777,), number % 251, dtype=torch.uint8) for number in range(4000)}
    save_file(tensors, tmp_path / "model.safetensors")
    url = f"memory://devices/{model}"
    rdmaload.save(tmp_path, url, chunk_bytes=200_000)
    targets = {name: fake_gpu.empty(tensor.shape, torch.int64, 0) for name, tensor in tensors.items()}
    fake_gpu.reset_peak()
    before = fake_gpu.state()
    rdmaload.load_into(targets, url, cast=True, device_extra_bytes=1_200_000, verify_device="on")
    after = fake_gpu.state()
    assert after["launches"] > before["launches"]
    assert 200_000 < after["peak_device_bytes"] - before["device_bytes"] <= 1_200_000
    assert all(torch.equal(fake_gpu.seen(targets[name]), tensor.to(torch.int64)) for name, tensor in tensors.items())


@pytest.fixture
def direct_storage(fake_gpu: FakeGpu) -> Iterator[FakeGpu]:
    """The fake cuFile for this test; any other test has none."""
    fake_gpu.open_cufile()
    yield fake_gpu
    fake_gpu.close_cufile()


def test_cold_files_go_to_the_device_by_cufile(direct_storage: FakeGpu, small: Path) -> None:
    gpu = direct_storage
    gpu.late_fills = True
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(small, device="cuda:0", stats=stats, file_io="direct")
    assert stats.path == "file-gds"
    assert stats.fallback_reason is None
    assert stats.copied_bytes == 0
    for name, tensor in stored(small).items():
        assert same(gpu.seen(loaded[name]), tensor), name
    rdmaload.load(small, device="cuda:0", stats=stats, file_io="direct", gds="off")
    assert stats.path == "file-direct+staged-gpu"
    rdmaload.load(small, device="cuda:0", stats=stats)  # small files are not worth it
    assert stats.path == "file-buffered+staged-gpu"


def test_two_devices_fill_by_cufile_within_their_memory(direct_storage: FakeGpu, small: Path) -> None:
    gpu = direct_storage
    expected = stored(small)
    targets = {
        name: gpu.empty(tensor.shape, tensor.dtype, number % 2)
        for number, (name, tensor) in enumerate(expected.items())
    }
    gpu.reset_peak()
    before = gpu.state()["device_bytes"]
    stats = rdmaload.load_into(targets, small, file_io="direct", device_extra_bytes=16_000_000)
    assert stats.path == "file-gds"
    assert gpu.state()["peak_device_bytes"] - before <= 2 * 16_000_000
    for name, tensor in expected.items():
        assert same(gpu.seen(targets[name]), tensor), name


def test_without_cufile_direct_reads_say_so(fake_gpu: FakeGpu, small: Path) -> None:
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(small, device="cuda:0", stats=stats, file_io="direct")
    assert stats.path == "file-direct+staged-gpu"
    assert stats.fallback_reason is not None
    assert "no GPUDirect Storage" in stats.fallback_reason
    for name, tensor in stored(small).items():
        assert same(fake_gpu.seen(loaded[name]), tensor), name


def test_page_locked_memory_is_kept_for_the_next_load(fake_gpu: FakeGpu, small: Path) -> None:
    base = fake_gpu.state()["host_bytes"]
    rdmaload.load(small, device="cuda:0")
    kept = fake_gpu.state()["host_bytes"] - base
    assert 0 < kept <= 128 << 20
    fake_gpu.fail_call("cuMemHostRegister_v2", 1)  # not asked again
    fake_gpu.fail_call("cuMemHostAlloc", 1)
    rdmaload.load(small, device="cuda:0")
    assert fake_gpu.state()["host_bytes"] - base == kept
    fake_gpu.fail_call("cuMemHostRegister_v2", 0)
    fake_gpu.fail_call("cuMemHostAlloc", 0)
    _core.release_pinned_memory()
    assert fake_gpu.state()["host_bytes"] == base


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_and_ends_cleanly(gpu: Gpu, small: Path) -> None:
    with rdmaload.open(small) as model:
        first = model.load(device="cuda:0")  # a ring is kept from it
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rdmaload.load(small, device="cuda:0")
            except DeviceError as error:
                code = 0 if "spawn" in str(error) else 2
            except BaseException:
                code = 3
            try:
                _core.release_pinned_memory()
                model.close()
            except BaseException:
                code = 4
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        again = model.load(device="cuda:0")
    for name, tensor in stored(small).items():
        assert same(gpu.seen(first[name]), tensor), name
        assert same(gpu.seen(again[name]), tensor), name


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_reads(
    fake_gpu: FakeGpu, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Gated(MemoryConnector):
        """The last chunk comes when the gate is open."""

        def get_into(self, key: str, buffer: memoryview) -> int:
            assert not key.endswith("/3") or gate.wait(20)
            return super().get_into(key, buffer)

    monkeypatch.setitem(registry._registered, "gated", Gated)
    checkpoint = make_checkpoint(tmp_path / "m", {f"t{i}": ("U8", [100_000]) for i in range(4)})
    rdmaload.save(checkpoint.directory, f"memory://{model}/m", chunk_bytes=110_000)
    with rdmaload.open(f"gated://{model}/m") as opened:
        tensors = opened.weight_iterator(device="cuda:0", window_bytes=400_000)
        delivered = dict([next(tensors)])
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # rather than for ever
            try:
                tensors.close()  # type: ignore[attr-defined]
            except BaseException:
                os._exit(3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        gate.set()
        delivered |= dict(tensors)
    forget_store(model)
    assert code == 0
    for name, tensor in stored(checkpoint.directory).items():
        assert same(fake_gpu.seen(delivered[name]), tensor), name


def test_cast_and_strided_targets_take_bounded_extra_memory(gpu: Gpu, small: Path) -> None:
    expected = stored(small)
    targets = {}
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            wide = gpu.empty((tensor.numel(), 2), torch.float64, 0)
            targets[name] = wide[:, 0]
        else:
            targets[name] = gpu.empty(tensor.shape, tensor.dtype, 0)
    before = 0
    if gpu.is_fake:
        gpu.reset_peak()
        before = gpu.state()["device_bytes"]
    stats = rdmaload.LoadStats()
    copies = _HostCopies(gpu)
    with copies:
        rdmaload.load_into(targets, small, cast=True, device_extra_bytes=100_000, stats=stats)  # less than the largest
    if gpu.is_fake:
        assert gpu.state()["peak_device_bytes"] - before <= 100_000
    # What torch makes beside a strided target is of the target's type: eight bytes for two.
    assert 0 < max(copies.temporary_bytes) <= 100_000
    assert stats.fallback_reason is not None
    for name, tensor in expected.items():
        assert torch.equal(targets[name].cpu(), tensor.to(targets[name].dtype)), name


class _HostCopies(TorchDispatchMode):
    """Sees how much torch copies at once from the host to a device's strided memory: so much it makes there again."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu
        self.temporary_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            from_host = self._gpu.ordinal_of(target) is not None and self._gpu.ordinal_of(source) is None
            if from_host and not target.is_contiguous():
                self.temporary_bytes.append(target.numel() * max(target.element_size(), source.element_size()))
        return func(*args, **(kwargs or {}))


def test_without_kernels_torch_converts_and_the_reason_is_told(
    fake_gpu: FakeGpu, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "convert_on_device", lambda *arguments: False)
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(small, device="cuda:0", dtype=torch.float16, stats=stats)
    assert stats.fallback_reason is not None
    assert stats.fallback_reason.startswith("torch converted on the GPU")
    for name, tensor in stored(small).items():  # what torch converts is not the fake's memory
        expected = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        assert same(loaded[name], expected), name


def test_a_gpu_that_the_kernels_are_too_new_for_loads_all_the_same(small: Path, tmp_path: Path) -> None:
    """In a process of its own: a device that has loaded its kernels keeps them."""
    tensors = {f"t{number:04}": torch.full((number % 7,), number % 251, dtype=torch.uint8) for number in range(500)}
    (tmp_path / "tiny").mkdir()
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    script = """
import sys
import torch
import rdmaload
from rdmaload import devices
from rdmaload.cli.host_checks import host_checks
from tests.support.fake_gpu import FakeGpu
gpu = FakeGpu()
gpu.set_module_result(209)
devices.allocator = lambda: gpu
stats = rdmaload.LoadStats()
tiny = rdmaload.load(sys.argv[1], device="cuda:0", stats=stats)
for name, tensor in rdmaload.load(sys.argv[1]).items():
    assert torch.equal(gpu.seen(tiny[name]), tensor), name
print(stats.fallback_reason)
small = rdmaload.load(sys.argv[2], device="cuda:0", dtype=torch.float16, stats=stats)
for name, tensor in rdmaload.load(sys.argv[2], dtype=torch.float16).items():
    assert torch.equal(small[name], tensor), name
print(stats.fallback_reason)
print({check.name: check for check in host_checks()}["gpus"])
stats = rdmaload.LoadStats()
checked = rdmaload.load(sys.argv[2], device="cuda:0", verify_device="on", stats=stats)
for name, tensor in rdmaload.load(sys.argv[2]).items():
    assert torch.equal(gpu.seen(checked[name]), tensor), name
assert stats.device_verified_bytes == stats.read_bytes > 0
print(stats.fallback_reason)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "tiny"), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    tiny, converted, doctor, verify = done.stdout.splitlines()
    for line in (tiny, converted, doctor, verify):
        assert "CUDA_ERROR_NO_BINARY_FOR_GPU (209)" in line
        assert "compute capability 9.0" in line
    assert tiny.startswith("small tensors were copied to the GPU one by one")
    assert converted.startswith("small tensors were copied") or converted.startswith("torch converted")
    assert "status='warn'" in doctor
    assert verify.startswith("verify_device reads back what it copied to the GPU")


def test_tensors_are_handed_out_in_the_order_of_streams(fake_gpu: FakeGpu) -> None:
    """Of a load the host has seen the end; the contract holds for what a stream still has to do, too."""
    source = _core.MemoryTransport(threads=1)
    road = DeviceRoad(source, 0, Options(), read_bytes=100_000, expected_bytes=100_000)
    made = fake_gpu.empty((10_000,), torch.int32, 0)
    late = torch.arange(10_000, dtype=torch.int32)
    fake_gpu.late_copy(road.staged.stream, 0, made, late)
    road.hand_out([made])
    assert torch.equal(fake_gpu.seen(made), late)
    assert fake_gpu.recorded == [(made.data_ptr(), 0, road.staged.stream)]


def test_a_cuda_graph_that_is_captured_refuses_the_load_and_stays_whole(fake_gpu: FakeGpu, small: Path) -> None:
    rdmaload.load(small, device="cuda:0", include="ids")
    fake_gpu.begin_capture(0)
    with pytest.raises(DeviceError, match="captures a CUDA graph") as raised:
        rdmaload.load(small, device="cuda:0")
    del raised
    assert fake_gpu.end_capture()


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize", "cuMemHostAlloc"])
def test_a_driver_error_is_named_and_the_next_load_works(fake_gpu: FakeGpu, small: Path, call: str) -> None:
    with rdmaload.open(small, staging_bytes=300_000) as model:
        fake_gpu.fail_call(call, 1)
        if call == "cuMemHostAlloc":  # which is asked only where memory cannot be registered
            fake_gpu.fail_call("cuMemHostRegister_v2", 1)
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY") as raised:
            model.load(device="cuda:0")
        del raised
        loaded = model.load(device="cuda:0", include="ids")
        assert torch.equal(fake_gpu.seen(loaded["ids"]), torch.arange(1000))


def test_flipped_bits_on_the_way_to_the_device_are_read_again(fake_gpu: FakeGpu, small: Path, model: str) -> None:
    url = f"memory://devices/{model}"
    rdmaload.save(small, url)
    fake_gpu.corrupt_copy(1)
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(url, device="cuda:0", verify_device="on", stats=stats)
    assert stats.retries == 1
    for name, tensor in stored(small).items():
        assert same(fake_gpu.seen(loaded[name]), tensor), name


def test_a_broken_context_is_told_and_the_other_device_goes_on(small: Path) -> None:
    """In a process of its own, because nothing makes such a context whole again."""
    script = """
import sys
import torch
import rdmaload
from rdmaload import devices
from tests.support.fake_gpu import FakeGpu
gpu = FakeGpu()
devices.allocator = lambda: gpu
gpu.fail_work(3, 700)
for attempt in ("in the middle of a load", "from then on"):
    try:
        rdmaload.load(sys.argv[1], device="cuda:0")
        print("loaded", attempt)
    except rdmaload.DeviceError as error:
        assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in str(error) and "start another one" in str(error), error
        print("refused", attempt)
loaded = rdmaload.load(sys.argv[1], device="cuda:1")
for name, tensor in rdmaload.load(sys.argv[1]).items():
    assert torch.equal(gpu.seen(loaded[name]), tensor), name
print("the other device loads")
"""
    command = [sys.executable, "-c", script, str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "refused in the middle of a load",
        "refused from then on",
        "the other device loads",
    ]


def test_devices_that_are_not_there_are_refused(fake_gpu: FakeGpu, small: Path) -> None:
    with pytest.raises(DeviceError, match=r"cuda:2.*2 CUDA devices"):
        rdmaload.load(small, device="cuda:2")


@pytest.mark.skipif(torch.version.cuda is not None, reason="about a torch that is built for the CPU")
def test_a_torch_for_the_cpu_says_so(small: Path) -> None:
    with pytest.raises(DeviceError, match=r"built for the CPU: install one with CUDA"):
        rdmaload.load(small, device="cuda")


def test_without_a_driver_the_reason_is_in_the_stats(small: Path) -> None:
    script = """
import sys
import time
from rdmaload import _core, devices
from rdmaload.options import Options
from rdmaload.stats import LoadStats
stats = LoadStats()
source = _core.FileTransport(root=sys.argv[1], threads=1)
try:
    _core.cuda_device_count()
    print("no CUDA driver")  # there is one: nothing to show here
except NotImplementedError:
    assert devices.open_road(source, 0, Options(), stats, read_bytes=100, expected_bytes=100) is None
    print(stats.fallback_reason)
"""
    done = subprocess.run([sys.executable, "-c", script, str(small)], capture_output=True, text=True, check=True)
    assert "no CUDA driver" in done.stdout


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_real_devices_get_the_same_bytes(small: Path, model: str, dtype: torch.dtype | None) -> None:
    """The kernels themselves: scatter and checksum (verify_device), and conversion, against torch."""
    url = f"memory://devices/{model}"
    rdmaload.save(small, url, chunk_bytes=50_000)
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(url, device="cuda:0", dtype=dtype, verify_device="on", stats=stats)
    assert stats.path == "python+staged-gpu"
    assert stats.retries == 0
    for name, tensor in stored(small).items():
        expected = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert loaded[name].device == torch.device("cuda", 0)
        assert same(loaded[name].cpu(), expected), name


@pytest.mark.needs_cuda
@pytest.mark.parametrize("gds", ["auto", "off"])
def test_real_devices_get_files_past_the_page_cache(small: Path, gds: str) -> None:
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(small, device="cuda:0", file_io="direct", gds=gds, stats=stats)
    ways = {"file-direct+staged-gpu", "file-buffered+staged-gpu", *(["file-gds"] if gds == "auto" else [])}
    assert stats.path in ways
    assert stats.path == "file-gds" or stats.fallback_reason or gds == "off"
    for name, tensor in stored(small).items():
        assert same(loaded[name].cpu(), tensor), name


@pytest.mark.needs_cuda
def test_real_modules_are_filled_in_place_on_every_device(small: Path) -> None:
    expected = stored(small)
    count = torch.cuda.device_count()
    targets = {
        name: torch.empty_like(tensor, device=f"cuda:{number % count}")
        for number, (name, tensor) in enumerate(expected.items())
    }
    for number in range(count):
        torch.cuda.reset_peak_memory_stats(number)
    before = [torch.cuda.memory_allocated(number) for number in range(count)]
    rdmaload.load_into(targets, small)
    assert [torch.cuda.max_memory_allocated(number) for number in range(count)] == before
    assert all(same(targets[name].cpu(), expected[name]) for name in expected)
    wide = {name: torch.empty(t.shape, dtype=torch.float64, device="cuda:0") for name, t in expected.items()}
    torch.cuda.reset_peak_memory_stats(0)
    allocated = torch.cuda.memory_allocated(0)
    rdmaload.load_into(wide, small, cast=True, device_extra_bytes=1_000_000)
    assert torch.cuda.max_memory_allocated(0) - allocated <= 1_000_000 + 512 * len(expected)  # torch's granularity
    assert all(torch.equal(wide[name].cpu(), expected[name].to(torch.float64)) for name in expected)


@pytest.mark.needs_cuda
def test_real_iterators_hold_no_more_than_their_window(small: Path) -> None:
    expected = stored(small)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    for name, tensor in rdmaload.weight_iterator(small, device="cuda:0", window_bytes=400_000):
        assert same(tensor.cpu(), expected[name]), name
        del tensor
    assert torch.cuda.max_memory_allocated(0) - before <= 400_000 + 160_000 + 512 * len(expected)


def test_the_benchmark_measures_every_part(fake_gpu: FakeGpu, small: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in stored(small).values())
    reported: list[str] = []
    result = device_benchmark.measure(
        small,
        nbytes,
        torch.device("cuda", 0),
        None,
        rounds=2,
        seconds=1e6,  # however busy the machine is: with less, rounds are left out
        stagings=[200_000, 400_000],
        pieces=[50_000, 100_000],
        report=lambda part: reported.append(json.dumps(part)),
    )
    assert len(reported) == 12
    for kind, path in {
        "file": "file-buffered",
        "memory": "memory",
        "server": "resp-tcp",
        "redis": "resp-tcp",
        "python": "python",
        "file_cold": "file-buffered",
    }.items():
        row = result[kind]
        assert row["path"] == f"{path}+staged-gpu"
        assert len(row["rdmaload"]["runs"]) == len(row["source"]["runs"]) == 2
        assert row["rdmaload"]["share_of_limit"] > 0
        assert row["timeline"]["reads"] == len(row["timeline"]["events"]) > 0
        assert 0 <= row["timeline"]["overlapped_share_of_copying"] <= 1
    assert [(row["read_bytes"], row["staging_bytes"]) for row in result["staging_memory"]] == [
        (50_000, 200_000),
        (50_000, 400_000),
        (100_000, 200_000),
        (100_000, 400_000),
    ]
    assert len(result["staging_server"]) == 2
    assert result["all_devices"]["devices"] == 2
    assert result["page_locking"]["kept_seconds"] > 0
    assert all(result[part]["gb_per_s"] > 0 for part in ("verify_device_file", "verify_device_server"))
    assert device_benchmark.union([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_the_benchmark_runs_from_its_command_line(
    fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of it, so that none is new to hardware."""
    monkeypatch.setattr(device_benchmark, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(device_benchmark, "MOST_SECONDS", 1e6)  # however busy the machine is
    output = tmp_path / "device.json"
    with torch_cuda_on(fake_gpu, monkeypatch):
        device_benchmark.main(["--bytes", "1e6", "--rounds", "1", "--seconds", "1e6", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["finished"] is True
    assert result["copy_limit_gb_per_s"] > 0
    assert not [part for part in result.values() if isinstance(part, dict) and ("error" in part or "skipped" in part)]
    row = result["file"]
    bound = min(row["source"]["gb_per_s"], result["copy_limit_gb_per_s"])
    for way in ("rdmaload", "load, then to"):
        assert row[way]["share_of_limit"] == pytest.approx(row[way]["gb_per_s"] / bound)
    assert set(row["failed"]) <= {"safetensors", "fastsafetensors", "runai_model_streamer"}  # torch is not on the fake


def test_the_benchmark_leaves_out_what_there_is_no_time_for(fake_gpu: FakeGpu, small: Path) -> None:
    result = device_benchmark.measure(small, 1000, torch.device("cuda", 0), None, rounds=2, seconds=0, redis=False)
    skipped = [part for part, value in result.items() if isinstance(value, dict) and "skipped" in value]
    assert "file_cold" in skipped
    assert "staging_memory" in skipped


def test_the_doctor_names_devices_and_driver(fake_gpu: FakeGpu) -> None:
    found = {check.name: check for check in host_checks()}["gpus"]
    assert found.status == "ok"
    assert re.fullmatch(r"2, \S+libfake_cuda.so of CUDA 13.0, with kernels", found.value)
