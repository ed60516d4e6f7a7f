"""What a tuned method gained over the one that it starts from is said, in one line."""

from __future__ import annotations

from utils.experiments.mnist import print_gain
from utils.runs.bound_rows import Row, summarize


def said(pairs, method, capsys) -> str:
    rows = [
        Row(n, 1, 1, 2, radius=radius, **({} if start is None else {"start_radius": start}))
        for n, (radius, start) in enumerate(pairs)
    ]
    print_gain(summarize(rows), method)
    return capsys.readouterr().out


def test_gains_are_counted_and_their_share_is_that_of_the_means(capsys):
    mixed = said([(0.2, 0.1), (0.1, 0.1), (0.0, 0.0), (0.3, None)], "curve", capsys)
    assert mixed == "curve gained nothing over crown on 1 of 2 radii; the mean radius is 50.0 % larger\n"


def test_a_method_that_gains_nothing_says_so_and_others_nothing(capsys):
    assert said([(0.1, 0.1), (0.2, 0.2)], "alpha", capsys) == "alpha gained nothing over crown on 2 of 2 radii\n"
    assert said([(0.1, None), (0.2, None)], "crown", capsys) == ""
    assert said([(0.1, None), (0.2, None)], "bab", capsys) == ""
