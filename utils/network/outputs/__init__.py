"""What of a forward's result is meant, and what of it the graph leaves out."""

from .parts import ENDS, SCORES, VALUES, Outputs, SeveralOutputs

__all__ = ["ENDS", "SCORES", "VALUES", "Outputs", "SeveralOutputs"]
