"""Transformer classifiers of sequences of vectors."""

from .model import LAYER_NORMS, SequenceTransformer
from .settings import TRANSFORMER_KEYS, check_transformer, make_transformer

__all__ = ["LAYER_NORMS", "TRANSFORMER_KEYS", "SequenceTransformer", "check_transformer", "make_transformer"]
