"""Runs SGLang's own Redis connector and the parts of its loader that use it, without its GPU dependencies.

    python sglang_driver.py WHEEL save URL RANK STATE FILES   SGLang's RemoteModelLoader.save_model
    python sglang_driver.py WHEEL load URL RANK STATE         its _load_model_from_remote_kv into that state
    python sglang_driver.py WHEEL iterate URL RANK OUT        RedisConnector.weight_iterator
    python sglang_driver.py WHEEL pull URL DIR                RedisConnector.pull_files
    python sglang_driver.py WHEEL plugin URL RANK STATE       as load, by the connector that our plug-in puts there

The connector package is imported as it is; only `sglang.srt.utils`, which imports the whole engine, is replaced. The
loader's module imports that engine, too: its functions are taken out of its source and run as they stand. A process of
its own, as the connector installs signal handlers.
"""

from __future__ import annotations

import ast
import collections
import importlib
import logging
import os
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path

import torch


def connector_package(wheel: Path) -> types.ModuleType:
    for name in ("sglang", "sglang.srt"):
        package = types.ModuleType(name)
        package.__path__ = [str(wheel.joinpath(*name.split(".")))]
        sys.modules[name] = package
    utils = types.ModuleType("sglang.srt.utils")
    utils.parse_connector_type = lambda url: url.partition("://")[0]
    utils.init_custom_process_group = None
    utils.__path__ = []
    common = types.ModuleType("sglang.srt.utils.common")
    common.is_npu = lambda: False
    sys.modules.update({"sglang.srt.utils": utils, "sglang.srt.utils.common": common})
    return importlib.import_module("sglang.srt.connector")


def loader_functions(wheel: Path, connector: types.ModuleType, rank: int) -> dict[str, typing.Any]:
    """The methods that SGLang's remote loader saves and loads with, by name."""
    source = (wheel / "sglang" / "srt" / "model_loader" / "loader.py").read_text()
    wanted = {
        "ShardedStateLoader": ["_filter_subtensors"],
        "RemoteModelLoader": ["save_model", "_load_model_from_remote_kv", "_get_weights_iterator_kv"],
    }
    scope: dict[str, typing.Any] = {
        **{name: getattr(typing, name) for name in ("Any", "Dict", "Generator", "List", "Tuple")},
        **{
            name: getattr(connector, name)
            for name in ("ConnectorType", "create_remote_connector", "get_connector_type")
        },
        "ModelConfig": object,
        "collections": collections,
        "get_parallel": lambda: types.SimpleNamespace(tp_rank=rank),
        "logger": logging.getLogger("sglang"),
        "nn": torch.nn,
        "os": os,
        "parse_model_name": importlib.import_module("sglang.srt.connector.utils").parse_model_name,
        "post_load_weights": lambda model: None,
        "torch": torch,
    }
    for node in ast.parse(source).body:
        for method in node.body if isinstance(node, ast.ClassDef) and node.name in wanted else ():
            if isinstance(method, ast.FunctionDef) and method.name in wanted[node.name]:
                method.decorator_list = []
                exec(textwrap.dedent(ast.unparse(method)), scope)
                wanted[node.name].remove(method.name)
    assert not any(wanted.values()), f"not in this SGLang: {wanted}"
    scope["ShardedStateLoader"] = types.SimpleNamespace(_filter_subtensors=scope["_filter_subtensors"])
    return scope


class Model(torch.nn.Module):
    """A model whose state dict is the one in a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = torch.load(path)

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return dict(self.tensors)


def plugin(connector: types.ModuleType) -> None:
    """Register our plug-in with SGLang's own registry, as its `load_plugins` does, and apply it."""
    from rdmaload.integrations.sglang import register

    plugins = types.ModuleType("sglang.srt.plugins")
    plugins.__path__ = [str(Path(connector.__path__[0]).parent / "plugins")]
    sys.modules["sglang.srt.plugins"] = plugins
    register()
    registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    registry.apply_hooks()
    assert registry._patched == {"sglang.srt.connector.create_remote_connector"}


def main() -> None:
    wheel, action, url, *rest = sys.argv[1:]
    package = connector_package(Path(wheel))
    if action == "plugin":
        plugin(package)
        action = "load"
    if action == "pull":
        with package.create_remote_connector(url) as client:
            client.pull_files()
            shutil.copytree(client.get_local_dir(), rest[0], dirs_exist_ok=True)
        return
    rank, path = int(rest[0]), rest[1]
    if action == "iterate":
        with package.create_remote_connector(url) as client:
            torch.save(dict(client.weight_iterator(rank)), path)
        return
    functions = loader_functions(Path(wheel), package, rank)
    model = Model(path)
    if action == "save":
        functions["save_model"](model, rest[2], url)
        return
    loader = types.SimpleNamespace(
        _get_weights_iterator_kv=lambda client: functions["_get_weights_iterator_kv"](None, client)
    )
    with package.create_remote_connector(url) as client:
        functions["_load_model_from_remote_kv"](loader, model, None, client)
    torch.save(model.tensors, path)


if __name__ == "__main__":
    main()
