"""Sets of p = 0, 1 and 2 within a range: rows' maxima by points that attain them, and images' windows by matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import normal
from torch import nn

from utils.bounds.passes import BoundPass
from utils.network.trace import trace
from utils.perturbation.cut_balls import CutBalls
from utils.question import Threat

BATCH, FRAMES, SIZE, LOW, HIGH = 4, 3, 2, -1.0, 1.5


def inputs(seed=0):
    """Values inside the range, some at its ends."""
    x = (1.3 * normal(BATCH, FRAMES, SIZE, seed=seed)).clamp(LOW, HIGH)
    x[0, 0, 0], x[1, 1, 1] = LOW, HIGH
    return x


def set_of(norm, ball, together=None, eps=None, **options):
    size = {0.0: 2.0, 1.0: 0.9, 2.0: 0.8}[norm]
    return (
        Threat(norm, ball, clip=(LOW, HIGH), together=together, **options)
        .to(inputs())
        .around(inputs(), torch.full((BATCH,), size if eps is None else eps, dtype=torch.float64))
    )


def corners(sets, count):
    """All points of p = 0 with at most ``count`` units of each ball at the ends of the range, (points, batch, T, n)."""
    x, whole = sets.x, sets.ball == "sequence"
    numbers = torch.arange(FRAMES * SIZE) if sets.together is None else sets.together.flatten()
    balls = [range(FRAMES * SIZE)] if whole else [range(SIZE * t, SIZE * t + SIZE) for t in range(FRAMES)]
    choices = []
    for places in balls:
        units = sorted({int(numbers[place]) for place in places})
        moves = []
        for chosen in itertools.combinations(units, min(count, len(units))):
            moved = [place for place in places if int(numbers[place]) in chosen]
            moves += [dict(zip(moved, ends, strict=True)) for ends in itertools.product((LOW, HIGH), repeat=len(moved))]
        choices.append(moves)
    for parts in itertools.product(*choices):
        point = x.flatten(1).clone()
        for place, end in itertools.chain.from_iterable(part.items() for part in parts):
            point[:, place] = end
        yield point.view_as(x)


COUNTED = [("frame", None), ("sequence", None), ("sequence", "frame"), ("sequence", [0, 1, 1, 2, 2, 2])]


@pytest.mark.parametrize(("ball", "together"), COUNTED, ids=str)
@pytest.mark.parametrize("count", (0, 1, 2))
def test_changes_are_all_tried(ball, together, count):
    """The most that rows fall is what they fall at the worst of all corners; both for one row and for the reach."""
    sets = set_of(0.0, ball, together, float(count))
    rows = normal(3, FRAMES * SIZE, seed=4)
    shaped = rows.view(3, FRAMES, SIZE)
    falls = torch.stack([(sets.x - point).flatten(1) @ rows.T for point in corners(sets, count)]).amax(dim=0)
    parts = {frame: shaped[None, :, frame] for frame in range(FRAMES)}
    torch.testing.assert_close(sets.joint_deviation(parts), falls.clamp(min=0.0))
    if ball == "frame":
        down, up = zip(*(sets.frame_reach(frame, shaped[:, frame]) for frame in range(FRAMES)), strict=True)
        torch.testing.assert_close(sum(down), falls.clamp(min=0.0))
        rises = torch.stack([(point - sets.x).flatten(1) @ rows.T for point in corners(sets, count)]).amax(dim=0)
        torch.testing.assert_close(sum(up), rises.clamp(min=0.0))


@pytest.mark.parametrize("norm", (1.0, 2.0))
@pytest.mark.parametrize("ball", ("frame", "sequence"))
def test_cut_balls_by_their_points(norm, ball):
    """No point falls more; the projection of a far point along the row, which is where it is worst, comes close."""
    mask = torch.tensor([True, False, True])
    threat = Threat(norm, ball, frames=mask, clip=(LOW, HIGH)).to(inputs())
    eps = torch.tensor([0.0, 0.3, 0.9, 50.0], dtype=torch.float64)
    sets, moves = threat.around(inputs(), eps), threat.moves(inputs())
    row = normal(1, FRAMES, SIZE, seed=6)
    bound = sets.joint_deviation({frame: row[:, None, frame] for frame in (0, 2)})[:, 0]
    far = -row * torch.logspace(-2, 5, 60, dtype=torch.float64)[:, None, None]
    radii = moves.per_group(eps)
    points = moves.project(far.expand(BATCH, -1, -1, -1).contiguous(), radii[:, None].expand(-1, 60, -1))
    falls = -(points * row).flatten(2).sum(dim=2)
    assert (falls <= bound[:, None] + 1e-9).all()
    # In l_1 all of a far point goes along a few values; the ones of equal size that share the rest are seldom met.
    torch.testing.assert_close(falls.amax(dim=1), bound, rtol=1e-3 if norm == 2.0 else 0.15, atol=1e-9)
    random = moves.project(3.0 * normal(BATCH, 500, FRAMES, SIZE, seed=8), radii[:, None].expand(-1, 500, -1))
    assert (-(random * row).flatten(2).sum(dim=2) <= bound[:, None] + 1e-9).all()
    uncut = Threat(norm, ball, frames=mask).to(inputs()).around(inputs(), eps)
    whole = uncut.total_deviation([uncut.frame_deviation(frame, row[:, None, frame]) for frame in (0, 2)])[:, 0]
    assert (bound <= whole + 1e-12).all() and float(bound[3]) < 0.9 * float(whole[3])


def test_stretched_balls():
    """Scales come in where moves are those of balls: the set is that of scaled values, in a scaled range of each."""
    x, scales = inputs(), torch.tensor([2.0, 0.0], dtype=torch.float64)
    for norm in (1.0, 2.0):
        sets = Threat(norm, clip=(LOW, HIGH), scales=scales).to(x).around(x, torch.full((BATCH,), 0.4).double())
        row = normal(2, SIZE, seed=3)
        room = torch.where(row[:, 0] > 0, x[:, 1, :1] - LOW, HIGH - x[:, 1, :1])
        expected = row[:, 0].abs() * room.clamp(max=0.8)
        torch.testing.assert_close(sets.frame_deviation(1, row[None]), expected)


def test_a_range_of_width_zero_moves_nothing():
    x = torch.full((2, FRAMES, SIZE), 0.5, dtype=torch.float64)
    for norm in (0.0, 1.0, 2.0):
        sets = CutBalls(x, torch.ones(2, FRAMES, dtype=torch.float64), norm, clip=(0.5, 0.5))
        assert all(sets.is_exact(frame) for frame in range(FRAMES))
        assert float(sets.frame_deviation(0, torch.ones(1, 1, SIZE, dtype=torch.float64)).max()) == 0.0


@pytest.mark.parametrize("count", (1.0, 2.0, 3.4))
@pytest.mark.parametrize("rough", (False, True))
def test_candidates(count, rough):
    """Of many values the gains of the largest entries are enough; where they are not, rows are made anew."""
    x = normal(5, 1, 60, seed=1).sigmoid().round()
    weight = normal(7, 60, seed=2)
    weight[0] = 1.0  # all alike: half of them gain nothing
    weight[1, 4:] = 0.0
    sets = CutBalls(x, torch.full((5, 1), count, dtype=torch.float64), 0.0, clip=(0.0, 1.0))
    sets.rough = rough
    found = sets.frame_reach(0, weight)
    exact = [sets.frame_deviation(0, sign * weight[None]) for sign in (1.0, -1.0)]
    for own, expected in zip(found, exact, strict=True):
        if rough:
            assert (own >= expected - 1e-12).all()
            assert ((own - expected).abs() < 1e-12).double().mean() > 0.7
        else:
            torch.testing.assert_close(own, expected)


class Images(nn.Module):
    """A convolution of two channels, with padding, steps and gaps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=(2, 1), dilation=(2, 1))
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("together", (None, "pixel", "rows"))
@pytest.mark.parametrize("norm", (0.0, 1.0, 2.0))
def test_windows_are_rows_of_the_matrix(norm, together):
    """Bounds of a convolution by its windows are those of its matrix, forwards and back through its layers."""
    if together is not None and norm != 0.0:
        pytest.skip("groups are of p = 0")
    x = normal(4, 2, 6, 7, seed=3).sigmoid()
    x[0, 0, :3] = 0.0
    net = Images().double().requires_grad_(False)
    for number, parameter in enumerate(net.parameters()):
        parameter.data = 0.5 * normal(*parameter.shape, seed=number)
    net.head.weight.data = net.head.weight.data[:, : net.conv(x)[0].numel()].clone()
    net.head = nn.Linear(net.conv(x)[0].numel(), 3).double().requires_grad_(False)
    numbers = torch.arange(6).repeat_interleave(7).repeat(2) if together == "rows" else together
    threat = Threat(norm, clip=(0.0, 1.0), together=numbers).to(x.flatten(1)[:, None], x.shape[1:])
    eps = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64) * (1.0 if norm == 0.0 else 0.4)
    sets, graph = threat.around(x.flatten(1)[:, None], eps), trace(net, x)
    by_windows, by_matrix = (BoundPass(one, sets, "crown") for one in (graph, graph.dense()))
    layers = zip(graph.nodes, graph.dense().nodes, strict=True)
    for node in [node for node, _ in layers if type(node).__name__ == "Convolution"]:
        own = by_windows.interval(node), by_matrix.interval(by_matrix.graph.nodes[node.index])
        for found, expected in zip(*own, strict=True):
            if together == "rows":  # of odd groups, windows know how large they are and no more
                assert ((found - expected) * (1.0 if found is own[0][1] else -1.0) >= -1e-9).all()
            else:
                torch.testing.assert_close(found, expected)
    rows = torch.eye(3, dtype=torch.float64)[None]
    if together != "rows":
        torch.testing.assert_close(by_windows.margin(rows), by_matrix.margin(rows))
