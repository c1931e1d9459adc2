"""One small adaptor per contender, run in the contender's own environment: each returns named tensors, or saves them.

An adaptor imports its library in `imports`, once and untimed. Its function is timed whole, from the first connection to
the last tensor. Nothing here may import rdmaload but rdmaload's own adaptor.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, s3_peer
from benchmarks.local_files import load_and_clone, load_pread, stream_with_runai

__all__ = ["ADAPTORS", "Adaptor", "Place"]

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U8": "uint8", "I64": "int64"}


@dataclass(frozen=True)
class Place:
    """Where the bytes are: a directory of files, and what the stores need. Sent as JSON."""

    directory: str
    url: str = ""
    """rdmaload's."""
    host: str = ""
    port: int = 0
    endpoint: str = ""
    prefix: str = ""
    """Of keys or objects."""
    objects: tuple[tuple[str, int], ...] = ()
    """Keys and sizes of what holds the weight files, one after the other."""
    target: str = ""
    """Where a contender that saves puts it."""
    extra: str = ""


@dataclass(frozen=True)
class Adaptor:
    """`run` or `save` is timed, or what `made` gives; `save` gets the tensors of the directory, read before."""

    imports: tuple[str, ...]
    run: Callable[[Place], Mapping[str, Any]] | None = None
    save: Callable[[Place, Mapping[str, Any]], Mapping[str, Any]] | None = None
    saved: Callable[[Place], Mapping[str, Any]] | None = None
    """Reads back, untimed, what `save` saved."""

    made: Callable[[Place], Callable[[], Mapping[str, Any]]] | None = None
    """Gives what is timed, for one whose client has to be there already."""

    def ready(self, place: Place) -> Callable[[], Mapping[str, Any]]:
        """What is timed, with everything there that it is not about."""
        if self.made is not None:
            return self.made(place)
        if self.save is not None:
            return functools.partial(self.save, place, safetensors_pread(place))
        assert self.run is not None
        return functools.partial(self.run, place)


def _tensors_in(views: list[memoryview]) -> dict[str, Any]:
    """The tensors of whole safetensors files in memory, as views of it."""
    import torch

    state: dict[str, Any] = {}
    for view in views:
        length = int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8 : 8 + length]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + at for at in entry["data_offsets"])
            if begin % 8 or begin == end:
                state[name] = torch.frombuffer(bytearray(view[begin:end]) or bytearray(1), dtype=torch.uint8)
                continue
            dtype = getattr(torch, _TORCH[entry["dtype"]])
            state[name] = torch.frombuffer(view[begin:end], dtype=dtype).reshape(entry["shape"])
    return state


def _files(place: Place) -> list[Path]:
    return checkpoints.weight_files(place.directory)


def rdmaload(place: Place) -> Mapping[str, Any]:
    import rdmaload

    return rdmaload.load(place.url)


def safetensors_mapped(place: Place) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in _files(place) for name, tensor in load_file(path).items()}


def safetensors_mapped_and_read(place: Place) -> Mapping[str, Any]:
    """Every byte read where it is mapped; the memory stays the page cache's, so this owns nothing."""
    import torch

    state = safetensors_mapped(place)
    for tensor in state.values():
        flat = tensor.view(torch.uint8).reshape(-1)
        torch.max(flat[: flat.numel() // 8 * 8].view(torch.int64)) if flat.numel() >= 8 else flat.sum()
    return state


def safetensors_cloned(place: Place) -> Mapping[str, Any]:
    return load_and_clone(Path(place.directory))  # type: ignore[return-value]


def safetensors_pread(place: Place) -> Mapping[str, Any]:
    return load_pread(Path(place.directory))  # type: ignore[return-value]


def runai(strategy: str) -> Callable[[Place], Mapping[str, Any]]:
    return lambda place: stream_with_runai(strategy, Path(place.directory))  # type: ignore[return-value]


def fastsafetensors(place: Place) -> Mapping[str, Any]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in _files(place)]})
    buffers = loader.copy_files_to_device()
    state = _Kept((name, buffers.get_tensor(name)) for name in loader.get_keys())
    state.owner = (loader, buffers)
    return state


class _Kept(dict[str, Any]):
    """Tensors, and what must live as long as they do."""

    owner: object = None


def tensorizer(place: Place) -> Mapping[str, Any]:
    from tensorizer import TensorDeserializer

    deserializer = TensorDeserializer(place.extra, device="cpu", num_readers=2)
    state = _Kept(deserializer.items())
    state.owner = deserializer
    return state


def prepare_tensorizer(directory: str, target: str) -> None:
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(target)
    serializer.write_state_dict(
        {name: tensor for path in checkpoints.weight_files(directory) for name, tensor in load_file(path).items()}
    )
    serializer.close()


def s3_client(name: str) -> Callable[[Place], Mapping[str, Any]]:
    """The clients of benchmarks/s3_peer.py, each used in its fastest way, and tensors from what they read."""

    def run(place: Place) -> Mapping[str, Any]:
        load = s3_peer.CLIENTS[name](place.endpoint, "bucket", list(place.objects))
        return _tensors_in(load())

    return run


def runai_s3(place: Place) -> Mapping[str, Any]:
    os.environ.update(
        AWS_ENDPOINT_URL=place.endpoint,
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="y",
        AWS_EC2_METADATA_DISABLED="true",
        RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
        RUNAI_STREAMER_CONCURRENCY="4",
        RUNAI_STREAMER_MEMORY_LIMIT="-1",
    )
    from runai_model_streamer import SafetensorsStreamer

    state = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"s3://bucket/{key}" for key, _ in place.objects])
        for name, tensor in streamer.get_tensors():
            state[name] = tensor
    return state


def _sglang_connector(place: Place, hiredis: bool) -> Any:
    from benchmarks.compare import sglang_connector

    return sglang_connector.connect(f"redis://{place.host}:{place.port}/{place.prefix}", hiredis=hiredis)


def sglang(hiredis: bool) -> Callable[[Place], Mapping[str, Any]]:
    def run(place: Place) -> Mapping[str, Any]:
        with _sglang_connector(place, hiredis) as connector:
            return dict(connector.weight_iterator(0))

    return run


def lmcache(place: Place) -> Mapping[str, Any]:
    """LMCache's native client: two workers GET the chunks that rdmaload saved, into fresh huge pages."""
    from lmcache.lmcache_redis import LMCacheRedisClient

    client = LMCacheRedisClient(place.host, place.port, 2)
    views = [s3_peer.memory(path.stat().st_size) for path in _files(place)]
    batches: dict[int, tuple[list[str], list[memoryview]]] = {}  # by size: the values of a batch must be equally long
    file = at = 0
    for key, size in place.objects:
        if at == len(views[file]):
            file, at = file + 1, 0
        keys, parts = batches.setdefault(size, ([], []))
        keys.append(key)
        parts.append(views[file][at : at + size])
        at += size
    for keys, parts in batches.values():
        client.submit_batch_get(keys, parts)
    done: list[Any] = []
    while len(done) < len(batches):
        if not select.select([client.event_fd()], [], [], 60)[0]:
            raise TimeoutError("the client said nothing for a minute")
        done += client.drain_completions()
    client.close()
    return _tensors_in(views)


def mooncake(place: Place) -> Callable[[], Mapping[str, Any]]:
    """Mooncake Store over TCP into fresh huge pages; its client, which a service keeps, is made before."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", place.extra) != 0:
        raise ConnectionError(f"no Mooncake master at {place.extra}")

    def load() -> Mapping[str, Any]:
        views = [s3_peer.memory(path.stat().st_size) for path in _files(place)]
        starts = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
        for start, view in zip(starts, views, strict=True):
            store.register_buffer(start, view.nbytes)
        pointers = []
        file = at = 0
        for _, size in place.objects:
            if at == views[file].nbytes:
                file, at = file + 1, 0
            pointers.append(starts[file] + at)
            at += size
        sizes = [size for _, size in place.objects]
        got = store.batch_get_into([key for key, _ in place.objects], pointers, sizes)
        if list(got) != sizes:
            raise OSError(f"Mooncake answered {[size for size in got if size < 0][:3]}")
        for start in starts:
            store.unregister_buffer(start)
        return _tensors_in(views)

    return load


def save_rdmaload(place: Place, state: Mapping[str, Any]) -> Mapping[str, Any]:
    import rdmaload

    rdmaload.save(dict(state), place.target)
    return {}


def saved_rdmaload(place: Place) -> Mapping[str, Any]:
    import rdmaload

    return rdmaload.load(place.target)


def save_sglang(place: Place, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """SGLang's connector has no save of its own: its `set` of each tensor, as its example of saving does."""
    with _sglang_connector(place, True) as connector:
        for name, tensor in state.items():
            connector.set(f"{place.prefix}/keys/rank_0/{name}", tensor)
    return {}


def save_safetensors(place: Place, state: Mapping[str, Any]) -> Mapping[str, Any]:
    from safetensors.torch import save_file

    os.makedirs(place.target, exist_ok=True)
    save_file(dict(state), f"{place.target}/model.safetensors")
    return {}


def save_safetensors_and_fsync(place: Place, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the promise that rdmaload's save makes: the name appears when the bytes would outlast a crash, and lasts."""
    from safetensors.torch import save_file

    os.makedirs(place.target, exist_ok=True)
    path, unfinished = f"{place.target}/model.safetensors", f"{place.target}/.model.safetensors"
    save_file(dict(state), unfinished)
    _fsync(unfinished)
    os.rename(unfinished, path)
    _fsync(place.target)
    return {}


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved_safetensors(place: Place) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(f"{place.target}/model.safetensors")


_TORCH_ONES = ("torch", "numpy", "safetensors.torch")
_SGLANG = ("redis", "hiredis", *_TORCH_ONES, "benchmarks.compare.sglang_connector")
_S3 = ("torch", "numpy", "benchmarks.s3_peer")
ADAPTORS: dict[str, Adaptor] = {
    "rdmaload": Adaptor(("rdmaload", "boto3", *_TORCH_ONES), rdmaload),
    "safetensors, mapped only": Adaptor(_TORCH_ONES, safetensors_mapped),
    "safetensors, mapped and read": Adaptor(_TORCH_ONES, safetensors_mapped_and_read),
    "safetensors, cloned": Adaptor(_TORCH_ONES, safetensors_cloned),
    "safetensors, pread": Adaptor(_TORCH_ONES, safetensors_pread),
    "runai, io_uring buffered": Adaptor(("runai_model_streamer", *_TORCH_ONES), runai("io_uring_buffered")),
    "runai, io_uring direct": Adaptor(("runai_model_streamer", *_TORCH_ONES), runai("io_uring_direct")),
    "fastsafetensors": Adaptor(("fastsafetensors", *_TORCH_ONES), fastsafetensors),
    "tensorizer": Adaptor(("tensorizer", *_TORCH_ONES), tensorizer),
    "boto3": Adaptor(("boto3", *_S3), s3_client("boto3")),
    "obstore": Adaptor(("obstore", *_S3), s3_client("obstore")),
    "s3torchconnector": Adaptor(("s3torchconnector", *_S3), s3_client("s3torchconnector")),
    "runai, S3": Adaptor(("runai_model_streamer", "runai_model_streamer_s3", *_TORCH_ONES), runai_s3),
    "SGLang's connector": Adaptor(_SGLANG, sglang(False)),
    "SGLang's connector, hiredis": Adaptor(_SGLANG, sglang(True)),
    "LMCache's Redis client": Adaptor(("lmcache.lmcache_redis", *_TORCH_ONES), lmcache),
    "Mooncake Store, TCP": Adaptor(("mooncake.store", *_TORCH_ONES), made=mooncake),
    "rdmaload, save": Adaptor(("rdmaload", *_TORCH_ONES), save=save_rdmaload, saved=saved_rdmaload),
    "SGLang's connector, set": Adaptor(_SGLANG, save=save_sglang, saved=sglang(True)),
    "safetensors, save_file": Adaptor(_TORCH_ONES, save=save_safetensors, saved=saved_safetensors),
    "safetensors, save_file and fsync": Adaptor(_TORCH_ONES, save=save_safetensors_and_fsync, saved=saved_safetensors),
}
