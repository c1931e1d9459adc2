"""Which ranks run on one node: those that could reach each other, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdmaload.integrations.places import place


def _elsewhere() -> str:
    code = "from rdmaload.integrations.places import place; print(place())"
    return subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).strip()


def test_two_processes_of_one_machine_are_in_one_place() -> None:
    assert _elsewhere() == place()


def test_another_kernel_namespace_or_user_is_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place()]
    for owner, name, other in (
        (Path, "read_text", lambda *_: "another kernel\n"),
        (os, "readlink", lambda *_: "net:[1]"),
        (os, "getuid", lambda: 12345),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, other)
            places.append(place())
    assert len(set(places)) == len(places)


def test_where_nothing_tells_every_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object) -> str:
        raise PermissionError(13, "a sandbox")

    monkeypatch.setattr(os, "readlink", hidden)
    alone = place()
    assert place() == alone
    code = "import os; os.readlink = lambda path: open('/not/there'); "
    code += "from rdmaload.integrations.places import place; print(place())"
    other = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).strip()
    assert other != alone
