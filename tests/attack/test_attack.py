"""Attacks: their sets, exact answers on linear models, and what they must never do to a certificate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.attack.attack_file import replay_attack, save_attack
from utils.attack.pgd import attack_radius, pgd
from utils.certify import certified_radius
from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import dual_norm, lp_norm, project, random_in_ball, random_on_sphere, steepest
from utils.perturbation.moves import FrameBalls

NORMS = (1.0, 2.0, math.inf)
T, N = 3, 4


def linear_model(seed: int = 0) -> SequenceClassifier:
    """Linear for inputs in [0, 1] and far around: a relu RNN whose units never come near zero."""
    torch.manual_seed(seed)
    rnn = nn.RNN(N, 5, batch_first=True, nonlinearity="relu")
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(rnn, name).uniform_(0.05, 0.4)
        rnn.bias_ih_l0.fill_(50.0)
        model = SequenceClassifier(rnn, nn.Linear(5, 3)).double()
        # Boundaries near the inputs: no class wins at their middle.
        model.head.bias.sub_(model(torch.full((1, T, N), 0.5).double())[0])
    return model


def recurrent_model(kind=nn.RNN, seed: int = 0, scale: float = 1.5, **options) -> SequenceClassifier:
    torch.manual_seed(seed)
    model = SequenceClassifier(kind(N, 6, batch_first=True, **options), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def inputs(model: SequenceClassifier, count: int = 6, seed: int = 1):
    """Inputs in [0, 1] with the labels that the model gives them."""
    x = torch.rand(count, T, N, generator=torch.Generator().manual_seed(seed)).to(model.head.weight.dtype)
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


def linear_distance(model, x, labels, norm: float, ball: str, mask: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest decision boundary of a linear model, by its gradient."""
    distances = []
    for other in range(3):
        y = x.clone().requires_grad_()
        logits = model(y)
        margin = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, other]
        (gradient,) = torch.autograd.grad(margin.sum(), y)
        norms = dual_norm(gradient, norm) * mask
        total = norms.sum(dim=1) if ball == "frame" else dual_norm(norms, norm)
        distances.append(torch.where(labels == other, math.inf, margin.detach() / total))
    return torch.stack(distances).amin(dim=0)


# --- balls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_projection_against_brute_force(norm):
    """No point of a fine grid over the ball is nearer than the projection, which is itself in the ball."""
    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    grid = grid[lp_norm(grid, norm) <= 1.0]
    points = 2.0 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projected = project(points, torch.ones(40, dtype=torch.float64), norm)
    assert (lp_norm(projected, norm) <= 1 + 1e-12).all()
    distance = (points - projected).norm(dim=1)
    nearest = torch.cdist(points, grid).amin(dim=1)
    assert (distance <= nearest + 1e-12).all() and (nearest - distance < 0.01).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", (1e-8, 1.0, 1e8))
def test_projection_keeps_the_inside_and_meets_zero(norm, scale):
    points = scale * torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = lp_norm(points, norm)
    assert torch.equal(project(points, 1.0001 * size, norm), points)
    assert project(points, 0 * size, norm).abs().max() <= 1e-14 * scale
    half = project(points, 0.5 * size, norm)
    torch.testing.assert_close(lp_norm(half, norm), 0.5 * size)
    torch.testing.assert_close(project(half, 0.5 * size, norm), half)
    ties = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(lp_norm(project(ties, torch.tensor([1.0]), norm), norm), torch.ones(1).double())


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_attains_the_dual_norm(norm):
    gradient = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = steepest(gradient, norm)
    torch.testing.assert_close((direction * gradient).sum(dim=1), dual_norm(gradient, norm))
    torch.testing.assert_close(lp_norm(direction, norm), torch.ones(30).double())
    assert torch.equal(steepest(torch.zeros(1, 7), norm), torch.zeros(1, 7))


@pytest.mark.parametrize("norm", NORMS)
def test_random_points(norm):
    """Even spread: the share of points within r is r^n; no point is outside; the sphere's are on it."""
    generator = torch.Generator().manual_seed(0)
    sizes = lp_norm(random_in_ball((20000, 3), norm, generator), norm)
    assert sizes.max() <= 1 + 1e-12
    assert abs((sizes < 0.7).double().mean() - 0.7**3) < 0.01
    sphere = random_on_sphere((2000, 3), norm, generator)
    torch.testing.assert_close(lp_norm(sphere, norm), torch.ones(2000).double())
    assert sphere.mean(dim=0).abs().max() < 0.08


# --- PGD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ("frame", "sequence"))
@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
def test_perturbed_inputs_lie_in_the_set(norm, ball, clip):
    model = recurrent_model()
    x, labels = inputs(model)
    mask = torch.rand(len(x), T, generator=torch.Generator().manual_seed(3)) < 0.6
    eps = torch.linspace(0.0, 2.0, len(x), dtype=torch.float64)
    found = pgd(model, x, labels, eps, norm=norm, ball=ball, clip=clip, frames=mask, steps=5, restarts=2)
    delta = found.x - x.double()
    assert (delta[~mask] == 0).all()
    sizes = lp_norm(delta, norm) if ball == "frame" else lp_norm(delta.flatten(1), norm)[:, None]
    assert (sizes <= eps[:, None]).all()
    assert (sizes.amax(dim=1)[mask.any(dim=1)] > 0.2 * eps[mask.any(dim=1)]).any(), "PGD did not move"
    if clip is not None:
        assert found.x.min() >= 0.0 and found.x.max() <= 1.0
    logits = model.double()(found.x)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    torch.testing.assert_close(found.margin, (logits.gather(1, labels[:, None]).squeeze(1) - others).detach())


def test_eps_per_frame():
    model = recurrent_model()
    x, labels = inputs(model)
    eps = torch.tensor([0.0, 0.1, 0.5]).expand(len(x), T)
    sizes = lp_norm(pgd(model, x, labels, eps, steps=5).x - x.double(), 2.0)
    assert (sizes <= eps.double()).all() and (sizes[:, 0] == 0).all() and (sizes[:, 2] > 0.4).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ("frame", "sequence"))
def test_pgd_is_exact_on_a_linear_model(norm, ball):
    model = linear_model()
    x, labels = inputs(model)
    everything = torch.ones(len(x), T)
    distance = linear_distance(model, x, labels, norm, ball, everything)
    for share, broken in ((0.999, False), (1.001, True)):
        found = pgd(model, x, labels, share * distance, norm=norm, ball=ball, steps=30, dtype=torch.float64)
        assert ((found.margin < 0) == broken).all()


def test_targeted_attacks_reach_the_target_only():
    """Where another class is nearer, a targeted attack needs more than an untargeted one and ends in its own class."""
    model = linear_model()
    x, labels = inputs(model)
    targets = (labels + 1) % 3
    free, aimed = attack_radius(model, x, labels), attack_radius(model, x, labels, targets=targets)
    assert (free.radius <= 1.01 * aimed.radius).all() and (free.radius < 0.9 * aimed.radius).any()
    logits = model(aimed.x)
    assert (logits.gather(1, targets[:, None]) > logits.gather(1, labels[:, None])).all()


def test_a_sample_does_not_depend_on_the_batch():
    model = recurrent_model().double()
    x, labels = inputs(model)
    together = pgd(model, x, labels, 0.3, dtype=torch.float64)
    alone = [pgd(model, x[i : i + 1], labels[i : i + 1], 0.3, dtype=torch.float64) for i in range(len(x))]
    torch.testing.assert_close(torch.cat([one.x for one in alone]), together.x, atol=1e-6, rtol=1e-6)
    split = pgd(model, x, labels, 0.3, dtype=torch.float64, batch_size=2)
    torch.testing.assert_close(split.x, together.x, atol=1e-6, rtol=1e-6)


def test_l1_steps_leave_saturated_elements():
    """Element 0 has the largest derivative but is at the end of the valid range: the step must take element 2."""
    x = torch.tensor([[[1.0, 0.5, 0.5, 0.0]]])
    balls = FrameBalls(x, torch.ones(1, 1, dtype=torch.bool), 1.0, clip=(0.0, 1.0))
    gradient = torch.tensor([[[9.0, 1.0, -2.0, -8.0]]])
    assert balls.steepest(gradient, torch.zeros_like(x)).tolist() == [[[0.0, 0.0, -1.0, 0.0]]]
    assert balls.steepest(-gradient, torch.zeros_like(x)).tolist() == [[[-1.0, 0.0, 0.0, 0.0]]]
    assert balls.steepest(-gradient, torch.tensor([[[-1.0, 0.0, 0.0, 0.0]]])).tolist() == [[[0.0, 0.0, 0.0, 1.0]]]


@pytest.mark.parametrize("norm", NORMS)
def test_clipping_makes_attacks_weaker(norm):
    model = linear_model()
    x, labels = inputs(model)
    x = x.round()
    with torch.no_grad():
        labels = model(x).argmax(dim=1)
    free = attack_radius(model, x, labels, norm=norm, steps=25)
    clipped = attack_radius(model, x, labels, norm=norm, steps=25, clip=(0.0, 1.0))
    assert (clipped.radius >= 0.99 * free.radius).all() and (clipped.radius > 1.05 * free.radius).any()
    assert clipped.radius.isfinite().any()


# --- radius ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ("frame", "sequence"))
@pytest.mark.parametrize("frames", (None, [1]))
def test_attack_radius_is_the_distance_of_a_linear_model(norm, ball, frames):
    model = linear_model()
    x, labels = inputs(model)
    mask = torch.ones(T) if frames is None else torch.tensor([0.0, 1.0, 0.0])
    distance = linear_distance(model, x, labels, norm, ball, mask)
    found = attack_radius(model, x, labels, norm=norm, ball=ball, frames=frames, steps=25)
    assert (found.radius >= distance * (1 - 1e-9)).all()
    assert (found.radius <= 1.005 * distance).all()
    assert (found.margin < 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "model", [recurrent_model(), recurrent_model(nonlinearity="relu"), recurrent_model(num_layers=2)]
)
def test_attack_radius_is_above_the_certified_radius(model, norm):
    x, labels = inputs(model, 10)
    certified = certified_radius(model, x, labels, norm=norm)
    found = attack_radius(model, x, labels, norm=norm, steps=25)
    assert (certified > 0).all() and found.radius.isfinite().any()
    assert (found.radius >= certified).all()
    inside = pgd(model, x, labels, certified, norm=norm, restarts=6, steps=25)
    assert (inside.margin > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_gated_attacks_are_above_the_certified_radius(kind, norm):
    model = recurrent_model(kind, scale=2.0)
    x, labels = inputs(model, 4)
    certified = certified_radius(model, x, labels, norm=norm)
    assert (certified > 0).all()
    assert (pgd(model, x, labels, certified, norm=norm, restarts=6, steps=25).margin > 0).all()
    assert (attack_radius(model, x, labels, norm=norm, steps=15).radius >= certified).all()


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_other_cells(kind):
    model = recurrent_model(kind, scale=3.0)
    x, labels = inputs(model)
    found = attack_radius(model, x, labels, norm=math.inf, steps=25)
    broken = found.radius.isfinite()
    assert broken.any()
    assert (model.double()(found.x).argmax(dim=1)[broken] != labels[broken]).all()
    torch.testing.assert_close((found.x - x.double()).abs().amax(dim=(1, 2))[broken], found.radius[broken])


def test_misclassified_and_unbreakable_inputs():
    model = recurrent_model()
    x, labels = inputs(model)
    wrong = attack_radius(model, x, (labels + 1) % 3)
    assert (wrong.radius == 0).all() and torch.equal(wrong.x, x.double()) and (wrong.margin <= 0).all()
    narrow = (float(x.min()) - 1e-6, float(x.max()) + 1e-6)
    constant = torch.full_like(x, 0.5 * sum(narrow))
    with torch.no_grad():
        labels = model(constant).argmax(dim=1)
    clip = (float(constant.min()) - 1e-6, float(constant.max()) + 1e-6)
    stuck = attack_radius(model, constant, labels, clip=clip, steps=3, restarts=1)
    assert stuck.radius.isinf().all() and torch.equal(stuck.x, constant.double())


def test_the_model_is_not_changed():
    model = recurrent_model()
    x, labels = inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    attack_radius(model, x, labels, steps=3)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_saved_attack_replays(tmp_path):
    model = recurrent_model()
    x, labels = inputs(model)
    threat = {"norm": math.inf, "frames": [0, 2], "clip": (-2.0, 3.0)}
    found = attack_radius(model, x, labels, steps=10, **threat)
    assert found.radius.isfinite().any()
    save_attack(tmp_path / "attack.pt", found, x, labels, **threat)
    again = replay_attack(tmp_path / "attack.pt", model)
    assert again.valid.all()
    torch.testing.assert_close(again.margin, found.margin)
    broken = found.radius.isfinite()
    torch.testing.assert_close(again.size[broken], found.radius[broken])
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a saved attack"):
        replay_attack(tmp_path / "damaged.pt", model)


@pytest.mark.parametrize(
    "bad",
    ({"norm": 3}, {"ball": "cube"}, {"clip": (0.5, 0.6)}, {"frames": [7]}, {"eps": -1.0}, {"eps": math.nan}),
    ids=str,
)
def test_bad_arguments(bad):
    model = recurrent_model()
    x, labels = inputs(model)
    with pytest.raises(ValueError):
        pgd(model, x, labels, **({"eps": 0.1} | bad))


def test_sizes_of_the_set():
    """By hand: frames of l_1 size 3 and 1, the first one exact."""
    x = torch.zeros(1, 2, 2)
    delta = torch.tensor([[[1.0, 2.0], [0.5, -0.5]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert FrameBalls(x, mask, 1.0).size(delta) == 3.0
    assert FrameBalls(x, mask, 1.0, "sequence").size(delta) == 4.0
    mask[0, 0] = False
    assert FrameBalls(x, mask, 1.0).size(delta) == 1.0
    assert FrameBalls(x, mask, 1.0, "sequence").size(delta) == 1.0
