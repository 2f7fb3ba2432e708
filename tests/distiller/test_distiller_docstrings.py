"""Runs the docstring examples of the Distiller, the methods and the inspection."""

from __future__ import annotations

import pytest
import torch
from support.distiller_cases import SMALL, batch, make, models
from support.docstrings import run_example

import sokd
from sokd import methods
from sokd.methods.crd import CRDLoss
from sokd.methods.mgd import MGDLoss
from sokd.methods.reviewkd import ReviewKDLoss

EXPLAINED = [
    sokd.Distiller, sokd.Distiller.step, methods.at, methods.build, methods.catkd,
    methods.class_maps, methods.dist, methods.dkd, methods.fitnet, methods.hcl, methods.kd,
    methods.lskd, methods.pooled, methods.rkd, methods.sp, CRDLoss, MGDLoss, ReviewKDLoss,
    sokd.inspect.table,
]  # fmt: skip


@pytest.mark.parametrize("subject", EXPLAINED, ids=lambda subject: subject.__qualname__)
def test_the_example_runs(subject, capsys):
    teacher, student = models()
    images, labels = batch()
    names = {
        "distiller": make(sokd=SMALL), "images": images, "labels": labels, "sokd": sokd,
        "student": student, "teacher": teacher, "torch": torch, "x": images, "y": labels,
    }  # fmt: skip
    run_example(subject, names)
