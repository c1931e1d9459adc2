"""doctor: what this machine, this installation and a store give, and what would be better."""

from __future__ import annotations

import argparse

from rdmaload.cli.arguments import Commands, add_command, options_of
from rdmaload.cli.exits import UsageError, exit_code
from rdmaload.cli.output import write_result

__all__ = ["register"]


def register(commands: Commands) -> None:
    """Add the command of this module."""
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        help="check this machine, this installation and a store",
        description="Check what speed and reliability depend on: versions, processor, memory, "
        "limits and network of this machine; with a url also whether the store answers, how far it "
        "is and whether it has room. Each line is ok, warn or fail, and says what to do.",
        prints="One line per check: ok, warn or fail, name, value, and what to do; with --json url, ok (true when "
        "no check failed, as exit code 0 says), warnings (how many there are) and checks (name, status, value, "
        "advice).",
        exits={
            0: "no check failed; there may be warnings",
            1: "a check of this machine or of the store failed",
        },
        examples=["rdmaload doctor", "rdmaload doctor redis://10.0.0.5", "rdmaload doctor --json"],
    )
    doctor.add_argument("url", metavar="URL", nargs="?", help="a store, or a model in it, to check as well")


def _doctor(args: argparse.Namespace) -> int:
    from rdmaload.cli.checks import Check
    from rdmaload.cli.host_checks import host_checks
    from rdmaload.cli.store_checks import store_checks
    from rdmaload.errors import RdmaloadError, UrlError
    from rdmaload.urls import parse_url

    opts = options_of(args)
    if args.url is None and opts:
        raise UsageError("-o is for a store: give its url, too")
    shown = None if args.url is None else parse_url(args.url, require_model=False).redacted
    checks = list(host_checks())
    code = 0
    if args.url is not None:
        try:
            for check in store_checks(args.url, opts):
                checks.append(check)
        except UrlError:
            raise
        except RdmaloadError as err:  # the rest of the report is worth having all the more
            checks.append(Check("store", "fail", str(err)))
            code = exit_code(err)
    if code == 0 and any(check.status == "fail" for check in checks):
        code = 1
    document = {
        "url": shown,
        "ok": code == 0,
        "warnings": sum(check.status == "warn" for check in checks),
        "checks": [check.to_json() for check in checks],
    }
    write_result(args.json, document, [check.line() for check in checks])
    return code
