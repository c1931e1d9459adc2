"""The loader that SGLang gets for a model of ours: its own, which takes the tensors from a store.

`get_model_loader` is asked at a start, with the url in the configuration's `model_weights` and our directory of files
in `model_path`, and for update_weights_from_disk, with the url in `model_path`. The loader that SGLang would have taken
for files is derived from, so that what it does for quantised models, drafts or kernels stays as it is.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaload import _save, loading
from rdmaload.errors import LayoutMismatchError, NotSupportedError
from rdmaload.integrations import names
from rdmaload.integrations.kept_files import collect_files
from rdmaload.integrations.metadata import EngineModel, resolve_model
from rdmaload.integrations.rank_weights import checkpoint_weights, load_shard
from rdmaload.integrations.sglang_plugin import set_up
from rdmaload.integrations.sglang_plugin.arguments import options_of
from rdmaload.integrations.sglang_plugin.set_up import Ranks
from rdmaload.integrations.vllm.options import LoaderOptions
from rdmaload.tensors import TensorSpec
from rdmaload.urls import parse_url

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rdmaload.model import Model

__all__ = ["around_get_model_loader", "around_save_model"]

_log = logging.getLogger("rdmaload")

_DEVICE_WINDOW_BYTES = 256 << 20  # GPU memory beside the model's own; several reads deep


def around_get_model_loader(
    original: Callable[..., Any], load_config: Any, model_config: Any = None, *arguments: Any, **keywords: Any
) -> Any:
    path, weights = (getattr(model_config, name, None) for name in ("model_path", "model_weights"))
    if not (names.is_ours(path) or names.is_ours(weights)):
        return original(load_config, model_config, *arguments, **keywords)
    formats = importlib.import_module("sglang.srt.configs.load_config").LoadFormat
    if load_config.load_format == formats.DUMMY:
        return original(load_config, model_config, *arguments, **keywords)
    plain = copy.copy(load_config)
    plain.load_format, plain.model_loader_extra_config = formats.AUTO, {}

    def own() -> Any:
        return original(plain, model_config, *arguments, **keywords)

    if names.is_ours(path):  # an update; what is wrong with it is said when tensors are asked for
        return _derived(own(), plain, str(path), None, LoaderOptions())
    found = resolve_model(names.store_url(str(weights)))
    if Path(str(path)) != found.directory:
        return own()  # an update from a directory, in an engine that was started from a url
    if found.kind == "sharded" and not set_up.is_as_loaded(found):
        return original(load_config, model_config, *arguments, **keywords)  # its remote loader, our connector
    options = options_of(load_config)
    if found.kind == "sharded":
        set_up.check_as_loaded(found, model_config, accept_version=options.accept_version)
    return _derived(own(), plain, str(path), found, options)


def around_save_model(original: Callable[..., Any], model: Any, model_path: str, url: str, *arguments: Any) -> Any:
    """Around RemoteModelLoader.save_model, which saves the files in `model_path`: after an update that is a url."""
    if names.is_ours(model_path):
        model_path = str(resolve_model(names.store_url(model_path)).directory)
    return original(model, model_path, url, *arguments)


def _derived(own: Any, config: Any, path: str, found: EngineModel | None, options: LoaderOptions) -> Any:
    default = importlib.import_module("sglang.srt.model_loader.loader").DefaultModelLoader
    if not isinstance(own, default):
        raise NotSupportedError(
            f"SGLang loads this model by its {type(own).__name__}, which takes files: `rdmaload pull` the model and "
            "give SGLang the directory"
        )
    changes_state = (found is not None and found.kind == "sharded") or options.save_to is not None
    if changes_state and type(own) is not default:
        raise LayoutMismatchError(
            f"SGLang loads this model by its {type(own).__name__}, so that its weights cannot be saved or loaded per "
            "rank: load the checkpoint"
        )
    base: Any = type(own)
    made = _class(base)(config)
    made.rdmaload_path, made.rdmaload_found, made.rdmaload_options = path, found, options
    return made


@functools.cache
def _class(base: Any) -> type[Any]:
    class RdmaloadModelLoader(base):  # type: ignore[misc]
        rdmaload_path: str
        rdmaload_found: EngineModel | None
        rdmaload_options: LoaderOptions

        def _get_weights_iterator(
            self, source: Any, *arguments: Any, **keywords: Any
        ) -> Iterator[tuple[str, torch.Tensor]]:
            if source.model_or_path != self.rdmaload_path:  # what a model adds from elsewhere
                weights: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(
                    source, *arguments, **keywords
                )
                return weights
            if getattr(source, "model_config", None) is None:
                raise NotSupportedError(
                    "this model takes weights from another part of its directory, which cannot be done from a store: "
                    "`rdmaload pull` the model and give SGLang the directory"
                )
            node = Ranks.here().node_group() if self.rdmaload_options.read_once != "off" else None
            url = self.rdmaload_path if self.rdmaload_found is None else self.rdmaload_found.url
            store = names.store_url(url)
            if self.rdmaload_options.read_once == "auto" and parse_url(store).scheme == "file":
                node = None  # the kernel caches it anyway
            # At once, not at the first tensor: SGLang can still tell of an error then, and the weights are untouched.
            model = loading.open(store, **self.rdmaload_options.store)  # type: ignore[arg-type]  # names of Options
            try:
                device, window_bytes = self._rdmaload_destination()
                tensors = checkpoint_weights(
                    model, device=device, wanted=_wanted(source), window_bytes=window_bytes, node=node
                )
            except BaseException:
                model.close()
                raise
            index = getattr(self.load_config, "draft_model_idx", None)
            if index is not None:
                return self._filter_mtp_weights(_until_end(model, tensors), source.prefix, index)  # type: ignore[no-any-return]
            return ((source.prefix + name, tensor) for name, tensor in _until_end(model, tensors))

        def _rdmaload_destination(self) -> tuple[str, int | None]:
            if self.rdmaload_options.device != "target":
                return "cpu", None
            import torch

            return ("cuda", _DEVICE_WINDOW_BYTES) if torch.cuda.is_available() else ("cpu", None)

        def resolve_model_weights(self, *arguments: Any, **keywords: Any) -> Any:
            raise NotSupportedError("--startup-weight-load-mode overlap reads files: leave it out for a url")

        def load_weights_and_postprocess(self, model: nn.Module, weights: Any, target_device: Any) -> None:
            found, options = self.rdmaload_found, self.rdmaload_options
            sharded = found is not None and found.kind == "sharded"
            if not sharded and options.save_to is None:
                super().load_weights_and_postprocess(model, weights, target_device)
                return
            if found is not None and sharded:
                _load_shard(found, model, options)
                importlib.import_module("sglang.srt.model_loader.loader").post_load_weights(model)
            else:
                base.load_weights_only(model, weights, target_device)
            if options.save_to is not None and options.save_layout == "rdmaload":
                self._rdmaload_save(model)
            base.postprocess_weights(model, target_device)
            if options.save_to is not None and options.save_layout == "sglang":
                self._rdmaload_save(model)

        def load_model(self, *, model_config: Any, **keywords: Any) -> Any:
            self._rdmaload_model_config = model_config
            return super().load_model(model_config=model_config, **keywords)

        def _rdmaload_save(self, model: nn.Module) -> None:
            _save_shard(model, self._rdmaload_model_config, self.rdmaload_options)

    return RdmaloadModelLoader


def _wanted(source: Any) -> Callable[[TensorSpec], bool] | None:
    patterns = getattr(source, "allow_patterns_overrides", None)
    if patterns is None:
        return None
    return lambda spec: any(fnmatchcase(spec.file, pattern) for pattern in patterns)


def _until_end(model: Model, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    with model:
        yield from tensors
        stats = model.stats
        _log.info("%s: %.3f GB in %.2f s by %s", model.url, stats.bytes / 1e9, stats.seconds, stats.path)


# ---- a rank's own state ------------------------------------------------------------------------


def _load_shard(found: EngineModel, model: nn.Module, options: LoaderOptions) -> None:
    _refuse_late_weights(model, found.shown)
    with loading.open(found.url, **options.store) as stored:  # type: ignore[arg-type]  # names of Options
        load_shard(stored, model.state_dict(), Ranks.here().rank)
        _log.info("%s: %.3f GB by %s", stored.url, stored.stats.bytes / 1e9, stored.stats.path)


def _save_shard(model: nn.Module, model_config: Any, options: LoaderOptions) -> None:
    assert options.save_to is not None
    sizes = set_up.sizes_here()
    shown = parse_url(options.save_to).redacted
    if sizes["pp"] > 1:
        raise LayoutMismatchError(f"{shown}: the weights of pipeline stages of SGLang cannot be saved per rank")
    ranks = Ranks.here()
    sharded = options.save_layout == "rdmaload"
    if sharded:
        _refuse_late_weights(model, shown)
    # `save_sharded` gives it a name: agreeing on one would wait for a rank that has failed to load.
    save_id = options.save_id or ranks.agree(f"sglang-{secrets.token_hex(12)}")
    with tempfile.TemporaryDirectory(prefix="rdmaload-save-") as directory:
        if ranks.rank == 0:
            collect_files(Path(model_config.model_path), Path(directory))
        _save.save(
            model.state_dict(),
            options.save_to,
            rank=ranks.rank,
            world_size=ranks.size,
            save_id=save_id if sharded else None,
            layout=options.save_layout,
            files=directory if ranks.rank == 0 else None,
            parallel=sizes if sharded else None,
            identity=set_up.identity_of(model_config) if sharded else None,
        )
    _log.info("saved the weights of rank %d to %s", ranks.rank, shown)


def _refuse_late_weights(model: nn.Module, shown: str) -> None:
    """What is made while a checkpoint is loaded has no memory yet where state is saved and loaded."""
    late = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if late:
        raise LayoutMismatchError(
            f"{shown}: {late[0]} is made while the model is loaded, so that its weights cannot be saved or loaded per "
            "rank: load the checkpoint",
            url=shown,
        )
