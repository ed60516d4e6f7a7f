"""Replacements of words: all of them counted and tried, and a search that never claims more than there is."""

import itertools

import pytest
import torch

from utils.attack.substitution import Replaceable, all_choices, count_choices, worst_replacements
from utils.network.transformer import SequenceTransformer

BUDGETS = [0, 1, 2, 3, None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SequenceTransformer(4, 3, width=8, heads=2, inner=6).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return model


def sentence(model, seed, sizes=(2, 0, 3, 1, 2)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sizes), 4, generator=generator, dtype=torch.float64)
    vectors = x[:, None] + torch.randn(len(sizes), 4, 4, generator=generator, dtype=torch.float64)
    # the valid ones are the last of the four, so that a number of a substitute is no count of them
    valid = torch.arange(4) >= 4 - torch.tensor(sizes)[:, None]
    return Replaceable(model, x, int(model(x[None]).argmax()), vectors, valid, at_once=7)


def by_loops(given, budget):
    """The least margin, one sentence after the other."""
    least = float("inf")
    options = [[None, *row.nonzero().squeeze(1).tolist()] for row in given.valid]
    for choice in itertools.product(*options):
        if budget is not None and sum(s is not None for s in choice) > budget:
            continue
        words = [given.x[t] if s is None else given.vectors[t, s] for t, s in enumerate(choice)]
        logits = given.model(torch.stack(words)[None])[0]
        others = torch.cat((logits[: given.label], logits[given.label + 1 :]))
        least = min(least, float(logits[given.label] - others.max()))
    return least


def test_all_sentences_are_counted_and_made_once(model):
    given = sentence(model, 0)
    for budget, count in ((0, 1), (1, 9), (2, 9 + 23), (5, 3 * 4 * 2 * 3), (None, 72)):
        assert count_choices([2, 3, 1, 2], budget) == count
        choices = all_choices(given, budget)
        assert len(choices) == len(choices.unique(dim=0)) == count
        assert budget is None or int((choices > 0).sum(dim=1).max()) <= budget
    assert not given.sentences(choices).eq(0.0).any()  # none reads what is not valid (seeded vectors are never 0)


@pytest.mark.parametrize("seed", range(4))
def test_worst_of_all_is_that_of_loops_and_a_search_never_beats_it(model, seed):
    given = sentence(model, seed)
    exact = worst_replacements(given, BUDGETS, exhaustive=100)
    searched = worst_replacements(given, BUDGETS, exhaustive=0, beam=2)
    for true, found, budget in zip(exact, searched, BUDGETS, strict=True):
        assert true.exact and found.exact == (budget == 0)
        assert true.margin == pytest.approx(by_loops(given, budget), abs=1e-12)
        assert found.margin >= true.margin - 1e-12
        for worst in (true, found):  # the choice gives the margin, within its budget
            assert budget is None or len(worst.choice) <= budget
            words = given.x.clone()
            for position, substitute in worst.choice:
                assert given.valid[position, substitute]
                words[position] = given.vectors[position, substitute]
            logits = given.model(words[None])[0]
            others = torch.cat((logits[: given.label], logits[given.label + 1 :]))
            assert float(logits[given.label] - others.max()) == pytest.approx(worst.margin, abs=1e-12)
    assert exact[0].margin > exact[1].margin >= exact[2].margin >= exact[3].margin >= exact[4].margin
    assert searched[1].margin == pytest.approx(exact[1].margin, abs=1e-12)  # one word: all are tried in any case


def test_a_search_that_forgets_words_is_noticed(model):
    """What the test above compares with differs if a word's last substitute, or the second change, is left out."""
    given = sentence(model, 1)
    fewer = Replaceable(model, given.x, given.label, given.vectors, given.valid & (torch.arange(4) < 3))
    margins = [[worst.margin for worst in worst_replacements(one, BUDGETS)] for one in (given, fewer)]
    assert margins[0][4] < margins[1][4] - 1e-6
    assert margins[0][1] > margins[0][2] + 1e-6


def test_part_of_the_budgets_by_search_and_nothing_to_replace(model):
    given = sentence(model, 2)
    mixed = worst_replacements(given, [1, 3], exhaustive=10)
    assert [worst.exact for worst in mixed] == [True, False]
    assert mixed[1].margin >= worst_replacements(given, [3])[0].margin - 1e-12
    fixed = Replaceable(model, given.x, given.label, given.vectors, torch.zeros_like(given.valid))
    for exhaustive in (0, 100):
        (worst,) = worst_replacements(fixed, [2], exhaustive=exhaustive)
        assert worst.exact and worst.choice == () and worst.margin > 0
