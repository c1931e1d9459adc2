"""The command line: `rdmaload save | load | ls | info | pull | verify | rm | prune | doctor | bench | serve | ...`.

Results go to stdout, everything else (questions, progress, warnings, one line per error) to stderr.
With --json stdout is one JSON document and nothing else; that of a failure is
`{"error": {"type", "message", "url", "key", "exit_code"}}`. With `--json FILE.json` the document goes there, and
the lines for people to stdout; a failure writes no file. Exit codes:

    0    done
    1    anything that no other code says: it exists already, memory, device, a "no" to a question
    2    usage: a wrong argument, url or option
    3    not found: no such model, file or key; a chunk that is gone; a pinned generation that is
         gone (open the new one)
    4    data mismatch: a checksum, a format, or tensors that differ from the files (`--against`)
    5    authentication: wrong or missing credentials, or no permission
    6    unreachable, full (the store's memory or disk), or timed out
    7    layout or identity: saved for other ranks, or for another engine
    8    unsupported: by this release, this installation or this store
    130  interrupted

Nothing heavy is imported before a command needs it: `--help` and `--version` do not import torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from rdmaload.cli.arguments import Parser, redact_arguments, with_json_joined
from rdmaload.cli.exits import INTERRUPTED, OTHER, describe, exit_code
from rdmaload.cli.output import write_error, write_json
from rdmaload.cli.parser import make_parser
from rdmaload.cli.progress import logging_to_stderr

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. `argv` is what follows the program's name."""
    arguments = with_json_joined(sys.argv[1:] if argv is None else argv)
    parser: Parser = make_parser()
    # Asked for before the parser has understood the rest, which may be what is wrong.
    debug, json = "--debug" in arguments, "--json=-" in arguments
    try:
        args = parser.parse_args(arguments)
        with logging_to_stderr(quiet=args.quiet, debug=args.debug):
            code: int = args.run(args)
            sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        # Whoever read stdout has had enough. The interpreter flushes it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OTHER
    except KeyboardInterrupt:
        _fail("interrupted", {"type": "KeyboardInterrupt", "exit_code": INTERRUPTED}, json)
        return INTERRUPTED
    except Exception as err:  # the edge: whatever it is, the user gets one line and a code
        if debug:
            sys.stderr.write(redact_arguments(traceback.format_exc(), arguments))
        code = exit_code(err)
        message = redact_arguments(describe(err), arguments)
        details = {
            "type": type(err).__name__,
            "url": getattr(err, "url", None),
            "key": getattr(err, "key", None),
            "exit_code": code,
        }
        _fail(message, details, json)
        return code


def _fail(message: str, details: dict[str, object], json: bool) -> None:
    write_error(message)
    if json:
        write_json({"error": {"message": message, **details}})
