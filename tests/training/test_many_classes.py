"""Certified training over 200 and 1,000 classes: loss fusion on made-up images of the sizes of ImageNet's kin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from utils.network import make_cnn
from utils.peak import Peak
from utils.perturbation.lp_ball import INF
from utils.training.certified import margins
from utils.training.certified.losses import Batch, robust_loss, rows_of
from utils.training.certified.margins import difference_intervals, other_classes
from utils.training.certified.objective import Certified
from utils.training.certified.recipe import Moment, Recipe

SIZES = {"tiny-imagenet": (64, 200), "imagenet64": (64, 1000), "imagenet32": (32, 1000)}
FUSED = Recipe("crown-ibp", eps=1 / 255, fusion=True, input_penalty=0.0)


def data_of(size: int, classes: int, count: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, size, size, generator=random)
    return x, torch.randint(classes, (count,), generator=random)


def network(size: int, classes: int, kind: str = "cnn7", width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return make_cnn(kind, 3, size, classes, width, mean=0.5, std=0.25)


@pytest.mark.parametrize("name", SIZES)
def test_training_steps(name):
    """Every weight gets a gradient, and steps along it make the bound of the loss smaller."""
    size, classes = SIZES[name]
    model, (x, y), objective = network(size, classes).train(), data_of(size, classes), Certified(FUSED)
    optimizer, found = torch.optim.Adam(model.parameters(), lr=2e-3), []
    for _ in range(3):
        loss = objective.loss(model, x, y, 1.0)
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all() & (p.grad != 0).any()) for p in model.parameters())
        optimizer.step()
        found.append(loss.item())
    assert found[0] > 0.8 * torch.tensor(float(classes)).log() and found[2] < found[1] < found[0]


def batch_of(classes: int, eps: float, recipe: Recipe = FUSED, beta: float = 1.0, count: int = 4) -> Batch:
    model, (x, y) = network(32, classes, "small").double().eval(), data_of(32, classes, count)
    return Batch(model, x.double(), y, recipe, Moment(eps, 0.0, beta, 1.0))


def worst_found(batch: Batch) -> Tensor:
    """The greatest cross entropy that gradient ascent and corners of the box find."""
    random, eps = torch.Generator().manual_seed(1), batch.moment.eps
    corners = eps * torch.randint(0, 2, (20, *batch.x.shape), generator=random).mul(2).sub(1)
    points = torch.cat(((batch.x + corners).flatten(0, 1), batch.attacked().reshape(batch.x.shape)))
    with torch.no_grad():
        values = nn.functional.cross_entropy(batch.model(points), batch.y.repeat(21), reduction="none")
    return values.reshape(21, -1).amax(dim=0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_fused_loss_of_1000_classes_is_a_bound(beta):
    for eps in (1e-3, 1e-2):
        batch = batch_of(1000, eps, beta=beta)
        loss = robust_loss(batch)
        assert (loss >= worst_found(batch) - 1e-9).all()
        by_intervals = robust_loss(batch_of(1000, eps, Recipe("ibp", eps=eps)))
        assert (loss < by_intervals).all()  # and a better one
    clean = nn.functional.cross_entropy(batch.model(batch.x), batch.y, reduction="none")
    torch.testing.assert_close(robust_loss(batch_of(1000, 0.0, beta=beta)), clean)


def test_a_chord_that_is_too_low_is_caught(monkeypatch):
    stock = margins.difference_intervals

    def narrow(bounds, y):
        low, high = stock(bounds, y)
        return low, 0.5 * (low + high)

    monkeypatch.setattr("utils.training.certified.losses.difference_intervals", narrow)
    with pytest.raises(AssertionError):
        test_the_fused_loss_of_1000_classes_is_a_bound(1.0)


@pytest.mark.parametrize("size", [2**26, 2**14])  # bytes: all classes at once, or some at a time
def test_intervals_of_differences_are_those_of_rows(size, monkeypatch):
    """And so are their gradients; at a tenth of the memory and less."""
    monkeypatch.setattr(margins, "PART_BYTES", size)
    found = []
    for by_rows in (False, True):
        batch = batch_of(200, 0.01)
        weights = list(batch.model.parameters())
        with Peak() as peak:
            bounds = batch.bounds("ibp")
            if by_rows:
                rows, output = rows_of(batch, bounds), bounds.graph.output  # of z_y - z_i
                ends = bounds.interval_lower_bound(output, -rows), -bounds.interval_lower_bound(output, rows)
            else:
                places = other_classes(batch.y, 200)
                ends = [end.gather(1, places) for end in difference_intervals(bounds, batch.y)]
            total = (ends[0].sin() + ends[1].cos()).sum()
            found.append((torch.stack(tuple(ends)), torch.autograd.grad(total, weights), peak.most))
    (ends, gradients, peak), (by_rows, expected, much) = found
    torch.testing.assert_close(ends, by_rows, rtol=1e-9, atol=1e-9)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    assert peak < (0.5 if size == 2**26 else 0.4) * much


def test_an_output_that_is_no_linear_layer():
    """Bounds by rows of a matrix, with zeros for the label's own."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU()).double().eval()
    x, y = torch.rand(3, 3, 2, 2).double(), torch.tensor([0, 6, 3])
    bounds = Batch(net, x, y, Recipe("ibp", eps=0.1), Moment(0.1, 0.0, 1.0, 1.0)).bounds("ibp")
    low, high = difference_intervals(bounds, y)
    points = x + 0.1 * (2 * torch.rand(200, *x.shape).double() - 1)
    values = net(points.flatten(0, 1)).reshape(200, 3, 7)
    values = values - values.gather(2, y.expand(200, 3)[..., None])
    assert (values >= low - 1e-9).all() and (values <= high + 1e-9).all()
    assert (low.gather(1, y[:, None]) == 0).all() and (high.gather(1, y[:, None]) == 0).all()
    assert bounds.perturbation.norm == INF
