"""The margins of a batch under one threat model, bounded at any eps: what certified margins and radii are made of."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.alpha import ALPHA_STEPS, select, store, tune_slopes
from utils.bounds import METHODS as PASS_METHODS
from utils.bounds import BoundPass
from utils.curvature import Curves
from utils.curve import CURVE_STEPS, CurvedPass, CurveTable, tune_curves
from utils.graph import Graph
from utils.memory import Parts, samples_at_once
from utils.networks import Network, check_network, graph_of, num_classes, read_network
from utils.perturbation import Perturbation, clip_of, dual_norm
from utils.planes import SLOPES

METHODS = (*PASS_METHODS, "alpha", "curve", "bab")  # the last three tune "crown"

# A margin counts as positive if it exceeds this share of 1 + the sum of the absolute values of its terms: room for the
# rounding of sums and products, which the bounds, statements about real numbers, do not account for.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}

TIME_LIMIT = 60.0  # seconds a sample of "bab", unless told otherwise

# Bytes of a sample's Gram matrix of neurons that "curve" may work on at once.
GRAM_BYTES = 2**26

# Bytes of coefficients that are worked on at once, on a CPU: more fall out of its cache, less pay for Python.
CACHE_BYTES = 5 * 2**20

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
        curve_steps: int = CURVE_STEPS,
        time_limit: float = TIME_LIMIT,
    ):
        model, x = read_network(model, x)
        check_inputs(model, x, labels, lengths)
        for name, value, known in (("method", method, METHODS), ("relaxation", relaxation, SLOPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if alpha_steps < 1:
            raise ValueError(f"alpha_steps must be at least 1, not {alpha_steps}")
        self.model, self.x, self.method, self.relaxation = model, x, method, relaxation
        if curve_steps < 0:
            raise ValueError(f"curve_steps must not be negative, not {curve_steps}")
        if not time_limit > 0:
            raise ValueError(f"time_limit must be a positive number of seconds, not {time_limit}")
        self.time_limit = time_limit
        self.alpha_steps, self.slopes = alpha_steps, None
        self.curve_steps, self.curves = curve_steps, None
        self.threat = {"norm": float(norm), "clip": clip_of(clip, x.dtype), "ball": ball}
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

    def slack(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """What the chosen samples' margins must exceed to count as positive, (m, n_specs); see ``SLACK``."""
        x, rows = self.x[chosen].to(dtype), self.rows[chosen].to(dtype)
        return SLACK[dtype] * (1.0 + self.graph(dtype, chosen).term_sizes(x, rows))

    def resolution(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The spacing of floats of x's precision at the greatest number that moves, (m,): no smaller eps certifies."""
        x = self.x[chosen].detach()
        return torch.finfo(x.dtype).eps * (x.abs().amax(dim=2) * self.mask[chosen]).amax(dim=1).to(dtype)

    def margins(
        self, eps: Tensor, dtype: torch.dtype, chosen: Tensor | slice = slice(None), sound: bool = True
    ) -> Tensor:
        """Lower bounds of the margins, (m, n_specs), of the chosen samples at eps, (m,) or (m, T).

        With ``sound=False`` estimates, without what is taken off for rounding; of curved bounds they are much cheaper,
        and mostly a little too high.
        """
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        size = self._samples_at_once(dtype) if self.curves is None else self._curved_at_once(dtype)
        return self._parts(lambda *part: self._margins(*part, dtype, sound), size, eps, samples)

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

    def _margins(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype, sound: bool) -> Tensor:
        graph, perturbation = self.graph(dtype, chosen), self._perturbation(eps, chosen, dtype)
        if self.curves is not None:
            bounds = CurvedPass(graph, perturbation, select_curves(self.curves, chosen, dtype), sound)
        else:
            slopes = None if self.slopes is None else select(self.slopes, chosen, dtype)
            method = self.method if self.method in PASS_METHODS else "crown"
            bounds = BoundPass(graph, perturbation, method, slopes, sound)
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

    @torch.no_grad()
    def tune_curves(
        self, eps: Tensor, dtype: torch.dtype, steps: int, chosen: Tensor | slice = slice(None), **until: float
    ) -> None:
        """Tune the curved bounds of the chosen samples at eps, (m,) or (m, T), from those they have.

        From then on ``margins`` uses them in place of planes, until ``curves`` is set to None. ``until``: see
        ``utils.curve.tune_curves``.
        """
        samples, size = torch.arange(len(self.x), device=self.x.device)[chosen], self._curved_at_once(dtype)
        table = self.curves
        for part_eps, part in zip(eps.split(size), samples.split(size), strict=True):
            start = None if self.curves is None else select_curves(self.curves, part, dtype)
            perturbation, rows = self._perturbation(part_eps, part, dtype), self.rows[part].to(dtype)
            tuned = tune_curves(self.graph(dtype, part), perturbation, rows, steps, start, **until)
            table = [None] * len(tuned) if table is None else table
            store(table, part, tuned, len(self.x))
        self.curves = table

    def _curved_at_once(self, dtype: torch.dtype) -> int:
        """Samples with curved bounds at once: their Gram matrices are large, and each has its own length."""
        if self.lengths is not None:
            return 1
        nodes = self.graph(dtype, slice(0, 1)).nodes
        neurons = sum(operand.size for operand in {one for node in nodes for one in node.relaxed_operands})
        return max(1, GRAM_BYTES // (max(neurons, 1) ** 2 * dtype.itemsize))

    def part(self, samples: Tensor) -> MarginProblem:
        """The problem of some samples, with copies of what is tuned."""
        part = copy.copy(self)
        part.x, part.mask, part.rows = (tensor[samples] for tensor in (self.x, self.mask, self.rows))
        part.lengths = None if self.lengths is None else self.lengths[samples]
        part.slopes = None
        part.curves = self.curves and select_curves(self.curves, samples)
        return part

    def branches(self) -> MarginProblem:
        """A problem with a sample of its own for every spec row of the only sample, and its curves to start from."""
        branches = self.part(torch.zeros(self.rows.shape[1], dtype=torch.long, device=self.x.device))
        branches.rows = self.rows[0].unsqueeze(1)
        return branches

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


def select_curves(table: CurveTable, rows: Tensor, dtype: torch.dtype | None = None) -> CurveTable:
    """The curves of some samples, in a precision, or the one that they have."""
    return [entry and Curves(*entry) for entry in select(table, rows, dtype)]


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
