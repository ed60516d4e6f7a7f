"""Reading leaves a module as it was, and what cannot be read is refused in the user's words."""

import copy
import io

import pytest
import torch
from torch import nn

from utils.certify import certified_margin
from utils.network.trace import trace

X = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(3, dtype=torch.long)


class Keeping(nn.Module):
    """Keeps what ``keep(self, x, h)`` says."""

    def __init__(self, keep):
        super().__init__()
        self.rnn, self.head, self.keep, self.seen, self.table = (
            nn.GRU(3, 4, batch_first=True),
            nn.Linear(4, 3),
            keep,
            [],
            {},
        )
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x):
        h = self.rnn(x)[1][-1]
        return self.head(self.keep(self, x, h))


def keep_attribute(module, x, h):
    module.last = h
    return h


def keep_everywhere(module, x, h):
    module.seen.append(h)
    module.table["h"] = (h, x)
    module.cache = h
    module.count += 1
    module.head.inner = [h]
    return h


@pytest.mark.parametrize("keep", [keep_attribute, keep_everywhere])
def test_a_module_is_left_as_it_was(keep):
    module = Keeping(keep).eval()
    hooked = []
    hook = module.head.register_forward_hook(lambda own, given, out: hooked.append(out))
    names = {name: set(vars(part)) for name, part in module.named_modules()}
    weight = module.head.weight
    margins = certified_margin(module, X, LABELS, 0.01)
    assert {name: set(vars(part)) for name, part in module.named_modules()} == names
    assert (module.seen, module.table, module.cache, module.count.item(), hooked) == ([], {}, None, 0, [])
    assert module.head.weight is weight
    copy.deepcopy(module)
    hook.remove()
    torch.save(module, io.BytesIO())
    margins.sum().backward()
    assert weight.grad is not None
    # What a user's own call has kept stays.
    module(X)
    last = module.last if keep is keep_attribute else module.cache
    certified_margin(module, X, LABELS, 0.01)
    assert (module.last if keep is keep_attribute else module.cache) is last


def carry(module, x, h):
    module.state = h + getattr(module, "state", 0.0)
    return module.state


def test_a_state_carried_between_calls_is_named():
    module = Keeping(carry).eval()
    with pytest.raises(ValueError, match="carries a state from call to call, in self.state"):
        certified_margin(module, X, LABELS, 0.01)
    assert not hasattr(module, "state")
    module(X)
    state = module.state
    with pytest.raises(ValueError, match=r"left in self\.state, reset that"):
        certified_margin(module, X, LABELS, 0.01)
    assert module.state is state


class Reads(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.rnn, self.time_first, self.head = nn.GRU(3, 4, batch_first=True), nn.GRU(3, 4), nn.Linear(4, 3)
        self.attention, self.function = nn.MultiheadAttention(4, 2, batch_first=True), function

    def last(self, x):
        return self.head(self.rnn(x)[1][-1])

    def forward(self, x):
        return self.function(self, x)


def under_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module.last(x)


def attend(module, x):
    states = module.rnn(x)[0][:, None]
    return module.head(
        nn.functional.scaled_dot_product_attention(states, states, states, enable_gqa=True)[:, 0].mean(dim=1)
    )


REFUSED = {
    "time first": (lambda m, x: m.head(m.time_first(x)[1][-1]), "batch_first=True"),
    "autocast": (under_autocast, "under autocast, which rounds to torch.bfloat16"),
    "greater": (lambda m, x: m.last(x * (x > 0.5)), "^>: a mask or choice .* lengths to a SequenceClassifier"),
    "padding": (lambda m, x: m.last(x.masked_fill(x == 0, 1.0)), "^==: a mask"),
    "any": (lambda m, x: m.last(x) if x.any() else x, "^any: a mask"),
    "float": (lambda m, x: m.last(x) * float(x[0, 0, 0]), "must not depend on the input's values"),
    "rounded quotient": (lambda m, x: m.last(x.div(2, rounding_mode="floor")), "^/: only a division by constants"),
    "norm": (lambda m, x: m.last(x / x.norm(p=3, dim=-1, keepdim=True)), "^norm: a length is supported of order"),
    "attention": (attend, "attention.*: .*as many heads of keys"),
    "power": (lambda m, x: m.last(x**0.7), r"^\*\*: a power"),
    "whole numbers": (lambda m, x: m.last(x // 2), "^//: it rounds"),
    "order": (lambda m, x: m.last(x.sort(dim=1)[0]), "^sort: an order"),
    "numpy": (lambda m, x: m.last(torch.from_numpy(x.numpy())), "^numpy: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_true_cause_is_named_in_the_users_words(name):
    function, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        trace(Reads(function).eval(), X)
    message = str(caught.value)
    assert "\n" not in message and "Traced" not in message and "__r" not in message and "test_reading.py" in message


def test_no_line_of_this_collection_is_named():
    with pytest.raises(ValueError, match="hardshrink") as caught:
        certified_margin(nn.Sequential(nn.Flatten(), nn.Hardshrink()), X, LABELS, 0.01)
    assert ".py" not in str(caught.value)


@pytest.mark.parametrize(
    "divide",
    [lambda x: x / 2, lambda x: x / torch.full((3,), 2.0), lambda x: (x + 0).div_(2), lambda x: x.true_divide(2)],
)
def test_divisions_by_constants_are_read(divide):
    module = Reads(lambda m, x: m.last(divide(x))).eval()
    graph = trace(module, X, torch.float64)
    torch.testing.assert_close(graph.evaluate(X.double()).float(), module(X))
