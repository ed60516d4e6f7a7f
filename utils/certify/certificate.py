"""Certificates: files that prove a certified margin to a program that does not trust this one.

A certificate holds the sample, its perturbation set, the classes, the hash of the model, and the slopes and curvatures
of every relaxation. That is all a proof needs: for given ones, intercepts and bounds follow by arithmetic alone, which
``scripts/check_certificate.py`` does by itself and rigorously. docs/certificates.md describes the format.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bounds.curve import CurvedPass
from ..bounds.passes import BoundPass
from ..choices.method import CERTIFIED_METHODS
from ..clock import Pace, now
from ..graph.nonlinear import Activation, NonLinear, Product
from ..network.models import SequenceClassifier
from ..network.speech import SpeechClassifier
from ..network.state import plain_state
from ..network.trace import TracedModule
from ..relaxation.curves import Curves
from ..runs.results import replacing
from .bab import ROUND_STEPS, TUNING
from .problem import MarginProblem, margin_problem

FORMAT, VERSION = "recurrent-robustness-certificate", 1
WEIGHTS_FORMAT = "recurrent-classifier-weights"
TUNINGS = 3  # how often bounds are tuned, each time from those before, until a sample is certified
SHARES = (0.25, 0.5, 0.7, 0.85, 1.0)  # of eps at which slopes are tuned at last, one after the other, as a search goes
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
    if isinstance(model, SpeechClassifier):
        header["model"]["features"] = {"hop": model.features.hop, "floor": model.features.floor}
        tensors["features.wave"], tensors["features.mel"] = model.features.wave, model.features.mel
    zeros = weight.new_zeros(rnn.num_layers * (2 if rnn.bidirectional else 1), rnn.hidden_size)
    tensors["h0"] = zeros if model.h0 is None else model.h0
    if isinstance(rnn, nn.LSTM):
        tensors["c0"] = zeros if model.c0 is None else model.c0
    return header, {name: to_array(value) for name, value in tensors.items()}


def to_array(tensor: Tensor) -> np.ndarray:
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
    problem.question.check_picks_one("certificates")
    problem.threat.check_even("certificates")
    eps = problem.question.eps(eps, torch.float64)
    names = [f"{number:05d}" for number in range(len(eps))] if names is None else list(map(str, names))
    if len(names) != len(eps):
        raise ValueError(f"names must be one a sample, {len(eps)}, not {len(names)}")
    return write_certificates(Path(folder), problem, eps, names)


@torch.no_grad()
def write_certificates(folder: Path, problem: MarginProblem, eps: Tensor, names: Sequence[str]) -> list[Path]:
    """``save_certificates`` for a problem that is set up already; eps is (batch,) or (batch, T).

    Of tuned bounds ("alpha", "curve", "bab") those that the problem has are tried first, then ones that are tuned at
    eps, for "bab" ones for every target by itself, and at last slopes that are tuned on the way up to eps.
    """
    check_model(problem.model)
    if isinstance(problem.model, SpeechClassifier) and problem.method.curved:
        raise ValueError("certificates of waveforms have planes: the checker has no rules for curved bounds of them")
    if problem.method.name not in CERTIFIED_METHODS:
        known = ", ".join(CERTIFIED_METHODS)
        raise ValueError(f"certificates are written for {known}: the checker has no rules for {problem.method.name}")
    problem = copy.copy(problem)
    problem.slopes, problem.curves = copy.deepcopy((problem.slopes, problem.curves))  # tuning changes them in place
    eps = (eps[:, None] if eps.dim() == 1 else eps).to(torch.float64) * problem.threat.frames
    left = (eps.amax(dim=1) > 0).nonzero().squeeze(-1)
    paths: dict[int, Path] = {}
    for bound in _attempts(problem, eps):
        if not left.numel():
            break
        for samples, bounded in bound(left):
            paths |= _write_certified(folder, problem, eps, names, samples, bounded)
        left = left[[sample not in paths for sample in left.tolist()]]
    return [paths[sample] for sample in sorted(paths)]


def say_missing(radius: Tensor, written: Sequence[Path]) -> None:
    """Print how many of the radii, (n,), have no certificate among the files written, if any; those of 0 never have."""
    missing = int((radius > 0).sum()) - len(written)
    if missing:
        why = "what splitting gains is in no file, and tuning may go otherwise; --method alpha writes more"
        print(f"{missing} of {len(radius)} radii have no certificate: {why}", flush=True)


def check_model(model: nn.Module) -> None:
    """Raise ValueError unless the checker has rules for the model."""
    speech = isinstance(model, SpeechClassifier)
    if not isinstance(model, SequenceClassifier) or not (model.is_bare or speech):
        read = isinstance(model, TracedModule)
        kind = "another module" if read else type(model).__name__
        raise ValueError(f"certificates are written for a SequenceClassifier only (utils.models), not for {kind}")
    if speech and model.power != "bands":
        raise ValueError(f"certificates of waveforms bound energies as bands, not as {model.power}")


# The bounds of some samples, and the problem that they are of; of a single sample they may be one set a target.
_Found = Iterator[tuple[Tensor, MarginProblem]]


def _attempts(problem: MarginProblem, eps: Tensor) -> Iterator[Callable[[Tensor], _Found]]:
    """Ways to bound the samples that are left, one after the other."""
    method = problem.method

    def parts(left: Tensor) -> _Found:
        size = problem.at_once(torch.float64)
        yield from ((part, problem) for part in left.split(size))

    def tuned(left: Tensor) -> _Found:
        if method.curved:
            problem.tune_curves(eps[left], TUNING, method.curve_steps, left)
        else:
            problem.tune(eps[left], torch.float64, method.alpha_steps, left)
        yield from parts(left)

    def planes(left: Tensor, share: float = 1.0) -> _Found:
        """Where curved bounds gain nothing, a radius may be that of alpha."""
        problem.curves = None
        problem.tune(share * eps[left], torch.float64, method.alpha_steps, left)
        yield from parts(left)

    def apart(left: Tensor) -> _Found:
        for sample in left.split(1):
            yield sample, _apart(problem.part(sample), eps[sample])

    if not method.curved or problem.curves is not None:
        yield parts
    for _ in range(TUNINGS if method.tuned else 0):
        yield tuned
    if method.branches:
        yield apart
    for _ in range(TUNINGS if method.curved else 0):
        yield planes
    for share in SHARES if method.tuned else ():
        yield partial(planes, share=share)


def _apart(problem: MarginProblem, eps: Tensor) -> MarginProblem:
    """The branches of a problem's only sample with curves that are tuned at eps until it is certified or time is up."""
    pace = Pace(now() + problem.method.time_limit)
    branches = problem.branches()
    everywhere = eps.expand(len(branches.x), -1)
    slack, steps = branches.slack(torch.float64), ROUND_STEPS
    for _ in range(TUNINGS):
        left = (branches.margins(everywhere, torch.float64) <= slack).any(dim=1).nonzero().squeeze(-1)
        for own in left.split(1):
            branches.tune_curves(everywhere[own], TUNING, steps, own, pace=pace)
        steps *= 2
    return branches


def _write_certified(
    folder: Path, problem: MarginProblem, eps: Tensor, names: Sequence[str], chosen: Tensor, bounded: MarginProblem
) -> dict[int, Path]:
    """Certificates of those of the chosen samples that are certified with the bounds that there are.

    ``bounded`` has these: it is the problem itself, or the branches of the only chosen sample.
    """
    apart = bounded is not problem
    rows = torch.arange(len(bounded.x), device=chosen.device) if apart else chosen
    exact, eps = problem.x[chosen].to(torch.float64), eps[chosen]
    bounds = bounded.bounds(eps.expand(len(rows), -1), rows, torch.float64)
    margins = bounds.margin(bounded.rows[rows].to(torch.float64))
    holds = (margins > bounded.slack(torch.float64, rows)).all(dim=1)
    holds = holds.all()[None] if apart else holds
    if not bool(holds.any()):
        return {}
    hints = {} if problem.method.name == "ibp" else collect_hints(problem.model, bounds)
    folder.mkdir(parents=True, exist_ok=True)
    weights_hash = write_weights(folder / WEIGHTS_NAME, problem.model)
    paths = {}
    for position in holds.nonzero().squeeze(-1).tolist():
        sample = int(chosen[position])
        length = exact.shape[1] if problem.threat.lengths is None else int(problem.threat.lengths[sample])
        if apart:
            own = {name: value.expand(len(rows), *value.shape[1:])[:, :length] for name, value in hints.items()}
        else:
            own = {name: value[position if len(value) > 1 else 0, :length] for name, value in hints.items()}
        if isinstance(problem.model, SpeechClassifier):  # a window fewer than there are chunks
            own = {name: value[..., : length - 1, :, :, :] for name, value in own.items()}
        arrays = {"x": exact[position, :length], "eps": eps[position, :length], **own}
        arrays = {name: to_array(value) for name, value in arrays.items()}
        header = _header(problem, problem.rows[sample], weights_hash, hash_arrays({"x": arrays["x"]}), names[sample])
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


def write_weights(path: Path, model: SequenceClassifier) -> str:
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


def collect_hints(model: SequenceClassifier, bounds: BoundPass) -> dict[str, Tensor]:
    """Slopes of all relaxations as slopes.l0.forward.NAME: (batch or 1, T, 2, operands, hidden).

    In the third dimension: lower, upper. Nodes that no perturbation reaches have no relaxation: zeros. If any node has
    curved bounds there are curvatures, likewise, with zeros for planes.
    """
    rnn, num_frames = model.rnn, len(bounds.graph.frames)
    num_steps = num_frames - isinstance(model, SpeechClassifier)
    nonlinear = [node for node in bounds.graph.nodes if isinstance(node, NonLinear)]
    curves = bounds.curves() if isinstance(bounds, CurvedPass) else [None] * len(nonlinear)
    nodes, hints = iter(zip(nonlinear, curves, strict=True)), {}
    if isinstance(model, SpeechClassifier):
        own = [_node_hints(*next(nodes), "log", Activation, 1, bounds)[0] for _ in range(num_steps)]
        hints["slopes.features.log"] = _over_steps(own)
    kinds = ("slopes", "curvatures") if any(own is not None for own in curves) else ("slopes",)
    for layer in range(rnn.num_layers):
        for direction in ("forward", "backward")[: 2 if rnn.bidirectional else 1]:
            order = range(num_steps) if direction == "forward" else reversed(range(num_steps))
            found = {t: [_node_hints(*next(nodes), *kind, bounds) for kind in OPERATIONS[type(rnn)]] for t in order}
            for position, (name, _, _) in enumerate(OPERATIONS[type(rnn)]):
                for part, kind in enumerate(kinds):
                    steps = [found[t][position][part] for t in range(num_steps)]
                    hints[f"{kind}.l{layer}.{direction}.{name}"] = _over_steps(steps)
    if next(nodes, None) is not None:
        raise RuntimeError("the graph has more non-linear nodes than its cells: certificates do not fit it")
    return hints


def _over_steps(steps: list[Tensor]) -> Tensor:
    """(batch or 1, T, ...) of hints of every time step."""
    batch = max(len(step) for step in steps)
    return torch.stack([step.expand(batch, *step.shape[1:]) for step in steps], dim=1)


def _node_hints(
    node: NonLinear, curves: Curves | None, name: str, kind: type, operands: int, bounds: BoundPass
) -> tuple[Tensor, Tensor]:
    """Slopes and curvatures, (batch or 1, 2, operands, size) each."""
    if not isinstance(node, kind) or len(node.parents) != operands:
        raise RuntimeError(f"node {node.index} of the graph is not the {name} of a cell: certificates do not fit it")
    none = torch.zeros(1, 2, operands, node.size, dtype=torch.float64, device=bounds.perturbation.x.device)
    if bounds.is_exact(node):
        return none, none
    lower, upper = bounds.relaxation(node)
    return _stacked(lower.slopes, upper.slopes), none if curves is None else _stacked(*curves[2:])


def _stacked(lower: tuple[Tensor, ...], upper: tuple[Tensor, ...]) -> Tensor:
    flat = torch.broadcast_tensors(*lower, *upper)
    flat = [part if part.dim() == 2 else part[None] for part in flat]
    return torch.stack(flat, dim=1).unflatten(1, (2, len(lower)))
