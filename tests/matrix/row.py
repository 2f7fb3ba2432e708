"""The checks of a row of the matrix, run by the environment's own Python.

    python tests/matrix/row.py bits       the operators' results against golden.json, bit by bit
    python tests/matrix/row.py training   losses of SoKD, the search and the Distiller
    python tests/matrix/row.py compile    torch.compile(fullgraph=True) of both
    python tests/matrix/row.py --write    write golden.json

Each prints one line. The inputs are arithmetic, because a generator may change with torch.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sokd
from sokd import ops

GOLDEN = Path(__file__).parent / "golden.json"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPE = (3, 17, 9, 11)  # a vector of channels and a rest, odd sides


def pattern(shape: Iterable[int], dtype: torch.dtype = torch.float64, *, start: int = 1) -> Tensor:
    """Numbers in (-1, 1) without an order that a kernel could profit from."""
    sizes = tuple(shape)
    index = torch.arange(start, start + math.prod(sizes), dtype=torch.int64)
    return ((index * 7919 % 1009).double() / 504.5 - 1).to(dtype).reshape(sizes)


def digest(tensors: Iterable[Tensor]) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def plan(dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels = SHAPE[:2]
    return {
        "theta": torch.eye(2, 3, dtype=dtype) + 0.2 * pattern((batch, 2, 3), dtype),
        "sigma": pattern((batch,), dtype).abs(),
        "hole": torch.tensor([[1, 2, 4, 6], [0, 0, 0, 0], [3, 0, 9, 11]]),
        "perm": (torch.arange(channels) * 5 + torch.arange(batch)[:, None]) % channels,
        "keep": pattern((batch, channels)) > -0.5,
    }


def refined(dtype: torch.dtype) -> list[Tensor]:
    features, parts = pattern(SHAPE, dtype).requires_grad_(), plan(dtype)
    wanted = [features, parts["theta"].requires_grad_(), parts["sigma"].requires_grad_()]
    result = ops.refine(features, **parts, seed=7)
    return [result, *torch.autograd.grad(result, wanted, pattern(SHAPE, dtype, start=5))]


def dots(dtype: torch.dtype) -> list[Tensor]:
    stacked = {name: torch.stack([part, part.flip(0)]) for name, part in plan(dtype).items()}
    stacked["seed"] = torch.tensor([7])
    return [ops.refine_dots(pattern(SHAPE, dtype), pattern(SHAPE, dtype, start=9), stacked)]


def masked_mse(dtype: torch.dtype) -> list[Tensor]:
    student, teacher = pattern(SHAPE, dtype).requires_grad_(), pattern(SHAPE, dtype, start=4)
    weight = pattern((SHAPE[0], *SHAPE[2:]), dtype).abs()
    losses = [ops.masked_mse(student, teacher, weight, normalise=by) for by in ("elements", "area")]
    return [*losses, *torch.autograd.grad(losses[0] + 3 * losses[1], student)]


def areas(dtype: torch.dtype) -> list[Tensor]:
    heat = pattern((3, 5, 9, 11), dtype).abs()
    size, offset = (pattern((3, 2, 9, 11), dtype, start=start).abs() for start in (2, 3))
    return list(ops.areas(heat, 4 * size, offset, k=6, teacher=(heat.flip(1), size, offset)))


def digests() -> dict[str, str]:
    """A hash of every operator's results and gradients in every dtype."""
    found = {
        f"{operator.__name__} {str(dtype).removeprefix('torch.')}": digest(operator(dtype))
        for operator in (refined, dots, masked_mse, areas)
        for dtype in DTYPES
    }
    return {**found, "draw": digest(ops.draw(torch.tensor([3]), torch.tensor([2]), 50))}


def network(width: int) -> nn.Sequential:
    """Its weights are arithmetic too. Layer "2" gives the map that is distilled."""
    layers = nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(pattern(parameter.shape) / math.sqrt(max(parameter[0].numel(), 9)))
    return layers


IMAGES, LABELS = pattern((8, 3, 32, 32), torch.float32), torch.arange(8)
PARTS: dict[str, Any] = {
    "adapter": "conv", "heads": "bounded", "areas": "mutual", "base": "replace",
    "lambda_agreement": 10.0, "lambda_areas": 10.0, "search": None,
}  # fmt: skip


def distiller() -> sokd.Distiller:
    torch.manual_seed(0)
    sokd.manual_seed(0)
    options = {"layers": "2", "method": "fitnet", "sokd": PARTS, "example": IMAGES}
    return sokd.Distiller(network(8), network(16), **options).train()


def losses() -> list[float]:
    """Three steps with `PolicySearch`, `sokd.loss` alone, and three steps with the defaults."""
    trained = distiller()
    search = sokd.PolicySearch(trained.kd, trained.student, epochs=3)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    found = []
    for _ in range(3):
        search.step(trained.step, (IMAGES, LABELS))
        total = sum(trained(IMAGES, LABELS)[1].values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        search.end_epoch()
        found.append(total.item())
    kd = sokd.SoKD(8, 16, **PARTS)
    student = pattern((4, 8, 6, 6), torch.float32).requires_grad_()
    loss = sokd.loss(student, pattern((4, 16, 6, 6), torch.float32), kd)
    loss.backward()
    assert student.grad is not None and student.grad.any()
    return [*found, loss.item(), *default_losses()]


def default_losses() -> list[float]:
    """Three steps with `sokd.SoKD` as it is by default; the policy moves in the loss."""
    torch.manual_seed(0)
    sokd.manual_seed(0)
    kd, backbone = sokd.SoKD(8, 16), network(4)[:3]
    teacher = pattern((8, 16, 8, 8), torch.float32)
    before = [parameter.clone() for parameter in kd.policy.parameters()]
    optimizer = torch.optim.SGD([*backbone.parameters(), *kd.parameters()], lr=0.01)
    found = []
    for _ in range(3):
        loss = sokd.loss(backbone(IMAGES), teacher, kd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert not all(map(torch.equal, before, kd.policy.parameters()))
    return found


def check_bits() -> str:
    golden, found = json.loads(GOLDEN.read_text())["bits"], digests()
    wrong = [name for name in golden if golden[name] != found[name]]
    if wrong:
        raise SystemExit(f"other bits: {', '.join(wrong)}")
    return f"{len(golden)} of {len(golden)}"


def check_training() -> str:
    golden, found = json.loads(GOLDEN.read_text())["losses"], losses()
    if not all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(golden, found, strict=True)):
        raise SystemExit(f"losses {found} instead of {golden}")
    return "same losses"


def check_compile() -> str:
    def same(function: Callable[..., Tensor], *inputs: Tensor) -> None:
        sokd.manual_seed(0)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        assert compiled.isfinite()
        compiled.backward()

    kd, trained = sokd.SoKD(8, 16), distiller()
    maps = torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(4, 16, 6, 6)
    same(lambda student, teacher: sokd.loss(student, teacher, kd), *maps)
    same(lambda x, y: torch.stack(list(trained(x, y)[1].values())).sum(), IMAGES, LABELS)
    return "one graph"


def write() -> str:
    GOLDEN.write_text(json.dumps({"bits": digests(), "losses": losses()}, indent=1) + "\n")
    return f"wrote {GOLDEN.name}"


if __name__ == "__main__":
    checks = {"bits": check_bits, "training": check_training, "compile": check_compile}
    print({**checks, "--write": write}[sys.argv[1]]())
