"""A Distiller as a module: copies, checkpoints, EMA, export, compilers, autocast, layouts."""

import copy
import io
import pickle

import pytest
import torch
from support.cases import compiles
from support.distiller_cases import (
    SMALL,
    Net,
    batch,
    extra,
    gradients,
    make,
    models,
    objective,
    rewound,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sokd.distiller import Distiller
from sokd.methods import METHODS


def check_same(found: dict, expected: dict, **close) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}", **close
        )


def stepped(distiller: Distiller, *args) -> tuple[Tensor, dict[str, Tensor]]:
    """Objective and gradients of one step."""
    x, y = args or batch()
    value = objective(distiller, x, y, **extra(len(x)))
    value.backward()
    return value.detach(), gradients(distiller)


# ------------------------------------------------------------------------------------------- copies
def test_deepcopy_and_pickle_are_the_same_and_apart():
    original = make()
    objective(original)
    expected = None
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), original):
        assert twin is original or twin.teacher is not original.teacher
        value, found = stepped(twin)
        if expected is not None:
            assert torch.equal(value, expected[0])
            check_same(found, expected[1], rtol=0, atol=0)
        expected = value, found
    assert not any(tap.armed for taps in original._taps.values() for tap in taps.taps.values())


def test_a_copy_of_the_student_alone_keeps_nothing():
    distiller = make()
    twin = copy.deepcopy(distiller.student)
    objective(distiller)
    twin(batch()[0])
    hooks = [hook for part in twin.modules() for hook in part._forward_hooks.values()]
    assert len(hooks) == 2 and all(hook.value is None for hook in hooks)


@pytest.mark.parametrize("whole", [False, True], ids=["student", "distiller"])
def test_moving_averages(whole):
    distiller, (x, _) = make(), batch()
    followed = distiller if whole else distiller.student
    followed_by = {"avg_fn": lambda old, new, count: 0.5 * (old + new)}
    average = torch.optim.swa_utils.AveragedModel(followed, **followed_by)
    before = distiller.student.head.bias.detach().clone()
    for value in (1.0, 3.0):
        distiller.student.head.bias.data.fill_(value)
        average.update_parameters(followed)
    bias = (average.module.student if whole else average.module).head.bias
    torch.testing.assert_close(bias, torch.full_like(before, 2.0))
    assert average.eval()(x).shape == (4, 5)


def test_export_is_the_bare_student():
    distiller, (x, _) = make(), batch()
    names = list(models()[1].state_dict())
    exported = distiller.export()
    assert list(exported.state_dict()) == list(distiller.student.state_dict()) == names
    assert type(exported) is Net and not exported.training and distiller.student.training
    assert not any(part._forward_hooks for part in exported.modules())
    assert any(part._forward_hooks for part in distiller.student.modules())
    distiller.eval()
    for bare in (exported, distiller.student):
        program = torch.export.export(bare, (x,))
        torch.testing.assert_close(program.module()(x), distiller(x))


# ------------------------------------------------------------------------------------------- resume
def run(distiller: Distiller, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        optimiser.zero_grad()
        values.append(objective(distiller))
        values[-1].backward()
        optimiser.step()
    return [value.item() for value in values]


def momentum(distiller: Distiller) -> torch.optim.Optimizer:
    return torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)


def test_a_resumed_run_goes_on_bit_for_bit():
    one = make(method={"fitnet": 1.0, "mgd": None})
    optimiser = momentum(one)
    run(one, optimiser, 2)
    file = io.BytesIO()
    torch.save({"distiller": one.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    rest = run(one, optimiser, 3)

    saved = torch.load(file, weights_only=True)
    other = make(method={"fitnet": 1.0, "mgd": None}, models=(models()[0], Net(3)))
    other.load_state_dict(saved["distiller"])
    fresh = momentum(other)
    fresh.load_state_dict(saved["optimiser"])
    assert run(other, fresh, 3) == rest
    check_same(dict(other.state_dict()), dict(one.state_dict()), rtol=0, atol=0)


def test_the_state_is_small():
    big, student = Net(24), Net(3)
    distiller = make(models=(big, student), sokd=False, method="at")
    held = sum(value.numel() for value in distiller.state_dict().values())
    assert held == sum(value.numel() for value in student.state_dict().values())


# ------------------------------------------------------------------------------------------ compile
COMPILED = [*(name for name in METHODS if name != "crd"), {"fitnet": 1.0, "kd": 1.0}]


@compiles
@pytest.mark.parametrize(
    ("method", "dynamic"), [*((m, None) for m in COMPILED), ("fitnet", True)], ids=str
)
def test_the_whole_compiles_in_one_graph(method, dynamic):
    torch._dynamo.reset()
    expected, wanted = stepped(make(method=method))
    distiller = make(method=method)
    compiled = torch.compile(distiller, fullgraph=True, dynamic=dynamic, backend="eager")
    value, found = stepped(compiled)
    torch.testing.assert_close(value, expected)
    check_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, wanted)
    assert int(distiller.kd.policy.counter) == 1


@compiles
def test_crd_breaks_the_graph_and_is_right():
    """Its bank changes in place: it runs as it is, and what is around it is compiled."""
    torch._dynamo.reset()
    options = {"method": "crd", "num_samples": 9, "negatives": 4}
    expected, distiller = make(**options), make(**options)
    compiled, index = torch.compile(distiller, backend="eager"), torch.tensor([0, 8, 3, 5])
    for _ in range(2):
        values = [objective(each, *batch(), index=index) for each in (expected, compiled)]
        torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    check_same(gradients(distiller), gradients(expected))


@compiles
def test_a_step_around_it_compiles_in_one_graph():
    torch._dynamo.reset()
    distiller, expected = make(), make()
    objective(expected).backward()

    @torch.compile(fullgraph=True, backend="eager")
    def step(x, y):
        logits, losses = distiller(x, y)
        return logits, sum(losses.values())

    for _ in range(2):
        distiller.zero_grad()
        rewound(distiller)
        step(*batch())[1].backward()
    check_same(gradients(distiller), gradients(expected))


@compiles
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_student(way):
    torch._dynamo.reset()
    expected, wanted = stepped(make())
    teacher, student = models()
    if way == "wrapped":
        distiller = make(models=(teacher, torch.compile(student, fullgraph=True, backend="eager")))
    else:
        student.compile(fullgraph=True, backend="eager")
        distiller = make(models=(teacher, student))
    value, found = stepped(distiller)
    torch.testing.assert_close(value, expected)
    check_same({name.replace("_orig_mod.", ""): g for name, g in found.items()}, wanted)
    assert type(distiller.export()) is Net


@compiles
def test_a_student_compiled_too_early_is_told():
    torch._dynamo.reset()
    teacher, student = models()
    compiled = torch.compile(student, backend="eager")
    compiled(batch()[0])
    with pytest.raises(RuntimeError, match=r"call torch.compiler.reset\(\)"):
        objective(make(models=(teacher, compiled)))
    torch.compiler.reset()
    assert objective(make(models=(teacher, compiled))).isfinite()


@compiles
def test_the_graphs_of_the_backward_agree():
    """The graphs that inductor compiles, functionalised; its C++ would take minutes here."""
    torch._dynamo.reset()
    expected, wanted = stepped(make())
    value, found = stepped(torch.compile(make(), fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(value, expected)
    check_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, wanted)


# ------------------------------------------------------------------------------- precision, layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", ["fitnet", {"at": 1.0, "kd": 1.0}], ids=str)
def test_autocast(dtype, method):
    expected, wanted = stepped(make(method=method))
    distiller = make(method=method)
    with torch.autocast("cpu", dtype=dtype):
        _, losses = distiller(*batch())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    value = torch.stack(list(losses.values())).sum()
    value.backward()
    torch.testing.assert_close(value, expected, rtol=0.03, atol=0.03)
    for name, gradient in gradients(distiller).items():
        torch.testing.assert_close(
            gradient.norm(),
            wanted[name].norm(),
            rtol=0.3,
            atol=0.05 * max(g.norm() for g in wanted.values()),
        )


def test_grad_scaler():
    distiller = make(method={"fitnet": 1.0})
    optimiser, scaler = momentum(distiller), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(distiller.state_dict())
    for _ in range(2):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            value = objective(distiller)
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()
    assert scaler.get_scale() == 1024.0, "no step was skipped"
    moved = {
        name
        for name, value in distiller.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert {"student.stem.0.weight", "kd.adapter.0.match.weight", "kd.dam.0.first.weight"} <= moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_models_in_another_dtype(dtype):
    teacher, student = (net.to(dtype) for net in models())
    distiller = make(models=(teacher, student), example=batch(dtype=dtype)[0])
    assert {p.dtype for p in distiller.parameters()} == {dtype}
    value, found = stepped(distiller, *batch(dtype=dtype))
    assert value.isfinite() and found


def test_channels_last_is_kept():
    expected, wanted = stepped(make())
    distiller = make().to(memory_format=torch.channels_last)
    x, y = batch()
    seen = []
    distiller.teacher.stage1.register_forward_hook(lambda module, args, output: seen.append(output))
    distiller.student.stage1.register_forward_hook(lambda module, args, output: seen.append(output))
    value, found = stepped(distiller, x.to(memory_format=torch.channels_last), y)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    check_same(found, wanted, rtol=1e-3, atol=1e-3)


class Checkpointed(Net):
    """Computes its stages again in the backward pass."""

    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=False)


def test_gradient_checkpointing():
    teacher, student = models(norm=False)
    twin = Checkpointed(3, norm=False)
    twin.load_state_dict(student.state_dict())
    adapter = nn.ModuleList([nn.Conv2d(6, 12, 1), nn.Conv2d(12, 24, 1)])
    options = {"sokd": {**SMALL, "adapter": adapter}}
    calls = []
    twin.stage1.register_forward_hook(lambda *_: calls.append(1))
    plain = make(models=(teacher, student), **copy.deepcopy(options))
    frugal = make(models=(teacher, twin), **copy.deepcopy(options))
    calls.clear()
    frugal.kd.load_state_dict(plain.kd.state_dict())
    expected, wanted = stepped(plain)
    value, found = stepped(frugal)
    assert len(calls) == 2, "the stage ran again"
    torch.testing.assert_close(value, expected)
    check_same(found, wanted)
