"""Attacks saved to a file, and their replay: the evidence behind an upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.constants.extra import Extra
from ..network.state import plain_state
from ..question.threat import threat_of
from .pgd import VERDICT, AttackProblem, AttackResult


@dataclass
class Replay:
    """Margins, sizes (max_t ||x'_t - x_t||_p) and whether the rest of the threat model holds, all (batch,)."""

    margin: Tensor
    size: Tensor
    valid: Tensor


def save_attack(
    path: str | Path,
    result: AttackResult,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    extra: Any = None,
    **threat: Any,
) -> None:
    """Write perturbed inputs with all that a replay needs but the model; arguments as the attack had them."""
    told, extra = threat_of(**threat), Extra.of(extra, len(x))
    content = {"perturbed": result.x, "x": x, "labels": labels, "norm": float(told.norm), "targets": targets}
    content |= {"frames": told.frames, "clip": told.clip, "ball": told.ball, "together": told.together}
    content |= {"extra": extra.given} if extra else {}
    torch.save(content, Path(path))


@plain_state()
@torch.no_grad()
def replay_attack(path: str | Path, model: nn.Module | Graph) -> Replay:
    """Evaluate a saved attack on a model once more, in float64. Raises ValueError if the file holds no attack."""
    try:
        content = torch.load(path, weights_only=True)
        perturbed, x, labels = (content.pop(key) for key in ("perturbed", "x", "labels"))
        problem = AttackProblem(model, x, labels, **content)
    except OSError:
        raise
    except Exception as error:  # a damaged or foreign file fails in whatever way its bytes lead to
        raise ValueError(f"{path} is not a saved attack on this model ({error})") from error
    balls = problem.balls
    delta = perturbed.to(VERDICT) - balls.x
    valid = ((delta == 0).all(dim=-1) | balls.mask).all(dim=-1)
    if balls.clip is not None:
        valid &= ((perturbed >= balls.clip[0]) & (perturbed <= balls.clip[1])).flatten(1).all(dim=1)
    return Replay(problem.worst_margin(perturbed.to(VERDICT)), balls.size(delta), valid)
