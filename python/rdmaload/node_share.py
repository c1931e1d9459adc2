"""Read once per node: one member of a group reads the model into shared memory, all of them map it.

The reader puts one part of the model after the other into a memory file without a name (memfd), verifies it, seals it
and sends its descriptor to every member, itself included. A member maps it privately, so that what one of them does to
a tensor never shows in another; the memory goes when the last tensor and the last descriptor have gone, whoever is
killed. Members say when they are done with a part: at most `window_bytes` are read ahead of the slowest of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdmaload import errors
from rdmaload.errors import LoadTimeoutError, RdmaloadError, UnavailableError
from rdmaload.node_group import NodeGroup, Peer, Rendezvous
from rdmaload.reader import Batch, StoreReader
from rdmaload.selection import RankTensors
from rdmaload.stats import LoadStats
from rdmaload.tensors import TensorSpec, import_target, torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["SharedRead", "meet"]

_ALIGNMENT = 64  # bytes: where tensors begin
_PARTS = 4  # of the window: one is consumed while others are read
_READ_AT_ONCE = 2  # parts: the store goes on with the next while the last reads of one arrive
_BEATS = 4  # signs of life within the time after which silence is a failure
_F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; Python has no name for it before 3.13
# Of what was read: nobody can map it to write, nor make it shorter under those who have mapped it.
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


@dataclass(frozen=True)
class _Part:
    """Tensors that are read together, by position, and where each begins in the shared memory."""

    positions: Sequence[int]
    offsets: Sequence[int]
    nbytes: int


@dataclass
class SharedRead:
    """What all members of a group agree on: they compute the same parts from the same index."""

    reader: StoreReader
    weights: RankTensors
    selection: Sequence[int]
    window_bytes: int
    group: NodeGroup
    url: str
    identity: object
    """Of what is stored, as JSON: the generation, or what the store says of each file's version."""
    inactivity_timeout: float
    stats: LoadStats
    parts: list[_Part] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = list(_parts_of(self.weights.specs, self.selection, max(1, self.window_bytes // _PARTS)))

    def digest(self) -> str:
        """Of everything that the members must agree on: those of other loads never meet."""
        specs = [self.weights.specs[position] for position in self.selection]
        what = [
            self.identity,
            self.window_bytes,
            [(spec.name, spec.dtype, spec.shape, spec.file) for spec in specs],
        ]
        return hashlib.sha256(json.dumps([self.url, what]).encode()).hexdigest()


def meet(read: SharedRead) -> Iterator[tuple[int, torch.Tensor]]:
    """Wait for the group, then yield the positions and tensors of the selection, in order.

    Raises LoadTimeoutError when the group is not complete in time. The iterator raises UnavailableError when another
    member ends, and what the store raised, in all members.
    """
    rendezvous = Rendezvous(read.group, read.digest(), read.url)
    source = rendezvous.meet()
    if source is not None:
        read.stats.path = "node-shared"
        return _received(read, source, None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own = Peer(theirs, read.group.member)
    producer = _Producer(read, own, rendezvous.members)
    return _received(read, Peer(ours, read.group.member), producer)


def _parts_of(specs: Sequence[TensorSpec], selection: Sequence[int], part_bytes: int) -> Iterator[_Part]:
    positions: list[int] = []
    offsets: list[int] = []
    total = nbytes = 0  # without and with what is left free between tensors
    for position in selection:
        size = specs[position].nbytes
        if positions and total + size > part_bytes:
            yield _Part(positions, offsets, nbytes)
            positions, offsets, total, nbytes = [], [], 0, 0
        positions.append(position)
        offsets.append(nbytes)
        total += size
        nbytes += -(-size // _ALIGNMENT) * _ALIGNMENT
    if positions:
        yield _Part(positions, offsets, nbytes)


def _received(read: SharedRead, source: Peer, producer: _Producer | None) -> Iterator[tuple[int, torch.Tensor]]:
    finished = False
    try:
        if producer is not None:
            producer.start()
        for number, part in enumerate(read.parts):
            descriptor = _expect_part(read, source, number)
            try:
                memory = mmap.mmap(descriptor, max(1, part.nbytes), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(descriptor)
            for position, offset in zip(part.positions, part.offsets, strict=True):
                yield position, _tensor_at(read.weights.specs[position], memory, offset)
            del memory
            with contextlib.suppress(OSError):  # why it is gone comes with the next message
                source.send({"done": number})
        totals = _next_message(read, source)[0].get("totals")
        if producer is None and isinstance(totals, dict):
            read.stats.verified_bytes += int(totals["verified_bytes"])
            read.stats.unverified_bytes += int(totals["unverified_bytes"])
            read.stats.generation = totals["generation"]
        finished = True
    finally:
        if not finished:
            with contextlib.suppress(OSError):
                source.send({"leaves": True})
        source.close()
        if producer is not None:
            producer.join()


def _expect_part(read: SharedRead, source: Peer, number: int) -> int:
    message, descriptor = _next_message(read, source)
    if message.get("part") != number or descriptor is None:
        if descriptor is not None:
            os.close(descriptor)
        raise UnavailableError(
            f"{read.url}: member {source.member} of node group {read.group.name!r} sent {sorted(message)}, not part "
            f"{number}: are all members of one version?",
            url=read.url,
        )
    return descriptor


def _next_message(read: SharedRead, source: Peer) -> tuple[dict[str, object], int | None]:
    """The next message that is not just a sign of life. Raises what the reader failed with."""
    while True:
        try:
            received = source.receive(read.inactivity_timeout)
        except TimeoutError:
            raise LoadTimeoutError(
                f"{read.url}: member {source.member} of node group {read.group.name!r}, which reads for all, has not "
                f"shown a sign of life for inactivity_timeout={read.inactivity_timeout:g} s",
                url=read.url,
            ) from None
        if received is None:
            raise UnavailableError(
                f"{read.url}: member {source.member} of node group {read.group.name!r}, which read for all, has ended",
                url=read.url,
            )
        message, _ = received
        if "error" in message:
            raise _error_from(message, read.url)
        if "alive" not in message:
            return received


def _error_from(message: dict[str, object], url: str) -> RdmaloadError:
    kind = getattr(errors, str(message["error"]), UnavailableError)
    if not (isinstance(kind, type) and issubclass(kind, RdmaloadError)):
        kind = UnavailableError
    error = kind(str(message.get("text")))
    error.url = url
    key = message.get("key")
    error.key = key if isinstance(key, str) else None
    return error


def _tensor_at(spec: TensorSpec, memory: mmap.mmap, offset: int) -> torch.Tensor:
    """A tensor with a storage of its own that keeps the mapping alive."""
    import torch

    dtype, shape = torch_dtype(spec)
    if spec.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=spec.nbytes, offset=offset)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, shape, strides)


class _Producer:
    """The thread of the reading member: reads part after part and gives each to all members."""

    def __init__(self, read: SharedRead, own: Peer, others: Sequence[Peer]) -> None:
        self._read = read
        self._own = own
        self._peers = [own, *others]
        self._done = dict.fromkeys(self._peers, 0)  # parts that each member is through with
        self._beat_seconds = read.inactivity_timeout / _BEATS
        self._next_beat = 0.0
        self._whole = read.reader.whole_files()
        self._thread = threading.Thread(target=self._run, name="rdmaload-node", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._produce()
        except BaseException as error:
            if not isinstance(error, RdmaloadError):
                error = UnavailableError(f"{self._read.url}: {type(error).__name__}: {error}")
            told = {"error": type(error).__name__, "text": str(error), "key": error.key}
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.send(told)
        finally:
            for peer in self._peers:
                peer.close()

    def _produce(self) -> None:
        read = self._read
        running: deque[tuple[int, Batch]] = deque()
        started = 0
        try:
            for number in range(len(read.parts)):
                while started < len(read.parts) and (
                    not running or (len(running) < _READ_AT_ONCE and self._has_room(started))
                ):
                    while not self._has_room(started):
                        self._listen(self._beat_seconds)
                    running.append(self._begin(read.parts[started]))
                    started += 1
                descriptor, batch = running[0]
                read.reader.finish(batch, read.stats, self._tick)
                del batch
                running.popleft()
                try:
                    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
                    self._broadcast({"part": number}, descriptor)
                finally:
                    os.close(descriptor)
        finally:
            for descriptor, batch in running:
                batch.operation.cancel()
                while not batch.operation.wait_for(1):
                    pass
                os.close(descriptor)
        while self._slowest() < len(read.parts):
            self._listen(self._beat_seconds)
        self._broadcast(
            {
                "totals": {
                    "verified_bytes": read.stats.verified_bytes,
                    "unverified_bytes": read.stats.unverified_bytes,
                    "generation": read.stats.generation,
                }
            }
        )

    def _begin(self, part: _Part) -> tuple[int, Batch]:
        import torch

        read = self._read
        descriptor = os.memfd_create("rdmaload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, max(1, part.nbytes))
            memory = mmap.mmap(descriptor, max(1, part.nbytes))
            destinations = []
            for position, offset in zip(part.positions, part.offsets, strict=True):
                spec = read.weights.specs[position]
                place = (
                    torch.frombuffer(memory, dtype=torch.uint8, count=spec.nbytes, offset=offset)
                    if spec.nbytes
                    else torch.empty(0, dtype=torch.uint8)
                )
                destinations.append(import_target(spec.name, place, spec.nbytes))
            plan = read.reader.plan(read.weights.native, list(part.positions), into_tensors=True)
            return descriptor, read.reader.start(plan, destinations, whole=self._whole)
        except BaseException:
            os.close(descriptor)
            raise

    def _slowest(self) -> int:
        return min(self._done.values())

    def _has_room(self, number: int) -> bool:
        """Whether part `number` may be read: it fits into the window with what the slowest member has not done yet."""
        slowest = self._slowest()
        waiting = sum(part.nbytes for part in self._read.parts[slowest : number + 1])
        return number == slowest or waiting <= self._read.window_bytes

    def _tick(self, _bytes: int, _files: object) -> None:
        self._listen(0)

    def _listen(self, seconds: float) -> None:
        """Hear what members say, and show a sign of life. Raises UnavailableError when one has ended."""
        poll = select.poll()
        by_descriptor = {peer.socket.fileno(): peer for peer in self._peers}
        for number in by_descriptor:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(seconds * 1000):
            self._hear(by_descriptor[number])
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._beat_seconds
            for peer in self._peers:
                # A member that does not listen now has enough in its queue.
                with contextlib.suppress(OSError):
                    peer.socket.send(b'{"alive": true}', socket.MSG_DONTWAIT)

    def _hear(self, peer: Peer) -> None:
        received = peer.receive(1)
        message = {} if received is None else received[0]
        if "done" in message:
            self._done[peer] += 1
            return
        if "leaves" in message and peer is not self._own:
            self._drop(peer)
            return
        what = "stopped before the end" if "leaves" in message else "has ended"
        raise UnavailableError(
            f"{self._read.url}: member {peer.member} of node group {self._read.group.name!r} {what}", url=self._read.url
        )

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        del self._done[peer]
        peer.close()

    def _broadcast(self, message: dict[str, object], descriptor: int | None = None) -> None:
        for peer in list(self._peers):
            try:
                peer.socket.settimeout(self._read.inactivity_timeout)
                peer.send(message, descriptor)
            except OSError:
                self._hear(peer)  # it left, or it has ended
