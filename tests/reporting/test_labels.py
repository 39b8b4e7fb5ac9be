"""Texts beside points cover neither each other nor the points, and the same text is written once."""

import itertools

from matplotlib.figure import Figure

from scaleot_core.reporting.labels import Label, write_labels


def test_no_text_covers_another_or_a_point():
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    draws = [(0.1, 0.5), (0.5, 0.5), (0.51, 0.5), (0.5, 0.53), (0.5, 0.47), (0.95, 0.95)]
    axis.plot(*zip(*draws, strict=True), "o")
    labels = [Label(f"point {k}", x, y, "C0") for k, (x, y) in enumerate(draws)]
    write_labels(figure, axis, [*labels, labels[0]])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == len(draws)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes for point in axis.transData.transform(draws) if box.contains(*point)]
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)
