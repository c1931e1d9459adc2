"""vLLM's load format `rdmaload`: a checkpoint through the model's own loading, a sharded model into each rank as it is.

Imported by vLLM's processes only. A loader is built several times per process and does no I/O until it is asked to
load. Sharded state is saved and loaded at one point, after vLLM has loaded a checkpoint's tensors and before it
changes them for its kernels: it suits every kernel and every GPU.
"""

from __future__ import annotations

import copy
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from rdmaload import _save, loading
from rdmaload.connectors.connector import STORE_OPTIONS
from rdmaload.connectors.registry import connector_class
from rdmaload.errors import LayoutMismatchError, NotSupportedError, RdmaloadError
from rdmaload.integrations import metadata, names
from rdmaload.integrations.kept_files import collect_files
from rdmaload.integrations.metadata import EngineModel
from rdmaload.integrations.rank_weights import checkpoint_weights, load_shard
from rdmaload.integrations.vllm import set_up
from rdmaload.integrations.vllm.options import LoaderOptions
from rdmaload.integrations.vllm.ranks import Ranks
from rdmaload.model import Model
from rdmaload.node_group import NodeGroup
from rdmaload.tensors import TensorSpec
from rdmaload.urls import parse_url, with_option

__all__ = ["RdmaloadModelLoader"]

_log = logging.getLogger("rdmaload")

# Scales that vLLM keeps for every attention layer; other engines have none, and these stay at their default of 1.
_OPTIONAL = ("._k_scale", "._v_scale", "._q_scale", "._prob_scale")

_DEVICE_WINDOW_BYTES = 256 << 20  # GPU memory beside the model's own; several reads deep


class RdmaloadModelLoader(DefaultModelLoader):  # type: ignore[misc]  # no types of vllm here
    """The loader that `--load-format rdmaload` names."""

    def __init__(self, load_config: Any) -> None:
        self.rdmaload_options = LoaderOptions.parse(load_config.model_loader_extra_config)
        self._pinned_urls: dict[str, str] = {}
        self._node_group: tuple[NodeGroup | None] | None = None  # once the ranks have agreed on it
        # What the model adds from elsewhere (`secondary_weights`) is loaded by vLLM in its own way.
        plain = copy.copy(load_config)
        plain.load_format = "auto"
        plain.model_loader_extra_config = {}
        super().__init__(plain)

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: tensors go from the store into the model."""

    def load_model(self, vllm_config: Any, model_config: Any, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        weights = getattr(model_config, "model_weights", "")
        if names.is_ours(weights) and not Path(model_config.model).is_dir():
            # Another node than the one that resolved the url: its directory is made here, too, under the same name
            # where the places for caches are the same.
            model_config.model = str(metadata.resolve_model(names.store_url(weights)).directory)
        model: torch.nn.Module = super().load_model(vllm_config, model_config, *arguments, **keywords)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        self._node(model_config)
        with self._open(model_config) as stored:
            if stored.kind == "sharded":
                self._load_shard(stored, model, model_config)
            else:
                self._refuse_quantization(model_config)
                super().load_weights(model, model_config)
        if self.rdmaload_options.save_to is not None and not _is_draft(model_config):
            self._save_shard(self.rdmaload_options.save_to, model, model_config)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        node = self._node(model_config)
        with self._open(model_config) as stored:
            if stored.kind == "sharded":
                raise NotSupportedError(
                    f"{stored.url} is sharded: weights cannot be reloaded from it while the engine runs; reload from "
                    "the checkpoint that it was made from, or start the engine again",
                    url=stored.url,
                )
            self.counter_before_loading_weights = time.perf_counter()
            device, window_bytes = self._destination()
            for wanted, group in self._parts(model, node if self._reads_once(stored) else None):
                yield from checkpoint_weights(
                    stored, device=device, wanted=wanted, window_bytes=window_bytes, node=group
                )
                stats = stored.stats
                _log.info("%s: %.3f GB in %.2f s by %s", stored.url, stats.bytes / 1e9, stats.seconds, stats.path)
        for source in getattr(model, "secondary_weights", ()):
            if source.model_or_path == model_config.model and names.is_ours(getattr(model_config, "model_weights", "")):
                raise NotSupportedError(
                    f"{type(model).__name__} takes weights from another part of {stored.url}, which cannot be done "
                    "from a store: `rdmaload pull` the model and use the engine's own loader",
                    url=stored.url,
                )
            yield from self._get_weights_iterator(source)

    # ---- where from --------------------------------------------------------------------------

    def _open(self, model_config: Any) -> Model:
        url = self._url(model_config)
        if not _is_draft(model_config):  # its url comes pinned, and not every rank need load it
            if url not in self._pinned_urls:
                self._pinned_urls[url] = self._pinned(url)
            url = self._pinned_urls[url]
        store = self.rdmaload_options.store
        if _is_draft(model_config):  # which inherits its target's options, and may lie in another kind of store
            foreign = STORE_OPTIONS - connector_class(parse_url(url).scheme).store_options
            store = {name: value for name, value in store.items() if name not in foreign}
        return loading.open(url, **store)  # type: ignore[arg-type]  # names of Options

    def _url(self, model_config: Any) -> str:
        """The model's url or directory. A reload puts its own into `model` and empties `model_weights`."""
        if names.is_url(model_config.model):
            return names.store_url(model_config.model)
        weights = getattr(model_config, "model_weights", "")
        if weights:
            return names.store_url(weights)
        if self.rdmaload_options.url is not None and not _is_draft(model_config):
            return self.rdmaload_options.url
        if Path(model_config.model).is_dir():
            return str(model_config.model)
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        return str(
            download_weights_from_hf(
                model_config.model,
                self.load_config.download_dir,
                patterns,
                model_config.revision,
                ignore_patterns=self.load_config.ignore_patterns,
            )
        )

    def _pinned(self, url: str) -> str:
        """The same url on every rank, with one generation: the front end has pinned what it resolved, a url that
        the ranks hear of for the first time (a reload, the option url) is pinned by the first of them."""
        ranks = Ranks.here()
        if ranks.world_size == 1 or not names.is_url(url) or "generation" in parse_url(url).query:
            return url
        answer: str | RdmaloadError = url
        if ranks.rank == 0:
            try:
                answer = pin(url, **self.rdmaload_options.store)
            except RdmaloadError as error:  # all must hear of it: they wait
                answer = error
        answer = ranks.agree(answer)
        if isinstance(answer, RdmaloadError):
            raise answer
        return answer

    # ---- a checkpoint ------------------------------------------------------------------------

    def _refuse_quantization(self, model_config: Any) -> None:
        if model_config.quantization == "torchao":
            raise NotSupportedError(
                "torchao checkpoints hold more than plain tensors: `rdmaload pull` the model and use the engine's own "
                "loader"
            )

    def _destination(self) -> tuple[torch.device, int | None]:
        from vllm.platforms import current_platform

        target = torch.device(self.load_config.device or current_platform.device_type)
        choice = self.rdmaload_options.device
        if target.type != "cuda" or choice == "cpu" or (choice == "auto" and Ranks.here().world_size > 1):
            return torch.device("cpu"), None
        return target, _DEVICE_WINDOW_BYTES

    def _node(self, model_config: Any) -> NodeGroup | None:
        """The ranks that read together with this one. All ranks come here before anything can fail in one of them."""
        if self.rdmaload_options.read_once == "off" or _is_draft(model_config):
            return None
        if self._node_group is None:
            self._node_group = (Ranks.here().node_group(),)
        return self._node_group[0]

    def _reads_once(self, stored: Model) -> bool:
        return self.rdmaload_options.read_once == "on" or parse_url(stored.url).scheme != "file"

    def _parts(
        self, model: torch.nn.Module, node: NodeGroup | None
    ) -> Iterator[tuple[Callable[[TensorSpec], bool], NodeGroup | None]]:
        """Which of the checkpoint's tensors to read, and who with: as vLLM's own loader, by the model's wishes and by
        experts. Of experts that are spread over the ranks each reads its own, after what all of them need."""
        patterns = getattr(model, "allow_patterns_overrides", None)
        is_unused = getattr(model, "is_unused_checkpoint_weight", None)
        experts = getattr(self, "local_expert_ids", None)

        def by_model(spec: TensorSpec) -> bool:
            if patterns is not None and not any(fnmatchcase(spec.file, pattern) for pattern in patterns):
                return False
            return is_unused is None or not is_unused(spec.name)

        if experts is None:
            yield by_model, node
        elif node is None:
            yield lambda spec: by_model(spec) and not _skips(spec.name, experts), None
        else:
            yield lambda spec: by_model(spec) and not _skips(spec.name, set()), node
            yield (lambda spec: by_model(spec) and _skips(spec.name, set()) and not _skips(spec.name, experts)), None

    # ---- a rank's own state ------------------------------------------------------------------

    def _load_shard(self, stored: Model, model: torch.nn.Module, model_config: Any) -> None:
        from vllm.config import get_current_vllm_config

        _refuse_late_weights(model, stored.url)
        parallel = get_current_vllm_config().parallel_config
        manifest = stored.manifest
        found = EngineModel(
            url=stored.url,
            shown=stored.url,
            directory=Path(),
            kind=stored.kind,
            world_size=stored.world_size,
            store_layout=stored.store_layout,
            layout={} if manifest is None else manifest.layout,
            identity={} if manifest is None else manifest.identity,
        )
        set_up.check(found, model_config, parallel, self.rdmaload_options)
        rank = Ranks.here().weights_rank(set_up.parallel_of(parallel))
        load_shard(stored, model.state_dict(), rank, optional=_OPTIONAL)
        stats = stored.stats
        _log.info("%s, rank %d: %.3f GB by %s", stored.url, rank, stats.bytes / 1e9, stats.path)

    def _save_shard(self, url: str, model: torch.nn.Module, model_config: Any) -> None:
        from vllm.config import get_current_vllm_config

        _refuse_late_weights(model, url)
        options = self.rdmaload_options
        parallel = get_current_vllm_config().parallel_config
        sizes = set_up.parallel_of(parallel)
        ranks = Ranks.here()
        # `save_sharded` gives it a name: agreeing on one would wait for a rank that has failed to load.
        save_id = options.save_id or ranks.agree(f"vllm-{secrets.token_hex(12)}", replicas=sizes["ep"] > 1)
        if sizes["ep"] == 1 and ranks.replica:
            return  # another replica saves the same
        rank = ranks.weights_rank(sizes)
        with tempfile.TemporaryDirectory(prefix="rdmaload-save-") as directory:
            if rank == 0:
                collect_files(Path(model_config.model), Path(directory))
            sharded = options.save_layout == "rdmaload"
            _save.save(
                model.state_dict(),
                url,
                rank=rank,
                world_size=set_up.world_size_of(parallel),
                save_id=save_id if sharded else None,
                layout=options.save_layout,
                files=directory if rank == 0 else None,
                parallel=sizes if sharded else None,
                identity=set_up.identity_of(model_config) if sharded else None,
            )
        _log.info("saved the weights of rank %d to %s", rank, parse_url(url).redacted)


def pin(url: str, **opts: object) -> str:
    """`url` with the generation that it means now, where its store has generations."""
    with loading.open(url, **opts) as model:  # type: ignore[arg-type]  # names of Options
        return url if model.generation is None else with_option(parse_url(url), "generation", model.generation)


def _is_draft(model_config: Any) -> bool:
    """A draft model inherits the loader's options, which are the target's."""
    return "draft" in (getattr(model_config, "runner_type", None), getattr(model_config, "runner", None))


def _skips(name: str, experts: set[int]) -> bool:
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, experts))


def _refuse_late_weights(model: torch.nn.Module, url: str) -> None:
    """Quantisation while loading makes parameters later than the point where state is saved and loaded."""
    late = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "quant_method", None), "uses_meta_device", False)
    ]
    late += [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if late:
        shown = parse_url(url).redacted
        raise LayoutMismatchError(
            f"{shown}: {late[0]} is quantised while it is loaded, so that its weights cannot be saved or loaded per "
            "rank: use a checkpoint that is quantised already, or load it unsharded",
            url=shown,
        )
