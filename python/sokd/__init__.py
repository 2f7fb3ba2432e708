"""SoKD: the teacher's features refined for the student, and distilled where both attend."""

# First, because it raises for a torch, NumPy or compiled module that does not fit.
from sokd.ops import installation as _installation  # isort: skip

from sokd import compat, inspect, methods, ops, reference
from sokd.distiller import Distiller
from sokd.kd import (
    DAM,
    Adapter,
    AttentionDAM,
    Match,
    Policy,
    PolicySearch,
    SoKD,
    loss,
    manual_seed,
    wrap,
)
from sokd.ops.config import choose_reader as _choose_reader
from sokd.ops.config import show_config
from sokd.ops.warmup import warmup

_choose_reader()  # before the first tensor is read

__version__ = _installation.VERSION
__all__ = [
    "DAM", "Adapter", "AttentionDAM", "Distiller", "Match", "Policy", "PolicySearch", "SoKD",
    "compat", "inspect", "loss", "manual_seed", "methods", "ops", "reference", "show_config",
    "warmup", "wrap",
]  # fmt: skip
