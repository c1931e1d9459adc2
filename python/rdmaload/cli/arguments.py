"""Arguments that several commands share, and a parser that reports errors our way.

An argument may hold a password, and argparse quotes what it refuses: messages go through
`redact_arguments` before they are shown.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from rdmaload.cli.exits import MEANINGS, UsageError
from rdmaload.errors import NotSupportedError, UrlError
from rdmaload.options import Options, parse_size, takes_none
from rdmaload.urls import SECRET_TEXT, is_secret_option, parse_url, redact

__all__ = [
    "ENVIRONMENT",
    "Commands",
    "Parser",
    "add_command",
    "add_patterns",
    "add_url",
    "add_verbosity",
    "option_names",
    "options_manual",
    "options_of",
    "picture_file",
    "redact_arguments",
    "seconds",
    "size",
    "whole_number",
]

_OPTION = re.compile(r"((?:-o|--)?([A-Za-z_][A-Za-z0-9_-]*)=).+", re.DOTALL)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", re.ASCII)
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_HELP_COLUMNS = 79  # what argparse leaves alone, we wrap for the narrowest terminal

_PRINTS = "Progress, warnings and errors, one line each, go to stderr; with --json a failure is a document, too."
ENVIRONMENT = (
    "The variable that -o password_env=NAME (or the url's query) names holds the password. COLUMNS is the width of "
    "this text. rdmaload itself reads nothing else, but what it uses does: for TLS without ca_file and ca_dir OpenSSL "
    "takes authorities from SSL_CERT_FILE and SSL_CERT_DIR, and for s3:// boto3 reads its own (AWS_ACCESS_KEY_ID, "
    "AWS_PROFILE, AWS_CA_BUNDLE ...) and HTTP_PROXY, HTTPS_PROXY and NO_PROXY; http servers, hubs and clouds are asked "
    "through the same proxies, hf:// by HF_ENDPOINT and HF_TOKEN, gs:// and az:// by what obstore reads (GOOGLE_..., "
    "AZURE_...)."
)

_URL_HELP = (
    "the model: redis://[user:pass@]host[:6379]/model (rediss:// over TLS), valkey:// (valkeys://) likewise, "
    "redis+unix:///path.sock?model=MODEL, s3://bucket/model (gs://, az:// likewise), https://host/model, "
    "hf://organisation/model, what fsspec knows (sftp:// ...), or a directory"
)


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints a page of usage and exits."""

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def redact_arguments(message: str, arguments: Sequence[str]) -> str:
    """`message` with the secrets of every argument that it quotes replaced by "***"."""
    # Longest first: an argument may be the start of another.
    for argument in sorted(set(arguments), key=len, reverse=True):
        safe = _redacted(argument)
        if safe != argument:
            message = message.replace(argument, safe).replace(repr(argument)[1:-1], safe)
    return message


def _redacted(argument: str) -> str:
    matched = _OPTION.fullmatch(argument)
    if matched and is_secret_option(matched.group(2)):
        return matched.group(1) + SECRET_TEXT
    start = matched.group(1) if matched else ""
    url = argument.removeprefix(start)
    if "://" not in url:
        return argument
    try:
        return start + parse_url(url, require_model=False).redacted
    except UrlError:  # which part of it is a user cannot be told
        return start + redact(url)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    prints: str,
    examples: Sequence[str],
    exits: Mapping[int, str] = MEANINGS,
    environment: str = ENVIRONMENT,
) -> Parser:
    """A command with the options that all of them have, and help that is complete as a manual page.

    `prints` says what goes to stdout. `exits` adds to, or replaces, what the exit codes mean; `environment` says
    what else the command reads.
    """
    command = commands.add_parser(name, help=help, description=_filled(description))
    command.epilog = _sections(prints, {**MEANINGS, **exits}, examples, environment)
    command.add_argument(
        "-o",
        dest="option_texts",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option such as connections=4 or bytes_in_flight=64MiB, the same as in the url's "
        "query; may be repeated; `rdmaload --help` lists them",
    )
    command.add_argument(
        "--json",
        nargs="?",
        const=True,
        default=False,
        type=_json_target,
        metavar="FILE.json",
        help="print one JSON document with exact numbers, or write it to FILE.json beside what is printed",
    )
    add_verbosity(command, default=argparse.SUPPRESS)
    command.set_defaults(run=run)
    return command


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _HELP_COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _sections(prints: str, exits: Mapping[int, str], examples: Sequence[str], environment: str) -> str:
    codes = [
        textwrap.fill(meaning, _HELP_COLUMNS, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
        for code, meaning in exits.items()
    ]
    sections = {
        "prints": _filled(f"{prints} {_PRINTS}", "  "),
        "exit codes": "\n".join(codes),
        "environment": _filled(environment, "  "),
        "examples": "\n".join(f"  {example}" for example in examples),
    }
    return "\n\n".join(f"{title}:\n{text}" for title, text in sections.items())


def with_json_joined(arguments: Sequence[str]) -> list[str]:
    """`arguments` with what belongs to --json in one word: argparse would take any word that follows it for a file.

    >>> with_json_joined(["load", "--json", "redis://h/m"]), with_json_joined(["--json", "out.json"])
    (['load', '--json=-', 'redis://h/m'], ['--json=out.json'])
    """
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--json=-" and argument.endswith(".json") and not argument.startswith("-"):
            joined[-1] = f"--json={argument}"
        else:
            joined.append("--json=-" if argument == "--json" and "--" not in joined else argument)
    return joined


def _json_target(text: str) -> bool | str:
    return True if text == "-" else _output_file(text)


def picture_file(*suffixes: str) -> Callable[[str], str]:
    """The type of arguments that name a picture to write: what is known before the work is refused before it."""

    def checked(text: str) -> str:
        if not text.lower().endswith(suffixes):
            raise argparse.ArgumentTypeError(f"{text!r} is no file that ends in {', '.join(suffixes)}")
        if text.lower().endswith(".png") and importlib.util.find_spec("matplotlib") is None:
            raise NotSupportedError(f"{text}: pictures as .png need matplotlib: pip install matplotlib")
        return _output_file(text)

    return checked


def _output_file(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: no permission")
    return text


def add_verbosity(parser: argparse.ArgumentParser, *, default: object = False) -> None:
    """--quiet and --debug, before the command's name as well as after it."""
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=default,
        help="no progress bar and no warnings; errors only",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=default,
        help="show what happens, and the traceback of an error",
    )


def add_url(command: argparse.ArgumentParser, help: str = _URL_HELP) -> None:
    command.add_argument("url", metavar="URL", help=help)


def add_patterns(command: argparse.ArgumentParser, noun: str, example: str) -> None:
    """--include and --exclude, which may be repeated."""
    for name, text in (("include", "only"), ("exclude", "not")):
        command.add_argument(
            f"--{name}",
            metavar="PATTERN",
            action="append",
            help=f"{text} the {noun} that match, such as {example}; case counts; may be repeated",
        )


def option_names() -> dict[str, object]:
    """The names of all options with their defaults."""
    return {option.name: option.default for option in fields(Options)}


def options_manual() -> str:
    """Every option as -o takes it, with its default and what it is for.

    The text is that of the fields' docstrings, read from the source: Python keeps none for fields.
    """
    try:
        tree = ast.parse(inspect.getsource(Options)).body[0]
    except OSError:  # installed without sources
        tree = ast.Pass()
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    meaning = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            meaning[node.target.id] = str(ast.literal_eval(after.value))
    lines = []
    for option in fields(Options):
        lines.append(f"  {option.name}={_default_text(option)}")
        text = meaning.get(option.name, "").replace("`", "").replace("None = ", "unless given, ")
        text = re.sub(r"\b(True|False)\b", lambda found: found[0].lower(), text)
        lines += [_filled(text, " " * 6)] if text else []
    return "\n".join(lines)


def _default_text(option: Field[Any]) -> str:
    """A default as it may be written after "=", or TEXT where there is none to write."""
    value: Any = option.default
    if value is None:
        return "none" if takes_none(option.name) else "TEXT"
    if isinstance(value, bool):
        return str(value).lower()
    if option.name.endswith("_bytes") and value % 2**20 == 0:
        return f"{value // 2**20}MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """The options that `-o` gave, as keywords; their values are checked where the url is opened."""
    given: dict[str, object] = {}
    known = option_names()
    for text in args.option_texts:
        name, equals, value = text.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise UsageError(f"unknown option {name}: {hint}")
        if not equals:
            raise UsageError(f"-o {name} has no value; write -o {name}=VALUE")
        if name in given:
            raise UsageError(f"-o {name} is given twice; keep one")
        given[name] = value
    return given


def size(text: str) -> int:
    """The type of arguments that are bytes."""
    try:
        value = parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1 byte")
    return value


def seconds(text: str) -> float:
    """The type of arguments that are durations: "90", "90s", "10m", "1.5h", "7d"."""
    matched = _DURATION.fullmatch(text)
    if matched is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90, 90s, 10m, 1.5h or 7d")
    return float(matched.group(1)) * _UNIT_SECONDS[matched.group(2)]


def whole_number(text: str) -> int:
    """The type of arguments that count from 0."""
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)
