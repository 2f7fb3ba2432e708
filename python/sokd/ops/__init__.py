"""The fused operators. Each has a twin of the same signature in `sokd.reference`."""

from sokd.ops import installation as _installation  # noqa: F401  (first: it may refuse)
from sokd.ops.areas import areas
from sokd.ops.draw import draw
from sokd.ops.masked_mse import masked_mse
from sokd.ops.refine import refine, refine_dots
from sokd.reference import Areas, Plan, Plans

__all__ = ["Areas", "Plan", "Plans", "areas", "draw", "masked_mse", "refine", "refine_dots"]
