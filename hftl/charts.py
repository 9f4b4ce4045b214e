"""Line charts as SVG, for a page that needs no library: colours come from the page, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from hftl.pages import short_name

#: size of the drawing in its own units; the page scales it
_WIDTH, _HEIGHT = 440, 260
#: room for the axes: left, top, right, bottom
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 10, 12, 40
#: around a map
_MARGIN = 8
#: points of a line beyond which the eye sees no difference
_MOST_POINTS = 200
#: colours that the page defines, --series-1 and on
COLOURS = 8
#: lines of four colours are unbroken; those of the other four differ by more than their colour from one of these
_DASHES = (None, None, None, None, None, "8 3", "2 3", "8 3 2 3", "1 5")


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: as the legend says; empty for one that needs none.
        xs: positions.
        ys: values, as many.
        colour: number of the page's colour, from 1 on; 0 is that of the axes.
        dashed: whether it is broken.
        marked: whether its points are marked.
        joined: whether they are joined; else they are all that is drawn.
    """

    name: str
    xs: Sequence[float] | npt.NDArray[np.float64]
    ys: Sequence[float] | npt.NDArray[np.float64]
    colour: int = 1
    dashed: bool = False
    marked: bool = False
    joined: bool = True


def line_chart(
    lines: Sequence[Line],
    description: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """The chart with its legend.

    Args:
        lines: at least one, each with a point at least.
        description: what a screen reader says of it.
        x_label: of the axis.
        y_label: of the axis.
        x_range: that of the points where it is None.
        y_range: the same.
    """
    left, right = x_range or _range([line.xs for line in lines])
    bottom, top = y_range or _range([line.ys for line in lines])

    def x(value: Any) -> Any:
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: Any) -> Any:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">']
    for tick in _ticks(bottom, top):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(left, right):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:.6g}</text>'
        )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="axis" x="{middle_x}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis" x="12" y="{middle_y}" text-anchor="middle" transform="rotate(-90 12 {middle_y})">'
        f"{escape(y_label)}</text>"
    )
    for line in lines:
        drawn = x(np.clip(line.xs, left, right)), y(np.clip(line.ys, bottom, top))
        drawn_points = np.stack(drawn, axis=1)
        points = (_along(drawn_points) if line.joined else drawn_points).round(1).tolist()
        if line.joined:
            parts.append(_stroke(line, " ".join(f"{px},{py}" for px, py in points)))
        if line.marked or len(points) == 1:
            parts += [f'<circle class="series-{line.colour}" cx="{px}" cy="{py}" r="3"/>' for px, py in points]
    return Markup("".join([*parts, "</svg>", _legend([(line.name, _sample(line)) for line in lines if line.name])]))


def _stroke(line: Line, points: str) -> str:
    pattern = "5 4" if line.dashed else _DASHES[line.colour]
    dashes = f' stroke-dasharray="{pattern}"' if pattern else ""
    return f'<polyline class="series-{line.colour}" points="{points}"{dashes}/>'


def _sample(line: Line) -> str:
    """A piece of the line, for its legend; of points alone one of them."""
    if not line.joined:
        return f'<span class="swatch back-{line.colour}"></span>'
    return f'<svg class="sample" viewBox="0 0 26 8" aria-hidden="true">{_stroke(line, "0,4 26,4")}</svg>'


def map_chart(
    points: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    wrong: npt.NDArray[np.bool_],
    names: Sequence[str],
    description: str,
) -> Markup:
    """Points without axes, coloured by class; the most frequent classes have colours, and a wrong answer is a cross.

    Args:
        points: shape (rows, 2).
        classes: class ids, shape (rows,).
        wrong: where the answer is wrong, shape (rows,).
        names: of the classes by class id.
        description: what a screen reader says of it.
    """
    order = np.argsort(-np.bincount(classes, minlength=len(names)), kind="stable")
    coloured = sorted(order[:COLOURS].tolist())
    low, high = points.min(axis=0), points.max(axis=0)
    places = _MARGIN + (points - low) / np.maximum(high - low, 1e-12) * (np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">']
    for (x, y), number, is_wrong in zip(places.round(1).tolist(), classes.tolist(), wrong.tolist(), strict=True):
        colour = coloured.index(number) + 1 if number in coloured else 0
        if is_wrong:
            parts.append(f'<path class="series-{colour}" d="M{x - 4} {y - 4}l8 8m0 -8l-8 8"/>')
        else:
            parts.append(f'<circle class="series-{colour}" cx="{x}" cy="{y}" r="3.2" fill-opacity="0.7"/>')
    legend = [(names[number], colour) for colour, number in enumerate(coloured, start=1)]
    legend += [("other classes", 0)] if len(names) > COLOURS else []
    swatches = [(name, f'<span class="swatch back-{colour}"></span>') for name, colour in legend]
    return Markup("".join([*parts, "</svg>", _legend(swatches)]))


def _legend(samples: Sequence[tuple[str, str]]) -> str:
    """Names with what they look like; nothing for one alone."""
    if len(samples) < 2:
        return ""
    entries = "".join(f"<li>{sample}{short_name(name)}</li>" for name, sample in samples)
    return f'<ul class="legend">{entries}</ul>'


def _along(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """At most `_MOST_POINTS` of the points, as far from each other along the line: no steep part is left out."""
    if len(points) <= _MOST_POINTS:
        return points
    lengths = np.concatenate([[0.0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    return points[np.unique(np.searchsorted(lengths, np.linspace(0, lengths[-1], _MOST_POINTS)))]


def _range(series: Sequence[Sequence[float] | npt.NDArray[np.float64]]) -> tuple[float, float]:
    """From the least to the largest value, never empty."""
    values = [value for values in series for value in values]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
