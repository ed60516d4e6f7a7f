"""Questions and their answers: certified margins and radii, decisions, verification, certificates."""

from ..choices import METHODS
from ..question import margin_rows
from .bab import Decision, decide
from .cascade import CascadeResult, Effort, StageCost, cascade
from .certificate import model_hash, save_certificates
from .interface import certified_margin, certified_radius
from .lipschitz import (
    LocalLipschitz,
    local_lipschitz,
    radius_without_stationary_point,
    sampled_lipschitz,
    search_without_stationary_point,
)
from .outputs import OutputBounds, band_radius, output_bounds
from .problem import MarginProblem, margin_problem
from .radius import RadiusResult, search_radius
from .substitution import (
    Substitutes,
    decide_substitution,
    save_substitution_certificates,
    substitution_margins,
)
from .verify import Verifier
from .vnnlib import counter_example, read_vnnlib, write_robustness

__all__ = [
    "METHODS",
    "CascadeResult",
    "Decision",
    "Effort",
    "LocalLipschitz",
    "MarginProblem",
    "OutputBounds",
    "RadiusResult",
    "Substitutes",
    "StageCost",
    "Verifier",
    "band_radius",
    "cascade",
    "certified_margin",
    "certified_radius",
    "counter_example",
    "decide",
    "decide_substitution",
    "local_lipschitz",
    "margin_problem",
    "margin_rows",
    "model_hash",
    "output_bounds",
    "radius_without_stationary_point",
    "read_vnnlib",
    "sampled_lipschitz",
    "save_certificates",
    "save_substitution_certificates",
    "search_radius",
    "search_without_stationary_point",
    "substitution_margins",
    "write_robustness",
]
