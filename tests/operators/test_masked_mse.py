"""ops.masked_mse: loss and gradient against the twin, naive loops and eager PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import naive
from support.cases import DTYPES, LAYOUTS, SHAPES, both, laid_out
from support.raises import raises

from sokd import ops, reference
from sokd.ops import torch_internals
from sokd.ops.masked_mse import _multiplied, scaled_mse

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, st = hypothesis.given, hypothesis.strategies

CLOSE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-6},
}


def loss_and_gradient(function, student, *rest, **options):
    student = student.detach().requires_grad_()
    loss = function(student, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def in_double(*maps, **options):
    """The same from the twin."""
    wide = (None if each is None else each.double() for each in maps)
    return loss_and_gradient(reference.masked_mse, *wide, **options)


@pytest.mark.parametrize("normalise", ["elements", "area"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, layout, normalise):
    student, teacher = laid_out(shape, layout, dtype), laid_out(shape, "contiguous", dtype)
    weight = torch.randint(0, 3, (shape[0], *shape[2:])).float()
    given = (student, teacher, weight)
    loss, d_student = loss_and_gradient(ops.masked_mse, *given, normalise=normalise)
    exact = in_double(*given, normalise=normalise)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
    assert d_student.dtype == dtype and d_student.shape == shape
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(d_student.double(), exact[1], **CLOSE[dtype])


@both
@pytest.mark.parametrize("normalise", ["elements", "area"])
def test_naive_loops(normalise, module):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    weight = torch.randint(0, 3, (2, 4, 5)).double()
    expected = naive.masked_mse(student.numpy(), teacher.numpy(), weight.numpy(), normalise)
    for omega in (weight, weight[:, None]):
        given = (student, teacher, omega)
        loss, d_student = loss_and_gradient(module.masked_mse, *given, normalise=normalise)
        assert loss.item() == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(d_student, torch.from_numpy(expected[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layouts",
    [("contiguous", "channels_last"), ("channels_last", "channels_last"), ("sliced", "expanded")],
)
def test_mixed_layouts(layouts, dtype):
    student, teacher = (laid_out((2, 18, 7, 8), layout, dtype) for layout in layouts)
    weights = [None, torch.rand(2, 1, 7, 8), torch.rand(1, 7, 8).expand(2, 7, 8)]
    weights += [torch.rand(2, 7, 8).to(kind) for kind in (torch.float32, torch.float64, dtype)]
    for weight in [*weights, torch.rand(2, 8, 7).transpose(1, 2)]:
        loss, d_student = loss_and_gradient(ops.masked_mse, student, teacher, weight)
        exact = in_double(student, teacher, weight)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(d_student.double(), exact[1], **CLOSE[dtype])


@both
def test_without_weight_it_is_mse(module):
    student, teacher = torch.randn(2, 2, 3, 14, 15)
    for normalise in ("elements", "area"):
        loss = module.masked_mse(student, teacher, normalise=normalise)
        torch.testing.assert_close(loss, F.mse_loss(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_eager(dtype):
    student, teacher = (torch.randn(4, 16, 14, 14).to(dtype) for _ in range(2))
    weight = torch.randint(0, 4, (4, 14, 14)).to(dtype)

    def eager(student, teacher, weight):
        return (weight.unsqueeze(1) * (student - teacher) ** 2).mean()

    exact = loss_and_gradient(
        reference.masked_mse, student.double(), teacher.double(), weight.double()
    )
    actual, other = (
        loss_and_gradient(function, student, teacher, weight)
        for function in (ops.masked_mse, eager)
    )
    for actual_, other_, exact_ in zip(actual, other, exact, strict=True):
        error, eagers_own = ((value.double() - exact_).abs().max() for value in (actual_, other_))
        assert error <= eagers_own + 1e-6 * exact_.abs().max()


def test_float16_gradients_do_not_underflow():
    """2 * difference / a million is below float16's range until a loss scale multiplies it."""
    student, teacher = torch.randn(2, 16, 64, 64, 64).half() * 1e-2
    exact = loss_and_gradient(reference.masked_mse, student.double(), teacher.double())[1] * 65536
    student = student.requires_grad_()
    (ops.masked_mse(student, teacher) * 65536).backward()
    torch.testing.assert_close(student.grad.double(), exact, rtol=2e-3, atol=2e-7)


def test_float16_gradients_of_a_small_area_do_not_overflow():
    """The area may be one cell of ten thousand; the saved gradient must not grow by that factor."""
    student = torch.zeros(2, 256, 100, 100).half()
    teacher = torch.full_like(student, 40)
    weight = torch.zeros(2, 100, 100)
    weight[:, 0, 0] = 8
    loss, gradient = loss_and_gradient(ops.masked_mse, student, teacher, weight, normalise="area")
    assert loss.item() == 1600
    assert (gradient[..., 0, 0] == -0.15625).all() and gradient.count_nonzero() == 512


def test_float16_gradients_of_large_weighted_differences_do_not_overflow():
    student, teacher = torch.zeros(1, 4, 64, 64).half(), torch.full((1, 4, 64, 64), 1e4).half()
    weight = torch.full((1, 64, 64), 64.0)
    given = student, teacher, weight
    for normalise in ("elements", "area"):
        _, gradient = loss_and_gradient(ops.masked_mse, *given, normalise=normalise)
        _, exact = in_double(*given, normalise=normalise)
        torch.testing.assert_close(gradient.double(), exact, **CLOSE[torch.float16])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_keeps_the_layout(layout):
    student = laid_out((2, 4, 5, 6), layout, torch.float32)
    gradient = loss_and_gradient(ops.masked_mse, student, torch.randn(2, 4, 5, 6))[1]
    assert gradient.stride() == student.stride()


# --- gradient
@pytest.mark.parametrize("normalise", ["elements", "area"])
def test_gradcheck(normalise):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    weight = torch.rand(2, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    options = {"normalise": normalise}
    assert torch.autograd.gradcheck(
        lambda student: ops.masked_mse(student, teacher, weight, **options), student
    )
    assert torch.autograd.gradgradcheck(
        lambda student: ops.masked_mse(student, teacher, weight, **options), student
    )
    teacher.requires_grad_()

    def mutual(student, teacher):
        return scaled_mse(student, teacher, weight, scale=3.0, mutual=True, **options)

    assert torch.autograd.gradcheck(mutual, (student, teacher))
    assert torch.autograd.gradgradcheck(mutual, (student, teacher))


@pytest.mark.parametrize("upstream", [1.0, 2.5, 0.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_upstream_twice(dtype, upstream):
    """A backward with a retained graph does not change it: a second one gives the same."""
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).to(dtype)
    student.requires_grad_()
    loss = ops.masked_mse(student, teacher)
    factor = torch.tensor(upstream, dtype=loss.dtype)
    first = torch.autograd.grad(loss, student, factor, retain_graph=True)[0]
    kept = first.clone()
    exact = loss_and_gradient(reference.masked_mse, student.double(), teacher.double())[1]
    exact *= upstream
    torch.testing.assert_close(first.double(), exact, **CLOSE[dtype])
    second = torch.autograd.grad(loss, student, factor, retain_graph=True)[0]
    assert torch.equal(second, kept)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(
        student.grad.double(),
        2 * exact / upstream if upstream else student.grad.double(),
        **CLOSE[dtype],
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_with_upstream_is_rounded_once(dtype, memory_format):
    gradient, upstream = (
        torch.randn(2, 16, 9, 8).to(dtype).to(memory_format=memory_format),
        torch.tensor(3.1),
    )
    product = _multiplied(gradient, upstream)
    assert torch.equal(product, (gradient.float() * upstream).to(dtype))
    assert product.stride() == gradient.stride()
    torch.ops.sokd.masked_mse_scale(gradient, upstream)
    assert torch.equal(gradient, product)


@pytest.mark.skipif(
    torch_internals.RELEASE < (2, 8),
    reason="torch before 2.8 does not report hooks on saved tensors",
)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_the_saved_gradient_is_handed_on_where_the_graph_ends(upstream):
    """With a retained graph, changing a gradient does not change the next backward."""
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    student.requires_grad_()
    loss = ops.masked_mse(student, teacher)
    saved, factor = loss.grad_fn.saved_tensors[0].data_ptr(), torch.tensor(upstream)
    first = torch.autograd.grad(loss, student, factor, retain_graph=True)[0]
    assert first.data_ptr() != saved
    expected = first.clone()
    first.zero_()
    last = torch.autograd.grad(loss, student, factor)[0]
    assert last.data_ptr() == saved and torch.equal(last, expected)


def test_what_a_hook_for_saved_tensors_holds_stays_as_it_is():
    """A hook that stores equal tensors once serves two graphs."""
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    student.requires_grad_()
    kept = {}

    def pack(tensor):
        key = tensor.detach().numpy().tobytes()
        kept.setdefault(key, tensor.detach())
        return key

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        losses = [ops.masked_mse(student, teacher) for _ in range(2)]
    for loss in losses:
        (found,) = torch.autograd.grad(3 * loss, student)
        torch.testing.assert_close(found, 6 * (student - teacher).detach() / student.numel())


def test_scale_is_folded_in():
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    plain = loss_and_gradient(ops.masked_mse, student, teacher)
    options = {"normalise": "elements", "scale": 1000.0}
    scaled = loss_and_gradient(scaled_mse, student, teacher, None, **options)
    for one, two in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one * 1000, two)


def test_mutual_gradients_are_opposite():
    student, teacher = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    options = {"normalise": "area", "scale": 2.0, "mutual": True}
    loss = scaled_mse(student, teacher, torch.rand(2, 4, 5), **options)
    loss.backward()
    assert torch.equal(student.grad, -teacher.grad) and student.grad.any()


@pytest.mark.parametrize("of_features", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_of_refined_features_goes_on_without_a_copy(of_features, twice):
    """`refine` reads the student's gradient with its sign set, and returns an ordinary tensor."""
    features = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=of_features)
    student = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([[[0.9, 0.1, 0.2], [0.0, 1.1, -0.1]]], dtype=torch.float64)
    theta.requires_grad_()
    sigma, straight = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True).unbind()
    wanted = [student, theta, sigma, straight, *([features] if of_features else [])]

    def gradients(module):
        refined = module.refine(features, theta, sigma=sigma, straight=straight, seed=3)
        mutual = scaled_mse if module is ops else reference.mutual_mse
        options = {"mutual": True} if module is ops else {}
        loss = mutual(student, refined, None, normalise="elements", scale=2.0, **options)
        return torch.autograd.grad(loss, wanted, create_graph=twice)

    actual = gradients(ops)
    torch.testing.assert_close(actual, gradients(reference))
    assert not any(gradient.is_neg() for gradient in actual)


def test_a_teacher_that_is_no_refined_map_gets_memory_of_its_own():
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    for of in (teacher, teacher * 1):
        loss = scaled_mse(student, of, None, normalise="elements", scale=1.0, mutual=True)
        d_student, d_teacher = torch.autograd.grad(loss, [student, of])
        assert d_student.data_ptr() != d_teacher.data_ptr() and not d_teacher.is_neg()


@both
@pytest.mark.parametrize("name", ["teacher", "weight"])
def test_other_gradients_are_refused(name, module):
    maps, weight = torch.ones(2, 1, 1, 2, 2), torch.ones(1, 2, 2)
    inputs = {"student": maps[0], "teacher": maps[1], "weight": weight}
    inputs[name].requires_grad_()
    text = f"masked_mse: {name} must not require grad, got a tensor that requires grad"
    with raises(ValueError, text):
        module.masked_mse(**inputs)
    with torch.no_grad():
        assert module.masked_mse(**inputs).item() == 0


def test_no_gradient_is_computed_when_none_is_wanted():
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    assert not ops.masked_mse(student, teacher).requires_grad
    with torch.no_grad():
        assert not ops.masked_mse(student.requires_grad_(), teacher).requires_grad


# --- values that are not numbers, maps that are empty
def test_nan_propagates():
    student, teacher, weight = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), torch.ones(1, 3, 3)
    for index, target in enumerate((student, teacher, weight)):
        inputs = [each.clone() for each in (student, teacher, weight)]
        inputs[index].view(-1)[4] = math.nan
        loss, gradient = loss_and_gradient(ops.masked_mse, *inputs)
        assert loss.isnan() and gradient.view(-1)[4].isnan(), target


@pytest.mark.parametrize("dtype", DTYPES)
@both
def test_an_area_of_nothing_is_zero(module, dtype):
    student, teacher = torch.randn(2, 2, 3, 4, 5).to(dtype)
    given = (student, teacher, torch.zeros(2, 4, 5))
    loss, gradient = loss_and_gradient(module.masked_mse, *given, normalise="area")
    assert loss.item() == 0 and not gradient.any()
    assert module.masked_mse(student[:0], teacher[:0]).item() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout, with_threads):
    student, teacher = (laid_out((5, 16, 33, 31), layout, torch.float32) for _ in range(2))
    weight = torch.rand(5, 33, 31)

    def work():
        return loss_and_gradient(ops.masked_mse, student, teacher, weight, normalise="area")

    first = with_threads(1, work)
    for threads in (2, 3):
        for one, two in zip(first, with_threads(threads, work), strict=True):
            assert torch.equal(one, two)


@given(
    st.tuples(st.integers(0, 3), st.integers(0, 18), st.integers(0, 9), st.integers(0, 9)),
    st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.sampled_from(["elements", "area"]),
    st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_any_case(shape, layout, teachers, normalise, seed, scale):
    torch.manual_seed(seed)
    student, teacher = (
        laid_out(shape, layout, torch.float64, scale),
        laid_out(shape, teachers, torch.float64, scale),
    )
    weight = torch.randint(0, 3, (shape[0], *shape[2:])).double()
    actual = loss_and_gradient(ops.masked_mse, student, teacher, weight, normalise=normalise)
    given = (student, teacher, weight)
    expected = loss_and_gradient(reference.masked_mse, *given, normalise=normalise)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
