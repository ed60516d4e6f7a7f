"""Certificates that no replacement of at most k frames, each by one of a list of its own, changes the class.

They hold the sequence, the substitutes of each frame, the budget k and the slopes of every relaxation; see
``utils.certify.certificate`` and docs/certificates.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...bounds.passes import BoundPass
from ...graph.graph import Graph
from ...network.models import SequenceClassifier
from ...network.reading import graph_of, output_shape
from ...network.state import plain_state
from ...question.arguments import as_classes, as_inputs
from ...question.specification import output_rows
from ..certificate import (
    FORMAT,
    VERSION,
    WEIGHTS_NAME,
    collect_hints,
    hash_arrays,
    to_array,
    write_npz,
    write_weights,
)
from ..problem import SLACK
from .margins import AT_ONCE, Substitutes


@plain_state()
@torch.no_grad()
def save_substitution_certificates(
    folder: str | Path,
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    substitutes: Substitutes,
    budget: int | Sequence[int | None] | None,
    *,
    targets: Tensor | None = None,
    method: str = "crown",
    names: Sequence[str] | None = None,
) -> list[Path]:
    """Write a certificate for every sequence that is certified at its budget, and the weights beside them.

    Args:
        folder: is made if it is not there; certificates of the same names in it are replaced.
        model: of vectors: one that looks words up itself is to be given without its table.
        x, labels, substitutes, targets: as for ``substitution_margins``.
        budget: how many frames may be replaced at most, a number or one a sequence; None: every one.
        method: whose slopes are written, "crown" or "crown-ibp"; "ibp" needs none.
        names: of the sequences, for the file names sample_NAME.npz; their places in the batch if left out.

    Returns:
        The certificates' paths.

    Raises:
        ValueError: an argument does not fit, the model is no SequenceClassifier, or another model's weights lie in
            the folder.
        OSError: the folder cannot be written.
    """
    AT_ONCE.check(method)
    if not isinstance(model, SequenceClassifier) or not model.is_bare:
        kind = type(model).__name__
        raise ValueError(f"certificates are written for a SequenceClassifier only (utils.models), not for {kind}")
    x = as_inputs(x).to(torch.float64)
    if x.dim() != 3 or x.shape != substitutes.frames_shape:
        raise ValueError(f"x is {tuple(x.shape)}, the substitutes {tuple(substitutes.vectors.shape)}")
    rows = output_rows(as_classes(labels, "labels", "(batch,) of integers"), output_shape(model), targets).to(x)
    budgets = list(budget) if isinstance(budget, Sequence) else [budget] * len(x)
    names = [f"{number:05d}" for number in range(len(x))] if names is None else list(map(str, names))
    for what, values in (("budgets", budgets), ("names", names)):
        if len(values) != len(x):
            raise ValueError(f"{what} must be one a sequence, {len(x)}, not {len(values)}")
    graph = graph_of(model, x.shape[1], torch.float64, "plane").detach()
    paths = []
    for n, name in enumerate(names):
        own = slice(n, n + 1)  # one by one: of several, frames that only one can replace would count for all
        bounds = _certified(graph, x[own], rows[own], substitutes.part(own), budgets[n], method)
        if bounds is not None:
            paths.append(_write(Path(folder), model, bounds, substitutes.part(own), rows[n], method, name))
    return paths


def _certified(
    graph: Graph, x: Tensor, rows: Tensor, substitutes: Substitutes, budget: int | None, method: str
) -> BoundPass | None:
    """The pass that certifies one sequence, if there is one."""
    bounds = BoundPass(graph, substitutes.set_around(x, budget), method)
    slack = SLACK[torch.float64] * (1.0 + graph.term_sizes(x, rows))
    return bounds if bool((bounds.margin(rows) > slack).all()) else None


def _write(
    folder: Path,
    model: SequenceClassifier,
    bounds: BoundPass,
    substitutes: Substitutes,
    rows: Tensor,
    method: str,
    name: str,
) -> Path:
    """The file names its set by one hash, and by another all that it holds."""
    valid = substitutes.valid[0]
    given = {"x": bounds.perturbation.x[0], "substitutes": substitutes.vectors[0][valid].to(torch.float64)}
    given = {key: to_array(value) for key, value in given.items()}
    set_ = {"budget": int(bounds.perturbation.budget), "counts": valid.sum(dim=1).tolist()}
    hints = {} if method == "ibp" else collect_hints(model, bounds)
    arrays = given | {key: to_array(value[0]) for key, value in hints.items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "weights": {"file": WEIGHTS_NAME, "sha256": write_weights(folder / WEIGHTS_NAME, model)},
        "sample": {"name": name, "sha256": hash_arrays(given, set_)},
        "substitutions": set_,
        "label": int(rows.argmax()),
        "targets": rows.argmin(dim=1).tolist(),
        "method": method,
        "relaxation": "plane",
    }
    path = folder / f"sample_{name}.npz"
    write_npz(path, header | {"sha256": hash_arrays(arrays, header)}, arrays)
    return path
