"""What a certified training is told: the loss, the ball it is certified for, and how both come in gradually."""

from __future__ import annotations

from dataclasses import dataclass

from .ramp import Ramped, between, check_recipe, ramp_share

LOSSES = ("ibp", "crown-ibp", "crown", "sabr", "mtl-ibp")


@dataclass(frozen=True)
class Recipe:
    """A certified training, without what belongs to any training (rate, epochs, seed).

    Attributes:
        loss: one of ``LOSSES``, see ``utils.training.certified.losses``.
        p, eps: norm and radius of the balls, in the units of the model's inputs; for p = 0 how many values change, to
            anything in [0, 1].
        ball: around every frame, or around the whole sequence; a key of ``utils.choices.BALLS``.
        frames: which frames are perturbed; None for all.
        clip: whether balls are cut to [0, 1].
        overshoot: the balls grow to ``overshoot * eps``.
        clean, ramp: shares of the steps: without perturbation, and after which eps has its full size.
        falls: how often the rate falls once eps has its full size; before each it is at its largest.
        smooth: the ramp starts flat (its first quarter a power of time) instead of at once.
        kappa: share of the clean cross entropy in the loss, (at the start of the ramp, from its end on).
        beta: likewise, share of backward bounds against intervals (crown-ibp).
        fusion: one row bounds the whole loss in place of a row for each margin (crown-ibp and crown).
        box: share of the radius that SABR's small balls have; ``alpha`` that of the interval loss in MTL-IBP.
        attack_steps: of gradient descent, to the points of SABR and MTL-IBP.
        input_penalty: weight of the sum of the dual norms of all rows of weights that meet the input.
        tightness: weight of a penalty on how fast boxes grow through the network, during the ramp.
        hidden_scale: factor of a recurrent layer's initial hidden-to-hidden weights, by which boxes grow every step.
        input_rate: learning rate of a recurrent layer's weights that meet the input, as a multiple of all others'.
        adam_beta2: share of the running mean of squared gradients that Adam keeps at a step.
        hidden_shift: what every unit hands on to the next one in the beginning; see ``objective.start_shifted``.
    """

    loss: str = "ibp"
    p: float = float("inf")
    eps: float = 0.1
    ball: str = "frame"
    frames: tuple[int, ...] | None = None
    clip: bool = False
    overshoot: float = 1.1
    clean: float = 0.05
    ramp: float = 0.7
    falls: int = 1
    smooth: bool = False
    kappa: tuple[float, float] = (0.0, 0.0)
    beta: tuple[float, float] = (1.0, 0.0)
    fusion: bool = False
    box: float = 0.4
    alpha: float = 0.5
    attack_steps: int = 1
    input_penalty: float = 1e-4
    tightness: float = 0.0
    hidden_scale: float = 0.2
    hidden_shift: float = 0.0
    input_rate: float = 1.0
    adam_beta2: float = 0.999

    def __post_init__(self):
        check_recipe(self, LOSSES)


@dataclass(frozen=True)
class Moment:
    """Where a training is: size of the balls, share of the clean loss, share of backward bounds, share of the ramp."""

    eps: float
    kappa: float
    beta: float
    ramp: float


def moment_of(recipe: Recipe, progress: float) -> Moment:
    """The moment at a share ``progress`` of all steps."""
    share = ramp_share(recipe, progress)
    grown = smoothed(share) if recipe.smooth else share
    kappa, beta = between(recipe.kappa, share), between(recipe.beta, share)
    return Moment(recipe.overshoot * recipe.eps * grown, kappa, beta, share)


def smoothed(share: float, bend: float = 0.25, power: int = 4) -> float:
    """A ramp from 0 to 1 that begins as share ** power, and from ``bend`` on is the line that continues it."""
    slope = power * bend ** (power - 1)
    whole = bend**power + slope * (1.0 - bend)
    return (share**power if share < bend else bend**power + slope * (share - bend)) / whole


def rate_factor(recipe: Ramped, progress: float, falls: int = 1) -> float:
    """Share of the largest learning rate: all of it until the ramp ends, then falling in a line to a fiftieth.

    Where it falls more than once it begins anew at all of it (warm restarts, Loshchilov and Hutter 2017, in lines).
    """
    if progress <= recipe.ramp:
        return 1.0
    # Falls that are ahead, parts of one too.
    ahead = falls * max(0.0, 1.0 - progress) / max(1e-12, 1.0 - recipe.ramp)
    return max(0.02, ahead if ahead <= 1.0 else ahead % 1.0 or 1.0)
