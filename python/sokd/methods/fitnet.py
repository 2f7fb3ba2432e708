"""FitNet: the squared distance of the student's adapted features and the teacher's.

    fitnet = sum over layers of  mean_{b,c,y,x} omega[b,y,x] * (Phi(F_s) - F_t)^2

Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets" (arXiv
1412.6550, section 2: half the squared distance; here, as in the usual code bases, the mean). omega,
1 without a mask: L_DA of SoKD (docs/method.md 3).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sokd.kd.features import of_one_dtype
from sokd.methods.checks import layer_pairs
from sokd.methods.common import Maps, Method, Step, Weights, total
from sokd.ops.masked_mse import scaled_mse

__all__ = ["FitNet", "fitnet", "hint"]


def fitnet(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The (weighted) mean squared difference, by `sokd.ops.masked_mse`.

        f_s, f_t = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        sokd.methods.fitnet(f_s, f_t).backward()

    Args:
        student: [B, C, H, W], already of the teacher's shape (`sokd.Adapter`), or a list of them,
            one a layer.
        teacher: [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] or [B, 1, H, W], not negative, or one (or None) for each layer.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for an empty batch. The usual
        weight is 100.
    """
    return total(
        [hint(*pair) for pair in layer_pairs("fitnet", student, teacher, weight, same="shape")]
    )


def hint(student: Tensor, teacher: Tensor, weight: Tensor | None, scale: float = 1.0) -> Tensor:
    """`scale` times the term of one checked layer."""
    student, teacher = of_one_dtype(student, teacher)
    return scaled_mse(student, teacher, weight, normalise="elements", scale=scale)


class FitNet(Method):
    """`fitnet` as a `Method`, on the adapted maps."""

    name: ClassVar[str] = "fitnet"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    adapts: ClassVar[bool] = True
    default_weight: ClassVar[float] = 100.0

    def forward(self, step: Step) -> Tensor:
        return fitnet(step.adapted, step.teacher, step.weight)
