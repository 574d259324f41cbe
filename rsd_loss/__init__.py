"""Redundancy Suppression Distillation (ICCV 2025): one loss term for students of another architecture."""

from rsd_loss import diagnostics, features
from rsd_loss.functional import RSDTerms, cross_correlation, rsd_loss
from rsd_loss.modules import DecouplingProjector, RSDLoss

__all__ = ["DecouplingProjector", "RSDLoss", "RSDTerms", "cross_correlation", "diagnostics", "features", "rsd_loss"]
__version__ = "0.1.0"
