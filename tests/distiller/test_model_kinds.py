"""Models that are graphs, scripts, or unusual modules, as teacher and student."""

import copy

import pytest
import torch
from support.distiller_cases import Net, batch, make, models, objective
from torch import nn


def traced(net: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(net)


def exported_program(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (batch()[0],)).module()


@pytest.mark.parametrize("form", [traced, exported_program], ids=["fx", "export"])
def test_a_teacher_that_is_a_graph(form):
    teacher, student = models()
    teacher.eval()
    expected = make(models=(teacher, copy.deepcopy(student)), method="kd", sokd=False)
    graph = make(models=(form(teacher), student), method="kd", sokd=False)
    found, wanted = (each(*batch())[1]["loss_kd"] for each in (graph, expected))
    torch.testing.assert_close(found, wanted)
    assert not any(p.requires_grad for p in graph.teacher.parameters())


def test_layers_of_a_graph():
    """Of a stage the graph calls the layers, not the stage."""
    pair = tuple(map(traced, models()))
    with pytest.raises(RuntimeError, match=r"torch\.fx graph, which calls the innermost mod"):
        make(models=pair, sokd=False)
    distiller = make(models=pair, sokd=False, layers=["stage1.2", "stage2.2"])
    expected = make(models=models(), sokd=False, layers=["stage1.2", "stage2.2"])
    for found, wanted in zip(
        distiller.features(batch()[0]), expected.features(batch()[0]), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    objective(distiller).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_student_of_torchscript_where_no_layers_are_used():
    teacher, student = models()
    student.eval()
    expected = make(models=(teacher, student), method="kd", sokd=False).eval()(*batch())[1]
    script = torch.jit.script(copy.deepcopy(student))
    distiller = make(models=(teacher, script), method="kd", sokd=False)
    torch.testing.assert_close(distiller.eval()(*batch())[1], expected)
    objective(distiller.train()).backward()
    assert all(p.grad is not None for p in script.parameters())
    assert torch.equal(distiller.export()(batch()[0]), script.eval()(batch()[0]))


class Silent(Net):
    """Its `train()` returns nothing, as that of mmdetection's backbones."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.stem.eval()


def test_models_whose_train_returns_nothing():
    distiller = make(models=(Silent(6), Silent(3)))
    assert isinstance(distiller.teacher, Silent) and not distiller.teacher.training
    objective(distiller.train()).backward()
    assert distiller.student.training and not distiller.student.stem.training
    distiller.teacher.train()
    with pytest.warns(UserWarning, match="the teacher was in train mode"):
        objective(distiller)
    assert isinstance(distiller.export(), Silent) and not distiller.export().training
