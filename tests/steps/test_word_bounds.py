"""Radii of single steps against the engine, attacks and substitutions; covered words; reports."""

import copy
import csv
import html.parser
import math
from dataclasses import replace

import pytest
import torch
from helpers import normal, seeded
from torch import nn

from data.text import Vocabulary
from utils.bounds.passes import BoundPass
from utils.certify import certified_radius
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.runs.results import ResultFolder
from utils.steps.arguments import COMPARED_COLUMNS
from utils.steps.step_bounds import sequence_radii, step_attacks, step_batches, step_radii
from utils.steps.word_bounds import neighbours
from utils.steps.word_report import html_page, most_sensitive, plot_sentences, plot_summary, sentence_lines, shade
from utils.steps.word_results import SentenceRow, WordRow, read_results, write_sentences
from utils.steps.word_summary import kind_of, place_bin, rank_correlation, summarize
from utils.training.text_models import TextModel

LENGTHS = torch.tensor([3, 1, 4])
LONGEST = 4


def gated(kind, layers=1, seed=0, **options):
    torch.manual_seed(seed)
    rnn = kind(3, 4, layers, batch_first=True)
    model = SequenceClassifier(rnn, nn.Linear(4, 3), **options).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.5)
    return model


MODELS = {
    "lstm": gated(nn.LSTM),
    "gru": gated(nn.GRU, seed=1),
    "rnn": gated(nn.RNN, seed=2),
    "two layers, normalised": gated(nn.LSTM, layers=2, mean=0.2, std=torch.tensor([0.5, 1.0, 2.0]).double()),
    "own state": gated(nn.LSTM, seed=3, state=(0.5 * normal(1, 4, seed=5), normal(1, 4, seed=6))),
}


def batch(model):
    x = normal(len(LENGTHS), LONGEST, 3, seed=9)
    return x, model(x, LENGTHS).argmax(dim=1)


@pytest.mark.parametrize(("name", "norm"), [*((name, 2.0) for name in MODELS), ("lstm", 1.0), ("gru", INF)])
def test_radii_are_those_of_the_whole_sequence_with_one_frame_perturbed(name, norm):
    model = MODELS[name]
    x, labels = batch(model)
    found = step_radii(model, x, labels, LENGTHS, norm=norm, tol=1e-2)
    for n, length in enumerate(LENGTHS.tolist()):
        assert found.radius[n, length:].isnan().all()
        alone = certified_radius(
            model,
            x[n, :length].expand(length, -1, -1),
            labels[n].expand(length),
            norm=norm,
            frames=torch.eye(length) > 0,
            tol=1e-2,
        )
        torch.testing.assert_close(found.radius[n, :length], alone, rtol=2e-2, atol=0.0)
        assert (found.failed[n, :length] > found.radius[n, :length]).all()


@pytest.mark.parametrize(
    ("name", "norm", "relaxation"),
    [
        *(("lstm", norm, "plane") for norm in (1.0, 2.0, INF)),
        ("gru", 2.0, "plane"),
        ("gru", INF, "line"),
        ("lstm", 1.0, "constant"),
    ],
)
def test_no_attack_inside_a_radius(name, norm, relaxation):
    model = MODELS[name]
    x, labels = batch(model)
    radius = step_radii(model, x, labels, LENGTHS, norm=norm, relaxation=relaxation, tol=1e-2).radius
    attack = step_attacks(model, x, labels, LENGTHS, norm=norm, tol=0.1)
    counts = radius.isfinite()
    assert counts.sum() == LENGTHS.sum() and (attack[~counts]).isnan().all()
    assert (radius[counts] > 0).all() and (radius[counts] <= attack[counts]).all()


def test_padding_does_not_matter():
    model = MODELS["lstm"]
    x, labels = batch(model)
    expected, whole = (find(model, x, labels, LENGTHS, tol=1e-2) for find in (step_radii, sequence_radii))
    other = x.clone()
    for n, length in enumerate(LENGTHS.tolist()):
        other[n, length:] = 1e3 * normal(LONGEST - length, 3, seed=n)
    wider = torch.cat((other, torch.full((3, 2, 3), 7.0).double()), dim=1)
    for variant in (other, wider):
        found = step_radii(model, variant, labels, LENGTHS, tol=1e-2).radius[:, :LONGEST]
        # Other strides may round otherwise, and a search may then end elsewhere in its bracket.
        torch.testing.assert_close(found, expected.radius, rtol=1e-2, atol=0.0, equal_nan=True)
    torch.testing.assert_close(sequence_radii(model, other, labels, LENGTHS, tol=1e-2), whole, rtol=1e-2, atol=0.0)


def test_misclassified_sequences_get_zero():
    model = MODELS["gru"]
    x, labels = batch(model)
    radius = step_radii(model, x, (labels + 1) % 3, LENGTHS).radius
    assert (radius[radius.isfinite()] == 0).all()


@pytest.mark.parametrize("method", ["crown", "ibp", "crown-ibp"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [(4, 3, 3, 1), (4, 4, 4, 2), (2, 2, 2, 2), (4, 1, 1, 1)], ids=str)
def test_steps_left_out_after_an_end_change_no_bound(name, lengths, method):
    model, lengths = MODELS[name], torch.tensor(lengths)
    x, every = normal(4, LONGEST, 3, seed=8), 0.05 * torch.ones(4, LONGEST).double()
    for eps in (every, every * (torch.arange(LONGEST) == 0)):
        short = Perturbation(
            x[:, : max(lengths)], (eps * (torch.arange(LONGEST) < lengths[:, None]))[:, : max(lengths)]
        )
        kept, left_out = (
            unroll(model, int(max(lengths)), None, "plane", lengths, falling) for falling in (False, True)
        )
        torch.testing.assert_close(left_out.evaluate(short.x), kept.evaluate(short.x))
        for rows in (torch.eye(3).double()[None], normal(4, 2, 3, seed=3)):
            expected = BoundPass(kept, short, method).margin(rows)
            torch.testing.assert_close(BoundPass(left_out, short, method).margin(rows), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 200])
def test_batches_hold_every_step_once(batch_size):
    lengths = torch.tensor([7, 1, 20, 20, 3])
    pairs = []
    for sample, step in step_batches(lengths, batch_size):
        assert 0 < len(sample) <= batch_size
        pairs += zip(sample.tolist(), step.tolist(), strict=True)
    assert sorted(pairs) == [(n, t) for n, length in enumerate(lengths.tolist()) for t in range(length)]


def test_models_that_read_backwards_are_refused():
    model = SequenceClassifier(nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="bidirectional"):
        step_radii(model, torch.zeros(1, 2, 3), torch.tensor([0]), torch.tensor([2]))
    model = SequenceClassifier(nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3), pooling="mean")
    with pytest.raises(ValueError, match="mean"):
        step_radii(model, torch.zeros(1, 2, 3), torch.tensor([0]), torch.tensor([2]))


# --- words ----------------------------------------------------------------------------------------------------------


def text_model(words=40):
    vectors = 0.4 * torch.randn(words, 3, generator=seeded(4))
    vocabulary = Vocabulary(["<pad>", "<unk>", *(f"w{n}" for n in range(2, words))])
    return TextModel(MODELS["lstm"], {"class_names": ["a", "b", "c"]}, vocabulary, vectors)


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_covered_words_by_brute_force(norm):
    model = text_model()
    numbers, radii = torch.tensor([2, 7, 1, 2]), torch.tensor([0.7, 0.0, 1.2, 9.0]).double()
    for number, radius, found in zip(
        numbers.tolist(), radii.tolist(), neighbours(model, numbers, radii, norm), strict=True
    ):
        own = model.embeddings[number].double()
        distances = {
            model.vocabulary.words[n]: sum(abs(v) ** norm for v in (vector.double() - own).tolist()) ** (1 / norm)
            if norm != INF
            else max(abs(v) for v in (vector.double() - own).tolist())
            for n, vector in enumerate(model.embeddings)
            if n > 1 and n != number
        }
        inside = sorted((d, word) for word, d in distances.items() if d <= radius)
        assert found["covered"] == len(inside)
        assert found["examples"].split() == [word for _, word in inside[:5]]
        assert found["nearest"] == min(distances, key=distances.get)
        assert found["distance"] == pytest.approx(min(distances.values()))


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_no_substitution_by_a_covered_word_changes_the_class(norm):
    model = text_model()
    numbers = torch.randint(2, 40, (6, 3), generator=seeded(1))
    lengths = torch.tensor([3, 2, 3, 3, 2, 1])
    labels = model.predict(numbers, lengths, torch.float64)
    radius = step_radii(model.classifier, model.embed(numbers).double(), labels, lengths, norm=norm, tol=1e-2).radius
    tried = 0
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            distance = torch.linalg.vector_norm(model.embeddings - model.embeddings[numbers[n, t]], ord=norm, dim=1)
            covered = (distance < radius[n, t]).nonzero().squeeze(-1)
            changed = numbers[n].repeat(len(covered), 1)
            changed[:, t] = covered
            found = model.predict(changed, lengths[n].expand(len(covered)), torch.float64)
            assert (found == labels[n]).all()
            tried += len(covered)
    assert tried > 20


# --- summaries and reports ------------------------------------------------------------------------------------------


def row(position, word="river", radius=0.5, index=0, words=4, **values):
    known = {
        "index": index,
        "position": position,
        "words": words,
        "word": word,
        "known": 1,
        "label": 1,
        "prediction": 1,
        "radius": radius,
        "failed_eps": radius * 1.001,
        "attack": 2 * radius,
        "text_radius": 0.1,
        "covered": 0,
        "examples": "",
        "nearest": "lake",
        "distance": 0.9,
        "norm": 1.0,
        "seconds": 0.01,
    }
    return WordRow(**known | values)


NASTY = "<script>&\"'</script>"
ROWS = [
    row(0, "what", 0.2),
    row(1, NASTY, 0.4, known=0, examples=NASTY, covered=1),
    row(2, "of", 0.6, attack=math.inf),
    row(3, "?", 0.8),
    row(0, "ocean", 0.0, index=3, words=1, nearest=NASTY),
]
SENTENCES = [SentenceRow(0, 1, 1, 4, 0.1, 'What, "really"\nof ?'), SentenceRow(3, 0, 0, 1, 0.0, "ocean")]


def test_kinds_and_places():
    assert [kind_of(word) for word in ("how", "the", "'s", "?", "...", "river", "b12")] == [
        "question word",
        "function word",
        "function word",
        "sign",
        "sign",
        "content word",
        "content word",
    ]
    assert [place_bin(row(t, words=5)) for t in range(5)] == [0, 1, 2, 3, 4]
    assert rank_correlation([0, 1, 2], [3.0, 4.0, 9.0]) == pytest.approx(1.0)
    assert rank_correlation([0, 1, 2], [3.0, 2.0, 2.0]) == pytest.approx(-math.sqrt(0.75))
    assert math.isnan(rank_correlation([0, 1, 2], [1.0, 1.0, 1.0]))


def test_summary():
    summary = summarize(ROWS, SENTENCES, [])
    assert (summary["texts"], summary["words"], summary["unknown_words"]) == (2, 5, 1)
    kinds = {entry["kind"]: entry for entry in summary["certified"]["kinds"]}
    assert kinds["question word"]["relative_radius"]["mean"] == pytest.approx(0.4)
    assert kinds["question word"]["most_sensitive_share"] == 1.0  # of the only text with more than one word
    assert kinds["question word"]["share_by_chance"] == pytest.approx(0.25)
    assert summary["certified"]["position_correlation"]["mean"] == pytest.approx(1.0)
    assert summary["radius_over_attack"]["mean"] == pytest.approx(0.5)


def test_console_rows():
    lines = sentence_lines(ROWS[:4])
    assert lines[0].split() == ["what", NASTY + "*", "of", "?"]
    assert lines[1].split() == ["----"]
    assert lines[2].split() == ["radius", "0.200", "0.400", "0.600", "0.800"]
    assert lines[3].split()[-2:] == ["inf", "1.600"]
    assert most_sensitive(ROWS[4:]) == {0} and shade(ROWS[4], ROWS[4:]) == 1.0
    long = sentence_lines([row(t, "word" * 5, words=40) for t in range(40)])
    assert max(map(len, long)) <= 112 and sum(line.count("word" * 5) for line in long) == 40


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.titles = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.titles += [value for name, value in attributes if name == "title"]
        assert not {name for name, _ in attributes} & {"src", "href"}

    def handle_data(self, data):
        self.texts.append(data)


def record():
    names = {"model": {"name": "lstm_4"}, "title": "words <l_2>", "class_names": ["A<b>", "B"], "arguments": {"p": 2.0}}
    return names | {"summary": summarize(ROWS, SENTENCES, [])}


def test_html_is_self_contained_and_escaped():
    content = html_page(ROWS, SENTENCES, record())
    page = Page()
    page.feed(content)
    assert "script" not in page.tags and "b" in page.tags and "http" not in content and "url(" not in content
    assert page.texts.count(NASTY) == 1 and "A<b>" in page.texts
    assert sum(NASTY in title for title in page.titles) == 2


@pytest.mark.parametrize("name", ["lstm", "gru", "two layers, normalised", "own state"])
def test_sequences_of_one_step_have_the_radius_of_the_whole(name):
    model = copy.deepcopy(MODELS[name]).double()
    x = normal(2, 1, 3, seed=9)
    labels, lengths = model(x).argmax(dim=1), torch.tensor([1, 1])
    whole = certified_radius(model, x, labels, tol=1e-2)
    for found in (step_radii(model, x, labels, lengths, tol=1e-2).radius[:, 0], step_radii_alone(model, x, labels)):
        torch.testing.assert_close(found, whole, rtol=2e-2, atol=0.0)
    assert (step_attacks(model, x, labels, lengths)[:, 0] >= whole).all()


def step_radii_alone(model, x, labels):
    one = torch.tensor([1])
    return torch.cat([step_radii(model, x[n : n + 1], labels[n : n + 1], one, tol=1e-2).radius[:, 0] for n in (0, 1)])


def test_reports_of_texts_of_one_word(tmp_path):
    rows = [row(0, "what", 0.2, words=1), row(0, "who", 0.4, index=3, words=1, attack=math.inf)]
    facts = record() | {"summary": summarize(rows, SENTENCES, [])}
    assert facts["summary"]["certified"]["places"] == [{"mean": None, "error": None}] * 5
    plot_sentences(rows, SENTENCES, facts).savefig(tmp_path / "a.png")
    plot_summary(facts).savefig(tmp_path / "b.png")
    assert "who" in html_page(rows, SENTENCES, facts)


def test_figures_are_drawn_from_any_words(tmp_path):
    rows = [row(0, "$a_b$"), row(1, "x" * 60, words=2), *ROWS[4:]]
    plot_sentences(rows, SENTENCES, record()).savefig(tmp_path / "a.png")
    plot_summary(record()).savefig(tmp_path / "b.png")


@pytest.mark.parametrize("compared", [{}, dict.fromkeys(COMPARED_COLUMNS, 0.25)])
def test_results_are_read_as_they_were_written(tmp_path, compared):
    signs = [row(0, ",", index=4), row(1, '"\u2603', index=4, examples="a , b")]
    rows = [replace(own, **compared) for own in (*ROWS, *signs)]
    results = ResultFolder(
        tmp_path, {"arguments": {}}, [own.key for own in rows], kind=WordRow, columns=tuple(compared)
    )
    results.append(rows)
    write_sentences(tmp_path, SENTENCES)
    assert read_results(tmp_path) == (rows, SENTENCES)
    with (tmp_path / "certified_bound.csv").open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    assert header[:4] == ["index", "position", "words", "word"] and ("line_radius" in header) == bool(compared)
    (tmp_path / "sentences.csv").write_text("index,label\n", encoding="utf-8")
    with pytest.raises(ValueError, match="header"):
        read_results(tmp_path)
