"""rdmaload: loads a model's weights from a remote store into memory, natively.

    state = rdmaload.load("redis://127.0.0.1:6379/llama")

Importing it is cheap: torch, redis and the native core are imported by the call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdmaload import connectors as connectors
    from rdmaload import errors as errors
    from rdmaload import metrics as metrics
    from rdmaload._prune import models, prune, remove
    from rdmaload._save import save
    from rdmaload.connectors import (
        Connector,
        FileConnector,
        FileInfo,
        KeyValueConnector,
        register_connector,
    )
    from rdmaload.errors import (
        AlreadyExistsError,
        AuthenticationError,
        DeviceError,
        FormatError,
        IntegrityError,
        LayoutMismatchError,
        LoadTimeoutError,
        MemoryLimitError,
        NotFoundError,
        NotSupportedError,
        PartialLoadError,
        RdmaloadError,
        StaleGenerationError,
        UnavailableError,
        UrlError,
    )
    from rdmaload.loading import load, load_into, open, pull_files, weight_iterator
    from rdmaload.model import Model
    from rdmaload.node_group import NodeGroup
    from rdmaload.options import Options
    from rdmaload.stats import LoadStats, Progress, SaveStats

__version__ = "0.1.0"

_ERRORS = (
    "AlreadyExistsError",
    "AuthenticationError",
    "DeviceError",
    "FormatError",
    "IntegrityError",
    "LayoutMismatchError",
    "LoadTimeoutError",
    "MemoryLimitError",
    "NotFoundError",
    "NotSupportedError",
    "PartialLoadError",
    "RdmaloadError",
    "StaleGenerationError",
    "UnavailableError",
    "UrlError",
)

_MODULE_OF = {
    **dict.fromkeys(_ERRORS, "rdmaload.errors"),
    **dict.fromkeys(
        ("Connector", "FileConnector", "FileInfo", "KeyValueConnector", "register_connector"), "rdmaload.connectors"
    ),
    **dict.fromkeys(("load", "load_into", "open", "pull_files", "weight_iterator"), "rdmaload.loading"),
    "Model": "rdmaload.model",
    "NodeGroup": "rdmaload.node_group",
    **dict.fromkeys(("LoadStats", "Progress", "SaveStats"), "rdmaload.stats"),
    **dict.fromkeys(("models", "prune", "remove"), "rdmaload._prune"),
    "Options": "rdmaload.options",
    "save": "rdmaload._save",
}

_SUBMODULES = ("connectors", "errors", "metrics")  # that users name without an import of their own

__all__ = [
    "AlreadyExistsError",
    "AuthenticationError",
    "Connector",
    "DeviceError",
    "FileConnector",
    "FileInfo",
    "FormatError",
    "IntegrityError",
    "KeyValueConnector",
    "LayoutMismatchError",
    "LoadStats",
    "LoadTimeoutError",
    "MemoryLimitError",
    "Model",
    "NodeGroup",
    "NotFoundError",
    "NotSupportedError",
    "Options",
    "PartialLoadError",
    "Progress",
    "RdmaloadError",
    "SaveStats",
    "StaleGenerationError",
    "UnavailableError",
    "UrlError",
    "load",
    "load_into",
    "models",
    "open",
    "prune",
    "pull_files",
    "register_connector",
    "remove",
    "save",
    "weight_iterator",
]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"rdmaload.{name}")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'rdmaload' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    # `from rdmaload import save` must give the function, not the module of that name that the import has just bound.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
