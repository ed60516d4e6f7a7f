"""Arguments as users have them: converted, or refused in one line; torch's global state changes no result."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from utils.attack import attack_radius, carlini_wagner, clever, pgd
from utils.certify import certified_margin, certified_radius, decide, output_bounds, save_certificates
from utils.models import SequenceClassifier
from utils.network.trace import trace


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x / 0.5)[1][-1])


def networks():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 3)
    own = Own().eval()
    lstm = SequenceClassifier(nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)).eval()
    return x, {"classifier": lstm, "module": own, "graph": trace(own, x, torch.float32)}


X, MODELS = networks()
LABELS = {name: (MODELS["module"] if name == "graph" else model)(X).argmax(dim=1) for name, model in MODELS.items()}
CALLS = {
    "margin": lambda *given: certified_margin(*given, 0.02),
    "ibp": lambda *given: certified_margin(*given, 0.02, method="ibp"),
    "curve": lambda *given: certified_margin(*given, 0.02, method="curve", norm="inf", alpha_steps=1, curve_steps=1),
    "radius": lambda *given: certified_radius(*given, tol=0.1),
    "decide": lambda *given: decide(*given, 1e-3)[0].margins,
    "pgd": lambda *given: pgd(*given, 0.3, steps=2, restarts=1).margin,
    "attack": lambda *given: attack_radius(*given, steps=2, restarts=1, tol=0.5).radius,
    "cw": lambda *given: carlini_wagner(*given, steps=2, searches=1).radius,
    "clever": lambda *given: clever(*given, batches=2, points=4),  # fewer than are fitted
}


@contextlib.contextmanager
def changed(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


STATES = {
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: changed(torch.set_default_device, "meta", None),
    "inference": torch.inference_mode,
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "short products": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
}


@pytest.fixture(scope="module", params=MODELS)
def answers(request):
    given = (MODELS[request.param], X, LABELS[request.param])
    names = [name for name in CALLS if request.param == "classifier" or name != "curve"]  # it is slow
    return given, {name: CALLS[name](*given).detach() for name in names}


@pytest.mark.parametrize("state", STATES)
def test_torchs_state_changes_no_result(answers, state):
    (model, x, labels), expected = answers
    for name in expected:
        with STATES[state]():
            found = CALLS[name](model, x.clone() if state != "meta" else x, labels)
        found = found.detach().clone()
        assert found.dtype == expected[name].dtype
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_model_of_inference_mode_and_of_another_type():
    expected = certified_radius(MODELS["module"], X, LABELS["module"])
    with torch.inference_mode():
        copy = Own().eval()
        copy.load_state_dict(MODELS["module"].state_dict())
    torch.testing.assert_close(certified_radius(copy, X, LABELS["module"]), expected)
    with STATES["float64"]():
        torch.manual_seed(0)
        model, x = SequenceClassifier(nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)).eval(), torch.randn(3, 5, 4)
        found = certified_radius(model, x, model(x).argmax(dim=1))
    torch.testing.assert_close(found, certified_radius(model, x, model(x).argmax(dim=1)))
    assert (found > 0).all()


@pytest.mark.parametrize("name", ["margin", "radius", "decide", "pgd", "attack", "cw", "clever"])
def test_lists_and_arrays(name):
    model, labels = MODELS["classifier"], LABELS["classifier"]
    expected = CALLS[name](model, X, labels)
    variants = [(X.tolist(), labels.tolist()), (X.numpy(), labels.numpy().astype(np.uint8)), (list(X), list(labels))]
    for x, own in variants:
        torch.testing.assert_close(CALLS[name](model, x, own), expected)
    torch.testing.assert_close(CALLS[name](torch.compile(model), X, labels), expected)
    torch.testing.assert_close(CALLS[name](nn.DataParallel(model, device_ids=[]), X, labels), expected)


def test_other_arguments_are_converted(tmp_path):
    model, labels = MODELS["classifier"], torch.tensor([0, 0])
    expected = certified_margin(model, X, labels, 0.1, targets=torch.tensor([2, 2]), norm=math.inf, clip=(0, 1))
    for norm in ("inf", "linf", "l_inf", np.inf, torch.tensor(math.inf)):
        eps = np.array([0.1, 0.1])
        found = certified_margin(model, X, labels, eps, targets=2, norm=norm, clip=np.array([0.0, 1.0]))
        torch.testing.assert_close(found, expected)
    expected = certified_margin(model, X, labels, 0.1, frames=[0, 2], lengths=torch.tensor([3, 2]))
    mask = np.array([True, False, True])
    torch.testing.assert_close(certified_margin(model, X, [0, 0], [0.1, 0.1], frames=mask, lengths=[3, 2]), expected)
    exact = certified_margin(model, X.double(), labels, torch.full((2,), 0.1, dtype=torch.float64))
    assert torch.equal(certified_margin(model, X.double(), labels, [0.1, 0.1]), exact)  # 0.1 in float64, not float32
    paths = save_certificates(tmp_path, model, X.tolist(), LABELS["classifier"].tolist(), [1e-3, 1e-3], names=[3, 4])
    assert [path.name for path in paths] == ["sample_3.npz", "sample_4.npz"]


def test_decide_takes_lengths_and_radii_of_frames():
    model, lengths = MODELS["classifier"], torch.tensor([3, 2])
    labels = model(X, lengths).argmax(dim=1)
    shares = torch.tensor([[0.4, 0.2, 0.4], [0.4, 0.4, 50.0]])  # the last is of a frame that does not count
    eps = certified_radius(model, X, labels, lengths=lengths)[:, None] * shares
    found = decide(model, X, labels, eps, lengths=lengths.tolist(), relaxation="line")
    assert [one.verdict for one in found] == ["certified", "certified"]
    for name in ("method", "alpha_steps", "curve_steps"):
        with pytest.raises(ValueError, match=f"leave out {name}"):
            decide(model, X, labels, eps, **{name: 3})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": torch.sin}, "nn.Module whose forward"),
        ({"model": "model.pt"}, "load_checkpoint"),
        ({"model": nn.LSTM}, "instance"),
        ({"model": {}}, "load_state_dict"),
        ({"model": None}, "NoneType"),
        ({"model": type("ExportedProgram", (), {})()}, "the module that was exported"),
        ({"x": "a"}, "x must be"),
        ({"x": [[[1.0], [1.0, 2.0]]]}, "x must be"),
        ({"labels": [0.5, 1.0]}, "labels must be"),
        ({"labels": ["a", "b"]}, "labels must be"),
        ({"targets": 1.5}, "targets must be"),
        ({"targets": "next"}, "targets must be"),
        ({"lengths": "a"}, "lengths must be"),
        ({"eps": "a"}, "eps must be"),
        ({"eps": None}, "eps must be"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
        ({"eps": [0.1, 0.2, 0.3]}, "eps must be"),
        ({"norm": "l3"}, "p must be 1, 2 or inf"),
        ({"norm": None}, "p must be 1, 2 or inf"),
        ({"clip": (2, 0)}, r"clip must be \(lowest, highest\)"),
        ({"clip": 3}, "clip must be"),
        ({"clip": (0, math.nan)}, "clip must be"),
        ({"frames": "first"}, "frames must be"),
        ({"ball": "box"}, "ball must be"),
    ],
)
def test_what_cannot_be_converted_is_named(change, part):
    given = {"model": MODELS["classifier"], "x": X, "labels": [0, 0], "eps": 0.1} | change
    for call in (certified_margin, decide, pgd):
        if call is pgd and "lengths" in change:
            continue
        with pytest.raises(ValueError, match=part) as caught:
            call(**given)
        assert "\n" not in str(caught.value)


def test_names_of_arguments():
    for call in (pgd, decide):
        with pytest.raises(ValueError, match="no argument 'nrom'"):
            call(MODELS["classifier"], X, [0, 0], 0.1, nrom=2)
    with pytest.raises(ValueError, match="leave out lengths"):
        pgd(MODELS["classifier"], X, [0, 0], 0.1, lengths=[3, 3])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_bounds_nothing(half):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, labels = torch.linspace(-1.0, 1.0, 8).reshape(2, 4).to(half), torch.tensor([0, 2])
    margins = certified_margin(model, x, labels, 0.1)
    assert torch.equal(margins, certified_margin(model, x.float(), labels, 0.1))
    for asked in (
        lambda: certified_margin(model, x, labels, 0.1, dtype=half),
        lambda: output_bounds(model, x, 0.1, dtype=half),
    ):
        with pytest.raises(ValueError, match="torch.float32 or torch.float64, not"):
            asked()
