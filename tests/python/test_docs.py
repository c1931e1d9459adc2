"""What the documentation says and shows is so: its tables, its examples, and those in docstrings."""

from __future__ import annotations

import builtins
import doctest
import importlib
import pkgutil
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rdmaload
from rdmaload import errors
from rdmaload.cli.exits import exit_code
from rdmaload.connectors import registry

DOCS = Path(__file__).resolve().parents[2] / "docs"


NEED_AN_ENGINE = ("rdmaload.integrations.vllm.loader",)


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(rdmaload.__path__, "rdmaload.")
    return [
        importlib.import_module(module.name)
        for module in found
        if not module.name.endswith("__main__") and module.name not in NEED_AN_ENGINE
    ]


def test_the_table_of_errors_is_what_the_code_does() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|.*\| ([^|]+) \|$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert {name for name, _, _ in rows} == set(errors.__all__) - {"RdmaloadError"}
    assert len(rows) == len(errors.__all__) - 1
    for name, bases, code in rows:
        cls = getattr(errors, name)
        assert cls.__bases__ == (errors.RdmaloadError, *(getattr(builtins, base) for base in re.findall(r"\w+", bases)))
        if code != "as the cause":
            assert exit_code(cls("x")) == int(code), name
            continue
        for cause in (errors.IntegrityError("x"), errors.LoadTimeoutError("x")):
            error = cls("x")
            error.__cause__ = cause
            assert exit_code(error) == exit_code(cause)


def test_the_plug_in_of_the_connector_page_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    section = (DOCS / "connectors.md").read_text().split("## A plug-in\n")[1]
    example = re.match(r"(?:\n|    .*\n)+", section)
    assert example is not None
    exec(textwrap.dedent(example[0]), {"__name__": "example"})
    source = {"a": torch.arange(1000.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)}
    rdmaload.save(source, "dict://store/model", chunk_bytes=1000)
    loaded = rdmaload.load("dict://store/model")
    assert loaded.keys() == source.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())


def test_the_examples_in_docstrings_work() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    finder = doctest.DocTestFinder(exclude_empty=True)
    report: list[str] = []
    with_examples = 0
    for module in modules():
        for test in finder.find(module):
            with_examples += bool(test.examples)
            runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert with_examples >= 17
