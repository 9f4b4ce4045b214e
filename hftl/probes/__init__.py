"""Heads fitted on features instead of trained."""

from __future__ import annotations

from hftl.probes.beside import BESIDE, Probe, fit_probe, linear_probe, load_probe
from hftl.probes.linear import check_every_class, fit_linear_head
from hftl.probes.logistic import LinearHead, solve_linear_head

__all__ = [
    "BESIDE",
    "LinearHead",
    "Probe",
    "check_every_class",
    "fit_linear_head",
    "fit_probe",
    "linear_probe",
    "load_probe",
    "solve_linear_head",
]
