"""Verified accuracy of many samples: cheap bounds and attacks settle most, dear bounds what is left."""

from .run import cascade
from .settings import ATTACK_STAGES, CLEAN, DEFAULT_STAGES, OUTCOMES, STAGES, CascadeResult, Effort, StageCost

__all__ = [
    "ATTACK_STAGES",
    "CLEAN",
    "DEFAULT_STAGES",
    "OUTCOMES",
    "STAGES",
    "CascadeResult",
    "Effort",
    "StageCost",
    "cascade",
]
