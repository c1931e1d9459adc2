"""Manual pages from the command line's own parser: `scripts/man.py DIRECTORY` writes rdmaload.1 and one per command."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rdmaload import __version__
from rdmaload.cli.parser import make_parser

_SECTIONS = {"prints": "OUTPUT", "exit codes": "EXIT STATUS", "environment": "ENVIRONMENT", "examples": "EXAMPLES"}


def _escaped(text: str) -> str:
    """Text that roff takes literally: backslashes and hyphens, and dots and quotes that begin a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(prog=parser.prog, width=70)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return " ".join(formatter.format_help().split())


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """What is written for each argument, and its help."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield choice.dest, choice.help or ""
        elif action.help != argparse.SUPPRESS:
            yield formatter._format_action_invocation(action), formatter._expand_help(action)


def page(parser: argparse.ArgumentParser, help: str) -> str:
    """The page of one command in roff; `help` is its line in the list of commands."""
    name = parser.prog.replace(" ", "-")
    lines = [f'.TH {name.upper()} 1 "" "rdmaload {__version__}" "User Commands"']
    lines += [".SH NAME", f"{_escaped(name)} \\- {_escaped(help)}"]
    lines += [".SH SYNOPSIS", _escaped(_usage(parser))]
    lines += [".SH DESCRIPTION", _escaped(parser.description or "")]
    lines.append(".SH OPTIONS")
    for written, text in _arguments(parser):
        lines += [".TP", f"\\fB{_escaped(written)}\\fR", _escaped(text)]
    for title, text in re.findall(r"^(\S[^\n]*):\n((?:  [^\n]*\n?)+)", f"{parser.epilog}\n", re.MULTILINE):
        # As it stands: these are tables and commands, whose line breaks matter.
        lines += [f".SH {_SECTIONS.get(title, title.upper())}", ".nf", _escaped(text.rstrip("\n")), ".fi"]
    if name != "rdmaload":
        lines += [".SH SEE ALSO", "rdmaload(1)"]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """Names of files and their content."""
    parser = make_parser()
    parser.format_help()  # which makes the list of options
    yield "rdmaload.1", page(parser, "save model weights into stores and load them back")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            help_of = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield f"rdmaload-{name}.1", page(command, help_of[name])


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (directory / name).write_text(text)
        print(directory / name)


if __name__ == "__main__":
    main()
