"""Certified margins and radii of a classifier: the Python interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.alpha import select, store, tune_slopes
from utils.bounds import METHODS as PASS_METHODS
from utils.bounds import BoundPass
from utils.graph import Graph
from utils.memory import Parts, samples_at_once
from utils.networks import Network, check_network, graph_of, num_classes, read_network
from utils.perturbation import Perturbation, dual_norm
from utils.planes import SLOPES
from utils.search import Bracket, largest_certified

# A margin counts as positive if it exceeds this share of 1 + |clean margin|: room for the rounding of sums and
# products, which the bounds, statements about real numbers, do not account for.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
# First eps of a search, as a share of the radius at which the margin's linearisation vanishes.
FIRST_SHARE = 0.1

# Coefficients that are worked on at once, on a CPU (measured: float64 bounds take a third less time than with 6 MiB).
CACHE_BYTES = 5 * 2**19

# Slopes are tuned in this many rounds, each at an eps a little above the radius reached.
ALPHA_STEPS = 20
ALPHA_ROUNDS = 2
ALPHA_OVERSHOOT = 1.03

METHODS = (*PASS_METHODS, "alpha")

# No larger eps is tried unless asked for: a sample of a saturating network can be certified at any.
MAX_EPS = 1e6

Frames = int | Sequence[int] | Tensor | None


def margin_rows(labels: Tensor, num_classes: int, targets: Tensor | None = None) -> Tensor:
    """The spec matrix C, (batch, n_specs, classes), with rows e_label - e_other.

    Args:
        labels: (batch,) classes that must win.
        targets: (batch,) or (batch, n_specs) classes they must beat; None for all others, in increasing order.

    Raises:
        ValueError: a label or target is no class, or a target is the label itself.
    """
    if targets is None:
        others = torch.arange(num_classes - 1, device=labels.device).expand(len(labels), -1)
        targets = others + (others >= labels[:, None])
    elif targets.is_floating_point() or targets.dim() not in (1, 2) or len(targets) != len(labels):
        raise ValueError(f"targets must be (batch,) or (batch, n_specs) of integers, not {tuple(targets.shape)}")
    targets = targets.to(labels.device).reshape(len(labels), -1)
    if targets.shape[1] == 0:
        raise ValueError("there is no class to compare the label with")
    for name, classes in (("label", labels), ("target", targets)):
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ValueError(f"a {name} is not one of the classes 0 ... {num_classes - 1}")
    if bool((targets == labels[:, None]).any()):
        raise ValueError("a target is the sample's own label")
    identity = torch.eye(num_classes, device=labels.device)
    return identity[labels][:, None] - identity[targets]


def frame_mask(frames: Frames, batch: int, num_frames: int) -> Tensor:
    """Which frames are perturbed, (batch, T) of bool: None for all, a frame, a list of frames, or a mask.

    Raises:
        ValueError: there is no such frame, or a mask has another shape.
    """
    if frames is None:
        return torch.ones(batch, num_frames, dtype=torch.bool)
    frames = torch.as_tensor(frames)
    if frames.dtype == torch.bool:
        if frames.shape not in ((num_frames,), (batch, num_frames)):
            raise ValueError(f"a frame mask is (T,) or (batch, T) = {(batch, num_frames)}, not {tuple(frames.shape)}")
        return frames.expand(batch, num_frames).clone()
    chosen = frames.reshape(-1).tolist()
    if not chosen or frames.is_floating_point() or any(not 0 <= frame < num_frames for frame in chosen):
        raise ValueError(f"frames must be from 0 ... {num_frames - 1}, not {chosen}")
    mask = torch.zeros(batch, num_frames, dtype=torch.bool)
    mask[:, chosen] = True
    return mask


class MarginProblem:
    """The margins of a batch under one threat model, for any eps; see ``certified_margin`` for the arguments."""

    def __init__(
        self,
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
        alpha_steps: int = ALPHA_STEPS,
    ):
        model, x = read_network(model, x)
        check_inputs(model, x, labels, lengths)
        for name, value, known in (("method", method, METHODS), ("relaxation", relaxation, SLOPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if alpha_steps < 1:
            raise ValueError(f"alpha_steps must be at least 1, not {alpha_steps}")
        self.model, self.x, self.method, self.relaxation = model, x, method, relaxation
        self.alpha_steps, self.slopes = alpha_steps, None
        self.threat = {"norm": float(norm), "clip": clip, "ball": ball}
        self.rows = margin_rows(labels, num_classes(model), targets).to(x.device)
        self.mask = frame_mask(frames, *x.shape[:2]).to(x.device)
        self.lengths = lengths = None if lengths is None else lengths.to(x.device)
        if lengths is not None:
            self.mask &= torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        self._graphs: dict[tuple[torch.dtype, bool], Graph] = {}
        self._widest: int | None = None
        self._parts = Parts()
        Perturbation(x, self.mask.to(x.dtype), **self.threat)  # raises what is wrong with the threat model

    def graph(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Graph:
        """The model unrolled, over the chosen samples' own lengths if these differ."""
        if self.lengths is not None:
            return self._unroll(dtype, self.lengths[chosen])
        key = (dtype, torch.is_grad_enabled())
        if key not in self._graphs:
            self._graphs[key] = self._unroll(dtype, None)
        return self._graphs[key]

    def _unroll(self, dtype: torch.dtype, lengths: Tensor | None) -> Graph:
        graph = graph_of(self.model, self.x.shape[1], dtype, self.relaxation, lengths)
        return graph if torch.is_grad_enabled() else graph.detach()

    def clean_margins(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Margins of the chosen samples' unperturbed input, (m, n_specs)."""
        return self._margins_at(self.x[chosen].to(dtype), dtype, chosen)

    def _margins_at(self, x: Tensor, dtype: torch.dtype, chosen: Tensor | slice) -> Tensor:
        logits = self.graph(dtype, chosen).evaluate(x)
        return (self.rows[chosen].to(dtype) @ logits[..., None]).squeeze(-1)

    def margins(self, eps: Tensor, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Lower bounds of the margins, (m, n_specs), of the chosen samples at eps, (m,) or (m, T)."""
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        size = self._samples_at_once(dtype)
        return self._parts(lambda *part: self._margins(*part, dtype), size, eps, samples)

    def _samples_at_once(self, dtype: torch.dtype) -> int:
        """As many as a processor's cache takes, more at once would be slower, or as many as a GPU's memory takes."""
        if self.x.device.type != "cpu":
            graph = self.graph(dtype, slice(0, 1))
            return samples_at_once(graph, self.rows.shape[1], dtype, self.x.device) or len(self.x)
        if self._widest is None:
            nodes = self.graph(dtype, slice(0, 1)).nodes
            operands = [operand.bounded_through.size for node in nodes for operand in node.relaxed_operands]
            self._widest = max(operands, default=1)
        # An operand of n neurons has 2 n rows of coefficients, of about n columns.
        return max(4, CACHE_BYTES // (2 * self._widest**2 * dtype.itemsize))

    def _margins(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        slopes = None if self.slopes is None else select(self.slopes, chosen, dtype)
        method = "crown" if self.method == "alpha" else self.method
        bounds = BoundPass(self.graph(dtype, chosen), self._perturbation(eps, chosen, dtype), method, slopes)
        return bounds.margin(self.rows[chosen].to(dtype))

    def _perturbation(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype) -> Perturbation:
        eps = (eps[:, None] if eps.dim() == 1 else eps).to(dtype) * self.mask[chosen]
        return Perturbation(self.x[chosen].to(dtype), eps, **self.threat)

    @torch.no_grad()
    def tune(self, eps: Tensor, dtype: torch.dtype, steps: int, chosen: Tensor | slice = slice(None)) -> None:
        """Tune the slopes of the chosen samples at eps, (m,) or (m, T), from those they have; ``margins`` uses them."""
        samples, size = torch.arange(len(self.x), device=self.x.device)[chosen], self._samples_at_once(dtype)
        table = self.slopes
        for part_eps, part in zip(eps.split(size), samples.split(size), strict=True):
            start = None if self.slopes is None else select(self.slopes, part, dtype)
            perturbation, rows = self._perturbation(part_eps, part, dtype), self.rows[part].to(dtype)
            tuned, _ = tune_slopes(self.graph(dtype, part), perturbation, rows, steps, start)
            table = [None] * len(tuned) if table is None else table
            store(table, part, tuned, len(self.x))
        self.slopes = table

    def linear_radius(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """eps at which the worst margin's linearisation at x vanishes, (m,): above the true radius as a rule."""
        with torch.enable_grad():
            x = self.x[chosen].detach().to(dtype).requires_grad_()
            worst = self._margins_at(x, dtype, chosen).amin(dim=1)
            (gradient,) = torch.autograd.grad(worst.sum(), x)
        norms = dual_norm(gradient, self.threat["norm"]) * self.mask[chosen]
        total = dual_norm(norms, self.threat["norm"]) if self.threat["ball"] == "sequence" else norms.sum(dim=1)
        radius = worst.detach().clamp(min=0) / total
        # Saturated activations have no gradient; any positive number starts the search.
        return torch.where(radius.isfinite() & (radius > 0), radius, torch.ones_like(radius))


def check_inputs(model: Network, x: Tensor, labels: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError, saying what is wrong, unless x, (batch, T, n), labels and lengths, (batch,), fit the model."""
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, T, n) with at least one sample and frame, not {tuple(x.shape)}")
    if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be ({x.shape[0]},) of integers, not {tuple(labels.shape)} of {labels.dtype}")
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be ({x.shape[0]},) of integers, not {tuple(lengths.shape)} of {lengths.dtype}"
            )
        if bool(((lengths < 1) | (lengths > x.shape[1])).any()):
            raise ValueError(f"lengths must be from 1 to the {x.shape[1]} frames of x")
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError("x must be finite floating-point numbers")
    check_network(model, x, lengths)


def certified_margin(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2.0,
    targets: Tensor | None = None,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    alpha_steps: int = ALPHA_STEPS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lower bounds of the margins over all perturbations of size eps; differentiable in the model and in x.

    Args:
        model: the classifier, any module whose forward ``utils.trace`` can read, or a graph; its weights are read,
            never changed.
        x: (batch, T, n) sequences in the model's input units. Inputs of a module may also be (batch, T) whole numbers
            of words, whose vectors are perturbed then, or of another shape, (batch, ...), which is one frame.
        labels: (batch,) classes that must win.
        eps: radius in the units of x: a number, (batch,), or (batch, T) for one radius a frame.
        norm: p of the l_p balls: 1, 2 or inf.
        targets: (batch,) or (batch, n_specs) classes to beat; None for every other class.
        frames: which frames are perturbed (``frame_mask``); the others are exact. None for all.
        clip: valid input range (lowest, highest) to which l_inf boxes are cut.
        ball: "frame" for a ball around every frame, "sequence" for one around the whole sequence.
        method: "crown", "ibp" or "crown-ibp" (``utils.bounds``), or "alpha": "crown" with slopes tuned to the sample.
        relaxation: of an LSTM's or GRU's gate products: "plane", "volume", "line" or "constant" (``utils.planes``).
        lengths: (batch,) number of frames that count in each sample; those after are padding. None for all.
        alpha_steps: gradient steps of "alpha", each at the price of about three bounds.
        dtype: precision of the computation; that of x if left out.

    Returns:
        (batch, n_specs); a positive row cannot change sign inside the perturbation set (up to rounding; ``SLACK``).

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    threat = {"norm": norm, "frames": frames, "clip": clip, "ball": ball, "lengths": lengths}
    how = {"method": method, "relaxation": relaxation, "alpha_steps": alpha_steps}
    problem = MarginProblem(model, x, labels, targets=targets, **how, **threat)
    x = problem.x
    eps = torch.as_tensor(eps, dtype=dtype or x.dtype, device=x.device)
    if eps.dim() > 2 or (eps.dim() > 0 and eps.shape != x.shape[: eps.dim()]):
        raise ValueError(f"eps must be a number, (batch,) or (batch, T), not {tuple(eps.shape)}")
    eps = eps.expand(len(x)) if eps.dim() == 0 else eps
    margins = problem.margins(eps, dtype or x.dtype)
    if method == "alpha":
        problem.tune(eps.detach(), dtype or x.dtype, alpha_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype or x.dtype))
    return margins


@dataclass
class RadiusResult:
    """What a radius search found, (batch,) each.

    Attributes:
        radius: the largest eps that was certified in the verdict's precision; 0 if none was.
        failed: the smallest eps that was not certified by the search; 0 if the clean input is not.
        margin: worst lower bound at ``radius`` less the slack for rounding (the clean one where radius is 0).
        evaluations: how many bounds were computed.
    """

    radius: Tensor
    failed: Tensor
    margin: Tensor
    evaluations: Tensor


def search_radius(
    problem: MarginProblem,
    *,
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> RadiusResult:
    """Largest certified eps of every sample: a search in ``search_dtype``, the verdict in ``dtype``.

    What the search found is certified once more in ``dtype``. The few samples for which that fails, by the precision
    of the search, are searched again in ``dtype``, as are those whose margin is too small for that precision.
    No eps above ``max_eps`` is tried: some samples, of saturating networks, are certified at any.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, not {tol}")
    if eps0 is not None and not 0 < eps0 < torch.inf:
        raise ValueError(f"eps0 must be a positive number, not {eps0}")
    if not max_eps > 0:
        raise ValueError(f"max_eps must be a positive number, not {max_eps}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for precision in (dtype, search_dtype):
        if precision not in SLACK:
            raise ValueError(f"a radius is searched in torch.float32 or torch.float64, not {precision}")
    parts = [
        _search_rows(problem, rows, tol, eps0, max_eps, dtype, search_dtype)
        for rows in torch.arange(len(problem.x), device=problem.x.device).split(batch_size)
    ]
    return RadiusResult(*(torch.cat([getattr(part, name) for part in parts]) for name in RadiusResult.__annotations__))


def _search_rows(problem, rows: Tensor, tol: float, eps0, max_eps: float, dtype, search_dtype) -> RadiusResult:
    clean = problem.clean_margins(dtype, rows).amin(dim=1)

    def margin_in(precision: torch.dtype):
        slack = SLACK[precision] * (1.0 + clean.abs())

        def margin_of(chosen: Tensor, eps: Tensor) -> Tensor:
            margins = problem.margins(eps, precision, rows[chosen])
            return margins.amin(dim=1).to(dtype) - slack[chosen]

        return margin_of

    at_zero = clean - SLACK[dtype] * (1.0 + clean.abs())
    # Where the slack is a larger share of the margin than tol, it would move the radius by more than tol.
    too_coarse = SLACK[search_dtype] * (1.0 + clean.abs()) > tol * clean

    def search(first: Tensor) -> Bracket:
        if search_dtype == dtype:
            return largest_certified(margin_in(dtype), at_zero, first, tol, max_eps)
        found = largest_certified(margin_in(search_dtype), at_zero.masked_fill(too_coarse, 0.0), first, tol, max_eps)
        _confirm(margin_in(dtype), at_zero, found, first, tol, max_eps)
        return found

    problem.slopes = None
    first = FIRST_SHARE * problem.linear_radius(search_dtype, rows) if eps0 is None else torch.full_like(clean, eps0)
    found = search(first.to(dtype))
    if problem.method == "alpha":
        for _ in range(ALPHA_ROUNDS):
            aim = torch.where(found.low > 0, ALPHA_OVERSHOOT * found.low, first.to(dtype))
            problem.tune(aim, search_dtype, -(-problem.alpha_steps // ALPHA_ROUNDS), rows)
            found = _better(found, search(aim))
    failed = torch.where(at_zero > 0, found.high, 0.0)
    return RadiusResult(found.low, failed, found.margin, found.evaluations)


def _better(first: Bracket, second: Bracket) -> Bracket:
    """Of two searches, per sample, the one that certified more; evaluations add up."""
    higher = second.low > first.low
    low, high, margin = (
        torch.where(higher, getattr(second, name), getattr(first, name)) for name in ("low", "high", "margin")
    )
    return Bracket(low, high, margin, first.evaluations + second.evaluations)


def _confirm(margin_of, at_zero: Tensor, found: Bracket, first: Tensor, tol: float, max_eps: float) -> None:
    """Replace what does not hold in the verdict's precision, or was not found, by a search in it."""
    found.margin = at_zero.clone()
    rows = (found.low > 0).nonzero().squeeze(-1)
    if rows.numel():
        found.margin[rows] = margin_of(rows, found.low[rows])
        found.evaluations[rows] += 1
    again = ((at_zero > 0) & ((found.low == 0) | (found.margin <= 0))).nonzero().squeeze(-1)
    if again.numel():
        start = torch.where(found.low > 0, found.low * (1 - tol), first)[again]
        bracket = largest_certified(
            lambda chosen, eps: margin_of(again[chosen], eps), at_zero[again], start, tol, max_eps
        )
        found.low[again], found.high[again], found.margin[again] = bracket.low, bracket.high, bracket.margin
        found.evaluations[again] += bracket.evaluations


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
    alpha_steps: int = ALPHA_STEPS,
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> Tensor:
    """Radius per sample, (batch,), within which no perturbation changes the classification (or reaches the target).

    Arguments as for ``certified_margin``, and:

    Args:
        tol: the smallest eps that failed is at most this relative distance above the radius.
        eps0: first eps of the search; found from the gradient if left out. It does not change what is certified.
        max_eps: largest eps to try, and the radius of a sample that is certified even there.
        dtype: precision of the verdict, in which every returned radius was certified.
        search_dtype: precision of the search before it.
        batch_size: samples bounded at once; less needs less memory.

    Returns:
        The largest eps that certified, in the units of x; 0 where none did (a misclassified sample).
    """
    threat = {"norm": norm, "frames": frames, "clip": clip, "ball": ball, "lengths": lengths}
    how = {"method": method, "relaxation": relaxation, "alpha_steps": alpha_steps}
    problem = MarginProblem(model, x, labels, targets=targets, **how, **threat)
    search = {
        "tol": tol,
        "eps0": eps0,
        "max_eps": max_eps,
        "dtype": dtype,
        "search_dtype": search_dtype,
        "batch_size": batch_size,
    }
    return search_radius(problem, **search).radius
