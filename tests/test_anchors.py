"""Points and anchors: against OTX's by the answers in test_assigners.py, and here by hand."""

from __future__ import annotations

import math

import pytest
import torch

from detloss_triton import anchors

SSD300 = {
    "map_sizes": [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)],
    "image_size": (300, 300),
    "aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
    "scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
    "steps": [8, 16, 32, 64, 100, 300],
}


def test_points_are_where_cells_are() -> None:
    """Level by level, row by row."""
    found = anchors.points([(2, 3), (1, 1)], [8, 16])
    expected = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert found[:, :2].tolist() == expected
    assert found[:, 2].tolist() == found[:, 3].tolist() == [8.0] * 6 + [16.0]
    assert anchors.points([(1, 2)], [8], offset=0)[:, :2].tolist() == [[0, 0], [8, 0]]


def test_anchors_of_one_scale_and_of_several() -> None:
    """By default squares of 8 strides around (0, 0), (stride, 0), ...; else ratio by ratio."""
    boxes, sizes = anchors.grid_anchors([(1, 2), (1, 1)], [8, 16])
    assert boxes.tolist() == [[-32, -32, 32, 32], [-24, -32, 40, 32], [-64, -64, 64, 64]]
    assert sizes == (2, 1)
    boxes, sizes = anchors.grid_anchors([(1, 1)], [10], scales=[1, 2], ratios=[4.0, 0.25])
    shapes = (boxes[:, 2:] - boxes[:, :2]).tolist()
    assert shapes == [[5, 20], [10, 40], [20, 5], [40, 10]] and sizes == (4,)


def test_default_boxes_are_ssd_s() -> None:
    boxes, sizes = anchors.default_boxes(**SSD300)
    assert sizes == (5776, 2166, 600, 150, 36, 4)
    # The first position: squares of 0.07 and sqrt(0.07 0.15) of the image, then 2:1 and 1:2.
    side, both, ratio = 21.0, 300 * math.sqrt(0.07 * 0.15), math.sqrt(2)
    shapes = [
        [side, side],
        [both, both],
        [side * ratio, side / ratio],
        [side / ratio, side * ratio],
    ]
    torch.testing.assert_close(boxes[:4, 2:] - boxes[:4, :2], torch.tensor(shapes))
    torch.testing.assert_close((boxes[:4, 2:] + boxes[:4, :2]) / 2, torch.full((4, 2), 4.0))
    # The last has sides of at most the image's.
    assert (boxes[-4:, 2:] - boxes[-4:, :2]).max() == 300
    spread = anchors.default_boxes(**{**SSD300, "steps": None}).boxes
    torch.testing.assert_close(spread[:1], boxes[:1] + (300 / 38 - 8) / 2)


def test_what_is_inside() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [-1, 0, 9, 9], [0, 0, 10, 9], [0, 0, 9, 20]])
    assert anchors.inside(boxes, (20, 10)).tolist() == [True, False, False, False]
    assert anchors.inside(boxes, (20, 10), border=2).tolist() == [True] * 4


def test_an_image_size_is_built_once() -> None:
    assert anchors.points([(3, 4)], [8]) is anchors.points(((3, 4),), (8.0,))
    with torch.inference_mode():
        made = anchors.grid_anchors([(5, 4)], [8]).boxes
    assert made is anchors.grid_anchors([(5, 4)], [8]).boxes and not made.is_inference()
    assert made is not anchors.grid_anchors([(4, 5)], [8]).boxes


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"points: 2 levels need as many positive strides, got"):
        anchors.points([(1, 1), (2, 2)], [8])
    with pytest.raises(ValueError, match=r"grid_anchors: 1 levels need as many positive strides"):
        anchors.grid_anchors([(1, 1)], [0])
    with pytest.raises(ValueError, match=r"clustered_anchors: 2 levels, got anchors of 1"):
        anchors.clustered_anchors([(1, 1), (2, 2)], [8, 16], [[1.0]], [[2.0]])
    with pytest.raises(ValueError, match=r"default_boxes: 6 levels need .* one scale more, got 6"):
        anchors.default_boxes(**{**SSD300, "scales": [0.1] * 6})
    with pytest.raises(ValueError, match=r"inside: anchors must have shape \(A, 4\), got"):
        anchors.inside(torch.zeros(4), (10, 10))
