"""Functions and layouts that are read: values as the module's, no attack outside the bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_output_bounds import extremes
from torch import nn

from utils.certify import output_bounds
from utils.network import UnsupportedError
from utils.network.trace import trace
from utils.relaxation.lines import ACTIVATIONS, Relaxation

T, N = 4, 6
W = torch.linspace(-1.0, 1.0, N * 3, dtype=torch.float64).reshape(N, 3).sin()
CONSTANT = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)


class Does(nn.Module):
    """A linear layer, what is tested, and another one on all that it gives."""

    def __init__(self, function, shape=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.shape = nn.Linear(N, N).double(), function, shape
        if isinstance(function, nn.Module):
            self.part = function.double()
        x = torch.zeros(1, T, N, dtype=torch.float64)
        size = function(self.first(x).reshape(1, *(shape or (T, N)))).numel()
        self.last = nn.Linear(size, 2).double()

    def forward(self, x):
        h = self.first(x)
        return self.last(self.function(h.reshape(len(x), *(self.shape or (T, N)))).flatten(1))


def channels(weight) -> nn.PReLU:
    layer = nn.PReLU(T)
    layer.weight.data = torch.tensor(weight)
    return layer.double()


class Attends(nn.Module):
    """Attention with its weights, which are read, too."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(N, 3, kdim=N, vdim=N, batch_first=True)

    def forward(self, h):
        mixed, share = self.attention(h, h, h)
        return torch.cat((mixed, share), dim=-1)


IMAGE = (2, 3, 4)
READ = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "logsigmoid": nn.LogSigmoid(),
    "softshrink": nn.Softshrink(0.3),
    "elu": nn.ELU(1.7),
    "celu": nn.CELU(0.6),
    "selu": nn.SELU(),
    "rrelu": nn.RReLU(),
    "threshold": nn.Threshold(0.2, 0.2),
    "prelu": nn.PReLU(),
    "prelu of channels": channels([0.1, -0.3, 0.25, 1.5]),
    "glu": nn.GLU(),
    "exp": lambda h: torch.exp(-h),
    "abs": lambda h: abs(h) + h.abs(),
    "square and cube": lambda h: h**2 + 0.1 * torch.pow(h, 3) + h.square(),
    "erf": torch.erf,
    "maximum": lambda h: torch.maximum(h[:, :2], h[:, 2:]) + torch.max(h[:, 1:3], CONSTANT),
    "minimum": lambda h: torch.minimum(CONSTANT, h) - torch.min(h, h.flip(1)),
    "lerp": lambda h: torch.lerp(h[:, :2], h[:, 2:], 0.3),
    "addcmul": lambda h: torch.addcmul(h, h.sigmoid(), h, value=0.5),
    "cumsum": lambda h: h.cumsum(1) + h.cumsum(dim=-1),
    "reflect": lambda h: F.pad(h, (2, 1), mode="reflect"),
    "replicate and circular": lambda h: F.pad(h, (1, 2), mode="replicate") + F.pad(h, (2, 1), mode="circular"),
    "windows": lambda h: h.unfold(1, 2, 1),
    "attention": lambda h: F.scaled_dot_product_attention(h, 0.5 * h, h.flip(1)),
    "attention of heads": Attends(),
    "layer of a transformer": nn.TransformerEncoderLayer(N, 2, 5, activation="gelu", batch_first=True),
    "normalised first": nn.TransformerEncoderLayer(N, 2, 5, batch_first=True, norm_first=True),
    "layer norm": nn.LayerNorm(N),
    "softmax within": lambda h: 3.0 * h.softmax(-1) + h.softmax(1).tanh(),
    "softmax that is moved, then read": lambda h: (
        (h.softmax(-1).mT.tanh(), h.softmax(-1).flatten(1)[..., None])[1]
        * h.softmax(-1).unsqueeze(1).split(2, dim=2)[0].sum(2)
    ),
    "greatest over an axis": lambda h: (
        h.amax(1) - h.max(dim=1).values.tanh() + 0.5 * h.min(1)[0] + h.amax(-1).sum(1)[:, None]
    ),
    "products": lambda h: h * h.tanh() + 0.1 * h * h + h @ h.mT @ h,
    "waves": lambda h: torch.sin(3.0 * h) + h.cos(),
    "logarithms": lambda h: (h.exp() + 0.1).log() + torch.log(0.5 + h**2) + (1.0 + h.abs()).log2(),
    "roots": lambda h: (h**2).sqrt() + (h.square().mean(-1, keepdim=True) + 0.3) ** -0.5 + (1.0 + h * h).rsqrt(),
    "division": lambda h: h / (1.0 + h.exp()) + 1.0 / (0.5 + h.abs()) + CONSTANT / (h.sigmoid() + 1.0),
    "root mean square norm": nn.RMSNorm(N, eps=1e-3),
    "root mean square norm written out": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 0.1),
    "group norm": nn.GroupNorm(2, T),
    "instance norm": nn.InstanceNorm1d(T, affine=True),
    "lengths": lambda h: torch.cat(
        [h.norm(dim=-1), torch.linalg.vector_norm(h, 1, dim=1), h.norm(float("inf"), dim=1)], dim=1
    ),
    "of length one": lambda h: F.normalize(h, dim=-1),
    "cosine": lambda h: F.cosine_similarity(h, CONSTANT, dim=-1),
    "log of a softmax": lambda h: h.log_softmax(-1).tanh() + h.logsumexp(1, keepdim=True),
    "masked sums of exponentials": lambda h: torch.cat(
        [
            h.masked_fill(torch.arange(N) == 0, -torch.inf).logsumexp(-1),
            h.masked_fill(torch.arange(N) == 0, -1e9).logsumexp(-1),
            h.masked_fill(torch.ones(T, N).triu(1) > 0, -torch.inf).logsumexp(-1).tanh(),
            h.masked_fill(torch.arange(N) == 2, -torch.inf).log_softmax(-1)[..., 1],
            h[..., :1].logsumexp(-1) + torch.norm(h, dim=(1, 2))[:, None],
        ],
        dim=1,
    ),
    "variance": lambda h: torch.cat((h.var(1), h.std(-1, correction=0)), dim=1),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "distances": lambda h: torch.cdist(h, W.T),
    "bilinear": lambda h: F.bilinear(h, h.tanh(), torch.einsum("ik,jk->kij", W, W.cos()), CONSTANT[:3]),
    "einsum": lambda h: torch.einsum("btn,nk->bkt", h, W),
}
IMAGES = {
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": lambda h: F.interpolate(h, size=(5, 3), mode="bilinear", align_corners=False),
    "columns": nn.Unfold(2, padding=1),
    "pixel shuffle": lambda h: F.pixel_unshuffle(F.pad(h, (0, 0, 0, 1)), 2),
    "channel shuffle": lambda h: F.channel_shuffle(h, 2),
}


def made(name: str) -> Does:
    shape = IMAGE if name in IMAGES else None
    return Does((READ | IMAGES)[name], shape).eval().requires_grad_(False)


def check(name: str, eps: float = 0.4) -> None:
    module = made(name)
    x = torch.randn(2, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(trace(module, x).evaluate(x), module(x), rtol=1e-9, atol=1e-9)
    least, most = extremes(module, x, eps, 2.0)
    for method in ("ibp", "crown"):
        found = output_bounds(module, x, eps, method=method)
        assert (found.lower <= least).all() and (most <= found.upper).all()
        assert found.lower.isfinite().all() and found.upper.isfinite().all()


@pytest.mark.parametrize("name", [*READ, *IMAGES])
def test_what_is_read_is_bounded(name):
    check(name)


def test_lines_that_cross_the_function_are_noticed(monkeypatch):
    honest = ACTIVATIONS["gelu"]

    def raised(*ends):
        lower, upper = honest.relax(*ends)
        return Relaxation(lower._replace(intercept=lower.intercept + 0.2), upper)

    monkeypatch.setitem(ACTIVATIONS, "gelu", honest._replace(relax=raised))
    with pytest.raises(AssertionError):
        check("gelu")


def test_a_least_value_that_is_not_one_is_noticed(monkeypatch):
    """What is known of operands: here of values of both signs it is claimed that none is below 2."""
    from utils.network.operations import norms

    check("division")
    monkeypatch.setattr(norms, "known_floor", lambda builder, x: 2.0)
    with pytest.raises((AssertionError, UnsupportedError)):
        check("division")


def test_a_logarithm_of_what_may_be_negative_is_said():
    module = Does(lambda h: h)
    module.function = lambda h: (h + 9.0).log()
    x = torch.zeros(1, T, N, dtype=torch.float64)
    assert output_bounds(module, x, 0.1).lower.isfinite().all()
    with pytest.raises(ValueError, match="log of values that may be as low as"):
        output_bounds(module, x, 30.0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (nn.Threshold(0.2, 5.0), "jumps"),
        (lambda h: h.amax(0), "one axis of a sample"),
        (lambda h: h.max(), "not over all values"),
        (lambda h: h**0.7, "whole exponent"),
        (lambda h: h[..., :1].std(-1), "variance of 1 values, divided by 0"),
        (lambda h: h.masked_fill(torch.eye(T, N) > 0, -torch.inf)[:, :, :T].logsumexp(-1), "same place of all rows"),
        (lambda h: torch.einsum("btn,btn->bt", h, h), "both depend"),
    ],
)
def test_what_is_not_read_is_said(function, words):
    module = Does(lambda h: h)
    module.function = function
    with pytest.raises(UnsupportedError, match=words):
        trace(module, torch.randn(2, T, N, dtype=torch.float64))


def test_of_numbers_that_overflow_nothing_is_known():
    module = Does(lambda h: (1e3 * h).logsumexp(-1) - (1e3 * h).logsumexp(-1).mean(1, keepdim=True))
    x = torch.zeros(1, T, N, dtype=torch.float64)
    for method in ("ibp", "crown"):
        found = output_bounds(module, x, 5.0, method=method)
        assert (found.lower == -torch.inf).all() and (found.upper == torch.inf).all()


def test_attention_in_onnx_files(tmp_path):
    pytest.importorskip("onnx")
    from test_onnx import node, write

    from utils.network.onnx_graph import read_onnx

    given = {"w": torch.linspace(-1.0, 1.0, 9).sin().reshape(3, 3), "g": torch.tensor([1.0, -0.5, 2.0])}
    nodes = [
        node("MatMul", "x", "w", output="q"),
        node("Transpose", "x", output="k", perm=[0, 2, 1]),
        node("MatMul", "q", "k", output="s"),
        node("Softmax", "s", output="p", axis=-1),
        node("MatMul", "p", "q", output="c"),
        node("LayerNormalization", "c", "g", "g", output="n", epsilon=1e-3),
        node("Mul", "n", "x", output="y"),
    ]
    assert read_onnx(write(tmp_path / "net.onnx", nodes, given, (1, 4, 3), 17, out=(1, 4, 3))).runs


ONNX = {
    "Elu": {"alpha": 1.7},
    "Celu": {"alpha": 0.6},
    "Selu": {},
    "PRelu": {},
    "Gelu": {},
    "Pow": {},
    "Max": {},
    "Min": {},
    "Mish": {},
    "HardSwish": {},
    "Softsign": {},
    "Erf": {},
    "Exp": {},
    "Abs": {},
    "Sin": {},
    "Cos": {},
    "Log": {},
    "Sqrt": {},
    "Reciprocal": {},
}


@pytest.mark.parametrize("kind", ONNX)
def test_operators_of_onnx_files(kind, tmp_path):
    """Reading compares with onnxruntime at random inputs."""
    pytest.importorskip("onnx")
    from test_onnx import node, write

    from utils.network.onnx_graph import read_onnx

    given = {"w": torch.linspace(-1.0, 1.0, 3 * 3).sin().reshape(3, 3)}
    second = {"PRelu": torch.tensor(0.2), "Pow": torch.tensor(3.0), "Max": torch.tensor(-0.1), "Min": torch.tensor(0.1)}
    names = ["h", *["s"] * (kind in second)]
    given |= {"s": second[kind]} if kind in second else {}
    nodes = [node("MatMul", "x", "w", output="h"), node(kind, *names, output="y", **ONNX[kind])]
    if kind in ("Log", "Sqrt", "Reciprocal"):
        nodes[1:] = [node("Exp", "h", output="e"), node(kind, "e", output="y")]
    opset = {"Gelu": 20, "Mish": 18}.get(kind, 17)
    assert read_onnx(write(tmp_path / "net.onnx", nodes, given, (4, 3), opset)).runs
