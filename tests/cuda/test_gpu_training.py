"""Training on a GPU: torch.compile, autocast, the Distiller, the policy search, both readers.

Run by `pytest -m gpu tests/cuda/test_gpu_*.py`; SOKD_TEST_DEVICE=cpu runs the same on the CPU.
"""

import pytest
import torch
from support import distiller_cases
from support.cases import compiles
from support.cuda import device_cases
from support.cuda.device_cases import everything_on, loss_steps
from torch import nn

import sokd
from sokd import _core
from sokd.ops.runtime import has_kernel

DEVICE = device_cases.chosen_device()
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    assert has_kernel(torch.empty(0, device=DEVICE.device)), sokd.ops.config.why_no_cuda()
    return DEVICE.device


def test_both_readers_agree(reader: str, device: torch.device) -> None:
    run = everything_on(DEVICE, (2, 16, 8, 8))
    found = run()
    _core.select_reader("portable")
    assert all(torch.equal(one, two) for one, two in zip(found, run(), strict=True))


@compiles
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-2)])  # TF32
def test_compiled_whole_the_loss_is_the_same(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    if backend == "inductor":
        pytest.importorskip("triton", reason="torch.compile needs triton")
    step = loss_steps(device, dtype)
    want = step(counter=2)
    got = step(torch.compile(sokd.loss, fullgraph=True, backend=backend), counter=2)
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    for one, two in zip(got[1:], want[1:], strict=True):
        largest = max(float(two.abs().max()), 1.0)
        torch.testing.assert_close(one / largest, two / largest, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Conv2d(3, width, 3, padding=1).to(device) for width in (8, 16))
    kd = sokd.SoKD(8, 16, heads="bounded", heat_channels=4).to(device)
    trained = [*student.parameters(), *kd.parameters()]
    before = [each.detach().clone() for each in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=dtype == torch.float16)
    images = torch.randn(4, 3, 12, 12, device=device)
    with torch.autocast(device.type, dtype):
        with torch.no_grad():
            of_teacher = teacher(images)
        loss = sokd.loss(student(images), of_teacher, kd)
    assert loss.dtype == torch.float32 and of_teacher.dtype == dtype
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert dtype != torch.float16 or scaler.get_scale() == 256.0, "a gradient was not finite"
    assert all(each.isfinite().all() for each in trained)
    assert not torch.equal(trained[0], before[0])


def test_a_distiller_and_its_search_step_as_on_the_cpu(device: torch.device) -> None:
    """One step of each in float64; the noise is float32."""
    outcomes = []
    for place in (torch.device("cpu"), device):
        distiller = distiller_cases.make().double().to(place)
        given = tuple(part.to(place) for part in distiller_cases.batch(dtype=torch.float64))
        torch.manual_seed(5)
        search = sokd.PolicySearch(distiller.kd, distiller.student)
        chi = [each.detach().clone() for each in distiller.kd.policy.parameters()]
        upper = search.step(distiller.step, given)
        assert any(
            not torch.equal(*pair)
            for pair in zip(chi, distiller.kd.policy.parameters(), strict=True)
        )
        _, losses = distiller(*given)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        weights = [each.detach() for each in distiller.parameters()]
        outcomes.append([part.detach().cpu() for part in (upper, *losses.values(), *weights)])
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
