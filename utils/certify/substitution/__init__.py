"""Certificates against the replacement of frames, such as words by synonyms."""

from .certificates import save_substitution_certificates
from .margins import Substitutes, substitution_margins
from .search import Decision, decide_substitution

__all__ = [
    "Decision",
    "Substitutes",
    "decide_substitution",
    "save_substitution_certificates",
    "substitution_margins",
]
