"""Rows of the cascade's tables: what became of every image of a batch, a letter each, and what each stage took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...certify.cascade import ATTACK_STAGES, CLEAN, STAGES
from ...runs.rows import KeyedRow

# A letter an image: the stage that settled it.
LETTERS = {CLEAN: "w", "ibp": "i", "runner-up": "r", "pgd": "p", "crown-ibp": "m", "crown": "c", "alpha": "a"}
LETTERS |= {"curve": "k", "bab": "b", "": "-"}
WRONG, UNDECIDED, BROKEN = LETTERS[CLEAN], LETTERS[""], "".join(LETTERS[stage] for stage in ATTACK_STAGES)
VERIFIED = "".join(LETTERS[stage] for stage in STAGES if stage not in ATTACK_STAGES)


@dataclass(frozen=True)
class CascadeKey:
    """A model, a threat, a radius in pixel values, and a batch of the images drawn, which are sorted by number."""

    model: str
    norm: float
    ball: str
    eps: float
    first: int
    images: int

    @property
    def threat(self) -> tuple[float, str]:
        return self.norm, self.ball


@dataclass(frozen=True)
class CascadeRow(CascadeKey, KeyedRow):
    """The outcomes of a batch, a letter of ``LETTERS`` an image, and what each stage took.

    That is: how many images it tried, and the processor's seconds.
    """

    KEY: ClassVar[type] = CascadeKey

    outcomes: str
    clean_tried: int
    clean_seconds: float
    ibp_tried: int
    ibp_seconds: float
    runner_up_tried: int
    runner_up_seconds: float
    pgd_tried: int
    pgd_seconds: float
    crown_ibp_tried: int
    crown_ibp_seconds: float
    crown_tried: int
    crown_seconds: float
    alpha_tried: int
    alpha_seconds: float
    curve_tried: int
    curve_seconds: float
    bab_tried: int
    bab_seconds: float

    def cost(self, stage: str, kind: str) -> float:
        return getattr(self, column(stage, kind))


def column(stage: str, kind: str) -> str:
    """Where a row has what a stage took; ``kind`` is "tried" or "seconds"."""
    return f"{stage.replace('-', '_')}_{kind}"


Group = list[CascadeRow]  # all batches of a model and an eps


def letters_of(group: Group) -> str:
    """The outcomes of all images, a letter each."""
    return "".join(row.outcomes for row in group)
