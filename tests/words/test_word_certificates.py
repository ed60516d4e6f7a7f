"""Certificates of replaced words: confirmed where the engine certifies, below all sentences, and no other file is."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from nets import N, T, made_recurrent, sentences, words
from test_certificate import checker, exact_margin, read, run_checker, save

from utils.certify import Substitutes, save_substitution_certificates, substitution_margins
from utils.certify.certificate import describe_model
from utils.network import SequenceClassifier

NETS = {
    "lstm": {"kind": "LSTM"},
    "lstm, both directions": {"kind": "LSTM", "bidirectional": True},
    "gru": {"kind": "GRU"},
    "gru, two layers": {"kind": "GRU", "num_layers": 2},
    "rnn": {"kind": "RNN"},
    "relu, both directions": {"kind": "RNN", "nonlinearity": "relu", "bidirectional": True},
}
BUDGETS = (1, None)


def worst(net, x, vectors, valid, label, budget) -> float:
    """The least margin of all sentences of one sample."""
    logits = net(sentences(x, vectors, valid, T if budget is None else budget))
    others = [k for k in range(3) if k != label]
    return float((logits[:, label, None] - logits[:, others]).min())


def rigorous(net, x, vectors, valid, label, budget, slopes=()) -> float:
    """The checker's margin of one sample, whatever its sign, for slopes by (layer, direction, operation)."""
    header, arrays = describe_model(net)
    weights = {name: array.astype(np.float64) for name, array in arrays.items()}
    lists = [row[there].numpy() for row, there in zip(vectors, valid, strict=True)]
    set_ = {"x": x.numpy(), "substitutes": lists, "budget": T if budget is None else budget}
    others = [k for k in range(3) if k != label]
    certificate = set_ | {"label": label, "targets": others, "slopes": dict(slopes)}
    with np.errstate(all="ignore"):
        return float(checker.rigorous_margins(header["model"], weights, certificate).min())


# --- confirmed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_what_the_engine_certifies_is_confirmed(name, tmp_path):
    net, (x, vectors, valid) = made_recurrent(**NETS[name]), words(size=0.1)
    labels, count = net(x).argmax(dim=1), 0
    for budget in BUDGETS:
        folder = tmp_path / str(budget)
        paths = save_substitution_certificates(folder, net, x, labels, Substitutes(vectors, valid), budget)
        for path in paths:
            own = slice(int(path.stem[-1]), int(path.stem[-1]) + 1)
            found = checker.check(path)[2]
            given = net, x[own], labels[own], Substitutes(vectors[own], valid[own])
            engine = float(substitution_margins(*given, [budget], method="crown").min())
            truth = worst(net, x[own][0], vectors[own][0], valid[own][0], int(labels[own]), budget)
            assert engine - 1e-9 <= found <= min(truth, engine + 1e-6)
            count += 1
    assert count >= 2


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_slopes_of_cheaper_methods(method, tmp_path):
    net, (x, vectors, valid) = made_recurrent("GRU"), words(size=0.05)
    labels, given = net(x).argmax(dim=1), Substitutes(vectors, valid)
    paths = save_substitution_certificates(tmp_path, net, x, labels, given, [1, 2], method=method, names="ab")
    margins = substitution_margins(net, x, labels, given, [1, 2], method=method).amin(dim=1)
    assert [path.name for path in paths] == ["sample_a.npz", "sample_b.npz"]
    for n, path in enumerate(paths):
        assert margins[n, n] - 1e-9 <= checker.check(path)[2]
    assert any(name.startswith("slopes") for name in read(paths[0])[1]) == (method != "ibp")


def test_one_word_that_may_be_replaced_is_exact(tmp_path):
    """All that follows it reads this word alone."""
    net, (x, vectors, valid) = made_recurrent("LSTM"), words(1, size=1.0)
    valid[:, 1:] = False
    label = int(net(x).argmax(dim=1))
    found = rigorous(net, x[0], vectors[0], valid[0], label, None)
    assert found == pytest.approx(worst(net, x[0], vectors[0], valid[0], label, None), abs=1e-9)


def test_nothing_is_written_for_what_is_not_certified(tmp_path):
    net, (x, vectors, valid) = made_recurrent("LSTM"), words(size=3.0)
    given = net, x, net(x).argmin(dim=1), Substitutes(vectors, valid), 1
    assert save_substitution_certificates(tmp_path / "none", *given) == [] and not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="names"):
        save_substitution_certificates(tmp_path, *given, names=["one"])
    with pytest.raises(ValueError, match="SequenceClassifier"):
        save_substitution_certificates(tmp_path, torch.nn.Linear(N, 3), *given[1:])


# --- below all sentences, whatever the hints ------------------------------------------------------------------------


def excess(name: str, seed: int, size: float, hints: bool) -> float:
    """How far the checker's margins are above those of the worst sentences, at most, over budgets."""
    net, (x, vectors, valid) = made_recurrent(**NETS[name], seed=seed), words(1, seed=seed, size=size)
    vectors = vectors + size  # so that lists are far from symmetric
    label, slopes = int(net(x).argmax(dim=1)), {}
    random = np.random.default_rng(seed)
    kind = net.rnn.mode.split("_")[0].lower()
    for layer in range(net.rnn.num_layers if hints else 0):
        for direction in ("forward", "backward")[: 2 if net.rnn.bidirectional else 1]:
            for operation, operands in checker.OPERATIONS[kind].items():
                slopes[layer, direction, operation] = random.uniform(0, 0.5, (T, 2, operands, net.rnn.hidden_size))
    given = x[0], vectors[0], valid[0], label
    return max(rigorous(net, *given, k, slopes) - worst(net, *given, k) for k in (1, 2, 3))


@pytest.mark.parametrize("name", NETS)
def test_no_margin_is_above_the_worst_sentence(name, monkeypatch):
    cases = [(0, 0.1, True), (1, 0.1, False), (1, 1.0, True)]
    assert max(excess(name, *case) for case in cases) <= 0
    monkeypatch.setattr(checker, "POINT_WIDTH", -1.0)  # all by planes: looser, and sound as well
    assert max(excess(name, *case) for case in cases[:1]) <= 0


def range_errors() -> np.ndarray:
    """How far ends of ranges of linear functions of words lie inside of what sentences reach."""
    (x, vectors, valid), found = words(1, seed=3), []
    vectors, matrix = vectors[0] + 0.5, np.random.default_rng(0).standard_normal((6, T, N))
    lists = [row[given].numpy() for row, given in zip(vectors, valid[0], strict=True)]
    for budget, own in itertools.product((1, 2, 3), ([0], [1], [0, 1], [0, 1, 2])):
        there = valid[0] & torch.tensor([[t in own] for t in range(T)])
        values = np.einsum("mtn,stn->sm", matrix[:, own], sentences(x[0], vectors, there, budget)[:, own].numpy())
        net = checker.Network(by_intervals=False)
        set_ = {"x": x[0].numpy(), "substitutes": lists, "budget": budget}
        frames = net.add_inputs(*checker._inputs(set_, np.zeros(N), np.ones(N)))
        node = net.add(checker.Affine([frames[t] for t in own], [matrix[:, t] for t in own], np.zeros(6)))
        found += [node.low - values.min(axis=0), values.max(axis=0) - node.high]
    return np.concatenate(found)


def test_ranges_of_linear_functions_are_exact():
    assert range_errors().max() <= 1e-13 and range_errors().min() > -1e-11


def fewer_words(patch):
    own = checker.Replacements.deviation

    def deviation(self, falls):
        self.budget -= 1
        try:
            return own(self, falls)
        finally:
            self.budget += 1

    patch.setattr(checker.Replacements, "deviation", deviation)


def symmetric_range(patch):
    """As if a word could go as far up as down."""

    def take_points(self, low, high):
        self.points, self.tight = (low, high), True
        reach = np.minimum(high.max(axis=0) - high[0], low[0] - low.min(axis=0))
        self.low, self.high = low[0] - reach, high[0] + reach

    patch.setattr(checker.Node, "take_points", take_points)


def one_left_out(patch):
    own = checker.Word.__init__

    def init(self, place, vectors, *how):
        own(self, place, vectors[: max(1, len(vectors) - 1)], *how)

    patch.setattr(checker.Word, "__init__", init)


def mirrored_moves(patch):
    own = checker.middle_of

    def middle_of(low, high):
        middle, radius = own(low, high)
        return (2 * middle[:1] - middle if middle.ndim == 2 else middle), radius

    patch.setattr(checker, "middle_of", middle_of)


@pytest.mark.parametrize(
    "broken", [fewer_words, symmetric_range, one_left_out, mirrored_moves], ids=lambda f: f.__name__
)
def test_broken_rules_are_caught(broken, monkeypatch):
    broken(monkeypatch)
    assert range_errors().max() > 1e-3
    found = []
    for name in ("gru", "rnn", "relu, both directions"):
        with contextlib.suppress(checker.Rejected):  # two bounds of a node contradict each other
            found.append(max(excess(name, 1, 0.1, hints) for hints in (True, False)))
    assert max(found, default=np.inf) > 1e-3


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_error_terms_pay_for_all_rounding(kind, monkeypatch):
    """Of substitutes that are what they replace, nothing is between the bound and the true margin but rounding."""
    unsound, losses = 0, []
    for seed in range(3):
        net, (x, _, _) = made_recurrent(kind, seed=seed), words(1, seed=seed)
        net = SequenceClassifier(net.rnn, net.head, mean=0.1, std=0.3)
        vectors, valid = x[0][:, None].expand(-1, 2, -1), torch.ones(T, 2, dtype=torch.bool)
        exact = min(exact_margin(net, x[0], 0, other) for other in (1, 2))
        for width in (checker.POINT_WIDTH, -1.0):
            with monkeypatch.context() as patch:
                patch.setattr(checker, "POINT_WIDTH", width)
                found = rigorous(net, x[0], vectors, valid, 0, 2)
                assert found <= exact
                losses.append(float(exact - found))
                patch.setattr(checker, "gamma", lambda n: 0.0)
                for constant in ("U", "VALUE_ERROR", "SIGMOID_ERROR", "TINY"):
                    patch.setattr(checker, constant, 0.0)
                patch.setattr(checker.np, "nextafter", lambda a, b: a)
                unsound += rigorous(net, x[0], vectors, valid, 0, 2) > exact
    assert max(losses) < 1e-9
    assert unsound > 0


# --- tampered files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The certificate of a sentence of which one word may be replaced; of two, the bounds leave it open."""
    place, net = tmp_path_factory.mktemp("words"), made_recurrent("LSTM", bidirectional=True)
    x, vectors, valid = words(1)
    label, valid = net(x).argmax(dim=1), torch.ones_like(valid)
    for size in range(6, 20):
        given = Substitutes(x[:, :, None] + 0.5 * size * (vectors - x[:, :, None]), valid)
        margins = substitution_margins(net, x, label, given, [1, 2], method="crown").amin(dim=1)[0]
        if margins[1] < -1e-3:
            break
    assert margins[0] > 1e-3
    assert len(save_substitution_certificates(place, net, x, label, given, 1)) == 1
    return place


def hashed(header, arrays):
    """The header with hashes that fit what is in the file now."""
    header["sample"]["sha256"] = checker.hash_arrays(
        {name: arrays[name] for name in ("x", "substitutes")}, header["substitutions"]
    )
    header["sha256"] = checker.hash_arrays(arrays, {key: value for key, value in header.items() if key != "sha256"})


def smaller_budget(header, arrays):
    header["substitutions"]["budget"] = 0


def larger_budget(header, arrays):
    header["substitutions"]["budget"] = 2


def left_out(header, arrays):
    header["substitutions"]["counts"][0] -= 1
    arrays["substitutes"] = arrays["substitutes"][1:]


def moved_to_another_word(header, arrays):
    counts = header["substitutions"]["counts"]
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1


def moved(header, arrays):
    arrays["substitutes"] += 0.5 * np.arange(1, N + 1)


def moved_a_little(header, arrays):
    arrays["substitutes"][0, 0] += 1e-12


def another_label(header, arrays):
    header["label"], header["targets"][0] = header["targets"][0], header["label"]


def fewer_targets(header, arrays):
    header["targets"].pop()


def another_input(header, arrays):
    arrays["x"] = -arrays["x"]


def other_slopes(header, arrays):
    for name in arrays:
        if name.startswith("slopes"):
            arrays[name] = arrays[name] + 3.0


def other_method(header, arrays):
    header["method"] = "ibp"


FALSE = (larger_budget, moved, another_label, another_input, other_slopes)
TAMPERS = (*FALSE, smaller_budget, left_out, moved_to_another_word, moved_a_little, fewer_targets, other_method)


def tampered(folder, tmp_path, tamper, rehash):
    (path,) = folder.glob("sample_*.npz")
    header, arrays = read(path)
    tamper(header, arrays)
    if rehash:
        hashed(header, arrays)
    return save(tmp_path / path.name, header, arrays), folder / "weights.npz"


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda function: function.__name__)
def test_tampered_files_are_rejected(tamper, folder, tmp_path, capsys):
    """By a hash, whatever is changed; with new hashes by the margin, if what the file states is false."""
    path, weights = tampered(folder, tmp_path, tamper, rehash=False)
    code, out, err = run_checker(capsys, path, "--weights", weights)
    assert code == 1 and out.startswith("rejected: ") and "hash" in out and out.count("\n") == 1 and err == ""
    if tamper in FALSE:
        path, weights = tampered(folder, tmp_path, tamper, rehash=True)
        code, out, err = run_checker(capsys, path, "--weights", weights)
        assert code == 1 and "rigorous margin" in out and err == ""


def test_the_line_names_the_set(folder, tmp_path, capsys):
    (path,) = folder.glob("sample_*.npz")
    header, _ = read(path)
    code, out, err = run_checker(capsys, path)
    assert code == 0 and err == "" and "at most 1 of 3 frames replaced, each by one of its own list" in out
    assert header["sample"]["sha256"][:12] in out and "l_" not in out
    path, weights = tampered(folder, tmp_path, smaller_budget, rehash=True)  # true, and another set
    code, out, _ = run_checker(capsys, path, "--weights", weights)
    assert code == 0 and "at most 0 of 3 frames" in out and header["sample"]["sha256"][:12] not in out


def within(key, value):
    return lambda header, arrays: header["substitutions"].update({key: value})


def curved(header, arrays):
    slopes = {name: array for name, array in arrays.items() if name.startswith("slopes")}
    arrays |= {name.replace("slopes", "curvatures"): 0 * array for name, array in slopes.items()}


DAMAGES = {
    "no table": lambda header, arrays: header.update(substitutions=[1]),
    "negative budget": within("budget", -1),
    "budget of words that are not there": within("budget", 4),
    "half a budget": within("budget", 0.5),
    "true": within("budget", True),
    "counts of other words": within("counts", [2, 2]),
    "negative counts": within("counts", [5, -1, 0]),
    "counts of other substitutes": within("counts", [2, 2, 1]),
    "no hash": lambda header, arrays: header.pop("sha256"),
    "eps as well": lambda header, arrays: arrays.update(eps=np.zeros(3)),
    "curvatures": curved,
    "NaN": lambda header, arrays: arrays.update(substitutes=arrays["substitutes"] * np.nan),
    "no substitutes": lambda header, arrays: arrays.pop("substitutes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_end_in_one_line(name, folder, tmp_path, capsys):
    path, weights = tampered(folder, tmp_path, DAMAGES[name], rehash=False)
    code, out, err = run_checker(capsys, path, "--weights", weights)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
