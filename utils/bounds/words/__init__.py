"""What is known of nodes that read single words, over sets in which words are replaced."""

from .sentences import sentences_alike
from .values import WordValues
from .words import Words

__all__ = ["WordValues", "Words", "sentences_alike"]
