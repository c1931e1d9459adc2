"""SGLang: `python -m sglang.launch_server --model-path redis://host:6379/llama`, with nothing patched by hand.

The entry point `sglang.srt.plugins` calls `register` in every process. SGLang has a road for remote models, which asks
`create_remote_connector` for files and tensors; urls of ours get a connector of ours there:

- an unsharded checkpoint is a file connector: the model's own loading takes the tensors, then SGLang processes them;
- a model with a part per rank is a key-value connector: each rank copies what it finds into its processed tensors.
  What SGLang itself writes through it goes through SGLang's own connector, as does a name under which nothing is.

The load format `rdmaload` makes `s3://` urls and directories ours, too. RDMALOAD_SGLANG_PLUGIN=0 leaves everything
alone.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaload import loading
from rdmaload.errors import LayoutMismatchError, NotFoundError, NotSupportedError
from rdmaload.integrations import names
from rdmaload.integrations.metadata import EngineModel, resolve_model
from rdmaload.integrations.rank_weights import checkpoint_weights

if TYPE_CHECKING:
    import torch

__all__ = ["create_connector", "prepare", "register"]

_log = logging.getLogger("rdmaload")

_CONNECTOR = "sglang.srt.connector.create_remote_connector"
_SOURCE = "rdmaload"  # who decided, in SGLang's record of its arguments


def register() -> None:
    """Called by SGLang, which logs what a plug-in raises and goes on."""
    if os.environ.get("RDMALOAD_SGLANG_PLUGIN", "1").lower() in ("0", "false", "off"):
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.register(_CONNECTOR, _around_create, registry.HookType.AROUND)
    try:
        hooks = importlib.import_module("sglang.srt.arg_groups.resolution_hooks")
        choices = importlib.import_module("sglang.srt.arg_groups.choices")
        hooks.register_resolution_hook("handle_model_source_paths")(_around_source_paths)
        choices.add_load_format_choices(["rdmaload"])
    except (ImportError, AttributeError, ValueError) as error:
        # Older than 0.5.20: the connector alone serves every url but those of SGLang itself.
        _log.info(
            "this SGLang has no %s: --load-format rdmaload is not there, and a url needs a --served-model-name without "
            "a colon; `rdmaload pull URL DIR` and SGLang's own loader work as well",
            error,
        )


# ---- arguments ---------------------------------------------------------------------------------


def _around_source_paths(server_args: Any, previous: Callable[[Any], None]) -> None:
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    changes = prepare(overrides.resolving_view(server_args))
    if changes:
        overrides.declare_resolution(server_args, _SOURCE, **changes)
    previous(server_args)


def prepare(cfg: Any) -> dict[str, object]:
    """What must change in SGLang's arguments for a model of ours; nothing for any other.

    The url is pinned to its generation here, in the one process that reads arguments: every rank gets the pinned one.
    """
    path = cfg.model_path
    asked = cfg.load_format == "rdmaload"
    if asked and not names.is_url(path) and Path(path).is_dir():
        path = Path(path).absolute().as_uri()
    if not names.is_ours(path) and not (asked and names.is_url(path)):
        if asked:
            raise NotSupportedError(f"--load-format rdmaload takes a directory or a url, not {path}")
        return {}
    if cfg.load_format not in ("auto", "remote", "rdmaload", "dummy"):
        raise NotSupportedError(f"--load-format {cfg.load_format} cannot read {names.shown_name(path)}: say rdmaload")
    pinned = names.engine_name(resolve_model(names.store_url(path)).url)
    changes: dict[str, object] = {"model_path": pinned}
    if cfg.load_format == "rdmaload":
        changes["load_format"] = "auto"  # which SGLang makes "remote", for every url
    if cfg.tokenizer_path in (None, cfg.model_path):
        changes["tokenizer_path"] = pinned
    elif names.is_ours(cfg.tokenizer_path):
        changes["tokenizer_path"] = names.engine_name(resolve_model(names.store_url(cfg.tokenizer_path)).url)
    if cfg.served_model_name is None:
        # A colon would be an adapter's separator; the rest of the name says which model it is.
        changes["served_model_name"] = names.shown_name(path).partition("://")[2].partition("/")[2] or "model"
    return changes


# ---- connectors --------------------------------------------------------------------------------


def _around_create(original: Callable[..., Any], url: Any, *arguments: Any, **keywords: Any) -> Any:
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
            _check_ranks(self._found)
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


def _check_ranks(found: EngineModel) -> None:
    """SGLang itself would copy a smaller tensor into a part of its own, and go on."""
    try:
        ranks = importlib.import_module("sglang.srt.distributed").get_tensor_model_parallel_world_size()
    except (ImportError, AttributeError, AssertionError):  # outside of an engine
        ranks = found.world_size
    if ranks != found.world_size:
        raise LayoutMismatchError(
            f"{found.shown} is sharded over {found.world_size} ranks, this engine has {ranks}: start it with --tp "
            f"{found.world_size}, or load the checkpoint that it was made from",
            url=found.shown,
        )
    engine = found.identity.get("engine", "sglang")
    if engine != "sglang":
        raise LayoutMismatchError(
            f"{found.shown} holds the weights of each rank for another engine:\n  engine: saved for {engine}, here "
            "sglang\nLoad the checkpoint that it was made from, which suits every engine.",
            url=found.shown,
        )
