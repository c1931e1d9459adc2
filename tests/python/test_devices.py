"""GPU loads on the fake driver: every byte in device memory, streams in order, memory bounded, errors clean."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdmaload
from benchmarks import device as device_benchmark
from rdmaload import devices
from rdmaload.cli.host_checks import host_checks
from rdmaload.errors import DeviceError
from tests.support.checkpoints import Checkpoint
from tests.support.fake_gpu import FakeGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The fake in place of torch's allocator; nothing of the test may be left in it."""
    fake = FakeGpu()
    monkeypatch.setattr(devices, "allocator", lambda: fake)
    before = fake.state()
    yield fake
    gc.collect()
    after = fake.state()
    fake.close()
    for what in ("device_allocations", "host_allocations", "events"):
        assert after[what] == before[what], f"{what} left behind"


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


@pytest.mark.parametrize("source", ["file", "redis", "python"])
@pytest.mark.parametrize("verify", ["off", "on"])
def test_a_model_arrives_in_device_memory_byte_for_byte(
    source: str, verify: str, gpu: FakeGpu, small: Path, redis_url: str, model: str
) -> None:
    url = {"file": str(small), "redis": redis_url, "python": f"memory://devices/{model}"}[source]
    if source != "file":
        rdmaload.save(small, url, chunk_bytes=50_000)
    gpu.late_fills = True
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(url, device="cuda:0", stats=stats, staging_bytes=300_000, verify_device=verify)
    expected = stored(small)
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert tensor.numel() == 0 or gpu.ordinal_of(tensor) == 0
        assert same(gpu.seen(tensor), expected[name]), name
    path = {"file": "file-buffered", "redis": "resp-tcp", "python": "python"}[source]
    assert stats.path == f"{path}+staged-gpu"
    assert stats.fallback_reason is None
    assert stats.copied_bytes == 0
    assert stats.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert {address for address, _, _ in gpu.recorded} == {t.data_ptr() for t in loaded.values() if t.nbytes}
    assert len({stream for _, _, stream in gpu.recorded}) == 1


def test_without_an_index_the_current_device_is_meant(gpu: FakeGpu, small: Path) -> None:
    loaded = rdmaload.load(small, device="cuda", include="ids")
    assert gpu.ordinal_of(loaded["ids"]) == 1
    assert torch.equal(gpu.seen(loaded["ids"]), torch.arange(1000))


def test_all_dtypes_arrive(gpu: FakeGpu, all_dtypes_checkpoint: Checkpoint) -> None:
    loaded = rdmaload.load(all_dtypes_checkpoint.directory, device="cuda:0")
    for name, tensor in rdmaload.load(all_dtypes_checkpoint.directory).items():
        assert same(gpu.seen(loaded[name]), tensor), name


def test_tiny_tensors_are_placed_by_one_launch_per_read(gpu: FakeGpu, tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((number % 7,), number % 251, dtype=torch.uint8) for number in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = gpu.state()
    loaded = rdmaload.load(tmp_path, device="cuda:1")
    after = gpu.state()
    assert after["launches"] - before["launches"] == 1
    for name, tensor in tensors.items():
        assert same(gpu.seen(loaded[name]), tensor)


def test_an_iterator_holds_no_more_than_its_window(gpu: FakeGpu, small: Path) -> None:
    expected = stored(small)
    gpu.late_fills = True
    before = gpu.state()["device_bytes"]
    seen = {}
    for name, tensor in rdmaload.weight_iterator(small, device="cuda:0", window_bytes=400_000):
        seen[name] = gpu.seen(tensor)
        del tensor
    assert seen.keys() == expected.keys()
    assert all(same(seen[name], expected[name]) for name in expected)
    peak = gpu.state()["peak_device_bytes"] - before
    assert 0 < peak <= 400_000 + 160_000  # and one that the consumer holds


def test_an_iterator_that_is_dropped_gives_everything_back(gpu: FakeGpu, small: Path) -> None:
    iterator = rdmaload.weight_iterator(small, device="cuda:0", window_bytes=200_000)
    name, tensor = next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert same(gpu.seen(tensor), stored(small)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_converted_on_the_device(gpu: FakeGpu, small: Path, dtype: torch.dtype) -> None:
    before = gpu.state()
    loaded = rdmaload.load(small, device="cuda:0", dtype=dtype, device_extra_bytes=400_000)
    assert gpu.state()["launches"] > before["launches"]
    final = 0
    for name, tensor in stored(small).items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert same(gpu.seen(loaded[name]), expected), name
        final += expected.nbytes
    assert gpu.state()["peak_device_bytes"] - before["device_bytes"] <= final + 400_000


def test_existing_tensors_on_two_devices_and_the_host_are_filled(gpu: FakeGpu, small: Path) -> None:
    expected = stored(small)
    targets = {}
    for number, (name, tensor) in enumerate(expected.items()):
        place = (None, 0, 1)[number % 3]
        targets[name] = torch.empty_like(tensor) if place is None else gpu.empty(tensor.shape, tensor.dtype, place)
    before = gpu.state()
    stats = rdmaload.load_into(targets, small)
    assert gpu.state()["device_bytes"] == before["device_bytes"]
    for name, tensor in expected.items():
        on_device = gpu.ordinal_of(targets[name]) is not None
        assert same(gpu.seen(targets[name]) if on_device else targets[name], tensor), name
    assert stats.copied_bytes == 0
    assert stats.bytes == sum(tensor.nbytes for tensor in expected.values())


def test_cast_and_strided_targets_take_bounded_extra_memory(gpu: FakeGpu, small: Path) -> None:
    expected = stored(small)
    targets = {}
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            wide = gpu.empty((tensor.numel(), 2), torch.float64, 0)
            targets[name] = wide[:, 0]
        else:
            targets[name] = gpu.empty(tensor.shape, tensor.dtype, 0)
    gpu.reset_peak()
    before = gpu.state()["device_bytes"]
    rdmaload.load_into(targets, small, cast=True, device_extra_bytes=100_000)  # less than the largest tensor
    assert gpu.state()["peak_device_bytes"] - before <= 100_000
    for name, tensor in expected.items():
        assert torch.equal(targets[name], tensor.to(targets[name].dtype)), name


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize", "cuMemHostAlloc"])
def test_a_driver_error_is_named_and_the_next_load_works(gpu: FakeGpu, small: Path, call: str) -> None:
    with rdmaload.open(small, staging_bytes=300_000) as model:
        gpu.fail_call(call, 1)
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY") as raised:
            model.load(device="cuda:0")
        del raised
        loaded = model.load(device="cuda:0", include="ids")
        assert torch.equal(gpu.seen(loaded["ids"]), torch.arange(1000))


def test_flipped_bits_on_the_way_to_the_device_are_read_again(gpu: FakeGpu, small: Path, model: str) -> None:
    url = f"memory://devices/{model}"
    rdmaload.save(small, url)
    gpu.corrupt_copy(1)
    stats = rdmaload.LoadStats()
    loaded = rdmaload.load(url, device="cuda:0", verify_device="on", stats=stats)
    assert stats.retries == 1
    for name, tensor in stored(small).items():
        assert same(gpu.seen(loaded[name]), tensor), name


def test_devices_that_are_not_there_are_refused(gpu: FakeGpu, small: Path) -> None:
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


def test_the_benchmark_compares_and_shows_overlap(gpu: FakeGpu, small: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in stored(small).values())
    with device_benchmark.sources(small, False) as urls:
        for url in urls.values():
            result = device_benchmark.compare(
                url, small, nbytes, torch.device("cuda", 0), None, 2, time.monotonic() + 60
            )
            assert len(result["rdmaload"]["runs"]) == len(result["source"]["runs"]) == 2
            assert result["share_of_limit"] > 0
            assert result["timeline"]["reads"] == len(result["timeline"]["events"]) > 0
            assert 0 <= result["timeline"]["overlapped_share_of_copying"] <= 1
    assert device_benchmark.union([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_the_doctor_names_devices_and_driver(gpu: FakeGpu) -> None:
    found = {check.name: check for check in host_checks()}["gpus"]
    assert found.status == "ok"
    assert re.fullmatch(r"2, \S+libfake_cuda.so of CUDA 13.0, with kernels", found.value)
