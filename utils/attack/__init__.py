"""Answers from the other side: perturbations that break a classification, and estimates of their least size."""

from .attack_file import replay_attack, save_attack
from .carlini_wagner import carlini_wagner
from .clever import clever
from .pgd import AttackProblem, AttackResult, RadiusAttackResult, attack_radius, pgd

__all__ = [
    "AttackProblem",
    "AttackResult",
    "RadiusAttackResult",
    "attack_radius",
    "carlini_wagner",
    "clever",
    "pgd",
    "replay_attack",
    "save_attack",
]
