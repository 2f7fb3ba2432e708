"""The checks of the benches, which precede measurements, at small shapes: the sides agree."""

from collections.abc import Iterator

import pytest
import torch
from pytest import MonkeyPatch

from benches import (
    bench_areas,
    bench_loss,
    bench_masked_mse,
    bench_methods,
    bench_readers,
    bench_refine,
)
from benches.harness import LAYOUTS, Case, Options, run_case

SHAPE = (3, 8, 6, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype, layout: str) -> None:
    for groups in (1, SHAPE[0]):
        bench_refine.forward_case(SHAPE, dtype, layout, groups, compile_too=False, target=1).check()
    bench_refine.affine_case(SHAPE, dtype, layout, target=1).check()
    bench_refine.loss_case(SHAPE, dtype, layout, compile_too=False, target=1).check()
    bench_masked_mse.case(SHAPE, dtype, layout, compile_too=False, targets={"eager": 1}).check()


def test_areas() -> None:
    bench_areas.case(2, 16, 16, target=1).check()


def test_readers() -> None:
    for case in bench_readers.cases(Options(quick=True)):
        case.check()


def method_cases(patch: MonkeyPatch) -> Iterator[Case]:
    patch.setattr(bench_methods, "MAP", (4, 16, 4, 4))
    patch.setattr(bench_methods, "STAGES", [(4, 8, 16, 16), (4, 12, 8, 8), (4, 16, 4, 4)])
    patch.setattr(bench_methods, "LEVEL", (2, 16, 5, 7))
    patch.setattr(bench_methods, "SAMPLES", 200)
    yield from bench_methods.logit_cases(8, 10)
    yield from bench_methods.feature_cases()
    yield from bench_methods.crd_cases()


def test_methods(monkeypatch: MonkeyPatch) -> None:
    torch.manual_seed(0)
    cases = list(method_cases(monkeypatch))
    assert len(cases) == 21
    for case in cases:
        case.check()


def test_loss() -> None:
    bench_loss._check_loss()
    threads = torch.get_num_threads()
    sides = bench_loss.demo_case().sides
    assert [*sides] == ["sokd", *bench_loss.WITHOUT, bench_loss.FITNET]
    for side in sides.values():
        side()
    assert torch.get_num_threads() == threads


def test_a_wrong_answer_is_not_measured(monkeypatch: MonkeyPatch) -> None:
    right = bench_masked_mse.sokd.ops.masked_mse
    monkeypatch.setattr(
        bench_masked_mse.sokd.ops, "masked_mse", lambda *given: 1.01 * right(*given)
    )
    given = {"compile_too": False, "targets": {"eager": 1.0}}
    case = bench_masked_mse.case(SHAPE, torch.float32, "contiguous", **given)
    with pytest.raises(AssertionError, match="not close"):
        run_case(case, Options(quick=True))
