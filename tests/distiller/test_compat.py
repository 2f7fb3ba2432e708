"""The mdistiller-style class in a loop as that project's trainer writes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.distiller_cases import SMALL, Net, batch, models
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


def test_a_script_with_its_checkpoints(tmp_path):
    """What mdistiller's train.py and its trainer do with a distiller, in their order."""

    def started():
        distiller = nn.DataParallel(made(method={"reviewkd": None, "kd": 1.0}))
        assert distiller.module.get_extra_parameters() > 0
        optimiser = torch.optim.SGD(
            distiller.module.get_learnable_parameters(), lr=0.01, weight_decay=5e-4
        )
        return distiller, optimiser

    def epoch_of(distiller, optimiser, epoch):
        distiller.train()
        optimiser.zero_grad()
        _, losses = distiller(image=x, target=y, epoch=epoch)
        sum(loss.mean() for loss in losses.values()).backward()
        optimiser.step()
        distiller.eval()
        with torch.no_grad():
            return distiller(image=x)

    x, y = batch()
    distiller, optimiser = started()
    epoch_of(distiller, optimiser, 1)
    state = {"epoch": 1, "model": distiller.state_dict(), "optimizer": optimiser.state_dict()}
    torch.save(state, tmp_path / "latest")
    expected = epoch_of(distiller, optimiser, 2)

    saved = torch.load(tmp_path / "latest", weights_only=True)
    resumed, fresh = started()
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert torch.equal(epoch_of(resumed, fresh, 2), expected)
    alone = Featured(models()[1])
    alone.load_state_dict(resumed.module.student.state_dict())
    assert torch.equal(alone.eval()(x)[0], expected)


@pytest.mark.parametrize(
    ("kind", "side"), [("CIFAR-100", 32), ("tiny_imagenet", 64), ("imagenet", 224)]
)
def test_the_data_set_names_the_size(kind, side):
    student = Featured(models()[1])
    sizes = []
    student.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    MDistiller(
        student,
        Featured(models()[0]),
        SimpleNamespace(DATASET=SimpleNamespace(TYPE=kind)),
        layers="net.stem",
    )
    assert sizes == [(2, 3, side, side)]


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
    assert made(num_data=10).methods["fitnet"] is not None, (
        "a method without that option is left alone"
    )


def test_without_a_known_data_set_an_example_is_needed():
    lazy = made(cfg=None)
    with pytest.raises(
        RuntimeError, match="Distiller: the parameters do not exist before the shapes are known"
    ):
        lazy.get_learnable_parameters()
    with pytest.raises(RuntimeError, match="before the shapes are known"):
        lazy.get_extra_parameters()
    assert made(cfg=None, example=batch()[0]).get_extra_parameters() > 0
