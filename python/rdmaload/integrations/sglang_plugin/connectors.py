"""The connectors that SGLang's own road for remote models gets for urls of ours.

An unsharded checkpoint is a file connector: the model's own loading takes the tensors, then SGLang processes them. A
model with a part per rank is a key-value connector: each rank copies what it finds into its processed tensors. What
SGLang itself writes through it goes through SGLang's own connector, as does a name under which nothing is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rdmaload import loading
from rdmaload.errors import NotFoundError, NotSupportedError
from rdmaload.integrations import names
from rdmaload.integrations.metadata import EngineModel, resolve_model
from rdmaload.integrations.rank_weights import checkpoint_weights
from rdmaload.integrations.sglang_plugin import set_up

if TYPE_CHECKING:
    import torch

__all__ = ["around_create", "create_connector"]


def around_create(original: Callable[..., Any], url: Any, *arguments: Any, **keywords: Any) -> Any:
    if not names.is_ours(url):
        return original(url, *arguments, **keywords)

    def own() -> Any:
        return original(url.partition("?")[0], *arguments, **keywords)

    try:
        return create_connector(url, own)
    except NotFoundError:
        # SGLang may be about to save there. Who loads has heard of it from `prepare`.
        if url.startswith("redis://"):
            return own()
        raise


def create_connector(name: str, own: Callable[[], Any]) -> Any:
    """The connector that SGLang gets for a url of ours; `own` makes the one that it would have without us.

    Raises what `open` raises.
    """
    found = resolve_model(names.store_url(name))
    file_class, key_value_class = _classes()
    return key_value_class(found, own) if found.kind == "sharded" else file_class(found)


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    """Subclasses of SGLang's two kinds of connectors, by which its loader tells what to do."""
    package = importlib.import_module("sglang.srt.connector")

    class _Connector:
        """What both kinds have. The constructors of SGLang's own are not called: they install signal handlers."""

        def __init__(self, found: EngineModel) -> None:
            self.url = found.url
            self.closed = False
            self.local_dir = str(found.directory)
            self._found = found

        def get_local_dir(self) -> str:
            return self.local_dir

        def pull_files(self, allow_pattern: object = None, ignore_pattern: object = None) -> None:
            """All files but weights are there already, under their own paths."""

        def close(self) -> None:
            self.closed = True  # the directory is not ours alone: see metadata.py

        def __repr__(self) -> str:
            return f"<rdmaload for SGLang {self._found.shown}>"

    class FileConnector(_Connector, package.BaseFileConnector):  # type: ignore[misc, name-defined]
        def weight_iterator(self, rank: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
            with loading.open(self._found.url) as model:
                yield from checkpoint_weights(model)

        def glob(self, allow_pattern: str) -> list[str]:
            raise NotSupportedError(f"{self._found.shown} is read tensor by tensor, not by files")

    class KeyValueConnector(_Connector, package.BaseKVConnector):  # type: ignore[misc, name-defined]
        def weight_iterator(self, rank: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
            set_up.check_processed(self._found)
            with loading.open(self._found.url) as model:
                wanted = [name for name, spec in model.rank_tensors(rank).items() if spec.nbytes]
                yield from _once(model.weight_iterator(rank, include=wanted))

        def __init__(self, found: EngineModel, own: Callable[[], Any]) -> None:
            super().__init__(found)
            self._make_own = own

        @functools.cached_property
        def _own(self) -> Any:
            if self._found.store_layout == "rdmaload":
                raise NotSupportedError(f"{self._found.shown} is not in SGLang's layout: `rdmaload rm` it first")
            return self._make_own()

        def get(self, key: str) -> Any:
            return self._own.get(key)

        def getstr(self, key: str) -> Any:
            return self._own.getstr(key)

        def set(self, key: str, obj: torch.Tensor) -> None:
            self._own.set(key, obj)

        def setstr(self, key: str, obj: str) -> None:
            self._own.setstr(key, obj)

        def list(self, prefix: str) -> Any:
            return self._own.list(prefix)

        def close(self) -> None:
            if not self.closed and "_own" in self.__dict__:
                self._own.close()
            super().close()

    return FileConnector, KeyValueConnector


def _once(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its smallest name, the only one of tied names that SGLang looks for. They come together."""
    name, held = "", None
    for other, tensor in tensors:
        if tensor is held:
            name = min(name, other)
            continue
        if held is not None:
            yield name, held
        name, held = other, tensor
    if held is not None:
        yield name, held
