"""SoKD: the teacher's features refined for the student, and distilled where both attend."""

import torch as _torch  # noqa: F401, I001  (first: it loads the libraries that a reader is linked to)

from sokd import _core, compat, inspect, methods, ops, reference
from sokd.distiller import Distiller
from sokd.kd import DAM, Adapter, Policy, PolicySearch, SoKD, loss, manual_seed, wrap
from sokd.ops.config import choose_reader as _choose_reader, show_config
from sokd.ops.warmup import warmup

_choose_reader()  # before the first tensor is read

__version__ = _core.build_info()["version"]
__all__ = [
    "DAM", "Adapter", "Distiller", "Policy", "PolicySearch", "SoKD", "compat", "inspect", "loss",
    "manual_seed", "methods", "ops", "reference", "show_config", "warmup", "wrap",
]  # fmt: skip
