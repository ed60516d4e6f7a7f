"""Pen strokes: tracing, files, and the published format."""

import numpy as np
import pytest
import torch

from data.mnist import DataError
from data.strokes import image_to_sequence, load_strokes, sequence_lengths, to_sequence, trace, write_strokes


def draw(*lines):
    return np.array([[sign != "." for sign in line] for line in lines])


def visited(sequence):
    return [tuple(point) for point in np.cumsum(sequence[:, :2], axis=0).tolist()]


def test_open_line_is_traced_from_end_to_end():
    (stroke,) = trace(draw("#....", ".#...", "..###"))
    assert stroke == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2)]


def test_closed_line_is_one_stroke():
    (stroke,) = trace(draw(".##.", "#..#", ".##."))
    assert len(stroke) == 6
    assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1 for a, b in zip(stroke, stroke[1:], strict=False))


def test_crossing_goes_straight_ahead():
    strokes = trace(draw("..#..", "..#..", "#####", "..#..", "..#.."))
    assert strokes[0] == [(2, y) for y in range(5)]
    assert sorted(point for stroke in strokes for point in stroke) == sorted(
        {(2, y) for y in range(5)} | {(x, 2) for x in range(5)}
    )


def test_every_pixel_is_drawn_once():
    chance = np.random.default_rng(0)
    for _ in range(20):
        pixels = chance.random((9, 9)) < 0.3
        points = [point for stroke in trace(pixels) for point in stroke]
        assert sorted(points) == sorted((int(x), int(y)) for y, x in np.argwhere(pixels))


def test_sequence_flags_and_stride():
    strokes = [[(3, 1), (4, 1), (5, 1), (6, 1)], [(3, 2), (3, 3)]]
    assert to_sequence(strokes).tolist() == [
        [3, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 1, 0],
        [-3, 1, 0, 0],
        [0, 1, 1, 1],
    ]
    thinned = to_sequence([*strokes, [(9, 9)]], stride=2)
    assert visited(thinned) == [(3, 1), (5, 1), (6, 1), (3, 2), (3, 3)]  # a single pixel beside strokes is left out
    assert thinned[:, 2].tolist() == [0, 0, 1, 0, 1] and thinned[:, 3].tolist() == [0, 0, 0, 0, 1]
    assert to_sequence([[(2, 2)]]).tolist() == [[2, 2, 1, 1]]
    with pytest.raises(ValueError, match="no stroke"):
        to_sequence([])


def test_thick_line_becomes_a_stroke():
    pytest.importorskip("skimage")
    image = np.zeros((28, 28), dtype=np.float32)
    image[5:20, 12:15] = 1.0
    sequence = image_to_sequence(image)
    assert all(x == 13 for x, _ in visited(sequence))
    assert image_to_sequence(0.3 * image).shape[1] == 4  # faint ink counts where there is no other


def sequences(seed=0):
    return [np.array([[seed, 1, 0, 0], [1, 1, 1, 1]]), np.array([[3, 2, 0, 0], [1, 0, 1, 0], [5, 5, 1, 1]])]


def test_file_is_read_as_it_was_written(tmp_path):
    write_strokes(tmp_path / "strokes.npz", {p: (sequences(), np.array([4, 9])) for p in ("train", "test")}, "here")
    data = load_strokes(tmp_path)
    assert data.source == "here" and data.test_y.tolist() == [4, 9] and data.test_index.tolist() == [0, 1]
    assert sequence_lengths(data.train_x).tolist() == [2, 3]
    torch.testing.assert_close(data.test_x[1], torch.from_numpy(sequences()[1]).float())


def test_damaged_file(tmp_path):
    path = tmp_path / "strokes.npz"
    write_strokes(path, {p: (sequences(), np.array([4, 9])) for p in ("train", "test")}, "here")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"):
        load_strokes(tmp_path)
    without_end = [np.array([[1, 1, 0, 0], [1, 1, 1, 0]])]
    write_strokes(path, {p: (without_end, np.array([4])) for p in ("train", "test")}, "here")
    with pytest.raises(DataError, match="end flag"):
        load_strokes(tmp_path)
    with pytest.raises(DataError, match="make_strokes"):
        load_strokes(tmp_path / "elsewhere")


def published(folder, number=0):
    for part in ("train", "test"):
        for index, sequence in ((number, sequences(7)[0]), (number + 2, sequences()[1])):
            lines = "".join(" ".join(map(str, row)) + "\n" for row in sequence)
            (folder / f"{part}img-{index}-inputdata.txt").write_text(lines)
            (folder / f"{part}img-{index}-targetdata.txt").write_text("0 0 0\n")
        (folder / f"{part}labels.txt").write_text("5\n0\n4\n1\n")


def test_published_format(tmp_path):
    published(tmp_path)
    data = load_strokes(tmp_path)
    assert data.source == "published" and data.test_y.tolist() == [5, 4] and data.test_index.tolist() == [0, 2]
    assert data.train_x[0].tolist() == [[7, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_damaged_published_files(tmp_path):
    published(tmp_path, number=9)
    with pytest.raises(DataError, match="no label"):
        load_strokes(tmp_path)
    published(tmp_path)
    for path in tmp_path.glob("*img-9-*"):
        path.unlink()
    for path in tmp_path.glob("*img-11-*"):
        path.unlink()
    (tmp_path / "trainimg-0-inputdata.txt").write_text("1 2 3\n")
    with pytest.raises(DataError, match="trainimg-0"):
        load_strokes(tmp_path)
