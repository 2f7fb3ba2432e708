"""The Distiller: distillation of any two models by any method."""

from sokd.distiller.distiller import Distiller

__all__ = ["Distiller"]
