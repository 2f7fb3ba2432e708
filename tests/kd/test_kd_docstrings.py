"""Runs the docstring examples of the public names of `sokd.kd`."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from support.docstrings import run_example
from support.kd_cases import features, trained
from torch import nn

import sokd
from sokd.kd.features import tokens_to_map

EXPLAINED = [
    sokd.Adapter, sokd.DAM, sokd.Policy, sokd.Policy.draw, sokd.Policy.plan, sokd.PolicySearch,
    sokd.SoKD, sokd.SoKD.consistency, sokd.SoKD.diagnostics, sokd.SoKD.distances, sokd.SoKD.match,
    sokd.SoKD.record, sokd.SoKD.terms, sokd.loss, sokd.manual_seed, sokd.wrap, tokens_to_map,
]  # fmt: skip


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 64, 3, stride=4), nn.Linear(64, 5)

    def forward(self, x):
        maps = self.body(x)
        return self.head(maps.mean((2, 3))), maps


@pytest.mark.parametrize("subject", EXPLAINED, ids=lambda subject: subject.__qualname__)
def test_the_example_runs(subject):
    student, kd = Student(), trained(64, 256, heat_channels=3)
    x, y = torch.randn(8, 3, 28, 28), torch.randint(0, 5, (8,))
    logits, f_s = student(x)
    names = {
        "F": F, "batch": (x, y), "f_s": f_s, "f_t": features(8, 256, 7, 7), "kd": kd,
        "logits": logits, "other": (x, y), "policy": kd.policy, "sokd": sokd, "step": 0,
        "student": student, "teacher_features": lambda x: features(len(x), 256, 7, 7),
        "tokens_to_map": tokens_to_map, "torch": torch, "writer": Mock(), "y": y,
    }  # fmt: skip
    run_example(subject, names)
