"""What a sharded model was saved for, compared with what is to load it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rdmaload.connectors import KeyValueConnector
from rdmaload.connectors.registry import connector_class
from rdmaload.errors import LayoutMismatchError, NotSupportedError
from rdmaload.urls import parse_url

__all__ = ["check_destination", "check_identity"]


def check_identity(
    shown: str,
    *,
    saved: tuple[Mapping[str, int], Mapping[str, str]],
    here: tuple[Mapping[str, int], Mapping[str, str]],
    ignored: Collection[str] = (),
) -> None:
    """Raise LayoutMismatchError, with every difference on a line, unless both parallel layouts and identities agree.

    `ignored` names members that may differ.
    """
    differences = []
    for old, new in zip(saved, here, strict=True):
        for name in sorted({*old, *new} - set(ignored)):
            one, other = old.get(name, "not said"), new.get(name, "not said")
            if one != other:
                differences.append(f"  {name}: saved for {one}, here {other}")
    if differences:
        listed = "\n".join(differences)
        raise LayoutMismatchError(
            f"{shown} holds the weights of each rank for another engine or another set-up of it:\n{listed}\n"
            "Start the engine as it was saved, save it again for this one (`rdmaload save-sharded`), or load the "
            "checkpoint that it was made from, which suits every set-up.",
            url=shown,
        )


def check_destination(url: str) -> None:
    """Raise NotSupportedError for a store in which a sharded model has no manifest to keep its identity in."""
    location = parse_url(url)
    if not issubclass(connector_class(location.scheme), KeyValueConnector):
        raise NotSupportedError(
            f"{location.redacted} keeps plain files, without the identity that sharded weights need: save them to "
            "Redis or Valkey",
            url=location.redacted,
        )
