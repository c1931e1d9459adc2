"""The parser of the whole command line, put together from one module per group of commands."""

from __future__ import annotations

import argparse
import difflib

from rdmaload import __version__
from rdmaload.cli import bench, doctor, listing, removal, serving, sharding, transfer
from rdmaload.cli.arguments import Commands, Parser, add_verbosity, options_manual
from rdmaload.cli.exits import UsageError

__all__ = ["make_parser"]

_DESCRIPTION = """\
Saves model weights into stores and loads them back, natively and verified.

A URL is a model in a store: redis://[user:pass@]host[:6379]/model (rediss://
over TLS), valkey:// (valkeys://) likewise, redis+unix:///path.sock?model=MODEL,
s3://bucket/model (gs://, az:// likewise), https://host/model,
hf://organisation/model, or a directory. A password is better given by
-o password_file=PATH or -o password_env=NAME than in a url, which every user of
the machine can see among the processes."""

_EPILOG = """\
options for -o and for the url's query, with their defaults (TEXT has none):
{options}

exit codes:
  0 done                 4 data mismatch              8 unsupported
  1 other                5 authentication             130 interrupted
  2 usage                6 unreachable, full or timed out
  3 not found            7 layout or identity

examples:
  rdmaload save /models/llama redis://10.0.0.5/llama
  rdmaload load redis://10.0.0.5/llama --against /models/llama
  rdmaload doctor redis://10.0.0.5"""


class _ListOfCommands(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest command: argparse forgets that commands are indented deeper than options."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


class _Whole(Parser):
    def format_help(self) -> str:
        self.epilog = _EPILOG.format(options=options_manual())  # here: no other command need wait for it
        return super().format_help()


def make_parser() -> Parser:
    """A new parser; its result has `run`, the function of the command."""
    parser = _Whole(prog="rdmaload", description=_DESCRIPTION, formatter_class=_ListOfCommands)
    parser.add_argument("--version", action="version", version=f"rdmaload {__version__}")
    # Set by every command, but also read when parsing has not come that far.
    parser.set_defaults(json=False)
    add_verbosity(parser)
    commands = parser.add_subparsers(
        metavar="COMMAND", dest="command", required=True, parser_class=Parser, title="commands"
    )
    for group in (transfer, listing, removal, doctor, bench, serving, sharding):
        group.register(commands)
    _add_help(commands)
    return parser


def _add_help(commands: Commands) -> None:
    # No `add_command`: this one has neither a store's options nor anything to report.
    command = commands.add_parser(
        "help",
        help="show the manual of a command",
        description="Show what `rdmaload COMMAND --help` shows; without one, all commands.",
        epilog="examples:\n  rdmaload help\n  rdmaload help bench",
    )
    command.add_argument("topic", metavar="COMMAND", nargs="?", help="the command to explain")
    command.set_defaults(run=lambda args: _help(commands, args.topic), quiet=False, debug=False)


def _help(commands: Commands, topic: str | None) -> int:
    if topic is None:
        make_parser().print_help()
        return 0
    if topic not in commands.choices:
        near = difflib.get_close_matches(topic, commands.choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands.choices)}"
        raise UsageError(f"no command {topic}: {hint}")
    commands.choices[topic].print_help()
    return 0
