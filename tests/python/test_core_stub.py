"""`_core.pyi` says what the extension has: every name, every parameter, every default that is written out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rdmaload
from rdmaload import _core

STUB = Path(rdmaload.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


def members(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def split(parameters: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(parameters):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(parameters[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, parameters[start:]] if part.strip()]


def documented(callable_: object, name: str) -> list[tuple[str, str | None]]:
    """Names and defaults from the first line of a docstring that pybind11 wrote; `*` is a name too."""
    line = (callable_.__doc__ or "").splitlines()[0]
    match = re.match(rf"{re.escape(name)}\((.*)\)(?: -> .*)?$", line)
    assert match is not None, f"{name} has no signature in its docstring: {line!r}"
    found = []
    for part in split(match[1]):
        parameter, _, default = part.partition(" = ")
        found.append((parameter.split(":")[0].strip(), default or None))
    return found


def stubbed(node: ast.FunctionDef) -> list[tuple[str, str | None]]:
    arguments = node.args
    positional = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [(name, None if d is None else ast.unparse(d)) for name, d in zip(positional, defaults, strict=True)]
    if arguments.kwonlyargs:
        found.append(("*", None))
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            found.append((argument.arg, None if default is None else ast.unparse(default)))
    return found


def assert_same(in_module: list[tuple[str, str | None]], in_stub: list[tuple[str, str | None]]) -> None:
    if in_module and in_module[0][0] == "self":
        in_module, in_stub = in_module[1:], in_stub[1:]
    # What a lambda without names shows; such parameters cannot be given by name anyway.
    assert [name for name, _ in in_module] == [name for name, _ in in_stub]
    for (name, actual), (_, written) in zip(in_module, in_stub, strict=True):
        assert (actual is None) == (written is None), f"{name} has a default on one side only"
        if written is not None and written != "...":
            assert ast.literal_eval(str(actual)) == ast.literal_eval(written), name


def test_names() -> None:
    assert public(dir(_core)) == public(CLASSES) | set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name: str) -> None:
    assert_same(documented(getattr(_core, name), name), stubbed(FUNCTIONS[name]))


@pytest.mark.parametrize("name", sorted(public(CLASSES)))
def test_classes(name: str) -> None:
    cls, stub = getattr(_core, name), members(CLASSES[name])
    bases = [base.id for base in CLASSES[name].bases if isinstance(base, ast.Name) and base.id in CLASSES]
    assert [base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__] == bases
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_")}
    assert set(own) == public(stub)
    for key, value in own.items():
        assert isinstance(value, property) == is_property(stub[key]), key
        if not isinstance(value, property):
            assert_same(documented(value, key), stubbed(stub[key]))
    assert ("__len__" in vars(cls)) == ("__len__" in stub)
    if "__init__" in stub:
        assert_same(documented(cls.__init__, "__init__"), stubbed(stub["__init__"]))
    else:
        with pytest.raises(TypeError, match="No constructor defined"):
            cls()


@pytest.mark.parametrize("name", sorted(public(CLASSES)))
def test_buffers(name: str) -> None:
    stub = CLASSES[name]
    says = any(isinstance(base, ast.Name) and base.id == "Buffer" for base in stub.bases)
    assert says == ("__buffer__" in members(stub))
    if name == "HostArena":
        assert memoryview(_core.HostArena(3)).nbytes == 3
        assert says


def test_counters_have_the_keys_that_the_stub_names() -> None:
    node = CLASSES["_Counters"]
    written = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    layout = _core.StoreLayout([], 0, False, b"")
    plan = _core.plan_into_arenas(_core.TensorIndex(), layout, [], _core.PlanLimits())
    transport = _core.PythonTransport(lambda key, offset, buffer: 0, 1)
    operation = _core.LoadOperation(transport, layout, plan, [])
    operation.start()
    assert operation.wait_for(10)
    assert set(operation.counters()) == written


def test_bytes_that_do_not_lie_one_after_the_other_are_refused() -> None:
    backwards = memoryview(b"{}" * 100)[::-1]
    index = _core.TensorIndex()
    for refused in (
        lambda: index.add_file(0, "a", 1000, backwards),
        lambda: index.add_single(0, "a", 1000, backwards, "a", "b"),
        lambda: _core.files_of_weight_map(backwards),
        lambda: _core.StoreLayout([], 4, True, backwards),
        lambda: _core.MemoryTransport(threads=1).put("a", backwards),
    ):
        with pytest.raises(BufferError):
            refused()
    assert len(index) == 0
