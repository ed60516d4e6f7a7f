"""How margins are bounded: a method by name, and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from .tables import METHODS, RELAXATIONS

TUNED_METHODS = ("alpha", "curve", "bab")  # each certifies what the ones before it do, or more, as a rule
CURVED_METHODS = TUNED_METHODS[1:]
CERTIFIED_METHODS = ("crown", "ibp", "crown-ibp", *TUNED_METHODS)  # whose bounds a certificate's checker can follow
GRADIENT_METHODS = ("jacobian", "shell")  # integrate bounds of gradients
DIRECT_METHODS = ("crown", "fastlin", "ibp", "crown-ibp")  # one pass over the network: what bounds its layers
# In which gradients are followed through the layers; "shift" is for perceptrons.
DIRECTIONS = ("backward", "both", "shift")
CHAINS = ("joint", "chord", "recurjac", "interval")  # how gradients are bounded; see ``utils.jacobian``
FORWARD_METHODS = ("forward", "forward-backward")  # linear functions of the input are carried on
WITHOUT_MATRICES = (*DIRECT_METHODS, *FORWARD_METHODS, "ball", "alpha")  # which need none of a convolution
# Whose bounds are linear in the input; others know balls and boxes alone.
OF_ANY_SET = (*DIRECT_METHODS, *FORWARD_METHODS, "alpha")
WITH_SLOPES = ("ball", *TUNED_METHODS)  # that tune the slopes of planes; "ball" by itself

ALPHA_STEPS = 20  # gradient steps of slopes, unless told otherwise
CURVE_STEPS = 20  # likewise of curved bounds
SHELLS = 30  # of "jacobian" and "shell", unless told otherwise
TIME_LIMIT = 60.0  # seconds a sample of "bab", unless told otherwise


def start_of(name: str) -> str:
    """The method that a tuned one starts from: "bab" from alpha where it splits neurons in place of tuning curves."""
    return "curve or alpha" if name == "bab" else "crown"


@dataclass(frozen=True)
class Method:
    """A method and its settings; see ``utils.certify.certified_margin``.

    Attributes:
        name: a key of ``METHODS``.
        relaxation: of gate products, a key of ``RELAXATIONS``.
        alpha_steps: gradient steps of "ball" and "alpha", and of what "curve" and "bab" do before.
        curve_steps: gradient steps of "curve", and of what "bab" does before.
        time_limit: seconds that "bab" may take for a sample.
        chain: of "jacobian" and "shell": how gradients are bounded, one of ``CHAINS``.
        layers: likewise: the method that bounds the network's layers, one of ``DIRECT_METHODS``.
        shells: likewise: parts of a ball in which gradients are bounded.
    """

    name: str = "crown"
    relaxation: str = "plane"
    alpha_steps: int = ALPHA_STEPS
    curve_steps: int = CURVE_STEPS
    time_limit: float = TIME_LIMIT
    chain: str = CHAINS[0]
    layers: str = "crown"
    shells: int = SHELLS

    def __post_init__(self):
        METHODS.check(self.name)
        RELAXATIONS.check(self.relaxation)
        if self.shells < 1:
            raise ValueError(f"shells must be at least 1, not {self.shells}")
        if self.alpha_steps < 1:
            raise ValueError(f"alpha_steps must be at least 1, not {self.alpha_steps}")
        if self.curve_steps < 0:
            raise ValueError(f"curve_steps must not be negative, not {self.curve_steps}")
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be a positive number of seconds, not {self.time_limit}")
        for name, known in (("chain", CHAINS), ("layers", DIRECT_METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def tuned(self) -> bool:
        """Whether slopes are tuned to the sample."""
        return self.name in WITH_SLOPES

    @property
    def takes_convolutions(self) -> bool:
        """Whether it follows convolutions as such; the others ask for their matrices."""
        return self.name in WITHOUT_MATRICES

    @property
    def takes_any_set(self) -> bool:
        """Whether it follows any set, such as balls cut to a range, as such; the others take the ball around it."""
        return self.name in (*OF_ANY_SET, "ball") or self.curved

    @property
    def curved(self) -> bool:
        """Whether curved bounds follow."""
        return self.name in CURVED_METHODS

    @property
    def integrates(self) -> bool:
        """Whether bounds of gradients are integrated."""
        return self.name in GRADIENT_METHODS

    @property
    def branches(self) -> bool:
        """Whether each target is bounded by itself in the end, as long as there is time."""
        return self.name == "bab"
