"""The layer check: clean for this tree, and it sees what it is there for."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_layers.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_tree_is_clean() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_it_looks_at_every_file(check: ModuleType) -> None:
    assert len(list((ROOT / "csrc").rglob("*.cpp"))) > 5
    for path in (ROOT / "python" / "rdmaload").rglob("*.py"):
        module = path.relative_to(ROOT / "python" / "rdmaload").parts[0].removesuffix(".py")
        assert module.startswith("__") or any(module in layer for layer in check.PYTHON_ORDER), path


@pytest.mark.parametrize(
    ("path", "line", "problem"),
    [
        ("core/planted.h", '#include "memory/host_arena.h"', "layer core must not include memory"),
        ("memory/planted.cpp", '#include "transport/transport.h"', "layer memory must not include transport"),
        ("transport/resp/planted.cpp", '#include "loader/load.h"', "layer transport must not include loader"),
        ("loader/planted.h", '  #  include "bindings/register.h"', "layer loader must not include bindings"),
        ("server/planted.cpp", '#include "loader/plan.h"', "layer server must not include loader"),
        ("loader/planted.cpp", "#include <pybind11/pybind11.h>", "belongs to bindings"),
        ("core/planted.cpp", "#include <Python.h>", "belongs to bindings"),
        ("loader/planted.cpp", "#include <infiniband/verbs.h>", "belongs to server, transport"),
        ("loader/planted.cpp", "#include <openssl/ssl.h>", "belongs to server, transport"),
        ("transport/planted.cpp", "#include <cuda.h>", "belongs to device"),
        ("memory/planted.cpp", "#include <cuda_runtime.h>", "belongs to device"),
    ],
)
def test_a_planted_include_is_found(check: ModuleType, tmp_path: Path, path: str, line: str, problem: str) -> None:
    tree = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    before = check.check_cpp(tree)
    planted = tree / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(f"#pragma once\n{line}\n")
    found = [text for text in check.check_cpp(tree) if text not in before]
    assert len(found) == 1
    assert str(planted) in found[0]
    assert problem in found[0]


@pytest.mark.parametrize(
    ("path", "line", "problem"),
    [
        ("errors.py", "from rdmaload.model import Model", "layer of errors must not import model"),
        ("stats.py", "import rdmaload.connectors", "layer of stats must not import connectors"),
        ("connectors/redis.py", "from rdmaload import reader", "layer of connectors must not import reader"),
        ("model.py", "from rdmaload.cli import main", "layer of model must not import cli"),
        ("errors.py", "from rdmaload import stats, model", "layer of errors must not import model"),
        ("errors.py", "from rdmaload import (\n    stats,\n    model,\n)", "layer of errors must not import model"),
        ("errors.py", "import rdmaload.stats, rdmaload.model as m", "layer of errors must not import model"),
        ("errors.py", "from .model import Model", "layer of errors must not import model"),
        ("connectors/redis.py", "from ..model import Model", "layer of connectors must not import model"),
        ("connectors/redis.py", "from .. import errors, model", "layer of connectors must not import model"),
        ("connectors/__init__.py", "from ..model import Model", "layer of connectors must not import model"),
        ("errors.py", "try:\n    import rdmaload.model\nexcept ImportError:\n    pass", "must not import model"),
        ("errors.py", "try:\n    pass\nexcept ImportError:\n    import rdmaload.model", "must not import model"),
        ("errors.py", "class A:\n    from rdmaload import model", "must not import model"),
        ("planted.py", "import json", "module planted is in no layer"),
    ],
)
def test_a_planted_import_is_found(check: ModuleType, tmp_path: Path, path: str, line: str, problem: str) -> None:
    tree = tmp_path / "rdmaload"
    shutil.copytree(ROOT / "python" / "rdmaload", tree, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    before = check.check_python(tree)
    planted = tree / path
    content = planted.read_text() if planted.exists() else ""
    planted.write_text(f"{line}\n{content}")
    found = [text for text in check.check_python(tree) if text not in before]
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "def f() -> None:\n    from rdmaload.model import Model\n",
        "class A:\n    async def f(self) -> None:\n        import rdmaload.model\n",
        "if TYPE_CHECKING:\n    from rdmaload.model import Model\n",
        '"""\nfrom rdmaload.model import Model\n"""\n',
        "from .stats import model\nfrom . import stats\nimport model\nfrom model import rdmaload\n",
    ],
)
def test_what_does_not_run_at_import_may_point_to_the_right(check: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.py").write_text(text)
    assert check.check_python(tmp_path) == []


def test_the_other_branch_of_type_checking_counts(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("if TYPE_CHECKING:\n    pass\nelse:\n    import rdmaload.model\n")
    assert len(check.check_python(tmp_path)) == 1
