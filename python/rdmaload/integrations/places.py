"""Which ranks of an engine run on the same node, told by what they say of themselves."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["gathered", "place"]

_Value = TypeVar("_Value")


def gathered(group: Any, value: _Value) -> list[_Value]:
    """What each rank of one of an engine's groups (`world_size`, `cpu_group`) gave; all of them must call it."""
    values: list[Any] = [value] * group.world_size
    if group.world_size > 1:
        import torch.distributed

        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def place() -> str:
    """The same in two processes that reach each other by an abstract socket: of one kernel, one network namespace (as
    the containers of a pod, say) and one user."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    except OSError:  # a sandbox without them
        return _NOWHERE


_NOWHERE = secrets.token_hex()  # of this process alone
