"""Any two models, any method: the Distiller, and what it finds out about them."""

from sokd.distiller.distiller import Distiller

__all__ = ["Distiller"]
