"""Lets the real SGLang run on a machine without a GPU: with this directory in PYTHONPATH, packages for GPUs that are
not installed can be imported, and are empty.

SGLang imports them at its top, and on a CPU with torch's own attention it calls none. Whatever is installed is used as
it is. Only a process that imports sglang is touched, at that moment.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

FOR_GPUS = frozenset(
    {
        *("cuda", "cutlass", "decord", "deep_gemm", "flash_attn", "flash_mla", "flashinfer", "humming", "kernels"),
        *("mooncake", "nvshmem", "pynvml", "quack", "sgl_deep_ep", "sgl_kernel", "sglang_kernel", "tilelang", "timm"),
        *("torch_memory_saver", "torchaudio", "torchcodec", "torchvision"),
    }
)


class Nothing:
    """Any function or object of such a package. As a decorator it gives back what it decorates."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __init_subclass__(cls, **keywords: object) -> None:
        pass

    def __call__(self, *arguments: object, **keywords: object) -> object:
        decorates = len(arguments) == 1 and not keywords and callable(arguments[0])
        return arguments[0] if decorates else Nothing()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __or__(self, other: object) -> object:  # in annotations
        return other

    __ror__ = __or__


class EmptyModule(types.ModuleType):
    """Has whatever is asked for; a name in capitals is a class, from which others may be derived."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Nothing,), {"__module__": self.__name__}) if name[0].isupper() else Nothing()
        setattr(self, name, made)
        return made


class EmptyPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: it is asked for what no other finder has."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in FOR_GPUS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class WaitForSglang(importlib.abc.MetaPathFinder):
    """Comes first, finds nothing, and puts the empty packages in place when sglang is asked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "sglang":
            return
        sys.meta_path.remove(self)
        # These look for packages by their names and must have found out the truth before.
        for early in ("tvm_ffi", "transformers", "transformers.utils.import_utils"):
            importlib.import_module(early)
        checks = sys.modules["transformers.utils.import_utils"]
        for package in ("decord", "kernels", "timm", "torchaudio", "torchcodec", "torchvision", "torchvision_v2"):
            check = getattr(checks, f"is_{package}_available", None)
            if check is not None:
                check()  # which remembers its answer
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer  # noqa: F401

        sys.meta_path.append(EmptyPackages())


sys.meta_path.insert(0, WaitForSglang())
