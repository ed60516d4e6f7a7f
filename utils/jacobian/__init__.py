"""Bounds of gradients over a perturbation set, and what follows from them."""

from .passes import CHAINS, JacobianPass

__all__ = ["CHAINS", "JacobianPass"]
