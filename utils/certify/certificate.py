"""Certificates: files that prove a certified margin to a program that does not trust this one.

A certificate holds the sample, its perturbation set, the classes, the hash of the model, and the slopes of every
relaxation. That is all a proof needs: for given slopes, intercepts and bounds follow by arithmetic alone, which
``scripts/check_certificate.py`` does by itself and rigorously. docs/certificates.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bounds.alpha import select
from ..bounds.passes import BoundPass
from ..choices.tables import METHODS
from ..graph.graph import Graph
from ..graph.nonlinear import Activation, NonLinear, Product
from ..network.models import SequenceClassifier
from ..network.state import plain_state
from ..runs.results import replacing
from .problem import MarginProblem, margin_problem

FORMAT, VERSION = "recurrent-robustness-certificate", 1
WEIGHTS_FORMAT = "recurrent-classifier-weights"
TUNINGS = 3  # how often slopes are tuned, each time from those before, until a sample is certified
FOLDER_NAME, WEIGHTS_NAME = "certificates", "weights.npz"
# Names of a time step's relaxed operations, in the order in which utils.network.unroll adds them to the graph.
OPERATIONS = {
    nn.RNN: (("activation", Activation, 1),),
    nn.LSTM: (("kept", Product, 2), ("written", Product, 2), ("output", Product, 2)),
    nn.GRU: (("reset", Product, 2), ("new", Product, 2), ("kept", Product, 2)),
}


def write_npz(path: Path, header: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays and the header, as JSON in an array of bytes, whole or not at all."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    with replacing(path) as temporary:
        np.savez_compressed(temporary, header=np.frombuffer(text.encode(), np.uint8), **arrays)


def hash_arrays(arrays: dict[str, np.ndarray], header: dict | None = None) -> str:
    """SHA-256 over the header and every array's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    if header is not None:
        digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def describe_model(model: SequenceClassifier) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays of a weights file: all that the classifier computes with, in its own precision.

    Biases and initial states that the model does without are zeros, mean and std are given per input value.
    """
    rnn, head = model.rnn, model.head
    header = {
        "format": WEIGHTS_FORMAT,
        "version": VERSION,
        "model": {
            "architecture": {nn.RNN: "rnn", nn.LSTM: "lstm", nn.GRU: "gru"}[type(rnn)],
            "activation": rnn.nonlinearity if isinstance(rnn, nn.RNN) else None,
            "input_size": rnn.input_size,
            "hidden_size": rnn.hidden_size,
            "num_layers": rnn.num_layers,
            "num_classes": head.out_features,
            "bidirectional": bool(rnn.bidirectional),
            "pooling": model.pooling,
        },
    }
    weight = head.weight.detach()
    tensors = {name: value.detach() for name, value in rnn.named_parameters()}
    for name in [name for name in tensors if name.startswith("weight_ih") and not rnn.bias]:
        for bias in ("bias_ih", "bias_hh"):
            tensors[name.replace("weight_ih", bias)] = weight.new_zeros(tensors[name].shape[0])
    tensors["head.weight"] = weight
    tensors["head.bias"] = weight.new_zeros(head.out_features) if head.bias is None else head.bias.detach()
    for name in ("mean", "std"):
        tensors[name] = getattr(model, name).detach().expand(rnn.input_size)
    zeros = weight.new_zeros(rnn.num_layers * (2 if rnn.bidirectional else 1), rnn.hidden_size)
    tensors["h0"] = zeros if model.h0 is None else model.h0
    if isinstance(rnn, nn.LSTM):
        tensors["c0"] = zeros if model.c0 is None else model.c0
    return header, {name: _array(value) for name, value in tensors.items()}


def _array(tensor: Tensor) -> np.ndarray:
    """Little-endian float32 or float64; other precisions become float32, which must hold them exactly."""
    kind = "<f8" if tensor.dtype == torch.float64 else "<f4"
    return tensor.detach().cpu().to(torch.float64).numpy().astype(kind)


def model_hash(model: SequenceClassifier) -> str:
    """The hash by which certificates name a model: of its weights and of how they are wired."""
    header, arrays = describe_model(model)
    return hash_arrays(arrays, header)


@plain_state()
def save_certificates(
    folder: str | Path,
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    names: Sequence[str] | None = None,
    **question: Any,
) -> list[Path]:
    """Write a certificate for every sample that is certified at eps, and the weights beside them.

    Args:
        model, x, labels: as for ``utils.certify.certified_margin``.
        folder: is made if it is not there; certificates of the same names in it are replaced.
        eps: as a rule what ``certified_radius`` found. Samples with eps = 0 or without a positive margin get none.
        names: of the samples, for the file names sample_NAME.npz; their places in the batch if left out.
        question: the threat model and the method, as for ``utils.certify.certified_margin``.

    Returns:
        The certificates' paths.

    Raises:
        ValueError: an argument does not fit, the model is no SequenceClassifier, or another model's weights lie in
            the folder.
        OSError: the folder cannot be written.
    """
    problem = margin_problem(model, x, labels, **question)
    eps = problem.question.eps(eps, torch.float64)
    names = [f"{number:05d}" for number in range(len(eps))] if names is None else list(map(str, names))
    if len(names) != len(eps):
        raise ValueError(f"names must be one a sample, {len(eps)}, not {len(names)}")
    return write_certificates(Path(folder), problem, eps, names)


@torch.no_grad()
def write_certificates(folder: Path, problem: MarginProblem, eps: Tensor, names: Sequence[str]) -> list[Path]:
    """``save_certificates`` for a problem that is set up already; eps is (batch,) or (batch, T).

    With tuned slopes ("alpha") those of the problem are tried first, then ones that are tuned at eps.
    """
    if not isinstance(problem.model, SequenceClassifier):
        kind = type(problem.model).__name__
        raise ValueError(f"certificates are written for a SequenceClassifier only (utils.models), not for {kind}")
    if problem.method.curved:
        raise ValueError("certificates hold planes, not curved bounds: take method alpha or a cheaper one")
    eps = (eps[:, None] if eps.dim() == 1 else eps).to(torch.float64) * problem.threat.frames
    left = (eps.amax(dim=1) > 0).nonzero().squeeze(-1)
    if not left.numel():
        return []
    paths: dict[int, Path] = {}
    for tuned in range(TUNINGS + 1 if problem.method.tuned else 1):
        if tuned:
            problem.tune(eps[left], torch.float64, problem.method.alpha_steps, left)
        written = _write_certified(folder, problem, eps, names, left)
        paths |= written
        left = left[[sample not in written for sample in left.tolist()]]
        if not left.numel():
            break
    return [paths[sample] for sample in sorted(paths)]


def _write_certified(
    folder: Path, problem: MarginProblem, eps: Tensor, names: Sequence[str], chosen: Tensor
) -> dict[int, Path]:
    """Certificates of those of the chosen samples that are certified with the slopes that there are."""
    exact, eps = problem.x[chosen].to(torch.float64), eps[chosen]
    graph = problem.graph(torch.float64, chosen)
    slopes = None if problem.slopes is None else select(problem.slopes, chosen, torch.float64)
    bounds = METHODS[problem.method.name](graph, problem.threat.part(chosen).around(exact, eps), slopes)
    rows = problem.rows[chosen].to(torch.float64)
    holds = (bounds.margin(rows) > problem.slack(torch.float64, chosen)).all(dim=1)
    if not bool(holds.any()):
        return {}
    slopes = {} if problem.method.name == "ibp" else collect_slopes(problem.model, graph, bounds)
    folder.mkdir(parents=True, exist_ok=True)
    weights_hash = _write_weights(folder / WEIGHTS_NAME, problem.model)
    paths = {}
    for position in holds.nonzero().squeeze(-1).tolist():
        sample = int(chosen[position])
        length = exact.shape[1] if problem.threat.lengths is None else int(problem.threat.lengths[sample])
        own = {name: value[position if len(value) > 1 else 0, :length] for name, value in slopes.items()}
        arrays = {"x": exact[position, :length], "eps": eps[position, :length], **own}
        arrays = {name: _array(value) for name, value in arrays.items()}
        header = _header(problem, rows[position], weights_hash, hash_arrays({"x": arrays["x"]}), names[sample])
        paths[sample] = folder / f"sample_{names[sample]}.npz"
        write_npz(paths[sample], header, arrays)
    return paths


def _header(problem: MarginProblem, rows: Tensor, weights_hash: str, input_hash: str, name: str) -> dict:
    threat = problem.threat
    return {
        "format": FORMAT,
        "version": VERSION,
        "weights": {"file": WEIGHTS_NAME, "sha256": weights_hash},
        "sample": {"name": name, "sha256": input_hash},
        "norm": f"{threat.norm:g}",
        "ball": threat.ball,
        "clip": None if threat.clip is None else [float(end) for end in threat.clip],
        "label": int(rows[0].argmax()),
        "targets": rows.argmin(dim=1).tolist(),
        "method": problem.method.name,
        "relaxation": problem.method.relaxation,
    }


def _write_weights(path: Path, model: SequenceClassifier) -> str:
    """Write the weights file unless it is there; its hash."""
    header, arrays = describe_model(model)
    found = hash_arrays(arrays, header)
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            earlier = {name: file[name] for name in file.files}
        there = json.loads(earlier.pop("header").tobytes())
        if hash_arrays(earlier, there) != found:
            raise ValueError(f"{path} holds another model's weights: take another folder for the certificates")
    else:
        write_npz(path, header, arrays)
    return found


def collect_slopes(model: SequenceClassifier, graph: Graph, bounds: BoundPass) -> dict[str, Tensor]:
    """Slopes of all relaxations as slopes.l0.forward.NAME: (batch or 1, T, 2, operands, hidden).

    In the third dimension: lower, upper. Nodes that no perturbation reaches have no relaxation: zeros.
    """
    rnn, num_frames = model.rnn, len(graph.frames)
    nodes = iter([node for node in graph.nodes if isinstance(node, NonLinear)])
    slopes = {}
    for layer in range(rnn.num_layers):
        for direction in ("forward", "backward")[: 2 if rnn.bidirectional else 1]:
            order = range(num_frames) if direction == "forward" else reversed(range(num_frames))
            found = {t: [_node_slopes(next(nodes), *kind, bounds) for kind in OPERATIONS[type(rnn)]] for t in order}
            for position, (name, _, _) in enumerate(OPERATIONS[type(rnn)]):
                steps = [found[t][position] for t in range(num_frames)]
                batch = max(len(step) for step in steps)
                steps = [step.expand(batch, *step.shape[1:]) for step in steps]
                slopes[f"slopes.l{layer}.{direction}.{name}"] = torch.stack(steps, dim=1)
    if next(nodes, None) is not None:
        raise RuntimeError("the graph has more non-linear nodes than its cells: certificates do not fit it")
    return slopes


def _node_slopes(node: NonLinear, name: str, kind: type, operands: int, bounds: BoundPass) -> Tensor:
    """(batch or 1, 2, operands, size)."""
    if not isinstance(node, kind) or len(node.parents) != operands:
        raise RuntimeError(f"node {node.index} of the graph is not the {name} of a cell: certificates do not fit it")
    if bounds.is_exact(node):
        return torch.zeros(1, 2, operands, node.size, dtype=torch.float64)
    lower, upper = bounds.relaxation(node)
    flat = torch.broadcast_tensors(*lower.slopes, *upper.slopes)
    flat = [slope if slope.dim() == 2 else slope[None] for slope in flat]
    return torch.stack(flat, dim=1).unflatten(1, (2, operands))
