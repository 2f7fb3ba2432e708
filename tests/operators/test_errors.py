"""What the operators say to wrong input: class and sentence, verbatim, with each reader; nothing
breaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.raises import raises

from sokd import ops

F32 = torch.float32


def features(*shape, **options):
    return torch.ones(shape or (2, 3, 4, 5), **options)


def refine(*args, **options):
    return lambda: ops.refine(*(args or (features(),)), **options)


def dots(upstream=None, **plans):
    return lambda: ops.refine_dots(features(), features() if upstream is None else upstream, plans)


def areas(
    heat=(2, 3, 4, 5),
    size=(2, 2, 4, 5),
    offset=(2, 2, 4, 5),
    teacher=None,
    dtypes=(F32, F32, F32),
    **options,
):
    maps = [
        torch.ones(shape, dtype=dtype)
        for shape, dtype in zip((heat, size, offset), dtypes, strict=True)
    ]
    return lambda: ops.areas(*maps, teacher=teacher, **options)


def mse(student=None, teacher=None, *args, **options):
    student = features() if student is None else student
    return lambda: ops.masked_mse(
        student, features() if teacher is None else teacher, *args, **options
    )


def theta(value, position=(0, 0, 0), shape=(1, 2, 3)):
    tensor = torch.zeros(shape)
    tensor[position] = value
    return tensor


FLOAT = "be float64, float32, float16 or bfloat16"
META = torch.ones(2, 3, 4, 5, device="meta")

CASES = [
    # type and dtype
    (refine([[1.0]]), TypeError,
     "refine: features must be a torch.Tensor or a numpy.ndarray, got list"),
    (refine(None), TypeError,
     "refine: features must be a torch.Tensor or a numpy.ndarray, got NoneType"),
    (refine(features(dtype=torch.int64)), TypeError, f"refine: features must {FLOAT}, got int64"),
    (refine(features(dtype=torch.complex64)), TypeError,
     "refine: features must be of a floating-point, integer or bool dtype, got torch.complex64"),
    (refine(features(), torch.ones(1, 2, 3).long()), TypeError,
     f"refine: theta must {FLOAT}, got int64"),
    (refine(hole=torch.ones(1, 4)), TypeError,
     "refine: hole must be of an integer dtype, got float32"),
    (refine(sigma=torch.ones(1).int()), TypeError, f"refine: sigma must {FLOAT}, got int32"),
    (refine(perm=torch.ones(1, 3)), TypeError,
     "refine: perm must be of an integer dtype, got float32"),
    (refine(keep=torch.ones(1, 3)), TypeError, "refine: keep must be bool, got float32"),
    (refine(straight=torch.ones(1).int()), TypeError, f"refine: straight must {FLOAT}, got int32"),
    (refine(seed=1.5), TypeError, "refine: seed must be an int or an int64 tensor [1], got float"),
    (refine(seed=torch.ones(1)), TypeError, "refine: seed must be int64, got float32"),
    (dots(upstream=features().half(), sigma=torch.ones(1, 1)), TypeError,
     "refine_dots: upstream must have the dtype of features, float32, got float16"),
    (areas(dtypes=(F32, torch.float16, F32)), TypeError,
     "areas: size must have the dtype of heat, float32, got float16"),
    (areas(dtypes=(torch.int32, F32, F32)), TypeError, f"areas: heat must {FLOAT}, got int32"),
    (areas(teacher=3), TypeError,
     "areas: teacher must be three maps (heat, size, offset), got int"),
    (areas(teacher=(1, 2)), TypeError,
     "areas: teacher must be three maps (heat, size, offset), got 2 of them"),
    (mse(teacher=features(dtype=torch.float64)), TypeError,
     "masked_mse: teacher must have the dtype of student, float32, got float64"),
    (mse(features().half()), TypeError,
     "masked_mse: teacher must have the dtype of student, float16, got float32"),
    (mse(None, None, torch.ones(2, 4, 5).int()), TypeError,
     f"masked_mse: weight must {FLOAT}, got int32"),
    # shape
    (refine(features(3, 4, 5)), ValueError,
     "refine: features must have the shape [B, C, H, W], got shape [3, 4, 5]"),
    (refine(features(), torch.ones(2, 3)), ValueError,
     "refine: theta must have the shape [G, 2, 3] = [1 or 2, 2, 3], got shape [2, 3]"),
    (refine(features(), torch.ones(3, 2, 3)), ValueError,
     "refine: theta must have the shape [G, 2, 3] = [1 or 2, 2, 3], got shape [3, 2, 3]"),
    (refine(hole=torch.ones(2, 3).int()), ValueError,
     "refine: hole must have the shape [G, 4] = [1 or 2, 4], got shape [2, 3]"),
    (refine(sigma=torch.ones(())), ValueError,
     "refine: sigma must have the shape [G] = [1 or 2], got shape []"),
    (refine(perm=torch.ones(1, 4).int()), ValueError,
     "refine: perm must have the shape [G, C] = [1 or 2, 3], got shape [1, 4]"),
    (refine(keep=torch.ones(3, 3).bool()), ValueError,
     "refine: keep must have the shape [G, C] = [1 or 2, 3], got shape [3, 3]"),
    (refine(straight=torch.ones(3)), ValueError,
     "refine: straight must have the shape [G] = [1 or 2], got shape [3]"),
    (refine(seed=torch.ones(2).long()), ValueError,
     "refine: seed must have the shape [1], got shape [2]"),
    (dots(upstream=features(1, 3, 4, 5), sigma=torch.ones(1, 1)), ValueError,
     "refine_dots: upstream must have the shape of features = [2, 3, 4, 5], got shape [1, 3, 4, "
     "5]"),
    (dots(theta=torch.ones(1, 2, 3)), ValueError,
     "refine_dots: theta must have the shape [G, 2, 3] = [1 or 2, 2, 3], got shape [2, 3]"),
    (dots(sigma=torch.ones(3, 1), keep=torch.ones(2, 1, 3).bool()), ValueError,
     "refine_dots: keep must have as many plans as the parts before it, 3, got 2"),
    (dots(), ValueError, "refine_dots: plans must have at least one part, got none"),
    (areas(heat=(2, 4, 5)), ValueError,
     "areas: heat must have the shape [B, C, H, W], got shape [2, 4, 5]"),
    (areas(size=(2, 3, 4, 5)), ValueError,
     "areas: size must have the shape [B, 2, H, W] = [2, 2, 4, 5], got shape [2, 3, 4, 5]"),
    (areas(offset=(2, 2, 5, 4)), ValueError,
     "areas: offset must have the shape [B, 2, H, W] = [2, 2, 4, 5], got shape [2, 2, 5, 4]"),
    (areas(teacher=(features(2, 4, 4, 5), features(2, 2, 4, 5), features(2, 2, 4, 5))), ValueError,
     "areas: the teacher's heat must have the shape of heat = [2, 3, 4, 5], got shape [2, 4, 4, "
     "5]"),
    (mse(features(3, 4, 5)), ValueError,
     "masked_mse: student must have the shape [B, C, H, W], got shape [3, 4, 5]"),
    (mse(teacher=features(2, 3, 5, 4)), ValueError,
     "masked_mse: teacher must have the shape of student = [2, 3, 4, 5], got shape [2, 3, 5, 4]"),
    (mse(None, None, torch.ones(2, 5, 4)), ValueError,
     "masked_mse: weight must have the shape [B, H, W] = [2, 4, 5], got shape [2, 5, 4]"),
    (mse(None, None, torch.ones(2, 3, 4, 5)), ValueError,
     "masked_mse: weight must have the shape [B, 1, H, W] = [2, 1, 4, 5], got shape [2, 3, 4, 5]"),
    # device
    (refine(features(), torch.ones(1, 2, 3, device="meta")), ValueError,
     "refine: theta must be on the device of features, cpu, got meta"),
    (mse(teacher=META), ValueError,
     "masked_mse: teacher must be on the device of student, cpu, got meta"),
    (mse(META), ValueError, "masked_mse: teacher must be on the device of student, meta, got cpu"),
    (dots(size=torch.ones(1)), ValueError,
     "refine_dots: plans must have no names but theta, hole, sigma, perm, keep, seed, got size"),
    (lambda: ops.refine_dots(features(), features(), [1]), TypeError,
     "refine_dots: plans must be a Plan or a mapping, got list"),
    # value
    (refine(features(), theta(math.nan)), ValueError,
     "refine: theta must be finite, got NaN at [0, 0, 0]"),
    (refine(features(), theta(-math.inf, (1, 1, 2), (2, 2, 3))), ValueError,
     "refine: theta must be finite, got -inf at [1, 1, 2]"),
    (refine(sigma=torch.tensor([0.5, math.inf])), ValueError,
     "refine: sigma must be finite, got inf at [1]"),
    (refine(seed=2**64), ValueError, "refine: seed must fit in 64 bits, got 18446744073709551616"),
    (refine(seed=-(2**63) - 1), ValueError,
     "refine: seed must fit in 64 bits, got -9223372036854775809"),
    (areas(k=0), ValueError, "areas: k must be at least 1 and at most A*H*W = 60, got 0"),
    (areas(k=61), ValueError, "areas: k must be at least 1 and at most A*H*W = 60, got 61"),
    (areas(k=-1), ValueError, "areas: k must be at least 1 and at most A*H*W = 60, got -1"),
    (areas((2, 3, 0, 5), (2, 2, 0, 5), (2, 2, 0, 5)), ValueError,
     "areas: k must be at least 1 and at most A*H*W = 0, got 8"),
    (areas(kernel=2), ValueError, "areas: kernel must be odd and at least 1, got 2"),
    (areas(kernel=-3), ValueError, "areas: kernel must be odd and at least 1, got -3"),
    (mse(None, None, torch.full((2, 4, 5), -0.5)), ValueError,
     "masked_mse: weight must be at least 0, got -0.5"),
    (mse(normalise="mean"), ValueError,
     'masked_mse: normalise must be "elements" or "area", got "mean"'),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, sentence", CASES, ids=[case[2][:60] for case in CASES])
def test_sentences(call, kind, sentence, reader):
    with raises(kind, sentence):
        call()


@pytest.mark.parametrize("perm", [[[0, 0, 1]], [[0, 1, 3]], [[0, 1, -1]], [[0, 1, 2**40]]])
def test_a_perm_must_be_a_permutation(perm, reader):
    plans = {"perm": torch.tensor([perm])}
    for op, call in (("refine", refine(perm=torch.tensor(perm))), ("refine_dots", dots(**plans))):
        with pytest.raises(ValueError, match=f"^{op}: perm must "):
            call()


@pytest.mark.parametrize("kind", ["sparse", "quantised", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_strides_are_refused(kind, reader):
    if kind == "sparse":
        tensor = features().to_sparse()
    elif kind == "quantised":
        tensor = torch.quantize_per_tensor(features(), 0.1, 0, torch.qint8)
    else:
        tensor = torch.nested.nested_tensor([torch.ones(3, 4, 5), torch.ones(3, 4, 6)])
    with pytest.raises(TypeError, match=r"^refine: features must be "):
        ops.refine(tensor)


def test_lazily_negated_and_expanded_inputs_are_read_right(reader):
    negated = torch.randn(2, 3, 4, 5, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert torch.equal(ops.refine(negated), negated)
    expected = torch.nn.functional.mse_loss(negated, features())
    torch.testing.assert_close(ops.masked_mse(negated, features()), expected)
    weight = torch.ones(1, 1, 1).expand(2, 4, 5)
    torch.testing.assert_close(ops.masked_mse(negated, features(), weight), expected)


def test_an_error_leaves_the_next_call_right(reader):
    for _ in range(3):
        with pytest.raises(ValueError, match="must be finite"):
            ops.refine(features(), theta(math.nan))
        assert torch.equal(ops.refine(features()), features())


def test_numpy_sentences():
    array = np.ones((2, 3, 4, 5), np.float32)
    for call, kind, sentence in [
        (lambda: ops.refine(array.astype(">f4")), TypeError,
         "refine: features must be of a floating-point, integer or bool dtype, got >f4"),
        (lambda: ops.refine(array[0]), ValueError,
         "refine: features must have the shape [B, C, H, W], got shape [3, 4, 5]"),
        (lambda: ops.masked_mse(array, array.astype(np.float64)), TypeError,
         "masked_mse: teacher must have the dtype of student, float32, got float64"),
        (lambda: ops.masked_mse(array, array, np.full((2, 4, 5), -1.0)), ValueError,
         "masked_mse: weight must be at least 0, got -1"),
        (lambda: ops.areas(array, array[:, :2], array[:, :2], k=2**64), ValueError,
         "areas: k must fit in 64 bits, got 18446744073709551616"),
        (lambda: ops.areas(array, array[:, :2], array[:, :2], k=0), ValueError,
         "areas: k must be at least 1 and at most A*H*W = 60, got 0"),
    ]:  # fmt: skip
        with raises(kind, sentence):
            call()
