"""sokd.loss under torch.compile, autocast, DDP and fake tensors; its peak memory."""

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import kd_cases
from support.cases import compiles, skip_without_fake_cuda
from support.kd_cases import FixedMask, make, trained
from support.ranks import of_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from benches.bench_loss import peak_bytes
from sokd.kd.dam import Attention
from sokd.kd.sokd import SoKD, loss
from sokd.ops.torch_internals import RELEASE

exports = pytest.mark.skipif(
    RELEASE < (2, 8), reason="torch.export before torch 2.8 loses the names of a policy's tables"
)


def pair(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor]:
    return kd_cases.pair((batch, 3, 6, 6), (batch, 4, 6, 6), dtype)


def value_and_gradients(
    call: Callable[..., Tensor], kd: SoKD, *features: Tensor
) -> tuple[Tensor, list[Tensor]]:
    kd.policy.counter.fill_(3)
    value = call(*features, kd)
    return value.detach(), list(torch.autograd.grad(value, [features[0], *kd.parameters()]))


# ---------------------------------------------------------------------------------------- compilers
@compiles
@pytest.mark.parametrize(
    ("backend", "batches"),
    [
        ("aot_eager", (2, 3)),
        ("inductor", (2,)),
    ],  # the second batch size makes the dimension dynamic
)
def test_compiled_whole_it_gives_the_same_value_gradients_and_statistics(backend, batches):
    torch._dynamo.reset()
    kd, twin = make(), make()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for batch in batches:
        features = pair(batch=batch)
        want, d_want = value_and_gradients(loss, kd, *features)
        got, d_got = value_and_gradients(compiled, twin, *features)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(d_got, d_want, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(twin.diagnostics(), kd.diagnostics())
        for name, tensor in kd.state_dict().items():
            torch.testing.assert_close(
                twin.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}"
            )


@compiles
def test_a_compiled_training_step_draws_anew_each_time():
    torch._dynamo.reset()
    kd = make(dam=None).eval()
    student, teacher = pair()
    step = torch.compile(
        lambda student, teacher: loss(student, teacher, kd), fullgraph=True, backend="aot_eager"
    )
    values = [step(student, teacher).item() for _ in range(6)]
    kd.policy.counter.zero_()
    assert values == pytest.approx([loss(student, teacher, kd).item() for _ in range(6)])
    assert len(set(values)) > 1


@compiles
def test_a_schedule_of_the_weights_is_compiled_once_more():
    torch._dynamo.reset()
    if torch._dynamo.config.specialize_float:
        pytest.skip("this PyTorch compiles each float anew")
    kd, features, graphs = make(base="keep"), pair(), []
    compiled = torch.compile(
        loss, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for step in range(1, 6):
        kd.lambda_agreement, kd.lambda_areas, kd.lambda_base = 0.1 * step, 0.3 * step, 0.7 * step
        got, expected = (value_and_gradients(call, kd, *features)[0] for call in (compiled, loss))
        torch.testing.assert_close(got, expected)
    assert len(graphs) == 2


class Clamped(nn.Module):
    """A DAM whose agreement is not proportional to `scale`."""

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float) -> Attention:
        agreement = (scale * (student - teacher).square().mean()).clamp(max=0.5)
        weight = torch.ones_like(student[:, 0])
        return Attention(agreement, weight, weight, weight, student.detach()[:0])


@compiles
def test_a_compiled_loss_gives_another_dam_its_scale():
    torch._dynamo.reset()
    kd, features = make(dam=Clamped(), lambda_agreement=100.0), pair()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for call in (loss, compiled):
        kd.policy.counter.fill_(3)
        assert call(*features, kd, return_terms=True)["agreement"].item() == 0.5


@compiles
def test_a_compiled_kd_is_taken_by_the_loss():
    torch._dynamo.reset()
    kd = make(dam=None).eval()
    features = pair()
    compiled = torch.compile(kd, fullgraph=True, backend="aot_eager")
    got = loss(*features, compiled)
    kd.policy.counter.zero_()
    torch.testing.assert_close(got, loss(*features, kd))


@compiles
@exports
def test_it_exports():
    kd = make().eval()
    features = [side.detach() for side in pair()]
    exported = torch.export.export(kd, tuple(features))
    kd.policy.counter.zero_()
    want = kd(*features)
    kd.policy.counter.zero_()
    torch.testing.assert_close(exported.module()(*features), want)


@compiles
@exports
@pytest.mark.parametrize(
    "which", [{0: "batch"}, {0: "batch", 2: "height", 3: "width"}], ids=["batch", "all"]
)
def test_it_exports_for_any_size(which):
    kd, twin = make(), make()
    dims = {index: torch.export.Dim(name, min=2) for index, name in which.items()}
    program = torch.export.export(kd, pair(), dynamic_shapes=(dims, dims)).module()
    sizes = (6, 6) if len(which) == 1 else (5, 7)
    features = [part.detach() for part in kd_cases.pair((3, 3, *sizes), (3, 4, *sizes))]
    torch.testing.assert_close(program(*features).detach(), loss(*features, twin).detach())


def remake_on(device: str, module: nn.Module) -> None:
    """`.to(device)` for fake tensors, which `nn.Module.to` cannot swap."""
    for child in module.children():
        remake_on(device, child)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
    for name, buffer in module._buffers.items():
        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_value_is_read_on_the_host(device):
    """Fake tensors have no values: `.item()`, a branch on a tensor or a copy to the host raises."""
    if device == "cuda":
        skip_without_fake_cuda()
    with FakeTensorMode(), warnings.catch_warnings():
        # the plain path; its kernels, if any, likewise
        warnings.filterwarnings("ignore", "sokd: no kernels for cuda")
        kd = make([3, 3], [4, 4])
        remake_on(device, kd)
        students = [torch.randn(2, 3, 6, 6, device=device, requires_grad=True) for _ in range(2)]
        teachers = [torch.randn(2, 4, 5, 6, device=device) for _ in range(2)]
        terms = loss(students, teachers, kd, return_terms=True)
        if device == "cpu":  # the autograd engine looks up the device, even of fake tensors
            terms["total"].backward()
            assert students[0].grad.shape == students[0].shape
        found = kd.diagnostics()
    assert terms["total"].device.type == device
    assert all(value.device.type == device for value in found.values())


# ----------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", list(itertools.product([True, False], repeat=2)), ids=str)
def test_under_autocast_the_loss_is_float32_and_near(dtype, sides):
    kd = make(lambda_agreement=1.0, lambda_areas=1.0).eval()
    student, teacher = pair()
    want, d_want = value_and_gradients(loss, kd, student, teacher)
    half = [
        side.detach().to(dtype) if low else side.detach()
        for side, low in zip((student, teacher), sides, strict=True)
    ]
    half[0].requires_grad_()
    with torch.autocast("cpu", dtype):
        value, gradients = value_and_gradients(loss, kd, *half)
    assert value.dtype == torch.float32
    # rounding may move a peak, and with it the covered cells: the terms keep their size
    torch.testing.assert_close(value, want, rtol=0.1, atol=0)
    assert gradients[0].dtype == half[0].dtype
    assert all(gradient.isfinite().all() for gradient in gradients)
    similarity = torch.cosine_similarity(gradients[0].float().flatten(), d_want[0].flatten(), dim=0)
    assert similarity > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_another_dtype(dtype):
    kd = make(lambda_agreement=1.0, lambda_areas=1.0).to(dtype).eval()
    value, gradients = value_and_gradients(loss, kd, *pair(dtype))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


# ---------------------------------------------------------------------------------------------- DDP
def free_of_the_batch() -> SoKD:
    """Without noise and BatchNorm, which depend on the position in the batch and on its content."""
    policies = [("rotate", "cutout"), ("shear_x", "channel_drop")]
    return trained(3, 4, heat_channels=5, k=2, policies=policies).eval()


def _rank(rank: int) -> dict[str, Any]:
    """Half of the batch, and a seed that differs: the state and the gradients of two steps."""
    torch.manual_seed(100 + rank)
    kd = free_of_the_batch()
    wrapped = DistributedDataParallel(kd)
    steps = []
    for step in range(2):
        student, teacher = (side.detach()[2 * rank : 2 * rank + 2] for side in pair(batch=4))
        kd.zero_grad()
        loss(student + step, teacher, wrapped).backward()
        steps.append({name: parameter.grad.clone() for name, parameter in kd.named_parameters()})
    return {"state": kd.state_dict(), "gradients": steps}


def test_two_ranks_draw_alike_and_give_the_gradients_of_the_whole_batch(tmp_path: Path):
    ranks = of_ranks(_rank, tmp_path)
    torch.manual_seed(100)
    kd = free_of_the_batch()
    for step in range(2):
        student, teacher = pair(batch=4)
        kd.zero_grad()
        loss(student.detach() + step, teacher, kd).backward()
        for rank in ranks:
            want = {name: parameter.grad for name, parameter in kd.named_parameters()}
            torch.testing.assert_close(rank["gradients"][step], want, rtol=1e-4, atol=1e-4)
    for rank in ranks:
        assert torch.equal(rank["state"]["policy.seed"], kd.policy.seed)
        assert torch.equal(rank["state"]["policy.counter"], kd.policy.counter)


# ------------------------------------------------------------------------------------------- memory
def step(kd: SoKD, student: Tensor, teacher: Tensor) -> None:
    torch.autograd.grad(loss(student, teacher, kd), student)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("mask", [True, False])
def test_the_loss_holds_two_maps_at_most(mask, layout):
    """Three on torch before 2.8, where masked_mse's backward writes to new memory."""
    shape = (8, 32, 32, 32)
    student, teacher = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    weight = torch.rand(shape[0], *shape[2:])
    kd = trained(
        32,
        32,
        adapter=None,
        dam=FixedMask(weight) if mask else None,
        policies=[("rotate", "channel_shuffle")],
    )
    map_bytes = student.numel() * student.element_size()
    most = peak_bytes(functools.partial(step, kd, student.requires_grad_(), teacher))
    maps = 2.05 if RELEASE >= (2, 8) else 3.05
    assert most <= maps * map_bytes, f"{most / map_bytes:.2f} maps"
    assert most >= 1.5 * map_bytes, "the count is blind"


def test_beyond_its_convolutions_dam_adds_no_map():
    """The whole loss with DAM, against DAM's convolutions forward and backward."""
    torch.manual_seed(0)
    shape = (4, 32, 32, 32)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    kd = trained(32, 32, adapter=None, heat_channels=8, policies=[("rotate", "channel_shuffle")])

    def convolutions() -> None:
        sides = [kd.dam._heads(side, *kd.dam._last()) for side in (student, teacher)]
        outputs = [part for side in sides for part in side]
        torch.autograd.grad(outputs, student, list(map(torch.ones_like, outputs)))

    map_bytes = student.numel() * student.element_size()
    most = peak_bytes(functools.partial(step, kd, student, teacher)) - peak_bytes(convolutions)
    assert most <= 2.05 * map_bytes, f"{most / map_bytes:.2f} maps"
