"""Questions and their answers: certified margins and radii, decisions, verification, certificates."""

from ..choices import METHODS
from ..question import margin_rows
from .bab import Decision, decide
from .certificate import model_hash, save_certificates
from .interface import certified_margin, certified_radius
from .problem import MarginProblem, margin_problem
from .radius import RadiusResult, search_radius
from .verify import Verifier
from .vnnlib import read_vnnlib
from .vnnlib_write import counter_example, write_robustness

__all__ = [
    "METHODS",
    "Decision",
    "MarginProblem",
    "RadiusResult",
    "Verifier",
    "certified_margin",
    "certified_radius",
    "counter_example",
    "decide",
    "margin_problem",
    "margin_rows",
    "model_hash",
    "read_vnnlib",
    "save_certificates",
    "search_radius",
    "write_robustness",
]
