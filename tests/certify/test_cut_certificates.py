"""l_1 and l_2 balls cut to a range: attacks inside of them, larger radii, every method and architecture."""

from __future__ import annotations

import pytest
import torch
from helpers import classifier, normal
from test_changes import NETS, all_margins, question

from utils.attack.attack_file import replay_attack, save_attack
from utils.attack.pgd import attack_radius, pgd
from utils.certify import certified_margin, certified_radius
from utils.certify.bab import decide
from utils.perturbation import cut_balls
from utils.perturbation.budgets import reach

LOW, HIGH = -1.0, 1.0
SETS = [(norm, ball) for norm in (1, 2) for ball in ("frame", "sequence")]
PASSES = ("ibp", "crown-ibp", "crown")


def worst_points(name: str, norm: float, ball: str, eps: float, count: int = 400):
    """The least margins, (batch,), of PGD's points, and of random points of the set's boundary, cut to the range."""
    net, x, labels = question(name)
    told = {"norm": norm, "ball": ball, "clip": (LOW, HIGH)}
    found = pgd(net, x, labels, eps, steps=25, restarts=2, **told)
    frames = x.reshape(len(x), *found.x.shape[1:])
    delta = normal(count, *found.x.shape, seed=3)
    flat = delta.flatten(2)[:, :, None] if ball == "sequence" else delta
    size = torch.linalg.vector_norm(flat, ord=float(norm), dim=-1, keepdim=True)
    points = (frames + (eps * flat / size).view(delta.shape)).clamp(LOW, HIGH)
    margins = all_margins(net, points.reshape(-1, *x.shape[1:]), labels.repeat(count)).amin(dim=1).view(count, -1)
    return torch.minimum(found.margin, margins.amin(dim=0))


def check(name: str, norm: float, ball: str, methods=PASSES, dtype=torch.float64) -> None:
    net, x, labels = question(name)
    for eps in (0.3, 1.2):
        worst = worst_points(name, norm, ball, eps)
        for method in methods:
            told = {"norm": norm, "ball": ball, "clip": (LOW, HIGH), "method": method, "dtype": dtype}
            bound = certified_margin(net, x, labels, eps, alpha_steps=3, curve_steps=2, **told).amin(dim=1)
            assert (bound <= worst + (1e-9 if dtype == torch.float64 else 1e-4)).all(), (method, eps)


@pytest.mark.parametrize(("norm", "ball"), SETS)
@pytest.mark.parametrize("name", NETS)
def test_no_point_of_a_cut_ball_is_below_a_bound(name, norm, ball):
    if ball == "frame" or name in ("rnn", "gru"):
        check(name, norm, ball)


@pytest.mark.parametrize("method", ("alpha", "curve", "ball", "shell", "jacobian", "spectral", "parabola", "fastlin"))
def test_other_methods_take_the_cut_ball_or_the_one_around_it(method):
    check("mlp", 2, "frame", (method,))
    if method != "parabola":
        check("mlp", 1, "frame", (method,) if method != "ball" else ("crown",))


@pytest.mark.parametrize("norm", (1, 2))
def test_single_precision(norm):
    check("mlp", norm, "frame", dtype=torch.float32)
    check("rnn", norm, "sequence", dtype=torch.float32)


@pytest.mark.parametrize(("name", "norm"), [("mlp", 2), ("rnn", 1), ("cnn", 2)])
def test_a_ball_that_is_too_small_is_caught(name, norm, monkeypatch):
    exact = cut_balls.most
    monkeypatch.setattr(cut_balls, "most", lambda sizes, rooms, eps, p: exact(sizes, 0.7 * rooms, 0.7 * eps, p))
    with pytest.raises(AssertionError):
        check(name, norm, "frame")


def test_frames_that_share_a_ball_are_not_bounded_apart(monkeypatch):
    """The norm of what frames can deviate by themselves, which is exact of whole balls, is too little of cut ones."""
    net = classifier(inputs=2, activation="relu")
    x = torch.full((1, 3, 2), 0.9, dtype=torch.float64)
    told = {"norm": 2, "ball": "sequence", "clip": (LOW, HIGH), "method": "ibp"}
    labels, exact = net(x).argmax(dim=1), cut_balls.CutBalls.joint_deviation

    def apart(self, coefficients):
        falls = [self.frame_deviation(frame, part) for frame, part in coefficients.items()]
        return self._ball.total(torch.stack(falls, dim=-1), self.norm)

    sets = cut_balls.CutBalls(x, torch.ones(1, 3, dtype=torch.float64), 2.0, "sequence", (LOW, HIGH))
    row = {frame: -torch.ones(1, 1, 2, dtype=torch.float64) for frame in range(3)}  # 0.1 is left above every value
    assert abs(float(exact(sets, row)) - 0.6) < 1e-12
    assert float(apart(sets, row)) < 0.4
    bound = certified_margin(net, x, labels, 1.0, **told).amin(dim=1)
    assert (bound <= all_margins(net, x + 0.1, labels).amin(dim=1) + 1e-9).all()


@pytest.mark.parametrize("norm", (1, 2))
@pytest.mark.parametrize("ball", ("frame", "sequence"))
def test_radii_grow(norm, ball):
    """A range without effect changes nothing, a narrow one certifies more, and an attack needs still more."""
    net, x, labels = question("rnn")
    told = {"norm": norm, "ball": ball}
    whole = certified_radius(net, x, labels, **told)
    wide = certified_radius(net, x, labels, clip=(-1e3, 1e3), **told)
    torch.testing.assert_close(wide, whole, rtol=2e-3, atol=0.0)
    cut = certified_radius(net, x, labels, clip=(LOW, HIGH), **told)
    assert (cut >= 0.99 * whole).all() and float(cut.mean()) > 1.02 * float(whole.mean())
    attacked = attack_radius(net, x, labels, clip=(LOW, HIGH), steps=20, **told)
    assert (attacked.radius >= cut).all()


def test_no_perturbation_and_a_range_of_one_point():
    net, x, labels = question("rnn")
    clean = all_margins(net, x, labels).amin(dim=1)
    same = torch.zeros_like(x)
    for norm in (1, 2):
        bound = certified_margin(net, x, labels, 0.0, norm=norm, clip=(LOW, HIGH)).amin(dim=1)
        torch.testing.assert_close(bound, clean)
        fixed = certified_margin(net, same, labels, 3.0, norm=norm, clip=(0.0, 0.0)).amin(dim=1)
        torch.testing.assert_close(fixed, all_margins(net, same, labels).amin(dim=1))


def test_lengths_and_frames():
    """Samples that end early, of which all but the first frames are padding outside of the range."""
    net = classifier(inputs=2)
    x = normal(3, 4, 2, seed=5).clamp(LOW, HIGH)
    lengths = torch.tensor([4, 2, 3])
    for sample, length in enumerate(lengths):
        x[sample, length:] = 99.0
    labels = torch.stack([net(x[k : k + 1, :n]).argmax() for k, n in enumerate(lengths)])
    for norm, ball in [(0, "sequence"), *SETS]:
        told = {"norm": norm, "ball": ball, "clip": (LOW, HIGH)}
        together = certified_margin(net, x, labels, 1, lengths=lengths, **told)
        for k, n in enumerate(lengths.tolist()):
            alone = certified_margin(net, x[k : k + 1, :n], labels[k : k + 1], 1, **told)
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-9, atol=1e-9)


def test_decisions_and_their_files(tmp_path):
    net, x, labels = question("rnn")
    told = {"norm": 2, "clip": (LOW, HIGH)}
    for own in decide(net, x, labels, 0.4, time_limit=1.0, **told):
        assert own.verdict in ("certified", "falsified", "unknown")
    found = attack_radius(net, x, labels, steps=20, **told)
    save_attack(tmp_path / "attack.pt", found, x, labels, **told)
    assert replay_attack(tmp_path / "attack.pt", net).valid.all()


def test_balls_in_which_all_values_end():
    """The search of the level comes to its end where all rooms are shorter than the ball together."""
    sizes, rooms = normal(5, 6, seed=1).abs(), normal(5, 6, seed=2).abs()
    assert reach(sizes, rooms, torch.full((5,), 100.0).double()).isinf().all()
