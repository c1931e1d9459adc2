"""The help of every command: complete, 80 columns wide, with examples that parse; and the manual pages."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rdmaload.cli import exits, main
from rdmaload.cli.arguments import options_of
from rdmaload.cli.parser import make_parser
from rdmaload.options import Options
from rdmaload.urls import parse_url

ROOT = Path(__file__).resolve().parents[2]


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("there are no commands")


COMMANDS = sorted(commands())
REPORTING = sorted(set(COMMANDS) - {"help"})


def help_of(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    return commands()[name].format_help()


def section(text: str, title: str) -> list[str]:
    found = re.search(rf"^{title}:\n((?:  [^\n]*\n?)+)", text, re.MULTILINE)
    assert found is not None, f"no section {title}"
    return [line.strip() for line in found[1].splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_into_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(name, monkeypatch)
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_the_list_of_commands_fits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = make_parser().format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\S", text, re.MULTILINE), name


@pytest.mark.parametrize("name", REPORTING)
def test_help_is_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(name, monkeypatch)
    assert text.startswith(f"usage: rdmaload {name} ")
    assert len(commands()[name].description or "") > 60
    for title in ("prints", "environment", "examples"):
        assert section(text, title)
    codes = {int(line.split()[0]) for line in section(text, "exit codes") if line.split()[0].isdecimal()}
    assert codes == {0, exits.INTERRUPTED} | {code for _, code in exits._CODES}
    for action in commands()[name]._actions:
        assert action.help, f"{name} {action.dest} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = section(help_of(name, monkeypatch), "examples")
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["rdmaload", name]
        args = make_parser().parse_args(words[1:])
        if name != "help":
            options_of(args)  # refuses unknown names
        url = getattr(args, "url", None)
        if url is not None:
            assert parse_url(url, require_model=False).scheme in ("redis", "rediss", "valkey", "file", "rdma")


def test_the_examples_of_the_whole_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = make_parser().format_help()
    for example in section(text, "examples"):
        make_parser().parse_args(shlex.split(example)[1:])
    codes = re.findall(r"(\d+) (?:done|other|usage|not|data|auth|unreach|layout|unsup|interr)", text)
    assert {int(code) for code in codes} == set(exits.MEANINGS)


def test_every_option_is_explained_with_a_default_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = make_parser().format_help()
    found = re.findall(r"^  (\w+)=(\S+)\n((?:      \S.*\n)+)", text, re.MULTILINE)
    assert [name for name, _, _ in found] == [option.name for option in fields(Options)]
    for name, default, meaning in found:
        assert len(meaning.strip()) > 10, name
        assert not re.search(r"\b(None|True|False)\b|`", meaning), name
        if default == "TEXT":
            assert getattr(Options(), name) is None
            continue
        url = parse_url(f"redis://h/m?{name}={default}")
        assert getattr(Options.resolve(url), name) == getattr(Options(), name), name
    assert "1 to a server on this machine, else 4" in " ".join(text.split())


def test_help_without_sources_still_lists_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", refuse)
    assert "\n  connections=none\n  bytes_in_flight=none\n" in make_parser().format_help()


@pytest.mark.parametrize("name", REPORTING)
def test_help_says_which_variables_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = " ".join(section(help_of(name, monkeypatch), "environment"))
    if name == "serve":  # it opens no url
        assert "XDG_CACHE_HOME" in read
        assert "COLUMNS" in read
        return
    for variable in ("password_env", "COLUMNS", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_PROFILE", "HTTPS_PROXY"):
        assert variable in read


def test_help_shows_every_kind_of_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (make_parser().format_help(), help_of("load", monkeypatch)):
        for scheme in ("redis://", "rediss://", "valkey://", "valkeys://", "redis+unix://", "s3://", "directory"):
            assert scheme in text


def test_help_shows_what_the_option_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for topic, arguments in (("bench", ["bench", "--help"]), (None, ["--help"])):
        assert main(["help"] if topic is None else ["help", topic]) == 0
        shown = capsys.readouterr().out
        assert main(arguments) == 0
        assert capsys.readouterr().out == shown
    assert main(["help", "lode"]) == 2
    assert capsys.readouterr().err == "rdmaload: no command lode: did you mean load?\n"


def test_manual_pages_say_what_the_help_says(tmp_path: Path) -> None:
    made = subprocess.run(
        [str(ROOT / "scripts" / "man"), str(tmp_path)],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    pages = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(pages) == {"rdmaload.1"} | {f"rdmaload-{name}.1" for name in COMMANDS}
    assert "verify_tls=true" in pages["rdmaload.1"]
    for name, page in pages.items():
        for line in page.splitlines():
            # A line that begins with a dot is a request; any other one would swallow the text after it.
            assert not line.startswith("'"), (name, line)
            assert not line.startswith(".") or re.match(r"\.(TH|SH|TP|nf|fi)\b", line), (name, line)
    for command in REPORTING:
        page = pages[f"rdmaload-{command}.1"]
        sections = re.findall(r"^\.SH (.*)$", page, re.MULTILINE)
        assert sections == [
            *("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "OUTPUT"),
            *("EXIT STATUS", "ENVIRONMENT", "EXAMPLES", "SEE ALSO"),
        ]
        assert f"rdmaload {command} ".replace("-", "\\-") in page
        assert "\\-\\-json" in page
