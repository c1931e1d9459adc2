"""A picture of figures: one bar each, the median, with a line from the lowest to the highest.

`.svg` and `.html` are written here and need nothing, neither now nor when they are opened; `.png` needs matplotlib.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rdmaload.cli.rates import Figure
from rdmaload.errors import NotSupportedError

__all__ = ["PLOT_SUFFIXES", "Section", "draw"]

PLOT_SUFFIXES = (".png", ".svg", ".html")

_ROW, _LEFT, _RIGHT, _WIDTH = 26, 200, 190, 900
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1d2430; } .soft { fill: #667; } .head { font-weight: 600; }
  .bar { fill: #3b6fb6; } .whisker { stroke: #1d2430; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) { text { fill: #e4e7ec; } .soft { fill: #9aa3b2; } .bar { fill: #6fa0e4; }
    .whisker { stroke: #e4e7ec; } }
"""


@dataclass(frozen=True)
class Section:
    """Figures that are read together, under a heading."""

    heading: str
    figures: Sequence[Figure]


def draw(path: str | Path, title: str, lines: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the picture to `path`, whose suffix says which kind. Raises NotSupportedError."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".png":
        _draw_png(path, title, lines, sections)
        return
    if kind not in PLOT_SUFFIXES:
        raise NotSupportedError(f"{path}: a plot is written as {', '.join(PLOT_SUFFIXES)}")
    picture = _svg(title, sections)
    if kind == ".html":
        text = "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)
        picture = (
            '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title>\n<style>:root {{ color-scheme: light dark; }} body {{ margin: 1.2rem "
            "1.5rem; font: 14px/1.45 system-ui, sans-serif; } p { margin: .2rem 0; } svg { max-width: 100%; height: "
            f"auto; }}</style>\n{picture}\n{text}</html>\n"
        )
    path.write_text(picture, encoding="utf-8")


def _svg(title: str, sections: Sequence[Section]) -> str:
    parts: list[str] = []
    y = 34
    for section in sections:
        scale = (_WIDTH - _LEFT - _RIGHT) / max(max(one.samples) for one in section.figures)  # its own in each
        y += _ROW
        parts.append(f'<text class="head" x="0" y="{y}">{html.escape(section.heading)} (GB/s)</text>')
        for figure in section.figures:
            y += _ROW
            low, high = (_LEFT + scale * bound(figure.samples) for bound in (min, max))
            middle = y - 5
            parts += [
                f'<text x="{_LEFT - 10}" y="{y}" text-anchor="end">{html.escape(_cut(figure.name))}</text>',
                f'<rect class="bar" x="{_LEFT}" y="{y - 15}" width="{scale * figure.median:.1f}" height="18"/>',
                f'<path class="whisker" fill="none" d="M{low:.1f} {middle}H{high:.1f}'
                f'M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"/>',
                f'<text class="soft" x="{high + 8:.1f}" y="{y}">{html.escape(figure.text())}</text>',
            ]
    height = y + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{html.escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<text class="head" x="0" y="18">{html.escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>"
    )


def _cut(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _draw_png(path: Path, title: str, lines: Sequence[str], sections: Sequence[Section]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError as err:
        raise NotSupportedError(
            f"{path}: plots as .png need matplotlib (pip install matplotlib), .svg nothing"
        ) from err
    counts = [len(section.figures) for section in sections]
    picture = Picture(figsize=(10, 1.2 + 0.35 * sum(counts) + 0.7 * len(counts)), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle("\n".join([title, *lines]), fontsize=9, x=0.01, ha="left")
    axes = picture.subplots(len(sections), 1, height_ratios=counts, squeeze=False)
    for (ax,), section in zip(axes, sections, strict=True):
        medians = [one.median / 1e9 for one in section.figures]
        spread = [
            [(one.median - min(one.samples)) / 1e9 for one in section.figures],
            [(max(one.samples) - one.median) / 1e9 for one in section.figures],
        ]
        ax.barh(range(len(medians)), medians, xerr=spread, color="#3b6fb6", capsize=3)
        ax.set_yticks(range(len(medians)), [one.name for one in section.figures])
        ax.invert_yaxis()
        ax.set_xlabel("GB/s")
        ax.set_title(section.heading, loc="left", fontsize=9)
    picture.savefig(path, dpi=110)
