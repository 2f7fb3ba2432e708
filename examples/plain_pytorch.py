"""Plain PyTorch: distil one model into another, search the augmentation, export the student.

Run as a script it trains two small networks on random images; call `distil` with your own models.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import sokd


def distil(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
    **options: Any,
) -> nn.Module:
    """Train the student; `options` are those of `sokd.Distiller`: layers=..., method=..."""
    images, _ = next(iter(loader))
    distiller = sokd.Distiller(student, teacher, example=images, **options)
    # the student's parameters, and those of adapters and heads
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        distiller.train()  # the teacher stays in eval mode
        for x, y in loader:
            _, losses = distiller(x, y)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        terms = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
        print(f"epoch {epoch}: {terms}")
    return distiller.export()


def small_net(width: int) -> nn.Sequential:
    """A network whose layer "3" returns the map that is distilled."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def main() -> None:
    torch.manual_seed(0)
    loader = [(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(4)]
    student = distil(
        small_net(8), small_net(32), loader, epochs=2, layers="3", method={"fitnet": 1.0, "kd": 1.0}
    )
    torch.save(student.state_dict(), "student.pt")


if __name__ == "__main__":
    main()
