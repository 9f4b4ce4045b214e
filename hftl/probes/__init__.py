"""Heads fitted on features instead of trained."""

from __future__ import annotations

from hftl.probes.linear import fit_linear_head
from hftl.probes.logistic import LinearHead, solve_linear_head

__all__ = ["LinearHead", "fit_linear_head", "solve_linear_head"]
