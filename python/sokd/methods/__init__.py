"""Distillation methods, each as a loss function or module and by name for a `Distiller`."""

from sokd.methods.at import at
from sokd.methods.catkd import catkd, class_maps
from sokd.methods.cc import cc
from sokd.methods.common import Method, Shape, Step
from sokd.methods.crd import crd, pooled
from sokd.methods.dist import dist
from sokd.methods.dkd import dkd
from sokd.methods.fgd import fgd
from sokd.methods.fitnet import fitnet
from sokd.methods.kd import kd
from sokd.methods.lskd import lskd
from sokd.methods.mgd import mgd
from sokd.methods.nst import nst
from sokd.methods.ofd import ofd, ofd_margin
from sokd.methods.pkt import pkt
from sokd.methods.registry import METHODS, build, options_of
from sokd.methods.reviewkd import hcl, reviewkd
from sokd.methods.rkd import rkd
from sokd.methods.sp import sp
from sokd.methods.vid import vid
from sokd.methods.wkd import class_distances, wkd, wkd_features, wkd_logits

__all__ = [
    "METHODS",
    "Method",
    "Shape",
    "Step",
    "at",
    "build",
    "catkd",
    "cc",
    "class_distances",
    "class_maps",
    "crd",
    "dist",
    "dkd",
    "fgd",
    "fitnet",
    "hcl",
    "kd",
    "lskd",
    "mgd",
    "nst",
    "ofd",
    "ofd_margin",
    "options_of",
    "pkt",
    "pooled",
    "reviewkd",
    "rkd",
    "sp",
    "vid",
    "wkd",
    "wkd_features",
    "wkd_logits",
]
