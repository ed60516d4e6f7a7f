"""Certificates against the replacement of frames, such as words by synonyms."""

from .margins import Substitutes, substitution_margins
from .search import Decision, decide_substitution

__all__ = ["Decision", "Substitutes", "decide_substitution", "substitution_margins"]
