"""p = 0: at most k values change. Every choice of values at both ends of the range, bounds, counts and attacks."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import INF, classifier, normal
from torch import Tensor, nn

from utils.attack.attack_file import replay_attack, save_attack
from utils.attack.pgd import attack_radius, pgd
from utils.certify import certified_margin, certified_radius
from utils.certify.bab import decide
from utils.network.models import SequenceClassifier
from utils.perturbation import cut_balls
from utils.training.certified.losses import Batch, robust_loss
from utils.training.certified.recipe import Moment, Recipe

BATCH, FRAMES, SIZE, LOW, HIGH = 4, 3, 2, -1.0, 1.0
METHODS = ("ibp", "crown-ibp", "crown", "alpha")


def mlp() -> nn.Module:
    return weighted(nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))


def cnn() -> nn.Module:
    """Of two channels; the middle layer's neurons are bounded by windows."""
    first, second = nn.Conv2d(2, 3, 2, padding=1), nn.Conv2d(3, 2, 2)
    return weighted(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)))


def weighted(net: nn.Module) -> nn.Module:
    for number, parameter in enumerate(net.parameters()):
        parameter.data = 0.6 * normal(*parameter.shape, seed=number)
    return net.double().requires_grad_(False)


def gated(kind: type) -> SequenceClassifier:
    rnn, head = kind(SIZE, 4, batch_first=True), nn.Linear(4, 3)
    return SequenceClassifier(weighted(rnn), weighted(head))


NETS = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 3, 2)),
    "rnn": (lambda: classifier(inputs=SIZE), (FRAMES, SIZE)),
    "lstm": (lambda: gated(nn.LSTM), (FRAMES, SIZE)),
    "gru": (lambda: gated(nn.GRU), (FRAMES, SIZE)),
}
# What counts as one change, and over what; numbers of groups for the exhaustive search.
SEQUENCES = {"rnn", "lstm", "gru"}
COUNTED = {
    "values": ({"ball": "sequence"}, lambda shape: torch.arange(shape.numel())),
    "frames": ({"ball": "sequence", "together": "frame"}, lambda shape: torch.arange(FRAMES).repeat_interleave(SIZE)),
    "pixels": ({"together": "pixel"}, lambda shape: torch.arange(6).repeat(2)),
}


def question(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, inputs in the range with values at both of its ends, and the classes it gives them."""
    make, shape = NETS[name]
    net, x = make(), (0.8 * normal(BATCH, *shape, seed=7)).clamp(LOW, HIGH)
    x.view(BATCH, -1)[0, 0], x.view(BATCH, -1)[1, 1] = LOW, HIGH
    return net, x, net(x).argmax(dim=1)


def all_margins(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    scores = net(x)
    own = scores.gather(1, labels[:, None])
    return (own - scores).scatter(1, labels[:, None], torch.inf)


def exhaustive(net, x, labels, numbers: Tensor, count: int) -> Tensor:
    """The least margin, (batch,), over all choices of units whose values go to one end or the other each."""
    flat, least = x.flatten(1), all_margins(net, x, labels).amin(dim=1)
    units = numbers.unique().tolist()
    for chosen in itertools.combinations(units, min(count, len(units))):
        places = [place for place, unit in enumerate(numbers.tolist()) if unit in chosen]
        ends = torch.tensor(list(itertools.product((LOW, HIGH), repeat=len(places))), dtype=x.dtype)
        points = flat[:, None].repeat(1, len(ends), 1)
        points[:, :, places] = ends
        found = all_margins(net, points.reshape(-1, *x.shape[1:]), labels.repeat_interleave(len(ends)))
        least = torch.minimum(least, found.amin(dim=1).view(len(x), -1).amin(dim=1))
    return least


def fits(name: str, kind: str) -> bool:
    return {"values": True, "frames": name in SEQUENCES, "pixels": name == "cnn"}[kind]


CASES = [(name, kind) for name in NETS for kind in COUNTED if fits(name, kind)]


def check_counts(name: str, kind: str, methods=METHODS, dtype=torch.float64) -> None:
    net, x, labels = question(name)
    options, numbers = COUNTED[kind]
    for count in (0, 1, 2):
        worst = exhaustive(net, x, labels, numbers(x[0].shape), count)
        for method in methods:
            told = {"norm": 0, "clip": (LOW, HIGH), "method": method, "alpha_steps": 3, "dtype": dtype, **options}
            bound = certified_margin(net, x, labels, count, **told).amin(dim=1)
            room = 1e-9 if dtype == torch.float64 else 1e-4
            assert (bound <= worst + room).all(), (method, count)
            if count == 0:
                torch.testing.assert_close(bound.double(), worst, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_choice_of_values_is_below_a_bound(name, kind):
    check_counts(name, kind, METHODS if kind == "values" else METHODS[:-1])


@pytest.mark.parametrize("name", ("mlp", "cnn", "rnn"))
def test_single_precision(name):
    check_counts(name, "values", METHODS[:-1], torch.float32)


@pytest.mark.parametrize(("name", "kind"), [("mlp", "values"), ("cnn", "pixels"), ("rnn", "values"), ("rnn", "frames")])
def test_a_bound_that_forgets_a_change_is_caught(name, kind, monkeypatch):
    exact = cut_balls.largest_sum
    monkeypatch.setattr(cut_balls, "largest_sum", lambda gains, count: exact(gains, (count - 1.0).clamp(min=0.0)))
    with pytest.raises(AssertionError):
        check_counts(name, kind, ("crown",))


@pytest.mark.parametrize("name", ("mlp", "rnn"))
def test_a_room_on_the_wrong_side_is_caught(name, monkeypatch):
    """Room above and below x taken for each other: seen where x is near an end of the range."""
    fall = cut_balls.CutBalls._fall
    monkeypatch.setattr(cut_balls.CutBalls, "_fall", lambda self, a, low, high, *rest: fall(self, a, high, low, *rest))
    with pytest.raises(AssertionError):
        check_counts(name, "values", ("ibp", "crown"))


@pytest.mark.parametrize("name", NETS)
def test_changes_of_everything_are_the_whole_range(name):
    net, x, labels = question(name)
    middle = torch.zeros_like(x)
    for method in ("ibp", "crown-ibp"):
        every = certified_margin(net, x, labels, 99, norm=0, clip=(LOW, HIGH), ball="sequence", method=method)
        box = certified_margin(net, middle, labels, HIGH, norm=INF, method=method)
        if method == "ibp":
            torch.testing.assert_close(every, box)
        assert (every <= box + 1e-9).all() or method != "ibp"


@pytest.mark.parametrize("name", ("mlp", "rnn", "lstm"))
def test_a_ball_around_every_frame_counts_in_each(name):
    """With k values of every frame, those of the whole sequence are fewer; frames that are exact have none."""
    net, x, labels = question(name)
    told = {"norm": 0, "clip": (LOW, HIGH)}
    each = certified_margin(net, x, labels, 1, **told)
    assert (each <= certified_margin(net, x, labels, 1, ball="sequence", **told) + 1e-9).all()
    if name != "mlp":
        last = certified_margin(net, x, labels, 1, frames=FRAMES - 1, **told)
        assert (last >= each - 1e-9).all()
        assert (last <= exhaustive_last(net, x, labels)[:, None] + 1e-9).any(dim=1).all()


def exhaustive_last(net, x, labels) -> Tensor:
    least = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for place, end in itertools.product(range(SIZE), (LOW, HIGH)):
        point = x.clone()
        point[:, -1, place] = end
        least = torch.minimum(least, all_margins(net, point, labels).amin(dim=1))
    return least


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"), [("mlp", "crown"), ("mlp", "ibp"), ("mlp", "alpha"), ("cnn", "crown"), ("rnn", "crown")]
)
def test_the_largest_number_is_certified_and_the_next_is_not(name, method):
    net, x, labels = question(name)
    end = 0.27 if name == "rnn" else 0.06  # a narrow range, so that some can be certified
    x = end * x
    labels, told = net(x).argmax(dim=1), {"norm": 0, "clip": (-end, end), "ball": "sequence", "method": method}
    radius = certified_radius(net, x, labels, **told)
    most = x[0].numel()
    assert (radius == radius.round()).all() and (radius <= most).all()
    planes = told | {"method": "crown"} if method == "alpha" else told
    holds = {k: (certified_margin(net, x, labels, k, **planes) > 1e-7).all(dim=1) for k in range(1, most + 1)}
    for sample, count in enumerate(radius.int().tolist()):
        assert count == 0 or holds[count][sample] or method == "alpha"
        if method != "alpha":
            assert count == most or not holds[count + 1][sample]
    assert len(radius.unique()) > 1
    capped = certified_radius(net, x, labels, max_eps=1, **told)
    torch.testing.assert_close(capped, radius.clamp(max=1.0))


def test_whole_numbers_are_asked_for():
    net, x, labels = question("mlp")
    with pytest.raises(ValueError, match="whole numbers"):
        certified_margin(net, x, labels, 1.5, norm=0, clip=(LOW, HIGH))


# --- attacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_attacks_stay_in_the_set_and_are_hardly_worse_than_all_choices(name, kind):
    net, x, labels = question(name)
    options, numbers = COUNTED[kind]
    numbers = numbers(x[0].shape)
    for count in (1, 2):
        found = pgd(net, x, labels, count, norm=0, clip=(LOW, HIGH), steps=20, **options)
        points = found.x.reshape(x.shape)
        changed = torch.zeros(BATCH, int(numbers.max()) + 1).scatter_add_(
            1, numbers.expand(BATCH, -1), (points != x).flatten(1).float()
        )
        assert ((changed > 0).sum(dim=1) <= count).all()
        assert (points >= LOW).all() and (points <= HIGH).all()
        torch.testing.assert_close(all_margins(net, points, labels).amin(dim=1), found.margin)
        clean = all_margins(net, x, labels).amin(dim=1)
        assert (found.margin <= clean - 0.4 * (clean - exhaustive(net, x, labels, numbers, count))).all()


def test_the_fewest_changes():
    """Of a linear model greedy choices are best: the fewest that break it are known."""
    net = weighted(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)))
    x = (0.8 * normal(BATCH, 6, seed=7)).clamp(LOW, HIGH)
    labels = net(x).argmax(dim=1)
    found = attack_radius(net, x, labels, norm=0, clip=(LOW, HIGH), steps=10)
    certified = certified_radius(net, x, labels, norm=0, clip=(LOW, HIGH))
    torch.testing.assert_close(found.radius.clamp(max=7.0), certified + 1.0)
    broken = found.radius.isfinite()
    assert broken.any() and (found.margin[broken] < 0).all()
    assert ((found.x.reshape(x.shape) != x).sum(dim=1) <= found.radius.clamp(max=6.0)).all()


@pytest.mark.parametrize("name", ("mlp", "cnn", "rnn"))
def test_attacks_need_more_than_is_certified(name, tmp_path):
    net, x, labels = question(name)
    told = {"norm": 0, "clip": (LOW, HIGH), "ball": "sequence"}
    attacked = attack_radius(net, x, labels, steps=10, **told)
    assert (attacked.radius > certified_radius(net, x, labels, **told)).all()
    save_attack(tmp_path / "attack.pt", attacked, x, labels, **told)
    if name == "rnn":
        replay = replay_attack(tmp_path / "attack.pt", net)
        broken = attacked.radius.isfinite()
        assert replay.valid.all() and (replay.size[broken] == attacked.radius[broken]).all()


def test_decisions():
    net, x, labels = question("mlp")
    for count in (1, 2):
        worst = exhaustive(net, x, labels, torch.arange(6), count)
        verdicts = decide(net, x, labels, count, norm=0, clip=(LOW, HIGH), time_limit=5.0)
        for own, margin in zip(verdicts, worst.tolist(), strict=True):
            assert own.verdict != "certified" or margin > 0
            assert (
                own.verdict != "falsified" or int((own.counterexample.flatten() != x.flatten(1)).sum(1).min()) <= count
            )
        assert {"certified", "falsified"} & {own.verdict for own in verdicts}


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ("ibp", "crown-ibp", "crown"))
def test_losses_are_above_the_worst_one_and_fall(loss):
    torch.manual_seed(0)
    x = normal(30, 12, seed=1).sigmoid().round().float()
    y = (x[:, :6].sum(dim=1) > x[:, 6:].sum(dim=1)).long()
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    recipe, optimizer = Recipe(loss, 0.0, 1.0, input_penalty=0.0), torch.optim.Adam(net.parameters(), lr=0.03)
    losses = []
    for step in range(40):
        batch = Batch(net, x, y, recipe, Moment(1.0, 0.0, 0.5, 1.0), check=step == 0)
        total = robust_loss(batch)
        if step == 0:
            for place in range(12):
                for end in (0.0, 1.0):
                    point = x.clone()
                    point[:, place] = end
                    assert (nn.functional.cross_entropy(net(point), y, reduction="none") <= total + 1e-5).all()
        losses.append(float(total.mean()))
        optimizer.zero_grad()
        total.mean().backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
