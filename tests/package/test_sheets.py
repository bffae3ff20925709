"""Pictures for people."""

import numpy as np
import pytest
from PIL import Image

from vlv.sheets import GAP, Pair, contact_sheet, side_by_side

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _count(sheet, colour):
    return int((np.asarray(sheet) == colour).all(-1).sum())


def _square(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def test_every_pair_is_on_the_sheet_whole():
    pairs = [Pair(_square(RED), _square(BLUE), f"picture {number}") for number in range(5)]
    sheet = contact_sheet(pairs, "Title", "subtitle", columns=2, tile=64)
    inner = 62 * 62  # without the frame
    assert _count(sheet, RED) == _count(sheet, BLUE) == 5 * inner


def test_pictures_keep_their_proportions():
    sheet = contact_sheet([Pair(_square(RED, (40, 10)), _square(BLUE, (10, 40)), "x")], "Title", "subtitle", tile=80)
    for colour, (width, height) in ((RED, (80, 20)), (BLUE, (20, 80))):
        rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
        # The frame covers the two ends of the longer side.
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (min(width, 78), min(height, 78))


@pytest.mark.parametrize("label", ["word " * 200, "x" * 2000, "", "ü\n\ttab"])
def test_labels_stay_below_their_pair(label):
    short = contact_sheet([Pair(_square(RED), _square(BLUE), "short", True)] * 2, "Title", "subtitle", tile=100)
    sheet = contact_sheet([Pair(_square(RED), _square(BLUE), label, True)] * 2, "Title", "subtitle", tile=100)
    assert sheet.width == short.width
    ink = np.asarray(sheet.convert("L")) < 128
    assert not ink[:, :30].any() and not ink[:, -30:].any() and not ink[-20:].any()


def test_marks_differ():
    sheets = [contact_sheet([Pair(_square(RED), _square(BLUE), "x", right)], "Title", "s") for right in (True, False)]
    assert sheets[0] != sheets[1]


def test_small_pictures_are_magnified_crisp():
    checks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    sheet = side_by_side(checks, checks)
    assert sheet.size == (2 * 256 + GAP, 256)
    expected = np.asarray(checks).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(np.asarray(sheet)[:, :256], expected)
    np.testing.assert_array_equal(np.asarray(sheet)[:, -256:], expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_odd_sizes(size):
    assert side_by_side(_square(RED, size), _square(BLUE, (64, 64))).height == 256
    contact_sheet([Pair(_square(RED, size), _square(BLUE), "odd")], "Title", "subtitle")
