"""A user's script, for type checkers: `make types` runs mypy --strict on it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sokd


def train(student: nn.Module, teacher: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    distiller = sokd.Distiller(student, teacher, layers="layer4", method="fitnet", sokd=True)
    assert_type(distiller.student, nn.Module)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    assert distiller.kd is not None
    search = sokd.PolicySearch(distiller.kd, distiller.student, epochs=1)
    for images, labels in batches:
        search.step(distiller.step, (images, labels))
        _, terms = distiller(images, labels)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # by torch
        optimizer.step()


def losses(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    kd = sokd.SoKD(64, 256, search="online")
    assert_type(sokd.loss(student, teacher, kd), Tensor)
    assert_type(sokd.loss(student, teacher, kd, return_terms=True)["agreement"], Tensor)
    assert_type(sokd.ops.masked_mse(student, student.detach()), Tensor)
    assert_type(sokd.methods.dkd(student.mean((2, 3)), teacher.mean((2, 3)), labels), Tensor)
    wrapped: Tensor = sokd.wrap(nn.functional.mse_loss, kd)(student, teacher)
    return wrapped


def of_arrays(features: "np.ndarray[Any, Any]", theta: "np.ndarray[Any, Any]") -> None:
    assert_type(sokd.ops.refine(features, theta), "np.ndarray[Any, Any]")
    assert_type(sokd.ops.masked_mse(features, features), "np.ndarray[Any, Any]")


sokd.manual_seed(0)
version: str = sokd.__version__
