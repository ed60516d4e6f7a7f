"""Replacements of words that lower a margin: searched for, or all of them tried."""

from .sentence import Replaceable, all_choices, count_choices
from .worst import Worst, worst_replacements

__all__ = ["Replaceable", "Worst", "all_choices", "count_choices", "worst_replacements"]
