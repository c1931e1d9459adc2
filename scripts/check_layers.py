"""Checks that each layer includes (C++) or imports (Python) only itself and the layers to its left."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each C++ layer with those it may include; `server` stands beside `loader`.
CPP_ORDER = ["core", "memory", "device", "transport", "loader", "bindings"]
CPP_ALLOWED = {layer: set(CPP_ORDER[: i + 1]) for i, layer in enumerate(CPP_ORDER)}
CPP_ALLOWED["bindings"].add("server")
CPP_ALLOWED["server"] = {"core", "memory", "device", "transport", "server"}

# Headers of third parties that only one layer may see.
CPP_ONLY_IN = {
    re.compile(r"pybind11/|Python\.h"): {"bindings"},
    re.compile(r"infiniband/|rdma/|openssl/|curl/"): {"transport", "server"},
    re.compile(r"cuda"): {"device"},
}

# Python modules by layer, left to right; what is not listed is a plain value that everybody may use.
PYTHON_ORDER = [
    {"_core"},
    {"amounts", "errors", "stats", "metrics", "meter", "threads"},
    {"urls", "options", "weights", "manifest", "index"},
    {"connectors"},
    {
        "tensors",
        "devices",
        "host_memory",
        "generations",
        "file_manifest",
        "digests",
        "disk_cache",
        "reader",
        "report",
        "selection",
        "targets",
        "fill",
        "gpu_stream",
        "node_group",
        "node_share",
        "pull",
        "timeline",
        "timeline_still",
    }
    | {"sources", "state_dict", "journal", "upload", "publish", "files_save", "object_save", "file_manifest"}
    | {"object_removal"}
    | {"sglang_layout", "sglang_source", "sglang_state", "_sglang_save"}
    | {"_save", "_prune", "model", "loading", "export_checksums", "exports"},
    {"integrations", "cli"},
]

_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def check_cpp(csrc: Path) -> list[str]:
    """Violations among the C++ files below `csrc`."""
    problems = []
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu"):
            continue
        layer = path.relative_to(csrc).parts[0]
        for quote, included in _INCLUDE.findall(path.read_text()):
            target = included.split("/")[0]
            if quote == '"' and target not in CPP_ALLOWED.get(layer, set()):
                problems.append(f"{path}: layer {layer} must not include {included}")
            for pattern, layers in CPP_ONLY_IN.items():
                if quote == "<" and pattern.match(included) and layer not in layers:
                    problems.append(f"{path}: <{included}> belongs to {', '.join(sorted(layers))}")
    return problems


def check_python(package: Path) -> list[str]:
    """Violations among the modules of the package. Imports inside functions may point anywhere."""
    rank = {module: i for i, modules in enumerate(PYTHON_ORDER) for module in modules}
    problems = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        module = parts[0].removesuffix(".py")
        if module.startswith("__"):
            continue
        if module not in rank:
            problems.append(f"{path}: module {module} is in no layer (scripts/check_layers.py)")
            continue
        parents = ("rdmaload", *parts[:-1])
        targets = {target for node in _imports(ast.parse(path.read_text()).body) for target in _targets(node, parents)}
        for target in sorted(targets):
            if target in rank and rank[target] > rank[module]:
                problems.append(f"{path}: layer of {module} must not import {target}")
    return problems


def _imports(statements: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported."""
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield statement
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(statement.orelse)
        else:
            for _, value in ast.iter_fields(statement):
                for child in value if isinstance(value, list) else []:
                    if isinstance(child, ast.stmt):
                        yield from _imports([child])
                    elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                        yield from _imports(child.body)


def _targets(node: ast.Import | ast.ImportFrom, parents: tuple[str, ...]) -> Iterator[str]:
    """The modules of the package that an import in a module of the package `parents` names."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    else:
        base = list(parents[: len(parents) - node.level + 1]) if node.level else []
        base += node.module.split(".") if node.module else []
        names = [[*base, alias.name] for alias in node.names]
    for name in names:
        if name[0] == "rdmaload" and len(name) > 1:
            yield name[1]


def main() -> int:
    problems = check_cpp(ROOT / "csrc") + check_python(ROOT / "python" / "rdmaload")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
