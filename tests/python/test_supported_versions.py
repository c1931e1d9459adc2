"""The Pythons that are supported: every place that names them says the same, and the sources are in their language."""

from __future__ import annotations

import ast
import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
SOURCES = sorted(path for top in ("python", "scripts", "tests", "benchmarks") for path in (ROOT / top).rglob("*.py"))

spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "scripts" / "check_wheel.py")
assert spec is not None
assert spec.loader is not None
check_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_wheel)


def oldest() -> tuple[int, int]:
    found = re.search(r'^requires-python = ">=(\d+)\.(\d+)"', PROJECT, re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


def test_every_place_names_the_same_pythons() -> None:
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    major, minor = oldest()
    assert versions[0] == f"{major}.{minor}"
    assert versions == [f"3.{number}" for number in range(minor, minor + len(versions))]
    built = re.search(r"^build = \[(.*)\]$", PROJECT, re.MULTILINE)
    assert built is not None
    assert built[1].replace('"', "").split(", ") == [f"cp{version.replace('.', '')}-*" for version in versions]
    assert f'python_version = "{versions[0]}"' in PROJECT  # mypy
    assert f'target-version = "py{major}{minor}"' in PROJECT  # ruff
    assert f"pythons=({' '.join(versions)})" in (ROOT / "scripts" / "test-pythons").read_text()
    assert f"find_package(Python {versions[0]} " in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_in_the_oldest_pythons_language(path: Path) -> None:
    ast.parse(path.read_text(), filename=str(path), feature_version=oldest())


def test_newer_syntax_would_be_found() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass\n", feature_version=oldest())


GOOD = (*check_wheel._EXPECTED, "rdmaload/_core.cpython-311-x86_64-linux-gnu.so", "rdmaload-0.1.0.dist-info/RECORD")
NAME = "rdmaload-0.1.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"


@pytest.mark.parametrize(
    ("name", "more", "less", "words"),
    [
        (NAME, (), (), None),
        (NAME, ("rdmaload.libs/libssl-0a1b2c3d.so.3",), (), "which nobody asked for"),
        (NAME, ("rdmaload.libs/libcuda-0a1b2c3d.so.1",), (), "which nobody asked for"),
        (NAME, ("tests/conftest.py",), (), "outside of its package"),
        (NAME, (), ("rdmaload/py.typed",), "lacks rdmaload/py.typed"),
        (NAME, (), (GOOD[-2],), "the extension exactly once"),
        ("rdmaload-0.1.0-cp311-cp311-linux_x86_64.whl", (), (), "no manylinux tag"),
        ("rdmaload-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl", (), (), "a newer glibc than 2.28"),
    ],
)
def test_wheels_are_checked(
    name: str, more: tuple[str, ...], less: tuple[str, ...], words: str | None, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for entry in sorted({*GOOD, *more} - set(less)):
            archive.writestr(entry, "")
    found = check_wheel.problems(tmp_path / name, (2, 28))
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])
