"""The dry run makes lazy parameters and leaves everything else of the models as it was."""

import pytest
import torch
from support.distiller_cases import CLASSES, Buffered, Net, batch, make, objective
from torch import Tensor, nn

import sokd
from sokd.distiller.copies import untouched


def reassign(net: Buffered, x: Tensor) -> None:
    net.memory = net.memory + len(x)


def resize(net: Buffered, x: Tensor) -> None:
    net.memory.resize_(len(x), 7).fill_(3.0)


def write(net: Buffered, x: Tensor) -> None:
    net.memory += 1


def swap_in_another_shape(net: Buffered, x: Tensor) -> None:
    net.memory = x.detach()[:, 0].clone()


def read(net: Buffered, x: Tensor) -> None:
    assert net.memory.shape[-1] >= 2


def delete(net: Buffered, x: Tensor) -> None:
    net.memory = None


USES = {
    "expanded": (lambda: torch.zeros(1, 1).expand(3, 4), read),
    "reassigned": (lambda: torch.zeros(2), reassign),
    "resized": (lambda: torch.zeros(2), resize),
    "written": (lambda: torch.zeros(2), write),
    "of another shape": (lambda: torch.zeros(2), swap_in_another_shape),
    "set to None": (lambda: torch.zeros(2), delete),
    "a view": (lambda: torch.zeros(4, 4).t()[::2], write),
}


@pytest.mark.parametrize(("buffer", "use"), USES.values(), ids=USES)
@pytest.mark.parametrize("layers", ["net.stage1", "auto"])
def test_buffers_of_any_kind(buffer, use, layers):
    pair = [Buffered(width, buffer(), use) for width in (6, 3)]
    before = [net.memory for net in pair]
    values = [(each.clone(), each.stride()) for each in before]
    distiller = make(models=pair, layers=layers)
    for net, own, (value, stride) in zip(pair, before, values, strict=True):
        assert net.memory is own and torch.equal(own, value) and own.stride() == stride
    assert objective(distiller).isfinite()


def test_a_buffer_of_two_modules_stays_one():
    net = Buffered(3, torch.zeros(2), write)
    net.other = nn.Module()
    net.other.register_buffer("memory", net.memory)
    with untouched(net):
        net(batch()[0])
        assert net.memory is net.other.memory and torch.equal(net.memory, torch.ones(2))
    assert net.memory is net.other.memory and not net.memory.any()


def test_buffers_are_restored_after_an_error():
    net = Buffered(3, torch.zeros(2), write)
    with pytest.raises(RuntimeError), untouched(net):
        net(torch.zeros(2, 9, 16, 16))
    assert not net.memory.any() and net.training


class Lazy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(width, 3, 2, 1), nn.LazyBatchNorm2d()
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("layers", ["norm", "auto"])
@pytest.mark.parametrize("lazy", ["student", "teacher", "both"])
def test_lazy_layers_are_made(layers, lazy):
    pair = [Lazy(6), Lazy(4)]
    for net, side in zip(pair, ("teacher", "student"), strict=True):
        if lazy not in (side, "both"):
            net(batch()[0])
            net.norm.reset_running_stats()
    distiller = make(models=pair, layers=layers)
    for net in pair:
        assert type(net.conv) is nn.Conv2d and type(net.norm) is nn.BatchNorm2d
        assert not net.norm.running_mean.any() and int(net.norm.num_batches_tracked) == 0
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    objective(distiller).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


@pytest.mark.parametrize("make_script", [
    torch.jit.script, lambda net: torch.jit.trace(net, batch()[0]),
], ids=["script", "trace"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestTorchScript:
    def test_a_teacher_for_a_method_without_layers(self, make_script):
        teacher, student = Net(6).eval(), Net(3)
        expected = make(models=(teacher, student), method="kd", sokd=False)(*batch())[1]
        student.load_state_dict(student.state_dict())
        scripted = make(models=(make_script(teacher), student), method="kd", sokd=False)
        found = scripted(*batch())[1]
        torch.testing.assert_close(found["loss_kd"], expected["loss_kd"])
        assert not any(p.requires_grad for p in scripted.teacher.parameters())

    @pytest.mark.parametrize("layers", ["stage1", "auto"])
    def test_layers_are_refused(self, make_script, layers):
        with pytest.raises(TypeError) as caught:
            make(models=(make_script(Net(6).eval()), Net(3)), layers=layers)
        assert str(caught.value).startswith(
            "Distiller: teacher must be an eager module where layers are used, because "
            "TorchScript runs no hooks (method='kd' with sokd=False uses no layers), got "
        )

    def test_a_script_inside_a_module(self, make_script):
        class Holder(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.outer, self.inner = nn.Conv2d(3, 3, 1, 2), inner

            def forward(self, x):
                self.outer(x)
                return self.inner(x)

        pair = Holder(make_script(Net(6).eval())), Holder(Net(3))
        with pytest.raises(RuntimeError, match="inside a TorchScript module"):
            make(models=pair, layers="inner.stage1")
        distiller = make(models=pair, layers={"inner.stage1": "outer"})
        assert objective(distiller).isfinite()


def fill(net: Buffered, x: Tensor) -> None:
    net.memory = torch.zeros(3) if net.memory is None else net.memory + 1


def drop(net: Buffered, x: Tensor) -> None:
    del net.memory
    net.register_buffer("memory", torch.full((2,), 5.0))


def multiply(net: Buffered, x: Tensor) -> None:
    assert net.memory.layout == torch.sparse_coo
    net.memory = net.memory * 2


@pytest.mark.parametrize(("use", "buffer"), [
    (fill, None), (drop, torch.zeros(4)), (multiply, torch.eye(3).to_sparse()),
], ids=["none yet", "registered again", "sparse"])  # fmt: skip
def test_buffers_that_come_and_go(use, buffer):
    pair = [Buffered(width, buffer, use) for width in (6, 3)]
    distiller = make(models=pair, layers="net.stage1")
    assert all(net.memory is buffer for net in pair)
    objective(distiller).backward()


def test_a_table_that_the_first_pass_registers():
    """Rotary tables, anchors: as after a first pass without a Distiller."""

    class Tabled(Net):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.arange(5.0), persistent=False)
            return super().forward(x) + self.table

    distiller = make(models=(Tabled(6), Tabled(3)))
    expected = distiller.student(batch()[0])
    torch.testing.assert_close(distiller(*batch())[0], expected)


def test_lazy_layers_where_no_dry_run_is_needed():
    def lazy():
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES))

    torch.manual_seed(0)
    distiller = sokd.Distiller(lazy(), lazy(), method="kd", sokd=False)
    assert objective(distiller).isfinite()
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
