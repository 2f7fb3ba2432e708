"""The methods by name, and their construction from names and options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from sokd.methods.at import AT
from sokd.methods.catkd import CATKD
from sokd.methods.cc import CC
from sokd.methods.common import Method, Shape
from sokd.methods.crd import CRD
from sokd.methods.dist import DIST
from sokd.methods.dkd import DKD
from sokd.methods.fgd import FGD
from sokd.methods.fitnet import FitNet
from sokd.methods.kd import KD
from sokd.methods.lskd import LSKD
from sokd.methods.mgd import MGD
from sokd.methods.nst import NST
from sokd.methods.ofd import OFD
from sokd.methods.pkt import PKT
from sokd.methods.reviewkd import ReviewKD
from sokd.methods.rkd import RKD
from sokd.methods.sp import SP
from sokd.methods.vid import VID
from sokd.methods.wkd import WKD

__all__ = ["METHODS", "build", "nearest", "one_of_names", "options_of"]

_ALL: tuple[type[Method], ...] = (
    FitNet, AT, CRD, ReviewKD, KD, DKD, LSKD, DIST, SP, RKD, CATKD, MGD, FGD, WKD, NST,
    PKT, VID, CC, OFD,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def build(
    name: str, *, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], **options: Any
) -> Method:
    """Make the method of that name for layer pairs of these shapes (C, H, W).

        shapes = [(8, 7, 7)]
        method = sokd.methods.build("mgd", student_shapes=shapes, teacher_shapes=shapes, ratio=0.5)

    Raises:
        ValueError: no such method (the error lists the nearest names), or unsupported shapes.
        TypeError: an unknown option, or a required option is missing.
    """
    if name not in METHODS:
        raise ValueError(f"build: name must {one_of_names(name)}")
    method, known = METHODS[name], options_of(name)
    for option in options:
        if option not in known:
            rule = f"be among {', '.join(known)}" if known else "be empty (it has none)"
            raise TypeError(f"{name}: options must {rule}, got {option}")
    return method(student_shapes, teacher_shapes, **options)


def one_of_names(name: str) -> str:
    """The end of the error about an unknown method, with the nearest names."""
    near = nearest(str(name).lower(), METHODS)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    return f"be one of {', '.join(METHODS)}{hint}, got {name!r}"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The names closest to this one, at most three."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)


def options_of(name: str) -> list[str]:
    """The names of a method's options."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
