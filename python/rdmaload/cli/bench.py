"""bench: how fast this machine and a store are, piece by piece, which piece limits a load, and what to set."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.arguments import Commands, add_command, add_url, options_of, picture_file, size, whole_number
from rdmaload.cli.output import columns, write_picture, write_result
from rdmaload.cli.plot import PLOT_SUFFIXES, Section, draw
from rdmaload.cli.progress import progress_bar

__all__ = ["register"]

_DEFAULT_BYTES = 10**9


def register(commands: Commands) -> None:
    """Add the command of this module."""
    bench = add_command(
        commands,
        "bench",
        _bench,
        help="measure where the limit of a load is: store, network, memory",
        description="Measure the pieces of a load one by one and say which is the limit and what to set: fresh and "
        "touched memory, the checksum, a stream over loopback (for a store on this machine), the store over several "
        "numbers of connections into memory that is there already, and a whole load. Files are measured warm, from the "
        "page cache. Each is repeated; the median is shown with the lowest and the highest. The store is only read. "
        "With --device the load goes to a GPU, and the way there is measured alone, too. With --against other loaders "
        "read the same weight files (whole ones, about --bytes of them), each in a fresh process, in turns with "
        "rdmaload, every byte into memory of their own; times are without starting Python and importing.",
        prints="One line per measurement in decimal GB/s, then the limit in words, then advice; with --json the same "
        "as one document: url, bytes, repeat, cpus, measurements, round_trip_seconds, limit (store, network, distance, "
        "memory, checksum, pcie, cpu, or sample when the model is too small to say), verdict, advice, device, load, "
        "and with --against a list of loaders with their rates and ratio (how many times as fast rdmaload was), or "
        "left_out, the reason.",
        examples=[
            "rdmaload bench redis://10.0.0.5/llama",
            "rdmaload bench redis://10.0.0.5/llama --connections 1,2,8 --repeat 5",
            "rdmaload bench /models/llama --bytes 4GB --json",
            "rdmaload bench /models/llama --against safetensors,runai --plot bench.html",
            "rdmaload bench redis://10.0.0.5/llama --device cuda:0 --json bench.json",
        ],
    )
    add_url(bench)
    bench.add_argument("--rank", type=whole_number, metavar="N", help="the rank of a sharded model to read")
    bench.add_argument(
        "--bytes",
        type=size,
        default=_DEFAULT_BYTES,
        metavar="SIZE",
        help="how much to read of the model at most; twice as much memory is used (default: 1GB)",
    )
    bench.add_argument(
        "--repeat", type=_positive, default=3, metavar="N", help="how often to measure everything (default: 3)"
    )
    bench.add_argument(
        "--connections",
        type=_counts,
        default=(1, 2, 4),
        metavar="N,N,...",
        help="numbers of connections (for files: threads) to compare; the one that is set is measured as well "
        "(default: 1,2,4)",
    )
    bench.add_argument(
        "--device", default="cpu", help="where the load goes: cpu, or a CUDA device such as cuda:0 (default: cpu)"
    )
    bench.add_argument(
        "--against",
        type=_loaders,
        default=(),
        metavar="NAME,...",
        help="other loaders to compare with, those of safetensors, runai, fastsafetensors (directories), runai, boto3, "
        "obstore (s3://) and redis-py (redis://) that are installed; one that is not, or does not read this store, is "
        "named with the reason",
    )
    bench.add_argument(
        "--plot",
        type=picture_file(*PLOT_SUFFIXES),
        metavar="FILE",
        help="draw the rates: .html or .svg (one file that needs nothing), or .png (needs matplotlib)",
    )


def _positive(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4")
    counts = tuple(sorted({int(number) for number in text.split(",")}))
    if counts[0] < 1 or counts[-1] > 1024:
        raise argparse.ArgumentTypeError("connections are 1 to 1024")
    return counts


def _loaders(text: str) -> tuple[str, ...]:
    from rdmaload.cli.peers import PEERS

    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"there is no loader {name!r}; there are {', '.join(PEERS)}")
    return names


def _bench(args: argparse.Namespace) -> int:
    from rdmaload.cli.bench_store import Bench
    from rdmaload.cli.transfer import import_torch
    from rdmaload.cli.verdict import judge
    from rdmaload.urls import parse_url

    import_torch()
    with progress_bar(args, "bench") as progress:
        bench = Bench(
            parse_url(args.url),
            options_of(args),
            rank=args.rank,
            nbytes=args.bytes,
            repeat=args.repeat,
            connections=args.connections,
            device=args.device,
            peers=args.against,
            progress=progress,
        )
        result = bench.run()
    found = result.findings
    verdict = judge(found)
    noun = "connection" if found.kind == "server" else "thread"
    figures = [
        (found.fresh, f"first touch; huge pages: {found.huge_pages or 'unknown'}"),
        (found.small_pages, "first touch of 4 KiB pages"),
        (found.touched, "copy out of the cache"),
        *((figure, figure.note) for figure in (found.checksum, found.stream, found.to_device) if figure is not None),
        *((figure, "as set" if count == found.configured else "") for count, figure in sorted(found.store.items())),
        (found.load, f"{result.stats.path}, {'verified' if result.stats.verified_bytes else 'not verified'}"),
    ]
    names = {figure.name: f"store, {count_text(count, noun)}" for count, figure in found.store.items()}
    rows = [(f"  {names.get(figure.name, figure.name)}", figure.text(), note) for figure, note in figures]
    lines = [
        f"{result.url}: {size_text(found.sample_bytes)} of {size_text(result.model_bytes)}, "
        f"{count_text(args.repeat, 'round')}, {count_text(found.cpus, 'CPU')}",
        *columns(rows),
    ]
    if found.round_trip is not None:
        lines.append(f"  round trip {found.round_trip * 1000:.2f} ms, {size_text(found.bytes_in_flight)} in flight")
    lines += [verdict.text, *(f"  - {advice}" for advice in verdict.advice)]
    document: dict[str, object] = {
        "url": result.url,
        "bytes": found.sample_bytes,
        "repeat": args.repeat,
        "cpus": found.cpus,
        "measurements": [{**figure.to_json(), "note": note} for figure, note in figures],
        "round_trip_seconds": found.round_trip,
        "limit": verdict.limit,
        "verdict": verdict.text,
        "device": args.device,
        "advice": list(verdict.advice),
        "load": result.stats.to_json(),
    }
    sections = [
        Section(
            "This machine and this store",
            [replace(figure, name=names.get(figure.name, figure.name)) for figure, _ in figures],
        )
    ]
    contest = result.contest
    if contest is not None:
        lines.append(
            f"{count_text(contest.files, 'weight file')}, {size_text(contest.nbytes)}, in fresh processes in turns, "
            f"{count_text(args.repeat, 'time')} each:"
        )
        lines += columns(contest.lines())
        document["against"] = contest.to_json()
        sections.append(Section("Loaders, the same files in fresh processes", contest.figures))
    if args.plot is not None:
        lines.append(f"plot {args.plot}")
        document["plot"] = args.plot
    write_result(args.json, document, lines)
    if args.plot is None:
        return 0
    title = f"rdmaload bench {result.url}"
    return write_picture(lambda: draw(args.plot, title, [verdict.text, *verdict.advice], sections))
