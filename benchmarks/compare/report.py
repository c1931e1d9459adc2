"""Tables and pictures of what `benchmarks.compare` measured: `python -m benchmarks.compare.report *.json`.

The table goes to stdout as Markdown, and after it who could not take part. With `--plots DIRECTORY` each source has a
picture: by region and contender the ratio of the pairs, its interval, and 1, where both are equally fast.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "main", "not_here", "read", "table"]

_HEADING = (
    "| source, region, cache | against | pairs | ratio (95%) | GB/s ours, theirs "
    "| CPU s/GB | server's CPU s/GB | peak MiB | load |"
)
_COLUMNS = 9


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [result for path in paths for result in json.loads(path.read_text())["results"]]


_ENOUGH_PAIRS = 5
"""With fewer an interval would say nothing: then the pairs themselves are shown."""


def _interval(found: Mapping[str, Any]) -> str:
    if found["pairs"] < _ENOUGH_PAIRS:
        return f"{found['median_ratio']:.2f} (no interval)"
    low, high = found["interval_95"]
    return f"{found['median_ratio']:.2f} ({low:.2f} to {high:.2f})"


def _spread(speed: Mapping[str, float]) -> str:
    return f"{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})"


def _figures(task: str, name: str, found: Mapping[str, Any], sides: Sequence[Mapping[str, Any]]) -> str:
    """One line: ours, then the other, in each cell. A server's CPU time is there where it is known."""
    servers = [side.get("server_cpu_s_per_gb") for side in sides]
    cells = [
        task,
        name,
        str(found["pairs"]),
        _interval(found),
        ", ".join(_spread(side["gb_per_s"]) for side in sides),
        ", ".join(f"{side['cpu_s_per_gb']['median']:.2f}" for side in sides),
        ", ".join("none" if used is None else f"{used['median']:.2f}" for used in servers) if any(servers) else "",
        ", ".join(f"{side['peak_bytes'] >> 20}" for side in sides),
        ", ".join(f"{side['load_average']['median']:.1f}" for side in sides),
    ]
    return f"| {' | '.join(cells)} |"


def _nothing(task: str, name: str, reason: str) -> str:
    return f"| {task} | {name} | 0 | {reason} |{' |' * (_COLUMNS - 4)}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line for each contender, also for those that failed or are missing. Speeds with their quartiles.

    In the columns from GB/s on, ours comes first, then the other; the load average is that when their runs began.
    """
    lines = [_HEADING, "|---" * _COLUMNS + "|"]
    for result in results:
        task = result["task"]
        if "bytes" in result:
            task += f" ({result['bytes'] / 1e9:.3g} GB)"
        for name, found in result["against"].items():
            if "failed" in found:
                lines.append(_nothing(task, name, found["failed"].removeprefix(f"{name}: ")))
            else:
                lines.append(_figures(task, name, found, (found["ours"], found["theirs"])))
        lines += [_nothing(task, name, f"not run: {reason}") for name, reason in result["missing"].items()]
        for key, what in (("one_reader", "one reader alone"), ("few_tensors", "the same bytes in 150 tensors")):
            if key in result:
                found = result[key]
                lines.append(_figures(task, f"ours: {what}", found, (found["ours"], found["compared"])))
    return "\n".join(lines)


def not_here(paths: Iterable[Path]) -> list[str]:
    """Who could not take part in any of it, and why."""
    found: dict[str, str] = {}
    for path in paths:
        found.update(json.loads(path.read_text()).get("not_here", {}))
    return [f"- {name}: {reason}" for name, reason in found.items()]


def draw(results: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """One SVG per source, of every comparison that has a ratio."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.fonttype"] = "none"
    rcParams["svg.hashsalt"] = "rdmaload"  # the same figures give the same file
    written = []
    directory.mkdir(parents=True, exist_ok=True)
    for source in dict.fromkeys(result["source"] for result in results):
        rows = [
            (f"{result['region']}{', cold' * (result['cache'] == 'cold')}: {name}", found)
            for result in results
            if result["source"] == source
            for name, found in result["against"].items()
            if "failed" not in found
        ]
        if not rows:
            continue
        figure = Figure(figsize=(8, 0.9 + 0.28 * len(rows)))
        axes = figure.add_subplot()
        for place, (_, found) in enumerate(rows):
            low, high = found["interval_95"]
            won = found["median_ratio"] >= 1
            color = "tab:blue" if won else "tab:red"
            if found["pairs"] < _ENOUGH_PAIRS:
                for ratio in found["ratios"]:
                    axes.plot([ratio], [place], "o", color="tab:blue" if ratio >= 1 else "tab:red", fillstyle="none")
                continue
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot([found["median_ratio"]], [place], "o", color=color)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_format("{x:g}")
        axes.set_yticks(range(len(rows)), [f"{label} ({found['pairs']} pairs)" for label, found in rows])
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="x", which="both", labelsize=6)
        axes.set_xlabel(
            "their time by ours; above 1 ours is faster. Median and its 95% interval; hollow: each of few pairs",
            fontsize=8,
        )
        axes.set_title(f"rdmaload from {source}, beside", fontsize=10)
        figure.tight_layout()
        path = directory / f"compare-{source}.svg"
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, help="directory for the pictures")
    arguments = parser.parse_args()
    try:
        results = read(arguments.json)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        parser.error(f"no result of benchmarks.compare can be read: {problem!r}")
    print(table(results))
    if absent := not_here(arguments.json):
        print("\nNot here:", *absent, sep="\n")
    if arguments.plots is not None:
        draw(results, arguments.plots)


if __name__ == "__main__":
    main()
