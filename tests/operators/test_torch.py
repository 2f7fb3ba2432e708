"""The operators as PyTorch's own: opcheck, compile, export, functorch, autocast, other devices."""

import warnings
from typing import ClassVar

import pytest
import torch
from support.cases import compiles, everything
from torch.library import opcheck

from sokd import _core, ops, reference
from sokd.ops import runtime
from sokd.ops.masked_mse import scaled_mse

SHAPE = (2, 3, 5, 6)
DOUBLE = torch.float64


def maps(dtype=torch.float32):
    return (
        torch.rand(2, 3, 5, 6, dtype=dtype),
        torch.rand(2, 2, 5, 6, dtype=dtype) * 4,
        torch.rand(2, 2, 5, 6, dtype=dtype),
    )


def samples():
    """Arguments of each library op."""
    features, plan = torch.randn(SHAPE), everything(SHAPE, 2, torch.float32)
    parts = [plan[name] for name in ("theta", "hole", "sigma", "perm", "keep")]
    stacked = [torch.stack([part, part]) for part in parts]
    last, seed = features.to(memory_format=torch.channels_last), torch.tensor([5])
    heat, size, offset = maps()
    return [
        ("refine", (features, *parts, None, 3)),
        ("refine", (last, None, None, parts[2], None, None, seed, 0)),
        ("refine", (features.double()[:, :, ::2], parts[0], *[None] * 5, 3)),
        ("refine_backward", (features, features, *parts, None, 3, torch.zeros(1), [True] * 4)),
        ("refine_backward", (last, last, *parts, seed, 0, None, [False, True, False, False])),
        ("refine_dots", (features, features, *stacked, None, 3, 2, False)),
        ("refine_dots", (features, last, *stacked, None, 3, 2, True)),
        ("areas", (heat, size, offset, None, None, None, 4, 3)),
        ("areas", (heat, size, offset, *maps(), 4, 3)),
        ("masked_mse", (features, last, torch.rand(2, 5, 6), "area", 2.0, True)),
        ("masked_mse", (last, features, None, "elements", 1.0, True)),
        ("masked_mse", (features, features, None, "elements", 1.0, False)),
        ("masked_mse_scale", (last.clone(), torch.tensor(3.0))),
        ("draw", (torch.tensor([3]), torch.tensor([4]), 7)),
    ]


@compiles
@pytest.mark.parametrize("index", range(14))
def test_opcheck(index):
    name, args = samples()[index]
    opcheck(getattr(torch.ops.sokd, name).default, args)


def objective(features, theta, sigma, student, plan, heads, module=ops):
    refined = module.refine(features, theta, sigma=sigma, seed=torch.tensor([4]), **plan)
    coverage = module.areas(*heads, k=4, teacher=heads).coverage
    return (
        module.masked_mse(student, refined.detach(), coverage, normalise="area")
        + refined.square().mean()
    )


def leaves(dtype=torch.float32):
    plan = everything(SHAPE, 2, dtype)
    tensors = (
        torch.randn(SHAPE, dtype=dtype),
        plan.pop("theta"),
        plan.pop("sigma"),
        torch.randn(SHAPE, dtype=dtype),
    )
    return [tensor.requires_grad_() for tensor in tensors], plan


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_as_one_graph(dtype, dynamic):
    inputs, plan = leaves()
    inputs = [
        each.detach().to(dtype).requires_grad_() if each.dim() == 4 else each for each in inputs
    ]
    heads = maps()
    compiled = torch.compile(objective, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        one, two = compiled(*inputs, plan, heads), objective(*inputs, plan, heads)
        torch.testing.assert_close(one, two)
        pairs = zip(torch.autograd.grad(one, inputs), torch.autograd.grad(two, inputs), strict=True)
        for first, second in pairs:
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


@compiles
def test_numbers_that_two_calls_share_compile_for_any_batch():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seed, self.scale = 5, 0.7  # symbols under `dynamic=True`

        def forward(self, student, teacher, sigma):
            terms = []
            for _ in range(2):
                refined = ops.refine(teacher, sigma=sigma, seed=self.seed)
                options = {"normalise": "elements", "scale": self.scale}
                terms.append(scaled_mse(student, refined, None, **options))
            return sum(terms)

    model, sigma = Model(), torch.tensor([0.1])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for batch in (4, 3):
        inputs = (
            torch.randn(batch, 4, 5, 5, requires_grad=True),
            torch.randn(batch, 4, 5, 5),
            sigma,
        )
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-6, atol=0)


@compiles
def test_compile_by_inductor():
    inputs, plan = leaves()
    heads = maps()
    one, two = (
        torch.compile(objective, fullgraph=True)(*inputs, plan, heads),
        objective(*inputs, plan, heads),
    )
    torch.testing.assert_close(one, two)
    of_both = (torch.autograd.grad(value, inputs) for value in (one, two))
    for first, second in zip(*of_both, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    plans = ops.Plan(theta=torch.randn(3, 1, 2, 3))
    features = torch.randn(SHAPE)
    by_plans = torch.compile(lambda x: ops.refine_dots(x, x, plans), fullgraph=True)
    dots = by_plans(features)
    torch.testing.assert_close(dots, ops.refine_dots(features, features, plans))
    draws = torch.compile(lambda seed: ops.draw(seed, seed, 5), fullgraph=True)(torch.tensor([3]))
    assert all(map(torch.equal, draws, ops.draw(torch.tensor([3]), torch.tensor([3]), 5)))


@compiles
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Model(torch.nn.Module):
        def forward(self, features, theta, student, heat, size, offset):
            refined = ops.refine(features, theta, sigma=torch.ones(1), seed=2)
            return ops.masked_mse(student, refined, ops.areas(heat, size, offset).coverage)

    args = (torch.randn(SHAPE), torch.eye(2, 3).unsqueeze(0), torch.randn(SHAPE), *maps())
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {
        name: ({0: batch} if name != "theta" else None)
        for name in Model.forward.__code__.co_varnames[1:7]
    }
    exported = torch.export.export(Model(), args, strict=strict, dynamic_shapes=shapes).module()
    assert torch.equal(exported(*args), Model()(*args))
    larger = tuple(each if each.dim() == 3 else each.repeat(2, 1, 1, 1) for each in args)
    assert torch.equal(exported(*larger), Model()(*larger))


# --- functorch
def test_func_grad():
    inputs, plan = leaves(DOUBLE)
    heads = maps(DOUBLE)
    inputs = [each.detach() for each in inputs]
    grad = torch.func.grad(lambda inputs, module: objective(*inputs, plan, heads, module))
    for one, two in zip(grad(inputs, ops), grad(inputs, reference), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("in_dims", [0, 1])
def test_func_vmap(in_dims):
    plan, many = everything(SHAPE, 2), torch.randn(4, *SHAPE, dtype=DOUBLE)
    teacher = torch.randn(SHAPE, dtype=DOUBLE)
    many = many.movedim(0, in_dims)
    refined = torch.func.vmap(lambda features: ops.refine(features, **plan, seed=3), in_dims)(many)
    losses = torch.func.vmap(lambda features: ops.masked_mse(features, teacher), in_dims)(many)
    for index in range(4):
        entry = many.select(in_dims, index)
        assert torch.equal(refined[index], ops.refine(entry, **plan, seed=3))
        assert torch.equal(losses[index], ops.masked_mse(entry, teacher))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_batched_gradients(dtype):
    """`is_grads_batched`, a vmap of its own, as of `functional.jacobian(vectorize=True)`."""
    features, student = torch.randn(2, *SHAPE).to(dtype).unbind()
    theta = torch.tensor([[[1.0, 0.1, 0.0], [0.0, 1.0, 0.1]]])
    for each in (features, student, theta):
        each.requires_grad_()
    refined = ops.refine(features, theta)
    loss = scaled_mse(student, refined, None, normalise="elements", scale=1.0, mutual=True)
    for output, inputs in ((refined, (features, theta)), (loss, (student, theta))):
        upstreams = torch.randn(3, *output.shape).to(output.dtype)
        single = [torch.autograd.grad(output, inputs, one, retain_graph=True) for one in upstreams]
        expected = [torch.stack(each) for each in zip(*single, strict=True)]
        for kept in (True, output is refined):  # the graph of the loss ends here
            options = {"is_grads_batched": True, "retain_graph": kept}
            found = torch.autograd.grad(output, inputs, upstreams, **options)
            torch.testing.assert_close(list(found), expected)


def test_zero_tensors_without_memory():
    """`torch._efficientzerotensor`, as forward derivatives have them."""
    zero, ones = torch._efficientzerotensor(SHAPE), torch.ones(SHAPE)
    assert ops.masked_mse(zero, ones) == ops.masked_mse(ones, zero) == 1
    assert torch.equal(ops.refine(zero, sigma=torch.zeros(1)), torch.zeros(SHAPE))


def test_func_vmap_of_areas_draws_and_dots():
    heat, size, offset = maps()
    many = torch.rand(3, *heat.shape)
    found = torch.func.vmap(
        lambda heat: ops.areas(heat, size, offset, teacher=(heat, size, offset))
    )(many)
    counters = torch.arange(3).unsqueeze(1)
    draws = torch.func.vmap(lambda counter: ops.draw(torch.tensor([1]), counter, 5))(counters)
    features = torch.randn(3, *SHAPE)
    sigma = {"sigma": torch.ones(2, 1)}
    dots = torch.func.vmap(lambda each: ops.refine_dots(each, each, sigma))(features)
    for index in range(3):
        each = ops.areas(many[index], size, offset, teacher=(many[index], size, offset))
        assert all(torch.equal(part[index], other) for part, other in zip(found, each, strict=True))
        each = ops.draw(torch.tensor([1]), counters[index], 5)
        assert all(torch.equal(part[index], other) for part, other in zip(draws, each, strict=True))
        sigma = {"sigma": torch.ones(2, 1)}
        assert torch.equal(dots[index], ops.refine_dots(features[index], features[index], sigma))


def test_per_sample_gradients():
    plan, many, teacher = (
        everything(SHAPE, 1),
        torch.randn(4, *SHAPE, dtype=DOUBLE),
        torch.randn(SHAPE, dtype=DOUBLE),
    )
    theta, rest = plan["theta"], {name: part for name, part in plan.items() if name != "theta"}

    def loss(theta, features):
        return ops.masked_mse(ops.refine(features, theta, **rest), teacher)

    one = torch.func.vmap(torch.func.grad(loss), (None, 0))(theta, many)
    for index in range(4):
        torch.testing.assert_close(one[index], torch.func.grad(loss)(theta, many[index]))
    whole = torch.func.grad(lambda theta: torch.func.vmap(loss, (None, 0))(theta, many).sum())
    total = whole(theta)
    torch.testing.assert_close(total, one.sum(0))


def test_second_derivatives_by_functorch():
    inputs, plan = leaves(DOUBLE)
    heads, inputs = maps(DOUBLE), [each.detach() for each in inputs]

    def hessian(module):
        def of(theta):
            return objective(inputs[0], theta, *inputs[2:], plan, heads, module)

        return torch.func.jacrev(torch.func.jacrev(of))(inputs[1])

    # the noise is float32
    torch.testing.assert_close(hessian(ops), hessian(reference), rtol=1e-5, atol=1e-6)
    assert hessian(ops).any()


def test_a_view_with_its_sign_set():
    """`x.conj().imag` is -x in memory; PyTorch resolves it before a kernel reads it."""
    own = torch.randn(SHAPE)
    negated = torch._neg_view(own)
    assert torch.equal(ops.refine(negated), -own)
    assert torch.equal(ops.masked_mse(negated, own), ops.masked_mse(-own, own))
    dots = [
        ops.refine_dots(each, own, {"theta": torch.eye(2, 3)[None, None]})
        for each in (negated, -own)
    ]
    assert torch.equal(*dots)


def test_a_tensor_that_outlives_its_transform():
    """A tensor that leaks out of func.grad is a dead wrapper, which PyTorch's operators unwrap."""
    leaked = []

    def leaking(theta):
        leaked.append(theta * 1)
        return theta.sum()

    theta = torch.eye(2, 3).unsqueeze(0) + 0.1
    torch.func.grad(leaking)(theta)
    features = torch.randn(SHAPE)
    assert torch.equal(ops.refine(features, leaked[0]), ops.refine(features, theta))
    plans = [{"theta": each[None]} for each in (leaked[0], theta)]
    dots = [ops.refine_dots(features, features, plan) for plan in plans]
    assert torch.equal(*dots)
    maps, own = ([each[None].expand(1, 2, 2, 3)] * 3 for each in (leaked[0], theta))
    assert torch.equal(ops.masked_mse(maps[0], own[0]), torch.zeros(()))
    assert torch.equal(ops.areas(*maps, k=1).boxes, ops.areas(*own, k=1).boxes)


def test_subclasses_reach_their_own_dispatch():
    class Logged(torch.Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    features, sigma = torch.randn(SHAPE), torch.ones(1)
    refined = ops.refine(features.as_subclass(Logged), sigma=sigma)
    assert torch.equal(refined.as_subclass(torch.Tensor), ops.refine(features, sigma=sigma))
    assert any("sokd" in name for name in Logged.seen)


# --- precision, devices
def test_autocast_leaves_the_operators_alone():
    features, theta = torch.randn(SHAPE).bfloat16(), torch.eye(2, 3).unsqueeze(0).requires_grad_()
    student = torch.randn(SHAPE).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        refined = ops.refine(features, theta)
        loss = ops.masked_mse(student, features)
    assert refined.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (loss + refined.float().sum()).backward()
    assert student.grad.dtype == torch.bfloat16 and theta.grad.dtype == torch.float32


def test_meta_tensors_get_shapes():
    features = torch.randn(SHAPE, device="meta", requires_grad=True)
    refined = ops.refine(features, torch.randn(1, 2, 3, device="meta"))
    assert refined.shape == SHAPE and refined.is_meta
    loss = ops.masked_mse(refined, features.detach())
    loss.backward()
    assert loss.shape == () and features.grad.shape == SHAPE


def test_a_device_without_kernels_uses_the_twin_and_says_so_once(monkeypatch):
    monkeypatch.setattr(runtime, "KERNELS", {})
    monkeypatch.setattr(runtime, "_warned", set())
    inputs, plan = leaves()
    heads = maps()
    sentence = (
        "sokd: no kernels for cpu in this build; "
        r"the plain PyTorch path \(sokd.reference\) is used"
    )
    with pytest.warns(UserWarning, match=sentence):
        loss = objective(*inputs, plan, heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(objective(*inputs, plan, heads), loss)
        assert torch.equal(loss, objective(*inputs, plan, heads, reference))
        ops.draw(torch.tensor([1]), torch.tensor([1]), 3)
        features = inputs[0].detach()
        twin = reference.refine_dots(features, features, {"sigma": torch.ones(2, 1)})
        assert torch.equal(ops.refine_dots(features, features, {"sigma": torch.ones(2, 1)}), twin)
        with pytest.raises(ValueError, match="masked_mse: teacher must not require grad"):
            ops.masked_mse(inputs[0], inputs[3])


def test_bare_ops_are_out_of_sight():
    names = "Areas Plan Plans areas draw masked_mse refine refine_dots"
    assert sorted(ops.__all__) == names.split()


# ------------------------------------------------------------------------------------ the checks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_metadata_of_a_valid_call_crosses_once(monkeypatch, dtype):
    """The kernels check their arguments; the separate checks run only after a failed call."""

    def unexpected(*_):
        raise AssertionError("the metadata was read twice")

    for name in [name for name in dir(_core) if name.startswith("check_")]:
        monkeypatch.setattr(_core, name, unexpected)
    maps = torch.rand(2, 2, 5, 6, dtype=dtype)
    ops.areas(maps, maps, maps, k=2, teacher=(maps, maps, maps))
    for normalise in ("elements", "area"):
        ops.masked_mse(maps.clone().requires_grad_(), maps, maps[:, 0], normalise=normalise)
    for groups in (1, 2):
        ops.refine(maps, sigma=torch.ones(2), straight=torch.ones(groups, requires_grad=True))
    ops.refine_dots(maps, maps, {"sigma": torch.ones(2, 1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_invalid_normalise(dtype):
    maps = torch.rand(2, 2, 5, 6, dtype=dtype)
    text = 'masked_mse: normalise must be "elements" or "area", got "cells"'
    for weight in (None, maps[:, 0]):
        with pytest.raises(ValueError, match=f"^{text}$"):
            ops.masked_mse(maps, maps, weight, normalise="cells")
    with pytest.raises(TypeError, match=r"^masked_mse: normalise must be a string, got int$"):
        ops.masked_mse(maps, maps, normalise=3)
