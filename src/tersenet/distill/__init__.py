"""Distillation: companions that make a training follow a teacher. What `with` in a recipe's train can name."""

from tersenet.distill.soft_targets import SoftTargets

COMPANIONS = {"soft_targets": SoftTargets}

__all__ = ["COMPANIONS", "SoftTargets"]
