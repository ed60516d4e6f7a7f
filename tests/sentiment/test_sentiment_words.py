"""Sentences in groups of one length, and batches that training makes of them."""

import argparse

import torch

from data.sst import Sentence
from data.text import Vocabulary
from utils.network.checkpoint import build_model
from utils.sentiment.recipe import Recipe, moment_of
from utils.sentiment.training.net import SentimentNet
from utils.sentiment.training.objective import Plain, accuracy
from utils.sentiment.training.train import Best, split, train_epoch
from utils.sentiment.words import group_by_length
from utils.training.certified.recipe import rate_factor
from utils.training.loop import make_optimizer

VOCABULARY = Vocabulary(["<pad>", "<unk>", "a", "good", "fine", "film", "movie", "bad"])
SYNONYMS = {"good": ["fine"], "film": ["movie", "flick"], "bad": []}
SENTENCES = [
    Sentence("good film", 1),
    Sentence("a bad film", 0),
    Sentence("odd film", 1, (("odd", "good"), ("film", "movie"))),
    Sentence("bad", 0),
    Sentence("A good film", 1),
]


def test_groups_hold_one_length_and_the_sentences_substitutes():
    one, two, three = group_by_length(SENTENCES, VOCABULARY, SYNONYMS)
    assert [group.places.tolist() for group in (one, two, three)] == [[3], [0, 2], [1, 4]]
    assert two.numbers.tolist() == [[3, 5], [1, 5]] and two.labels.tolist() == [1, 1]
    assert two.choices.tolist() == [[[4], [6]], [[0], [6]]]  # an unknown word is not replaceable
    assert three.choices[1].tolist() == [[0], [4], [6]] and three.numbers[1, 0] == 2
    assert one.choices.tolist() == [[[0]]] and not one.valid.any()
    assert group_by_length(SENTENCES, VOCABULARY, SYNONYMS, max_words=1)[-1].places.tolist() == [3]


def make_net():
    torch.manual_seed(0)
    config = {"architecture": "transformer", "input_size": 4, "num_classes": 2, "width": 4, "heads": 2, "inner": 4}
    model = build_model(config | {"num_layers": 1, "layer_norm": "no-variance", "max_frames": None})
    return SentimentNet(torch.randn(len(VOCABULARY), 4), model, dropout=0.5, word_dropout=0.1)


def test_an_epoch_sees_every_sentence_once_in_batches_of_one_length():
    groups = group_by_length(SENTENCES * 3, VOCABULARY, SYNONYMS)
    assert split(groups, 4) == [(0, 0), (1, 0), (1, 4), (2, 0), (2, 4)]
    args = argparse.Namespace(lr=0.01, weight_decay=0.0, batch_size=4, seed=0)
    seen = []

    class Noting(Plain):
        def group_loss(self, net, group, progress):
            seen.append(group)
            return super().group_loss(net, group, progress)

    net = make_net()
    loss = train_epoch(net, groups, make_optimizer(net, args, 10, Noting()), Noting())
    assert loss > 0 and sorted(torch.cat([group.places for group in seen]).tolist()) == list(range(15))
    assert all(len(group) <= 4 for group in seen)
    for group in seen:  # a part keeps what belongs together
        for place, numbers in zip(group.places.tolist(), group.numbers.tolist(), strict=True):
            assert numbers == VOCABULARY.encode((SENTENCES * 3)[place].words)


def test_dropout_takes_the_same_numbers_from_a_word_and_its_substitutes():
    net, (_, two, _) = make_net(), group_by_length(SENTENCES, VOCABULARY, SYNONYMS)
    x, vectors = net.train().vectors(two)
    zero = x == 0.0
    assert zero.any() and torch.equal(zero[:, 0], zero[:, 1])
    assert torch.equal(vectors[0, 0, 0] == 0.0, zero[0, 0])
    x, vectors = net.eval().vectors(two)
    assert torch.equal(x, net.embedding.weight[two.numbers])
    with net.train().bounding() as classifier:  # a fixed function
        assert torch.equal(classifier(x), classifier(x))
    assert not torch.equal(classifier(x), classifier(x))


def test_best_epoch_is_kept():
    net = make_net().eval()
    groups = group_by_length(SENTENCES, VOCABULARY, SYNONYMS)
    best, kept = Best(net), None
    for score, shift in ((0.5, 0.0), (0.7, 1.0), (0.6, 2.0)):
        with torch.no_grad():
            net.classifier.head.bias += shift
        best.offer(score)
        kept = net.classifier.head.bias.clone() if score == 0.7 else kept
    again = Best(net)
    again.load_state_dict(best.state_dict())
    again.take()
    assert torch.equal(net.classifier.head.bias, kept)
    assert 0.0 <= accuracy(net, groups) <= 1.0


def test_schedule():
    recipe = Recipe("mixed", budget=5, clean=0.2, ramp=0.6, kappa=(1.0, 0.25), beta=(1.0, 0.5))
    start, middle, end = (moment_of(recipe, progress) for progress in (0.1, 0.4, 0.9))
    assert (start.eps, start.budget, start.kappa) == (0.0, 1, 1.0)
    assert abs(middle.eps - 0.5) < 1e-12 and middle.budget == 3
    assert (end.eps, end.budget, end.kappa, end.beta) == (1.0, 5, 0.25, 0.5)
    assert moment_of(Recipe("ibp"), 0.9).beta == 0.0
    assert rate_factor(recipe, 0.5) == 1.0 and rate_factor(recipe, 1.0) == 0.02
