"""Processes of one node that load the same model: how they find each other, and what they tell each other.

The first that binds an abstract unix socket named after what is loaded reads for all; the others connect to it. Such a
socket has no file: nothing is left behind by whoever is killed. Messages are small JSON objects, some of them with a
file descriptor. The kernel says which user is at the other end, and only one's own is talked to.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rdmaload.errors import LoadTimeoutError, UnavailableError

__all__ = ["Peer", "NodeGroup", "Rendezvous"]

Message = Mapping[str, object]

_MESSAGE_BYTES = 64 * 1024
_RETRY_SECONDS = 0.02  # between attempts to reach who is about to listen


@dataclass(frozen=True)
class NodeGroup:
    """The processes of one node that read a model once, together: one of them reads, all get the tensors.

    >>> NodeGroup("engine-1", member=0, size=2)
    NodeGroup(name='engine-1', member=0, size=2, join_seconds=60.0)
    """

    name: str
    """The same in all members, and in no other group of this machine that loads the same model at the same time."""
    member: int
    """Which one this process is, from 0; a tensor-parallel engine's local rank, for instance."""
    size: int
    """How many members there are."""
    join_seconds: float = 60.0
    """How long to wait for all of them; then those that are there read by themselves."""

    def __post_init__(self) -> None:
        if not 0 <= self.member < self.size:
            raise ValueError(f"member {self.member} of a node group of {self.size}")
        if self.join_seconds <= 0:
            raise ValueError(f"join_seconds must be positive, not {self.join_seconds}")


class Peer:
    """One end of a connection between two members. Belongs to one thread."""

    def __init__(self, connection: socket.socket, member: int) -> None:
        self.socket = connection
        self.member = member

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Send one message; raises OSError when the other end is gone."""
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self.socket.sendmsg([json.dumps(message).encode()], rights)

    def receive(self, seconds: float) -> tuple[dict[str, object], int | None] | None:
        """The next message and the descriptor that came with it, which is the caller's to close; None at the end.

        Raises TimeoutError when nothing came for `seconds`.
        """
        self.socket.settimeout(seconds)
        try:
            try:
                data, control = self._receive()
            except ConnectionResetError:  # it closed with something unread: what it had sent before still comes
                data, control = self._receive()
        except ConnectionError:
            return None
        descriptor = None
        for level, kind, payload in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (descriptor,) = struct.unpack("i", payload)
        if not data:
            return None
        return json.loads(data), descriptor

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        data, control, _, _ = self.socket.recvmsg(
            _MESSAGE_BYTES, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
        return data, control

    def close(self) -> None:
        self.socket.close()


class Rendezvous:
    """Brings the members of a group that load `what` (a digest of it) together, and says which one of them reads."""

    def __init__(self, group: NodeGroup, what: str, url: str) -> None:
        self._group = group
        self._url = url
        digest = hashlib.sha256(json.dumps([os.getuid(), group.name, group.size, what]).encode()).hexdigest()
        self._address = f"\0rdmaload-{digest[:40]}"
        self._deadline = time.monotonic() + group.join_seconds
        self.members: list[Peer] = []
        """Of who reads: the others."""

    def meet(self) -> Peer | None:
        """Wait for the whole group. The connection to who reads; None when that is this process: see `members`.

        Raises LoadTimeoutError when the group is not complete in time: each then reads for itself.
        """
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                try:
                    listener.bind(self._address)
                except OSError:
                    listener.close()
                else:
                    listener.listen(self._group.size)
                    self._gather(listener)
                    return None
            reader = self._join()
            if reader is not None:
                return reader
            if time.monotonic() > self._deadline:
                raise self._incomplete(1)
            time.sleep(_RETRY_SECONDS)

    def _gather(self, listener: socket.socket) -> None:
        present = {self._group.member}
        try:
            while len(present) < self._group.size:
                listener.settimeout(max(0.001, self._deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise self._incomplete(len(present)) from None
                peer = Peer(connection, -1)
                if not _is_ours(connection):
                    peer.close()
                    continue
                try:
                    hello = peer.receive(max(0.001, self._deadline - time.monotonic()))
                except TimeoutError:
                    hello = None
                member = hello[0].get("member") if hello else None
                if not isinstance(member, int) or member in present or not 0 <= member < self._group.size:
                    peer.close()  # it tries again, until this group has gone its way
                    continue
                peer.member = member
                present.add(member)
                self.members.append(peer)
            for peer in self.members:
                peer.send({"complete": self._group.size, "reads": self._group.member})
        except BaseException as error:
            for peer in self.members:
                with contextlib.suppress(OSError):
                    peer.send({"alone": str(error)})
                peer.close()
            self.members.clear()
            if isinstance(error, OSError) and not isinstance(error, LoadTimeoutError):
                raise UnavailableError(
                    f"{self._url}: a member of node group {self._group.name!r} ended before the load began ({error})",
                    url=self._url,
                ) from error
            raise

    def _join(self) -> Peer | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer = Peer(connection, -1)
        try:
            connection.settimeout(max(0.001, self._deadline - time.monotonic()))
            connection.connect(self._address)
            if not _is_ours(connection):
                raise UnavailableError(
                    f"{self._url}: another user's process has taken the place of node group {self._group.name!r}",
                    url=self._url,
                )
            peer.send({"member": self._group.member})
            # Who gathers gives up by its own clock, which may have started later: it has the word, while it lives.
            answer = peer.receive(2 * self._group.join_seconds)
        except (ConnectionError, TimeoutError):
            peer.close()
            return None
        except BaseException:
            peer.close()
            raise
        if answer is None:
            peer.close()
            return None
        message, _ = answer
        if "complete" not in message:
            peer.close()
            raise LoadTimeoutError(str(message.get("alone", "")), url=self._url)
        reads = message.get("reads")
        peer.member = reads if isinstance(reads, int) else -1
        return peer

    def _incomplete(self, present: int) -> LoadTimeoutError:
        return LoadTimeoutError(
            f"{self._url}: {present} of the {self._group.size} members of node group {self._group.name!r} came within "
            f"{self._group.join_seconds:g} s",
            url=self._url,
        )


def _is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end is of this process's user; the kernel knows."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
