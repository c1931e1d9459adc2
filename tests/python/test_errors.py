"""The exception tree: what each class is besides, and that messages survive pickling."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest

from rdmaload import errors

BUILTINS: dict[str, tuple[type[BaseException], ...]] = {
    "UrlError": (ValueError,),
    "AuthenticationError": (PermissionError,),
    "NotFoundError": (LookupError, FileNotFoundError),
    "UnavailableError": (ConnectionError,),
    "LoadTimeoutError": (TimeoutError,),
    "IntegrityError": (ValueError,),
    "FormatError": (ValueError,),
    "LayoutMismatchError": (ValueError,),
    "StaleGenerationError": (LookupError,),
    "PartialLoadError": (RuntimeError,),
    "NotSupportedError": (NotImplementedError,),
    "DeviceError": (RuntimeError,),
    "AlreadyExistsError": (FileExistsError,),
    "MemoryLimitError": (MemoryError,),
}


def test_every_class_is_covered_here_and_drawn_in_the_docstring() -> None:
    assert set(errors.__all__) == {"RdmaloadError", *BUILTINS}
    drawn = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    assert drawn[0] == "    RdmaloadError"
    for line, name in zip(drawn[1:], BUILTINS, strict=True):
        mark = "└──" if line is drawn[-1] else "├──"
        builtins = ", ".join(builtin.__name__ for builtin in BUILTINS[name])
        assert re.fullmatch(rf"    {mark} {name} +\({builtins}\) +\w.*", line), line


@pytest.mark.parametrize("name", BUILTINS)
def test_each_is_ours_and_the_builtin_of_its_meaning(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, (errors.RdmaloadError,))
    assert all(issubclass(cls, base) for base in BUILTINS[name])
    with pytest.raises(BUILTINS[name], match="plain message"):
        raise cls("plain message")


@pytest.mark.parametrize("name", errors.__all__)
def test_message_and_attributes_survive_pickling(name: str) -> None:
    error = getattr(errors, name)("what to do: x", url="redis://h/m", key="m/manifest")
    error.add_note("while testing") if hasattr(error, "add_note") else None
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what to do: x"
    assert copy.args == ("what to do: x",)
    assert (copy.url, copy.key) == ("redis://h/m", "m/manifest")
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("name", errors.__all__)
def test_url_and_key_are_none_by_default_and_the_message_is_the_text(name: str) -> None:
    error = getattr(errors, name)("message")
    assert (str(error), error.url, error.key) == ("message", None, None)
    assert str(getattr(errors, name)()) == ""


def test_partial_load_carries_what_was_loaded() -> None:
    error = errors.PartialLoadError("half", loaded=["a", "b"], url="u")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.loaded == ["a", "b"]
    assert copy.url == "u"
    assert errors.PartialLoadError("none").loaded == []


def test_the_foundation_imports_no_client_library() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['rdmaload._core'] = stand_in = types.ModuleType('rdmaload._core')\n"
        "stand_in.crc32c = None\n"
        "import rdmaload.errors, rdmaload.stats, rdmaload.urls, rdmaload.options\n"
        "import rdmaload.weights, rdmaload.index, rdmaload.manifest, rdmaload.connectors\n"
        "rdmaload.connectors.connector_for('memory://a/b').close()\n"
        "rdmaload.connectors.connector_for('/tmp').close()\n"
        "heavy = {'torch', 'redis', 'boto3', 'tqdm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
