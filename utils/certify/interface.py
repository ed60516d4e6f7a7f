"""Certified margins and radii of a classifier: the Python interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..choices.method import ALPHA_STEPS, CURVE_STEPS, TIME_LIMIT, Method
from ..graph.graph import Graph
from ..network.state import plain_state
from ..question.arguments import check_precision
from ..question.question import Question
from ..question.threat import Frames, Threat
from .bab import TUNING, best_margins
from .problem import MarginProblem
from .radius import MAX_EPS, search_radius
from .results.progress import Progress
from .substitution import Substitutes, substitution_margins


@plain_state()
def certified_margin(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor | None,
    *,
    norm: float = 2.0,
    targets: Tensor | None = None,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    features: Any = None,
    scales: Any = None,
    together: Any = None,
    box: Any = None,
    substitutions: Substitutes | None = None,
    extra: Any = None,
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    time_limit: float = TIME_LIMIT,
    chain: str = "joint",
    layers: str = "crown",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lower bounds of the margins over all perturbations of size eps; differentiable in the model and in x.

    Arrays and lists are as good as tensors, of x, labels and everything else.

    Args:
        model: the classifier, any module whose forward ``utils.network`` can read, or a graph; its weights are read,
            never changed.
        x: (batch, T, n) sequences in the model's input units. Inputs of a module may also be (batch, T) whole numbers
            of words, whose vectors are perturbed then, or of another shape, (batch, ...), which is one frame.
        labels: (batch,) classes that must win. Of a model with one score a sample, (batch,) or (batch, 1), 1 where the
            score must stay positive (after a sigmoid: above 1/2) and 0 where it must stay negative. Of a model with
            outputs of every step, (batch, T, classes) or one score a step, (batch, T): as in torch's losses, a step
            with the label -100 asks for nothing.
        eps: radius in the units of x: a number, (batch,), or (batch, T) for one radius a frame. For p = 0 how many
            values change, a whole number.
        norm: p of the l_p balls: 1, 2 or inf, also as "l1", "l2", "linf"; or 0: at most eps values change, to anything
            in the range ``clip``, of every frame or of the whole sequence, as ``ball`` says.
        targets: classes to beat, one for all, (batch,) or (batch, n_specs); None for every other class.
        frames: which frames are perturbed (``frame_mask``); the others are exact. None for all.
        clip: valid input range (lowest, highest) to which balls are cut.
        ball: "frame" for a ball around every frame, "sequence" for one around the whole sequence.
        method: "crown", "ibp" or "crown-ibp" (``utils.bounds``); "forward" or "forward-backward": layers by linear
            functions of the input (``bounds.forward``); "ball": layers as l_2 balls, with slopes tuned to the
            sample (``bounds.balls``; p = 2, feed-forward networks); "alpha": "crown" with slopes tuned to the sample;
            "curve": curved bounds as well, slopes and curvatures tuned (``bounds.curve``); "bab": after these, curved
            bounds of every target class by itself, until ``time_limit`` (``utils.certify.bab``). "fastlin":
            Fast-Lin; "parabola": quadratic bounds of a last hidden layer of relu; "spectral": product of the layers'
            norms; "jacobian": bounds of gradients, integrated; "shell": these and ``layers`` in turn
            (``utils.jacobian.shells``).
        relaxation: of an LSTM's or GRU's gate products: "plane", "volume", "line" or "constant" (``utils.relaxation``).
        lengths: (batch,) number of frames that count in each sample; those after are padding. None for all.
        features: which elements are perturbed: numbers of a frame's elements, or a mask of bool, (n,), (T, n),
            (batch, T, n) or of the shape of x; None for all.
        scales: by what each element moves more than eps, likewise: ||(x' - x) / scales||_p <= eps, and what has scale 0
            is exact. With ``eps=1`` they are an eps for every element.
        together: for p = 0, what changes together and counts as one: "pixel", all channels of a place of an image;
            "frame" (with ball="sequence"); numbers of groups, (n,), (T, n) or of an input's shape. None for values.
        box: (lower, upper) for p = inf, likewise or numbers: x' lies between x + eps (lower - x) and
            x + eps (upper - x), so that eps = 1 is all of a box in which x need not be the middle.
        substitutions: in place of balls: what every frame may become (``utils.certify.substitution``). eps is how many
            frames may, a whole number or None for every one; methods are "crown", "crown-ibp" and "ibp".
        extra: further arguments of a module's forward, which are exact: a tensor, a tuple of arguments, or a dict of
            them by name. Tensors of as many rows as x have one a sample, others are shared.
        alpha_steps: gradient steps of "alpha", each at the price of about three bounds.
        curve_steps: gradient steps of "curve", each at the price of a dozen bounds by planes or more.
        time_limit: seconds that "bab" may take for a sample, from its start: planes, tuned slopes and "curve" count.
        chain: of "jacobian" and "shell": how gradients are bounded, "chord", "recurjac" or "interval".
        layers: likewise: the method, of one pass, by which the network's layers are bounded.
        dtype: precision of the bounds, float32 or float64; if left out that of x, of half precision float32. They are
            tuned in float32.

    Returns:
        (batch, n_specs); a positive row cannot change sign inside the perturbation set (up to rounding; ``SLACK``).
        Those of "bab" have no gradient. With labels (batch, T) they are (batch, T, n_specs), inf of steps without one.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    threat = Threat(norm, ball, frames, clip, lengths, features, scales, together, box)
    if substitutions is not None:
        if threat != Threat():
            raise ValueError("substitutions are all that happens: leave out norm, frames and what else describes balls")
        return substitution_margins(
            model,
            x,
            labels,
            substitutions,
            [eps],
            targets=targets,
            method=method,
            dtype=dtype or torch.float64,
            extra=extra,
        ).squeeze(-1)
    how = Method(method, relaxation, alpha_steps, curve_steps, time_limit, chain, layers)
    problem = MarginProblem(Question(model, x, labels, targets, threat, extra=extra), how)
    dtype = dtype or torch.promote_types(problem.x.dtype, torch.float32)
    check_precision(dtype)
    return problem.question.arranged(margins_at(problem, problem.question.eps(eps, dtype), dtype))


def margins_at(problem: MarginProblem, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """Margins, (batch, n_specs), at eps, (batch,) or (batch, T), by the problem's method, group by group."""
    parts, order = [], []
    for members, own in problem.groups():
        mine = eps[members]
        found = best_margins(own, mine.detach(), dtype) if own.method.branches else tuned_margins(own, mine, dtype)
        parts.append(found)
        order.append(members)
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort()]


def tuned_margins(problem: MarginProblem, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """Margins, (batch, n_specs), at eps, (batch,) or (batch, T), the best of what the method goes through."""
    margins, how = problem.margins(eps, dtype), problem.method
    if how.tuned:
        problem.tune(eps.detach(), TUNING, how.alpha_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype))
    if how.curved:
        problem.tune_curves(eps.detach(), TUNING, how.curve_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype))
    return margins


@plain_state()
@torch.no_grad()
def certified_radius(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    *,
    norm: float = 2.0,
    targets: Tensor | None = None,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    features: Any = None,
    scales: Any = None,
    together: Any = None,
    box: Any = None,
    extra: Any = None,
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    time_limit: float = TIME_LIMIT,
    chain: str = "joint",
    layers: str = "crown",
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    progress: Progress = None,
) -> Tensor:
    """Radius per sample, (batch,), within which no perturbation changes the classification (or reaches the target).

    Arguments as for ``certified_margin``, and:

    Args:
        tol: the smallest eps that failed is at most this relative distance above the radius. "jacobian" ends inside a
            shell of its own last sweep (``utils.certify.sweep``) instead.
        eps0: first eps of the search; found from the gradient if left out. It does not change what is certified.
        max_eps: largest eps to try, and the radius of a sample that is certified even there.
        dtype: precision of the verdict, in which every returned radius was certified.
        search_dtype: precision of the search before it.
        batch_size: samples bounded at once; less needs less memory.
        progress: True for a bar on a terminal, or a function that is called with the number of samples done and of all
            after every ``batch_size``.

    Returns:
        The largest eps that certified, in the units of x, for p = 0 the largest number of changes; 0 where none did (a
        misclassified sample), or none that the floats of x resolve.
    """
    threat = Threat(norm, ball, frames, clip, lengths, features, scales, together, box)
    how = Method(method, relaxation, alpha_steps, curve_steps, time_limit, chain, layers)
    problem = MarginProblem(Question(model, x, labels, targets, threat, extra=extra), how)
    search = {
        "tol": tol,
        "eps0": eps0,
        "max_eps": max_eps,
        "dtype": dtype,
        "search_dtype": search_dtype,
        "batch_size": batch_size,
        "progress": progress,
    }
    return search_radius(problem, **search).radius
