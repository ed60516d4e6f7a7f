"""Bounds over replaced words against all sentences: margins, intervals of nodes, budgets, the hull, broken versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from word_nets import NETS, N, S, T, made, normal, sentences, words

from utils.bounds.passes import BoundPass
from utils.bounds.words import means, pairs
from utils.bounds.words.sources import WordSources
from utils.certify import certified_margin
from utils.certify.substitution import Substitutes, decide_substitution, substitution_margins
from utils.graph.mixing import MatMul
from utils.graph.sums import apply_rows
from utils.network.reading import graph_of, read_network
from utils.network.transformer import SequenceTransformer
from utils.perturbation.substitutions import Substitutions

METHODS = ("ibp", "crown-ibp", "crown")
BUDGETS = (0, 1, 2, None)
LABELS = torch.tensor([0, 2])


def worst(net, x, vectors, valid, budget) -> torch.Tensor:
    """Least margins over all sentences, (batch, 2)."""
    found = []
    for sample, label in enumerate(LABELS):
        logits = net(sentences(x[sample], vectors[sample], valid[sample], T if budget is None else budget))
        others = [k for k in range(3) if k != label]
        found.append((logits[:, label, None] - logits[:, others]).amin(dim=0))
    return torch.stack(found)


def check_net(name: str, methods=METHODS, seed: int = 0, size: float = 0.5) -> dict[str, torch.Tensor]:
    """Bounds are below the worst sentence for every budget; what is lost, by method."""
    net, (x, vectors, valid) = made(name, seed), words(seed=seed, size=size)
    truth = torch.stack([worst(net, x, vectors, valid, budget) for budget in BUDGETS], dim=-1)
    lost = {}
    for method in methods:
        found = substitution_margins(net, x, LABELS, Substitutes(vectors, valid), BUDGETS, method=method)
        assert found.isfinite().all() and (found <= truth + 1e-12).all(), method
        assert (found[..., 0] >= truth[..., 0] - 1e-9).all()  # nothing may change
        assert (found[..., 1:] <= found[..., :-1] + 1e-12).all()  # the more may change, the less is certified
        lost[method] = truth - found
    return lost


@pytest.mark.parametrize("name", NETS)
def test_no_bound_is_above_the_worst_sentence(name):
    lost = check_net(name)
    if name not in ("two layers, standard", "torch's layer"):  # which take seconds
        check_net(name, ("crown",), seed=1, size=2.0)
    assert lost["crown"].mean() <= lost["ibp"].mean() + 1e-9
    if "standard" not in name:  # where the variance is small, its inverse is large
        assert lost["crown"].mean() < 1.0


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_two_standard_norms_at_a_working_width(scale):
    """Also where a word may become zeros, which have no variance: bounds are finite and below the worst sentence."""
    torch.manual_seed(0)
    net = SequenceTransformer(64, 2, width=64, heads=4, inner=128, layers=2, layer_norm="standard").double().eval()
    for parameter in net.requires_grad_(False).parameters():
        parameter.mul_(scale if parameter.dim() == 2 else 1.0)
    x, valid = normal(1, T, 64), torch.ones(1, T, S, dtype=torch.bool)
    vectors = x[:, :, None] + torch.tensor([0.01, 1.0])[:, None] * normal(1, T, S, 64, seed=1)
    vectors[0, 0, 1] = 0.0
    label = net(x).argmax(dim=1)
    logits = [net(sentences(x[0], vectors[0], valid[0], budget)) for budget in range(T + 1)]
    truth = torch.stack([(own[:, label] - own[:, 1 - label]).min() for own in logits])
    for method in METHODS[:2]:  # crown takes seconds
        found = substitution_margins(net, x, label, Substitutes(vectors, valid), range(T + 1), method=method)[0, 0]
        assert found.isfinite().all() and (found <= truth + 1e-12).all()
        assert found[0] >= truth[0] - 1e-7


@pytest.mark.parametrize("name", ["transformer", "lstm, both directions", "bag"])
def test_single_precision(name):
    net, (x, vectors, valid) = made(name), words()
    truth = torch.stack([worst(net, x, vectors, valid, budget) for budget in BUDGETS], dim=-1)
    for method in METHODS:
        found = substitution_margins(
            net, x.float(), LABELS, Substitutes(vectors.float(), valid), BUDGETS, method=method, dtype=torch.float32
        )
        assert (found <= truth + 1e-6).all()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("budget", [1, pytest.param(3, marks=pytest.mark.full)])
def test_every_node_is_inside_its_interval(name, budget):
    net, (x, vectors, valid) = made(name), words(1)
    network, frames = read_network(net, x)
    graph = graph_of(network, T, torch.float64, "plane").detach()
    bounds = BoundPass(graph, Substitutions(frames, vectors, valid, budget))
    bounds.margin(torch.eye(3, dtype=torch.float64)[None])
    values = graph._values(sentences(x[0], vectors[0], valid[0], budget))
    for node, value in zip(graph.nodes, values, strict=True):
        known = bounds.known_interval(node)
        if known is not None:
            assert (known[0] <= value + 1e-12).all() and (value <= known[1] + 1e-12).all()


def test_a_linear_function_of_words_is_exact_for_every_budget():
    x, vectors, valid = words()
    rows = normal(2, 6, T, N, seed=5)
    for budget in range(T + 1):
        found = Substitutions(x, vectors, valid, budget)
        deviations = [found.frame_deviation(t, rows[:, :, t]) for t in range(T)]
        least = torch.einsum("brtn,btn->br", rows, x) - found.total_deviation(deviations)
        for sample in range(2):
            all_of_them = sentences(x[sample], vectors[sample], valid[sample], budget)
            truth = torch.einsum("rtn,stn->rs", rows[sample], all_of_them).amin(dim=-1)
            torch.testing.assert_close(least[sample], truth)
        # Mixtures of substitutes, and of sentences, are no worse.
        shares = torch.rand(100, 2, T, S + 1, dtype=torch.float64)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        moved = 1.0 - shares[..., 0]
        shares[..., 1:] *= (budget / moved.sum(dim=-1).clamp(min=max(budget, 1e-9)))[..., None, None]
        mixed = x + torch.einsum("pbts,btsn->pbtn", shares[..., 1:], found.moves[:, :, 1:])
        assert (torch.einsum("brtn,pbtn->pbr", rows, mixed) >= least - 1e-9).all()


def test_attention_of_a_fixed_query_is_exact():
    """Rows of a mean of words over all sentences, one head at a time."""
    net, (x, vectors, valid) = made("transformer"), words(1)
    graph = graph_of(*read_network(net, x)[:1], T, torch.float64, "plane").detach()
    node = next(node for node in graph.nodes if isinstance(node, MatMul) and node.shape.columns == 2)
    for budget in range(T + 1):
        bounds = BoundPass(graph, Substitutions(x, vectors, valid, budget), "crown-ibp")
        rows = torch.zeros(1, 6, node.size, dtype=torch.float64)
        rows[:, :3, :2], rows[:, 3:, 2:] = normal(1, 3, 2, seed=6), normal(1, 3, 2, seed=7)
        values = graph._values(sentences(x[0], vectors[0], valid[0], budget))[node.index]
        truth = apply_rows(rows, values).amin(dim=0)
        found = bounds.lower_bound(node, rows)[0]
        assert (found <= truth + 1e-13).all()
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-8)


def test_scores_of_a_first_layer_know_the_pairs_of_words():
    net, (x, vectors, valid) = made("two layers"), words(1)
    graph = graph_of(*read_network(net, x)[:1], T, torch.float64, "plane").detach()
    node = next(node for node in graph.nodes if isinstance(node, MatMul))
    for budget in range(T + 1):
        bounds = BoundPass(graph, Substitutions(x, vectors, valid, budget), "crown-ibp")
        values = graph._values(sentences(x[0], vectors[0], valid[0], budget))[node.index]
        low, high = bounds.interval(node)
        torch.testing.assert_close(low[0], values.amin(dim=0), rtol=0, atol=1e-10)
        torch.testing.assert_close(high[0], values.amax(dim=0), rtol=0, atol=1e-10)


# --- broken versions --------------------------------------------------------------------------------------------------


def one_word_less(monkeypatch):
    honest = Substitutions.largest

    def largest(self, deviations):
        self.budget = self.budget - 1
        found = honest(self, deviations)
        self.budget = self.budget + 1
        return found

    monkeypatch.setattr(Substitutions, "largest", largest)


def pairs_of_single_words(monkeypatch):
    honest = pairs._ends

    def ends(words, products, lines):
        return honest(words, products[:, :1, :1], lines)

    monkeypatch.setattr(pairs, "_ends", ends)


def ratio_not_proved(monkeypatch):
    monkeypatch.setattr(means, "_proved", lambda words, places, found: found + 0.02)


def centres_counted_twice(monkeypatch):
    def meet(self, node, coefficients, batch):
        found = honest(self, node, coefficients, batch)
        return None if found is None else 2.0 * found

    honest = WordSources.meet
    monkeypatch.setattr(WordSources, "meet", meet)


def check_margins(name: str):
    return lambda: [check_net(name, ("crown",), seed=seed) for seed in range(4)]


BROKEN = [
    (one_word_less, check_margins("two layers")),
    (one_word_less, check_margins("gru")),
    (ratio_not_proved, check_margins("transformer")),
    (centres_counted_twice, check_margins("gru")),
    (pairs_of_single_words, test_scores_of_a_first_layer_know_the_pairs_of_words),
]


@pytest.mark.parametrize(("damage", "check"), BROKEN)
def test_broken_versions_are_noticed(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "gru"])
def test_decisions_are_those_of_all_sentences(name, monkeypatch):
    monkeypatch.setattr("utils.certify.substitution.search.FEW", 1)
    monkeypatch.setattr("utils.certify.substitution.search.MOST", 1)
    seen = set()
    for seed in range(8):
        net, (x, vectors, valid) = made(name, seed), words(1, seed=seed, size=3.0)
        label = net(x).argmax(dim=1)
        for budget in (1, 2, None):
            logits = net(sentences(x[0], vectors[0], valid[0], T if budget is None else budget))
            others = [k for k in range(3) if k != int(label)]
            margins = (logits[:, label] - logits[:, others]).amin(dim=1)
            found = decide_substitution(net, x, label, Substitutes(vectors, valid), budget)
            assert found.status == ("certified" if margins.min() > 0 else "falsified")
            seen.add(found.status)
            if found.status == "falsified":
                changed = x[0].clone()
                for position, substitute in found.choice:
                    assert valid[0, position, substitute]
                    changed[position] = vectors[0, position, substitute]
                assert len(found.choice) <= (T if budget is None else budget)
                again = net(changed[None])[0]
                assert abs(float(again[label] - again[others].max()) - found.margin) < 1e-9
                assert found.margin <= 0
    assert seen == {"certified", "falsified"}


def test_a_decision_that_has_no_time_is_unknown():
    net, (x, vectors, valid) = made("gru"), words(1, size=3.0)
    vectors, valid = vectors.repeat(1, 6, 4, 1), valid.new_ones(1, 6 * T, 4 * S)
    x = x.repeat(1, 6, 1)
    label = net(x).argmax(dim=1)
    found = decide_substitution(net, x, label, Substitutes(vectors, valid), None, time_limit=1e-9)
    assert found.status in ("unknown", "falsified")


def test_gradients_reach_weights_words_and_substitutes():
    net, (x, vectors, valid) = made("transformer").requires_grad_(True), words()
    leaves = [x.requires_grad_(), vectors.requires_grad_()]
    for method in METHODS:
        found = substitution_margins(net, x, LABELS, Substitutes(vectors, valid), [2], method=method)
        weights = [net.entry.weight, net.layers[0].query.weight, net.head.weight]
        gradients = torch.autograd.grad(found.sum(), [*leaves, *weights])
        assert all((gradient != 0).any() and gradient.isfinite().all() for gradient in gradients)


def test_a_sentence_has_the_same_bounds_beside_any_other():
    """Of one word that can be replaced more is known, also where another sentence has more of them."""
    net, (x, vectors, valid) = made("lstm, both directions"), words()
    valid[0, 1:] = False
    together = substitution_margins(net, x, LABELS, Substitutes(vectors, valid), [1, None], method="crown")
    apart = Substitutes(vectors[:1], valid[:1])
    alone = substitution_margins(net, x[:1], LABELS[:1], apart, [1, None], method="crown")
    assert torch.allclose(together[:1], alone, rtol=1e-9, atol=0.0)


def test_margins_of_a_module_that_reads_word_numbers():
    """``certified_margin`` with word numbers as inputs, whose vectors the module looks up itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, N), made("gru")).double().eval()
    numbers = torch.tensor([[1, 2, 3], [4, 5, 6]])
    others = torch.tensor([[[2, 7], [8, 0], [1, 4]], [[1, 2], [3, 3], [7, 8]]])
    valid = others > 0
    x, vectors = net[0](numbers), net[0](others)
    substitutes = Substitutes.of_words(net[0], others, valid)
    for budget in (1, None):
        found = certified_margin(net, numbers, LABELS, budget, substitutions=substitutes, method="crown-ibp")
        truth = worst(net[1], x, vectors, valid, budget)
        assert (found <= truth + 1e-9).all() and found.isfinite().all()
    with pytest.raises(ValueError, match="leave out norm"):
        certified_margin(net, numbers, LABELS, 1, substitutions=substitutes, norm=1)


def test_what_does_not_fit_is_said():
    net, (x, vectors, valid) = made("gru"), words()
    with pytest.raises(ValueError, match="the substitutes"):
        substitution_margins(net, x, LABELS, Substitutes(vectors[:, :2], valid[:, :2]), [1])
    with pytest.raises(ValueError, match="method of substitutions"):
        substitution_margins(net, x, LABELS, Substitutes(vectors, valid), [1], method="curve")
    with pytest.raises(ValueError, match="whole numbers"):
        substitution_margins(net, x, LABELS, Substitutes(vectors, valid), [-1])


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "attention.md", "exec"), {"__name__": "page"})
