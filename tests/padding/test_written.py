"""Values written into tensors, masks of attention, products over chosen axes, projected states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_output_bounds import extremes
from test_padding import EPS, INF, SIZE, Net, check_inside, check_like_cut
from torch import nn

from utils.certify import output_bounds
from utils.network import UnsupportedError
from utils.network.operations import attention
from utils.network.trace import TracedModule

BATCH, T, N = 2, 3, 4
WORDS = torch.tensor([[3, 4, 5, 0], [1, 2, 0, 0]])
MATRIX = torch.linspace(-1.0, 1.0, T * N * 2, dtype=torch.float64).reshape(T, N, 2).sin()


class Does(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(N, N), nn.LazyLinear(2), function
        self.register_buffer("memory", torch.zeros(BATCH, T, N))
        self(torch.zeros(1, T, N))
        self.double().requires_grad_(False).eval()

    def forward(self, x):
        return self.last(self.function(self, self.first(x).tanh()).flatten(1))


def inputs() -> torch.Tensor:
    return torch.randn(BATCH, T, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def check_same(function, other, rtol=1e-9) -> None:
    """Bounds of one formulation are those of another, and the module's own values stay inside."""
    x, net, twin = inputs(), Does(function), Does(other)
    bounds, same = (output_bounds(one, x, EPS, norm=INF) for one in (net, twin))
    for side, own in zip(bounds, same, strict=True):
        torch.testing.assert_close(side, own, rtol=rtol, atol=1e-9)
    for k in range(BATCH):
        least, most = extremes(net, x[k : k + 1], EPS, INF)
        assert (least[0] >= bounds.lower[k] - 1e-9).all() and (most[0] <= bounds.upper[k] + 1e-9).all()


# --- writing ----------------------------------------------------------------------------------------------------------


def by_steps(make):
    def function(net, h):
        out = make(h)
        for t in range(T):
            out[:, t] = h[:, t] * (t + 1)
        return out

    return function


WRITTEN = {
    "zeros": by_steps(lambda h: torch.zeros(h.shape, dtype=h.dtype)),
    "empty": by_steps(lambda h: torch.empty(h.shape, dtype=h.dtype)),
    "like another": by_steps(torch.zeros_like),
    "new zeros": by_steps(lambda h: h.new_zeros(h.shape)),
    "a copy": by_steps(torch.clone),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_steps_written_into_a_tensor(name):
    check_same(WRITTEN[name], lambda net, h: torch.stack([h[:, t] * (t + 1) for t in range(T)], dim=1))


def test_constants_and_parts_that_are_written():
    def function(net, h):
        h = h.clone()
        h[:, 0, 1:3] = 0.5
        h[..., 3] = h[..., 0] + h[..., 1]
        return h

    def other(net, h):
        first = torch.cat((h[:, :1, :1], torch.full_like(h[:, :1, 1:3], 0.5), h[:, :1, 3:]), dim=2)
        h = torch.cat((first, h[:, 1:]), dim=1)
        return torch.cat((h[..., :3], (h[..., 0] + h[..., 1]).unsqueeze(-1)), dim=-1)

    check_same(function, other)


def test_a_buffer_that_is_written_to_is_left_as_it_was():
    def function(net, h):
        memory = net.memory[: len(h)]
        memory[:, 1] = h[:, 1]
        return memory.sum(1)

    net, x = Does(function), inputs()
    net.memory.fill_(0.25)
    buffer = net.memory
    output_bounds(net, x, EPS)
    assert net.memory is buffer and type(buffer) is torch.Tensor and torch.equal(buffer, torch.full_like(buffer, 0.25))
    buffer[0, 0, 0] = 1.0
    assert buffer[0, 0, 0] == 1.0


@pytest.mark.parametrize(
    "message, function",
    [
        ("rounded to torch.int64", lambda net, h: write(torch.zeros(h.shape, dtype=torch.int64), 0, h)),
        ("another view", lambda net, h: (h[:, 1], write(h, 0, 1.0))[0] + 1.0),
        ("not treated alike|computes something else", lambda net, h: row_of(h)),
        ("an index must not depend", lambda net, h: write(torch.zeros(4), h, 1.0)),
    ],
)
def test_what_cannot_be_written_is_refused(message, function):
    net = Does(lambda net, h: h)
    net.function = function
    with pytest.raises(UnsupportedError, match=message):
        output_bounds(net, inputs(), EPS)


def write(target, place, value):
    if isinstance(place, torch.Tensor):
        target[place] = value
    else:
        target[:, place] = value[:, place] if isinstance(value, torch.Tensor) else value
    return target


def row_of(h):
    out = torch.zeros(h.shape, dtype=h.dtype)
    out[0] = h[0]
    return out


def test_a_view_of_what_is_written_later_is_caught():
    """A view of an ordinary tensor does not see what is written: the comparison with the module does."""

    def function(net, h):
        out = torch.zeros(h.shape, dtype=h.dtype)
        first = out[:, 0]
        out[:, 0] = h[:, 0]
        return h[:, 1] + first

    with pytest.raises(UnsupportedError, match="computes something else"):
        output_bounds(Does(function), inputs(), EPS)


# --- products over chosen axes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, other",
    [
        (lambda net, h: torch.tensordot(h, MATRIX.to(h), 2), lambda net, h: h.flatten(1) @ MATRIX.to(h).flatten(0, 1)),
        (
            lambda net, h: torch.tensordot(MATRIX.to(h)[0], h, dims=([0], [2])).movedim(1, 0),
            lambda net, h: (h @ MATRIX.to(h)[0]).mT,
        ),
        (
            lambda net, h: torch.tensordot(h, MATRIX.to(h), dims=([1], [0])),
            lambda net, h: torch.einsum("btn,tmk->bnmk", h, MATRIX.to(h)),
        ),
    ],
)
def test_tensordot(function, other):
    check_same(function, other)


def test_tensordot_over_the_batch_is_refused():
    net = Does(lambda net, h: h)
    net.function = lambda net, h: torch.tensordot(torch.ones(2, 1).to(h), h, dims=([0], [0]))
    with pytest.raises(UnsupportedError, match="mixes the samples"):
        output_bounds(net, inputs(), EPS)


# --- masks of attention -----------------------------------------------------------------------------------------------


class Attends(Net):
    def __init__(self, between):
        super().__init__(between, kind=None, width=SIZE + 1)
        torch.manual_seed(1)
        self.wide = nn.Linear(SIZE, SIZE + 1)
        self.attention = nn.MultiheadAttention(SIZE + 1, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(SIZE + 1, 2, 5, batch_first=True)
        self.double().requires_grad_(False).eval()


def pooled(states, mask):
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def padded_keys(net, words, vectors):
    x, mask = net.wide(vectors), words != 0
    return pooled(net.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0], mask)


def encoder(net, words, vectors):
    mask = words != 0
    return pooled(net.layer(net.wide(vectors), src_key_padding_mask=~mask), mask)


def scaled(net, words, vectors):
    x, mask = net.wide(vectors), words != 0
    return pooled(F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None]), mask)


def causal(net, words, vectors):
    x, mask = net.wide(vectors), words != 0
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return pooled(
        net.attention(x, x, x, attn_mask=~past)[0] + F.scaled_dot_product_attention(x, x, x, is_causal=True), mask
    )


@pytest.mark.parametrize("between", [padded_keys, encoder, scaled, causal])
def test_masks_of_attention(between):
    net, words = Attends(between), WORDS if between is padded_keys else WORDS[1:]
    bounds = output_bounds(net, words, EPS, norm=INF)
    check_inside(net, words, bounds)
    check_like_cut(net, words, bounds)


def test_a_mask_that_is_left_out_is_caught(monkeypatch):
    monkeypatch.setattr(attention, "masked", lambda builder, scores, mask, takes_part=False: scores)
    net = Attends(padded_keys)
    with pytest.raises(UnsupportedError, match="computes something else"):
        output_bounds(net, WORDS, EPS, norm=INF)
    monkeypatch.setattr(TracedModule, "agrees", lambda self, *given: True)
    with pytest.raises(AssertionError):
        check_inside(net, WORDS, output_bounds(net, WORDS, EPS, norm=INF))


# --- projected states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_projected_lstm_is_the_loop_of_its_equations(bias):
    torch.manual_seed(2)
    rnn = nn.LSTM(N, 3, batch_first=True, proj_size=2, bias=bias).double().requires_grad_(False)

    def by_hand(net, h):
        state, cell = h.new_zeros(len(h), 2), h.new_zeros(len(h), 3)
        for t in range(T):
            gates = F.linear(h[:, t], rnn.weight_ih_l0.to(h)) + F.linear(state, rnn.weight_hh_l0.to(h))
            gates = gates + (rnn.bias_ih_l0 + rnn.bias_hh_l0).to(h) if bias else gates
            i, f, g, o = gates.chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = F.linear(o.sigmoid() * cell.tanh(), rnn.weight_hr_l0.to(h))
        return state

    check_same(lambda net, h: rnn(h.double())[1][0][-1] if h.dtype == torch.float64 else by_hand(net, h), by_hand, 1e-7)
