"""rm and prune: the commands that remove something."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.arguments import Commands, add_command, add_url, options_of, seconds
from rdmaload.cli.exits import OTHER, UsageError
from rdmaload.cli.output import printable, write_error, write_result

if TYPE_CHECKING:
    from rdmaload.connectors.objects import ObjectConnector

__all__ = ["register"]


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    rm = add_command(
        commands,
        "rm",
        _rm,
        help="remove a model",
        description="Remove a model that was saved here, with everything that saves left of it. "
        "Asks first; where nobody can answer, --yes is needed.",
        prints="How many keys were removed; with --json url and keys.",
        examples=["rdmaload rm redis://10.0.0.5/llama", "rdmaload rm --yes redis://10.0.0.5/llama"],
    )
    add_url(rm)
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    prune = add_command(
        commands,
        "prune",
        _prune,
        help="remove what no reader needs: replaced generations, dead saves",
        description="Remove replaced generations of a model and what dead saves left. The "
        "published generation and saves that are alive always stay.",
        prints="What was removed and what was kept, with bytes; with --json the same by name.",
        examples=[
            "rdmaload prune redis://10.0.0.5/llama",
            "rdmaload prune redis://10.0.0.5/llama --grace 10m",
            "rdmaload prune redis://10.0.0.5/llama --force",
        ],
    )
    add_url(prune)
    prune.add_argument(
        "--force",
        action="store_true",
        help="do not wait: loads of a replaced generation that still run will fail",
    )
    prune.add_argument(
        "--grace",
        type=seconds,
        default=3600.0,
        metavar="TIME",
        help="how long a replaced generation stays for its readers: 90, 90s, 10m, 1h (default), 7d",
    )


def _rm(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.urls import parse_url

    shown = parse_url(args.url).redacted
    opts = options_of(args)
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it removes, and stdin is no terminal: give --yes")
        if not _confirmed(f"remove {shown} ({_what_is_there(args.url, opts)})?"):
            write_error("nothing was removed")
            return OTHER
    keys = rdmaload.remove(args.url, **opts)  # type: ignore[arg-type]
    document = {"url": shown, "keys": keys}
    write_result(args.json, document, [f"removed {shown}: {count_text(keys, 'key')}"])
    return 0


def _what_is_there(url: str, opts: dict[str, object]) -> str:
    from rdmaload._prune import nothing_to_remove
    from rdmaload.connectors import KeyValueConnector, connector_for
    from rdmaload.connectors.objects import ObjectConnector
    from rdmaload.errors import FormatError, IntegrityError
    from rdmaload.sglang_layout import layout_keys
    from rdmaload.sources import read_manifest

    with connector_for(url, **opts) as connector:  # type: ignore[arg-type]
        if isinstance(connector, ObjectConnector):
            return _what_objects(connector)
        if not isinstance(connector, KeyValueConnector):
            raise nothing_to_remove(connector)
        try:
            manifest = read_manifest(connector)
        except (FormatError, IntegrityError):
            return "its manifest is damaged"
        keys = layout_keys(connector) if manifest is None else []
    if keys:
        return f"{count_text(len(keys), 'value')} in SGLang's layout"
    if manifest is None:
        return "not published; what saves left"
    return f"{count_text(manifest.files, 'file')}, {size_text(manifest.bytes)}"


def _what_objects(connector: ObjectConnector) -> str:
    from rdmaload.file_manifest import FILE_MANIFEST
    from rdmaload.manifest import Manifest

    value = connector.read_small(FILE_MANIFEST)
    if value is None:
        return "not published; what saves left"
    manifest = Manifest.decode(value, url=connector.url, key=FILE_MANIFEST)
    return f"{count_text(manifest.files, 'file')}, {size_text(manifest.bytes)}"


def _confirmed(question: str) -> bool:
    sys.stderr.write(f"{printable(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _prune(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.urls import parse_url

    shown = parse_url(args.url).redacted
    stats = rdmaload.prune(
        args.url,
        force=args.force,
        grace=args.grace,
        **options_of(args),  # type: ignore[arg-type]
    )
    lines = [
        f"pruned {shown}: {count_text(stats.generations, 'generation')}, "
        f"{count_text(stats.saves, 'dead save')}, {count_text(stats.keys, 'key')}"
    ]
    if stats.waiting:
        lines.append(
            f"  {count_text(stats.waiting, 'generation')} may still have readers: prune again "
            "later, or now with --force"
        )
    write_result(args.json, {"url": shown, **stats.to_json()}, lines)
    return 0
