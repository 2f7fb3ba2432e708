"""The mdistiller-style class in a loop as that project's trainer writes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from distiller_cases import SMALL, Net, batch, models, one_thread  # noqa: F401
from torch import nn

from sokd.compat import MDistiller


class Featured(nn.Module):
    """Returns (logits, dict of features), as mdistiller's models do."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        first = self.net.stage1(self.net.stem(x))
        second = self.net.stage2(first)
        pooled = second.mean((2, 3))
        return self.net.head(pooled), {"feats": [first, second], "pooled_feat": pooled}


CFG = SimpleNamespace(DATASET=SimpleNamespace(TYPE="cifar100"))


def made(cfg=CFG, **options):
    teacher, student = map(Featured, models())
    given = {"layers": ["net.stage1", "net.stage2"], "method": "fitnet", "sokd": SMALL, **options}
    return MDistiller(student, teacher, cfg, **given)


def test_a_trainers_loop():
    distiller = made()
    optimiser = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01, momentum=0.9)
    x, y = batch()
    before = distiller.student.net.head.weight.detach().clone()
    for epoch in range(2):
        distiller.train()
        preds, losses = distiller(image=x, target=y, epoch=epoch)
        loss = sum(term.mean() for term in losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert preds.shape == (4, 5)
    assert list(losses) == ["loss_ce", "loss_fitnet", "loss_agreement"]
    assert not torch.equal(before, distiller.student.net.head.weight)
    distiller.eval()
    with torch.no_grad():
        assert torch.equal(distiller(image=x), distiller.student(x)[0])


def test_the_methods_by_themselves():
    distiller, (x, y) = made(), batch()
    logits, losses = distiller.forward_train(image=x, target=y, epoch=3)
    assert logits.shape == (4, 5) and "loss_fitnet" in losses
    extra = sum(p.numel() for p in distiller.kd.parameters())
    assert distiller.get_extra_parameters() == extra
    every = sum(p.numel() for p in distiller.get_learnable_parameters())
    assert every == extra + sum(p.numel() for p in distiller.student.parameters())
    assert not {id(p) for p in distiller.teacher.parameters()} & {
        id(p) for p in distiller.get_learnable_parameters()
    }


def test_crd_gets_the_size_of_the_training_set_and_the_indices():
    distiller, (x, y) = made(num_data=10, method="crd"), batch()
    index, others = torch.arange(4), torch.zeros(4, 3, dtype=torch.int64)
    _, losses = distiller(image=x, target=y, index=index, contrastive_index=others)
    assert losses["loss_crd"].isfinite()
    assert made(num_data=10).methods["fitnet"] is not None, "a method without that option is left alone"


def test_without_a_known_data_set_an_example_is_needed():
    lazy = made(cfg=None)
    with pytest.raises(
        RuntimeError, match="Distiller: parameters must be asked for once the shapes are known"
    ):
        lazy.get_learnable_parameters()
    assert made(cfg=None, example=batch()[0]).get_extra_parameters() > 0
