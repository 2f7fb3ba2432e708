"""The inputs of a method in each step, its base class, and functions that the methods share.

A method can be used in two ways: as a function or module (`sokd.methods.kd(student_logits,
teacher_logits)`), and by name (`build("kd", ...)`), which gives a `Method` that is called with a
`Step`. All methods compute in float32 (float64 for float64 input) regardless of autocast, compute
no gradient for the teacher, and return 0 for an empty batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sokd.kd.dam import masked, resized, root
from sokd.kd.features import Size, total
from sokd.methods.regions import Images
from sokd.ops.runtime import apply, savable
from sokd.reference import accumulator

__all__ = [
    "Maps", "Method", "Shape", "Shapes", "Step", "Weights", "masked", "resized", "root", "total",
]  # fmt: skip

T = TypeVar("T")
Shape = tuple[int, int, int]  # (C, H, W)
Shapes = Sequence[Shape]
Maps = Tensor | Sequence[Tensor]
Weights = Tensor | Sequence[Tensor | None] | None


@dataclass
class Step:
    """The inputs of a method in one training step."""

    student_logits: Tensor | None  # [B, K], or dense, [B, K, H, W]
    teacher_logits: Tensor | None  # of that shape, constant
    target: Tensor | None  # [B] class indices (int64)
    student: list[Tensor]  # one map [B, C_s, H_s, W_s] for each layer pair, not adapted
    teacher: list[Tensor]  # [B, C, H, W], constants; refined where SoKD is on
    adapted: list[Tensor]  # in the teacher's shapes where a method `adapts`, else `student`
    weight: list[Tensor | None]  # omega [B, H, W] at the teacher's size; None: no mask
    index: Tensor | None  # [B] int64: the samples' places in the training set
    boxes: Sequence[Tensor] | None = None  # [n, 4] for each image: x1 y1 x2 y2 in input pixels
    images: Images | None = None  # the sizes of the images and of the padded input


class Method(nn.Module):
    """A distillation method as a module: `forward(step)` returns its unweighted term, a scalar.

    The constructor of a subclass takes the shapes of the layer pairs, then keyword-only options.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # of {"logits", "features", "target", "index", "boxes"}
    adapts: ClassVar[bool] = False  # whether it reads step.adapted
    default_weight: ClassVar[float]  # the paper's weight of the term

    def __init__(self, student_shapes: Shapes = (), teacher_shapes: Shapes = ()) -> None:
        super().__init__()
        self.student_shapes, self.teacher_shapes = tuple(student_shapes), tuple(teacher_shapes)

    def forward(self, step: Step) -> Tensor:
        raise NotImplementedError

    @classmethod
    def logits(cls, step: Step) -> tuple[Tensor, Tensor]:
        """Both sides' logits."""
        what = "this method compares logits [B, K]"
        return (
            given(cls.name, "student_logits", step.student_logits, what),
            given(cls.name, "teacher_logits", step.teacher_logits, what),
        )


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph, as one that autograd can save."""
    return savable(tensor).detach()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the accumulator dtype: float64 for float64, else float32."""
    return tensor.to(accumulator(tensor.dtype))


def unmixed(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: sums and products stay float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def shared_size(student: Tensor, teacher: Tensor) -> Size:
    """The smaller height and the smaller width of two maps, at which they are compared."""
    return min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])


def unit(vectors: Tensor, dim: int) -> Tensor:
    """The vectors along `dim`, divided by their norms; a zero stays zero, with a bounded gradient.

    `F.normalize` divides the gradient at zero by its eps of 1e-12, so a single dead unit would
    spoil the step.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 0, length, 1.0)


def squares(features: Tensor, dim: int) -> Tensor:
    """The sum of squares along `dim`, with a backward of one product."""
    return (
        cast(Tensor, apply(_Squares, features, dim))
        if features.requires_grad
        else (features * features).sum(dim)
    )


class _Squares(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, dim: int) -> Tensor:
        return (features * features).sum(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, ctx.dim = inputs
        ctx.save_for_backward(features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        return features * (2 * upstream).unsqueeze(ctx.dim), None


def once(op: str, gradient: Tensor, of: Tensor) -> Tensor:
    """A gradient computed in the forward; differentiating it raises.

    `once_differentiable` would give a silent 0 where the upstream gradient is a constant.
    """
    return cast(Tensor, apply(_Once, gradient, of, op))


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, of: Tensor, op: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[2]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: the loss must be differentiated once only, got a second backward"
        )


def given(op: str, name: str, value: T | None, what: str) -> T:
    """A part of the step that this method requires."""
    if value is None:
        raise ValueError(f"{op}: {name} must be given ({what}), got None")
    return value
