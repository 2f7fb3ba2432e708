"""`masked_mse`, forward and backward, against the usual line of PyTorch, eager and compiled.

Bytes: student and teacher read once, the student's gradient written once (3 maps), and the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from support import eager

import sokd
from benches.bench_refine import LARGE, MAIN, gradients
from benches.harness import LAYOUTS, MEMORY, Case, Options, check_close, compiled, name_of
from sokd import reference


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    *,
    compile_too: bool,
    targets: dict[str, float],
) -> Case:
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    student.requires_grad_()
    weight = torch.randint(0, 4, (shape[0], *shape[2:])).float()
    loose = 1e-5 if dtype == torch.float32 else 1e-2

    def check() -> None:
        ours = sokd.ops.masked_mse(student, teacher, weight)
        truth = reference.masked_mse(student, teacher, weight)
        check_close(ours, truth, rtol=loose, atol=loose)
        check_close(eager.masked_mse(student, teacher, weight), truth, rtol=10 * loose, atol=loose)
        # gradients are about 1 / numel: compare them where the tolerance means something
        scale = student.numel()
        ours, truth = (torch.autograd.grad(loss * scale, student)[0] for loss in (ours, truth))
        check_close(ours, truth, rtol=loose, atol=loose)

    sides: dict[str, Any] = {
        "sokd": lambda: gradients(sokd.ops.masked_mse, [student], student, teacher, weight),
        "eager": lambda: gradients(eager.masked_mse, [student], student, teacher, weight),
    }
    if compile_too:
        fast = compiled(eager.masked_mse)
        sides["compile"] = lambda: gradients(fast, [student], student, teacher, weight)
    if targets["eager"] > 1:
        sides[MEMORY] = lambda: torch.sub(student.detach(), teacher)
    moved = 3 * student.nbytes + weight.nbytes
    return Case(
        "masked_mse, forward + backward", shape, sides, moved, targets, check, name_of(dtype),
        layout,
    )  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    """Targets at the main shape in float32; elsewhere no case may be slower than eager."""
    yield case(
        MAIN, torch.float32, "contiguous", compile_too=True, targets={"eager": 6, "compile": 1.3}
    )
    if options.quick:
        return
    no_slower: dict[str, float] = {"eager": 1}
    yield case(MAIN, torch.float32, "channels_last", compile_too=True, targets=no_slower)
    for layout in LAYOUTS:
        yield case(MAIN, torch.bfloat16, layout, compile_too=False, targets=no_slower)
    for shape in LARGE:
        for layout in LAYOUTS:
            yield case(
                shape, torch.float32, layout, compile_too=layout == "contiguous", targets=no_slower
            )
        yield case(shape, torch.bfloat16, "contiguous", compile_too=False, targets=no_slower)
