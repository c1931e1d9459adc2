"""What `--model-loader-extra-config` may say to our loader. Unknown names are refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, cast

from rdmaload.errors import UrlError
from rdmaload.options import Options

__all__ = ["LoaderOptions"]

_CHOICES = {
    "device": ("auto", "cpu", "target"),
    "read_once": ("auto", "on", "off"),
    "save_layout": ("rdmaload", "sglang"),
}


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the loader; every option of a url (docs/settings.md) may stand beside them.

    >>> LoaderOptions.parse({"connections": 8}).store
    {'connections': 8}
    """

    url: str | None = None
    """The model, where the engine's own name for it is a directory; not for a draft model."""
    device: Literal["auto", "cpu", "target"] = "auto"
    """Where a checkpoint's tensors arrive: in the GPU at once ("target"), in host memory ("cpu"), or "auto": in the GPU
    when one rank takes them whole."""
    read_once: Literal["auto", "on", "off"] = "auto"
    """Whether the ranks of one node read a checkpoint once, together: "auto" leaves directories of this machine to
    each rank, as the kernel caches them."""
    accept_version: bool = False
    """Whether a sharded model may be of another version of the engine."""
    save_to: str | None = None
    """Where every rank saves its weights once they are loaded, before the engine changes them for its kernels."""
    save_id: str | None = None
    """Name of that save; None: the ranks agree on one."""
    save_layout: Literal["rdmaload", "sglang"] = "rdmaload"
    """Layout of that save."""
    store: Mapping[str, object] = field(default_factory=dict)
    """Options of the store."""

    @classmethod
    def parse(cls, extra: object) -> LoaderOptions:
        """The options in an engine's extra configuration. Raises UrlError for an unknown name or a wrong value."""
        if not isinstance(extra, Mapping):
            raise UrlError(f"the loader's options are names and values, not a {type(extra).__name__}")
        own = {option.name for option in fields(cls)} - {"store"}
        known = sorted(own | {option.name for option in fields(Options)})
        for name in extra:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UrlError(f"unknown option {name} for load format rdmaload: {hint}")
        for name, kind in (("url", str), ("save_to", str), ("save_id", str), ("accept_version", bool)):
            if not isinstance(extra.get(name), (kind, type(None))):
                raise UrlError(f"the loader's option {name} must be a {kind.__name__}, not {extra[name]!r}")
        for name, choices in _CHOICES.items():
            if extra.get(name, choices[0]) not in choices:
                raise UrlError(f"the loader's option {name} must be one of {', '.join(choices)}, not {extra[name]!r}")
        store = {name: value for name, value in extra.items() if name not in own}
        Options(**store)  # wrong values are refused before anything starts
        return cls(**{name: extra[name] for name in own if name in extra}, store=cast("Mapping[str, object]", store))
