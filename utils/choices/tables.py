"""The tables: each name that a flag or a keyword argument takes, and what stands behind it."""

from __future__ import annotations

from .registry import Registry

# Makes a pass from a graph, a perturbation set, slopes (or None) and whether rounding is to be accounted for (estimates
# need not); see ``utils.bounds.BoundPass``. Ball, alpha, curve and bab are tuned: they begin with the pass that stands
# here, and ``utils.choices.Method`` says what follows; "jacobian" and "shell" take its settings.
METHODS = Registry(
    "method",
    {
        "crown": "bounds.methods:crown",
        "ibp": "bounds.methods:ibp",
        "crown-ibp": "bounds.methods:crown_ibp",
        "forward": "bounds.forward:forward",
        "forward-backward": "bounds.forward:forward_backward",
        "ball": "bounds.methods:ball",
        "alpha": "bounds.methods:crown",
        "curve": "bounds.methods:crown",
        "bab": "bounds.methods:crown",
        "fastlin": "bounds.methods:fastlin",
        "parabola": "bounds.parabola:parabola",
        "spectral": "jacobian.shells:spectral",
        "jacobian": "jacobian.shells:jacobian",
        "shell": "jacobian.shells:shell",
    },
)

# Slopes of the planes around a gate product, from the product and the box of its operands.
RELAXATIONS = Registry(
    "relaxation",
    {
        "plane": "relaxation.planes:contracting_slopes",
        "volume": "relaxation.planes:volume_optimal_slopes",
        "line": "relaxation.planes:line_slopes",
        "constant": "relaxation.planes:constant_slopes",
    },
)

# How the balls of frames make a set of sequences: a ``utils.perturbation.Ball``.
BALLS = Registry("ball", {"frame": "perturbation.balls:FRAME", "sequence": "perturbation.balls:SEQUENCE"})

# Attacks at a given eps, called like ``utils.attack.pgd``.
ATTACKS = Registry("attack", {"pgd": "attack.pgd:pgd"})

# Kinds of convolutional networks, made by ``utils.network.make_cnn``, with the channels of their first layers.
CNN_WIDTHS = {"small": 16, "large": 32, "cnn7": 64, "resnet": 16, "densenet": 32, "resnext": 32, "wide_resnet": 64}
