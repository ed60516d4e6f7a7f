"""The classifier that is trained and certified, under the short name of its module."""

from .network.models import POOLINGS, SequenceClassifier

__all__ = ["POOLINGS", "SequenceClassifier"]
