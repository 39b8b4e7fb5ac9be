"""Texts beside the points of a picture, each where it covers least."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

PLACES = [  # offset from the point in points, and what of the text lies there, the nearest first
    (dx * far, dy * far, ("right", "center", "left")[dx + 1], ("top", "center", "bottom")[dy + 1])
    for far in (6, 13, 20)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


class Label(NamedTuple):
    """A text beside a point."""

    text: str
    x: float
    y: float
    colour: str


def write_labels(figure: Figure, axis: Axes, labels: Sequence[Label]) -> None:
    """Write texts into a finished panel; the same text at the same point once."""
    figure.draw_without_rendering()  # lays it out
    marks = np.array([*_marks(axis)])  # (N, 2), in pixels
    boxes: list[Bbox] = []
    for text, x, y, colour in {label[:3]: label for label in labels}.values():
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colour, "in_layout": False}
        texts = [axis.annotate(text, (x, y), (dx, dy), ha=ha, va=va, **style) for dx, dy, ha, va in PLACES]
        extents = [text.get_window_extent().padded(3) for text in texts]
        k = int(np.argmin([_covered(extent, axis.bbox, marks, boxes) for extent in extents]))
        boxes.append(extents[k])
        for other in (*texts[:k], *texts[k + 1 :]):
            other.remove()


def _covered(extent: Bbox, panel: Bbox, marks: np.ndarray, boxes: Sequence[Bbox]) -> int:
    """Count the marks (N, 2) that a text covers; other texts, and what lies outside the panel, weigh more."""
    inside = ((marks > extent.min) & (marks < extent.max)).all(1).sum()
    outside = not (panel.x0 <= extent.x0 and extent.x1 <= panel.x1 and panel.y0 <= extent.y0 and extent.y1 <= panel.y1)
    return int(inside) + 100 * extent.count_overlaps(boxes) + 100 * int(outside)


def _marks(axis: Axes) -> Iterator[np.ndarray]:
    """Yield points (2,), in pixels, close together along all lines and error bars."""
    paths = [np.asarray(line.get_xydata()) for line in axis.lines]
    for bars in axis.collections:
        if isinstance(bars, LineCollection):
            paths += [np.asarray(segment) for segment in bars.get_segments()]
    for path in paths:
        corners = axis.transData.transform(path)
        yield from [*corners] * 5  # a point is worse to cover than a piece of a line
        for start, end in itertools.pairwise(corners):
            yield from np.linspace(start, end, 50)
