"""save, load, pull, verify: the commands that move a model's bytes."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rdmaload.amounts import amount_text, count_text, size_text
from rdmaload.cli.arguments import (
    Commands,
    add_command,
    add_patterns,
    add_url,
    options_of,
    picture_file,
    size,
    whole_number,
)
from rdmaload.cli.exits import UsageError
from rdmaload.cli.output import write_picture, write_result
from rdmaload.cli.progress import progress_bar

if TYPE_CHECKING:
    from rdmaload.stats import LoadStats

__all__ = ["import_torch", "register"]


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    _register_save(commands)
    _register_load(commands)
    _register_pull(commands)
    _register_verify(commands)


def _register_save(commands: Commands) -> None:
    save = add_command(
        commands,
        "save",
        _save,
        help="save a directory, or a model from another store",
        description="Save a model: a directory with safetensors files, or a model in another "
        "store, verified while it is copied. Readers see the old model or the new one, never a mix. A "
        "save that was interrupted goes on where it stopped when it is called again. Neither holds for --layout "
        "sglang, which has no generations: the old model is taken away before the new one comes, loads fail meanwhile "
        "(one that is under way may mix both), and a save that was interrupted starts anew.",
        prints="Files, bytes sent, speed, path and the new generation; with --json the fields of SaveStats (bytes, "
        "seconds, gb_per_s, stages, path, files, chunks, skipped_bytes, generation, save_id, published).",
        examples=[
            "rdmaload save /models/llama redis://10.0.0.5/llama",
            "rdmaload save redis://old-host/llama redis://new-host/llama",
            "rdmaload save ./0 redis://10.0.0.5/big --rank 0 --world-size 8 --save-id s900",
            "rdmaload save /models/llama redis://10.0.0.5/llama-sgl --layout sglang",
        ],
    )
    save.add_argument("source", metavar="SOURCE", help="a directory, or the url of a model")
    add_url(save)
    save.add_argument("--rank", type=whole_number, metavar="N", help="which rank of a sharded model this is")
    save.add_argument("--world-size", type=whole_number, metavar="N", help="how many ranks save together")
    save.add_argument(
        "--save-id",
        metavar="ID",
        help="a name that all ranks of one save share and no other save has, such as step-900",
    )
    save.add_argument(
        "--layout",
        choices=("rdmaload", "sglang"),
        default="rdmaload",
        help="sglang: values that SGLang's own Redis connector loads, without checksums (default: rdmaload)",
    )
    save.add_argument("--no-overwrite", action="store_true", help="fail when there is a model already")
    save.add_argument(
        "--chunk-bytes",
        type=size,
        metavar="SIZE",
        help="bytes per value in a key-value store (default: the source's, or 2^20 - 4096)",
    )


def _save(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.urls import parse_url

    _check_save(args)
    opts = options_of(args)
    if args.chunk_bytes is not None and "chunk_bytes" in opts:
        raise UsageError("--chunk-bytes and -o chunk_bytes say the same; keep one")
    shown = parse_url(args.url).redacted
    with progress_bar(args, "save") as progress:
        stats = rdmaload.save(
            args.source,
            args.url,
            rank=args.rank,
            world_size=args.world_size,
            save_id=args.save_id,
            layout=args.layout,
            overwrite=not args.no_overwrite,
            chunk_bytes=args.chunk_bytes,
            progress=progress,
            **opts,  # type: ignore[arg-type]  # names of Options only: see options_of
        )
    sent = stats.bytes - stats.skipped_bytes
    lines = [
        f"saved {count_text(stats.files, 'file' if args.layout == 'rdmaload' else 'value')} to {shown}",
        f"  sent       {amount_text(sent, stats.seconds)} by {stats.path}",
    ]
    if stats.skipped_bytes:
        lines.append(f"  skipped    {size_text(stats.skipped_bytes)} that were there already")
    if stats.generation is not None:
        lines.append(f"  generation {stats.generation}")
    if not stats.published:
        lines.append(
            "  not published yet: the last rank to finish does that; repeat the ranks that failed "
            f"with --save-id {stats.save_id}"
        )
    write_result(args.json, {"url": shown, **stats.to_json()}, lines)
    return 0


def _check_save(args: argparse.Namespace) -> None:
    """What `rdmaload.save` refuses too, in terms of the command line."""
    from rdmaload.journal import SAVE_ID
    from rdmaload.urls import parse_url

    if (args.rank is None) != (args.world_size is None):
        raise UsageError("--rank and --world-size go together")
    if args.rank is not None and args.rank >= args.world_size:
        raise UsageError(f"--rank {args.rank} is not one of 0 to {args.world_size - 1}")
    if args.rank is not None and parse_url(args.source).scheme != "file":
        raise UsageError("a model that is copied keeps its ranks: leave out --rank and --world-size")
    if args.layout == "sglang" and (args.save_id is not None or args.chunk_bytes is not None):
        raise UsageError("--layout sglang resumes nothing and has no chunks: leave out --save-id and --chunk-bytes")
    if args.layout == "rdmaload" and args.save_id is None and (args.world_size or 1) > 1:
        raise UsageError("several ranks need a --save-id that they share and no other save has")
    if args.save_id is not None and not SAVE_ID.fullmatch(args.save_id):
        raise UsageError(f"--save-id {args.save_id[:200]!r} is not 1 to 128 of A-Z a-z 0-9 . _ -")


def _register_load(commands: Commands) -> None:
    load = add_command(
        commands,
        "load",
        _load,
        help="load a model into memory, and say how fast that was",
        description="Load a model's tensors into host memory and report speed, path and what was "
        "verified; with --against also compare every byte with safetensors files. Nothing is kept.",
        prints="Tensors, bytes, speed, path, and what was verified; with --json url, tensors and the fields of "
        "LoadStats (bytes, seconds, gb_per_s, stages, path, connections, retries, verified_bytes, "
        "unverified_bytes, copied_bytes, read_bytes, generation, cached_bytes, device_verified_bytes), and "
        "compared_bytes with --against.",
        examples=[
            "rdmaload load redis://10.0.0.5/llama",
            "rdmaload load redis://10.0.0.5/llama --against /models/llama",
            "rdmaload load redis://10.0.0.5/llama --include '*.layers.0.*' --json",
            "rdmaload load redis://10.0.0.5/big --rank 3 -o connections=4",
            "rdmaload load redis://10.0.0.5/llama --timeline load.html",
        ],
    )
    add_url(load)
    load.add_argument("--rank", type=whole_number, metavar="N", help="the rank of a sharded model to load")
    add_patterns(load, "tensors", "'*.layers.0.*'")
    load.add_argument(
        "--against",
        metavar="DIR",
        help="compare names, dtypes, shapes and every byte with the safetensors files in DIR",
    )
    load.add_argument(
        "--timeline",
        type=picture_file(".html", ".png", ".json"),
        metavar="FILE",
        help="draw what each connection did when: .html (one file), .png (needs matplotlib) or .json",
    )


def _load(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.stats import LoadStats

    if args.against is not None and "://" in args.against:
        raise UsageError("--against takes a local directory")
    import_torch()
    stats = LoadStats()
    compared: int | None = None
    with rdmaload.open(args.url, **options_of(args)) as model:  # type: ignore[arg-type]
        timeline = None if args.timeline is None else model.record()
        with progress_bar(args, "load") as progress:
            tensors = model.load(
                rank=args.rank,
                include=args.include,
                exclude=args.exclude,
                stats=stats,
                progress=progress,
            )
        shown = model.url
        if args.against is not None:
            from rdmaload.cli.compare import compare_with_files

            with progress_bar(args, "compare") as progress:
                compared = compare_with_files(
                    tensors,
                    model.rank_tensors(args.rank),
                    args.against,
                    rank=args.rank,
                    include=args.include,
                    exclude=args.exclude,
                    progress=progress,
                )
    lines = [f"loaded {count_text(len(tensors), 'tensor')} from {shown}", *_stats_lines(stats)]
    document: dict[str, object] = {"url": shown, "tensors": len(tensors), **stats.to_json()}
    if timeline is not None:
        lines += [f"  timeline   {args.timeline}", *(f"    {line}" for line in timeline.summary())]
        document["timeline"] = {"file": args.timeline, "summary": timeline.summary()}
    if compared is not None:
        lines.append(f"  compared   {size_text(compared)}: equal to the files in {args.against}")
        document["compared_bytes"] = compared
    write_result(args.json, document, lines)
    return 0 if timeline is None else write_picture(lambda: timeline.write(args.timeline))


def import_torch() -> None:
    """Seconds that are no part of a load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that numpy is missing, which nothing here needs
        import torch  # noqa: F401


def _register_pull(commands: Commands) -> None:
    pull = add_command(
        commands,
        "pull",
        _pull,
        help="copy a model's files into a directory",
        description="Copy the files of a model into a directory, verified. Each file appears whole "
        "or not at all. Without options all files are copied.",
        prints="The directory, bytes, speed and what was verified; with --json url, directory and the fields of "
        "LoadStats.",
        examples=[
            "rdmaload pull redis://10.0.0.5/llama ./llama",
            "rdmaload pull redis://10.0.0.5/llama ./llama --no-weights",
            "rdmaload pull redis://10.0.0.5/llama cfg --include '*.json' --include 'tok*'",
        ],
    )
    add_url(pull)
    pull.add_argument("directory", metavar="DIR", help="where to; made when it does not exist")
    pull.add_argument(
        "--no-weights",
        action="store_true",
        help="leave out files with weights, in safetensors or any other format",
    )
    add_patterns(pull, "files", "'*.json'")


def _pull(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.stats import LoadStats
    from rdmaload.weights import WEIGHT_SUFFIXES

    if "://" in args.directory:
        raise UsageError("DIR is a local directory; `rdmaload save` copies between stores")
    ignored: list[str] = list(args.exclude or ())
    if args.no_weights:
        ignored += [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
    # No pattern at all means "all but weights" to pull_files, and is fine with finding nothing.
    allowed: Sequence[str] | None = args.include or (None if args.no_weights else ["*"])
    stats = LoadStats()
    with rdmaload.open(args.url, **options_of(args)) as model:  # type: ignore[arg-type]
        with progress_bar(args, "pull") as progress:
            directory = model.pull_files(
                args.directory,
                allow_pattern=allowed,
                ignore_pattern=ignored or None,
                stats=stats,
                progress=progress,
            )
        shown = model.url
    lines = [f"pulled {shown} into {directory}", *_stats_lines(stats)]
    document = {"url": shown, "directory": str(directory), **stats.to_json()}
    write_result(args.json, document, lines)
    return 0


def _register_verify(commands: Commands) -> None:
    verify = add_command(
        commands,
        "verify",
        _verify,
        help="read every chunk of a model and compare its checksum",
        description="Read every chunk of every file and compare its checksum; nothing is kept. "
        "The first chunk that is missing or differs is named. Bytes that have no checksum, as in a "
        "directory, are read and reported as not verified; with -o verify=require they are an "
        "error.",
        prints="Files, bytes, speed and what was verified; with --json url, files and the fields of LoadStats.",
        examples=[
            "rdmaload verify redis://10.0.0.5/llama",
            "rdmaload verify redis://10.0.0.5/llama --json",
        ],
    )
    add_url(verify)


def _verify(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.urls import parse_url

    opts = options_of(args)
    if "off" in (opts.get("verify"), parse_url(args.url).query.get("verify")):
        raise UsageError("verify=off leaves nothing to do; drop it")
    with rdmaload.open(args.url, **opts) as model:  # type: ignore[arg-type]
        with progress_bar(args, "verify") as progress:
            stats = model.verify(progress=progress)
        shown, files = model.url, len(model.files)
    word = "read" if stats.unverified_bytes else "verified"
    lines = [f"{word} {count_text(files, 'file')} of {shown}", *_stats_lines(stats)]
    write_result(args.json, {"url": shown, "files": files, **stats.to_json()}, lines)
    return 0


def _stats_lines(stats: LoadStats) -> list[str]:
    lines = [f"  read       {amount_text(stats.bytes, stats.seconds)} by {stats.path or 'nothing'}"]
    if stats.verified_bytes:
        lines.append(f"  verified   {size_text(stats.verified_bytes)} by CRC32C")
    if stats.unverified_bytes:
        lines.append(f"  unverified {size_text(stats.unverified_bytes)}: no checksum was compared")
    if stats.retries:
        lines.append(f"  retries    {stats.retries}")
    if stats.fallback_reason is not None:
        lines.append(f"  fallback   {stats.fallback_reason}")
    if stats.generation is not None:
        lines.append(f"  generation {stats.generation}")
    return lines
