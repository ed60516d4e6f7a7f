"""Certificates of the sentences of a run, for scripts/check_certificate.py: a file for every row that bounds prove."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...certify.substitution import Substitutes, save_substitution_certificates
from ...network.models import SequenceClassifier
from ..arguments import EVERY_WORD
from ..words import Group
from .rows import BOUNDS, CERTIFIED, SentenceRow


def write_certificate(
    folder: Path, classifier: SequenceClassifier, vectors: Tensor, sentence: Group, row: SentenceRow
) -> None:
    """Write what a certified row states of its sentence, with the slopes of the cheapest method that proves it.

    Of what only a search has proved, by dividing the set, there is a file if "crown" proves it at once.
    """
    if row.verdict != CERTIFIED:
        return
    save_substitution_certificates(
        folder,
        classifier,
        vectors[sentence.numbers],
        torch.tensor([row.label]),
        Substitutes(vectors[sentence.choices], sentence.valid),
        None if row.budget == EVERY_WORD else row.budget,
        method=next((method for method in BOUNDS if row.bound(method) > 0), "crown"),
        names=[f"{row.index:05d}_{row.budget}"],
    )
