"""SoKD: the teacher's features refined for the student, and distilled where both attend."""

import torch as _torch  # noqa: F401, I001  (first: it loads the libraries that the compiled module is linked to)

from sokd.config import choose_reader as _choose_reader, show_config

_choose_reader()  # before the first tensor is read

from sokd import _core, inspect, methods, ops, reference  # noqa: E402
from sokd.adapters import Adapter  # noqa: E402
from sokd.dam import DAM  # noqa: E402
from sokd.distiller import Distiller  # noqa: E402
from sokd.kd import SoKD  # noqa: E402
from sokd.loss import loss  # noqa: E402
from sokd.policy import Policy, manual_seed  # noqa: E402
from sokd.search import PolicySearch  # noqa: E402
from sokd.warmup import warmup  # noqa: E402
from sokd.wrap import wrap  # noqa: E402

__version__ = _core.build_info()["version"]
__all__ = [
    "DAM",
    "Adapter",
    "Distiller",
    "Policy",
    "PolicySearch",
    "SoKD",
    "inspect",
    "loss",
    "manual_seed",
    "methods",
    "ops",
    "reference",
    "show_config",
    "warmup",
    "wrap",
]
