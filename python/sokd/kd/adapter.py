"""The adapter Phi: the student's map in the teacher's channels and size.

============  ========================================================================  ======
kind          layers                                                                    source
============  ========================================================================  ======
"conv"        size-matching convolution, 3x3, 3x3, each + BN + ReLU                     [A]
"separable"   size-matching convolution, depthwise 3x3, 1x1, each + BN + ReLU           [S]
"regressor"   size-matching convolution + BN + ReLU, as in published FitNet tables      [S]
"linear"      size-matching convolution with a bias, nothing else                       [S]
============  ========================================================================  ======

Source: docs/method.md 1 [A: authors' prototype, S: settled here]. Settled here, where the prototype
raises for all but a few ratios: which convolution matches which sizes (`Adapter`), and `resize` at
any other ratio.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.features import Size, one_of, positive
from sokd.kd.virtual import unwrapped

__all__ = ["KINDS", "Adapter", "apply_adapter", "kind_of_state", "resize"]

KINDS = ("conv", "separable", "regressor", "linear")


class Adapter(nn.Module):
    """Student features [B, C_s, H_s, W_s] -> [B, C, H, W], by one to three convolutions.

        adapter = sokd.Adapter(64, 256, student_size=16, teacher_size=8)
        adapted = adapter(torch.randn(2, 64, 16, 16))     # [2, 256, 8, 8]

    The first convolution matches the sizes, each axis by itself (settled here):

    ============================  =================================================================
    sizes given at construction   convolution
    ============================  =================================================================
    student = r * teacher, r > 1  strided: kernel r rounded up to odd, stride r
    teacher = r * student, r > 1  transposed: kernel r + 2 * (r // 2), stride r
    equal, other ratios, unknown  1x1, after `resize` to the teacher's cells where they differ
    ============================  =================================================================

    Without sizes the parameters are the same whatever the features are, so an optimiser made before
    the first batch holds them all. Maps of another ratio than the adapter was made for are resized
    after the convolution.

    Args:
        student_channels: C_s.
        teacher_channels: C, also of the hidden layers.
        student_size: (height, width) of the student's map, or one number for both; None: unknown.
        teacher_size: the same for the teacher; both or neither.
        kind: "conv" [A], three convolutions, the last two 3x3, each + BN + ReLU; "separable" [S],
            the same with a depthwise 3x3 and a 1x1 convolution; "regressor" [S], the size-matching
            convolution + BN + ReLU of the published FitNet tables; "linear" [S], that convolution
            with a bias and nothing else.

    All kinds but "linear" end in a ReLU, as most backbones' maps do. Only "linear" returns negative
    values, which an FPN, tokens of a transformer and a map before its activation have.

    The state_dict of another kind is refused (RuntimeError).
    """

    @torch.inference_mode(False)
    def __init__(
        self, student_channels: int, teacher_channels: int, *,
        student_size: int | Size | None = None, teacher_size: int | Size | None = None,
        kind: str = "conv",
    ) -> None:  # fmt: skip
        super().__init__()
        if (student_size is None) != (teacher_size is None):
            raise ValueError(
                "Adapter: student_size and teacher_size must be given together, "
                f"got {student_size} and {teacher_size}"
            )
        one_of("Adapter", "kind", kind, KINDS)
        self.kind = kind
        self.student_channels = positive("Adapter", "student_channels", student_channels)
        self.teacher_channels = positive("Adapter", "teacher_channels", teacher_channels)
        sizes = _as_size("student_size", student_size), _as_size("teacher_size", teacher_size)
        self._sizes = sizes
        linear = kind == "linear"
        self.match = _size_matching((student_channels, teacher_channels), *sizes, bias=linear)
        self.norm = None if linear else nn.BatchNorm2d(teacher_channels)
        self.body = nn.Sequential(*_body(kind, teacher_channels))

    def forward(self, features: Tensor, size: Size | None = None) -> Tensor:
        """features [B, C_s, H_s, W_s] -> `[B, C, *size]`; `size` None: that of the convolution.

        Dtype and memory format are the convolution's (autocast applies, channels_last is kept).
        """
        if size is not None and self.match.kernel_size == (1, 1):
            features = resize(features, size)  # a 1x1 convolution and a resize commute
        matched = self.match(features)
        if size is not None:
            matched = resize(matched, size)
        if self.norm is None:
            return cast(Tensor, matched)
        return cast(Tensor, self.body(F.relu(self.norm(matched), inplace=True)))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As `nn.Module._load_from_state_dict`, but refuse the state of another kind by name."""
        kind = kind_of_state(state_dict, prefix)
        if kind not in (None, self.kind):
            raise RuntimeError(
                f"Adapter: the state was made with adapter={kind!r}, this module with "
                f"adapter={self.kind!r}; make it with adapter={kind!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.student_channels} -> {self.teacher_channels}, kind={self.kind!r}"


def kind_of_state(state: Mapping[str, Any], prefix: str = "") -> str | None:
    """The kind of the `Adapter` whose parameters a state_dict holds under `prefix`; None: none.

    kind_of_state(kd.state_dict(), "adapter.")
    """
    if f"{prefix}match.weight" not in state:
        return None
    if f"{prefix}match.bias" in state:
        return "linear"
    last = state.get(f"{prefix}body.3.weight")
    if last is None:
        return "regressor"
    return "separable" if last.shape[-1] == 1 else "conv"


def resize(features: Tensor, size: Size) -> Tensor:
    """features [B, C, H, W] -> `[B, C, *size]`; equal sizes: the tensor itself.

    Settled here: where neither axis grows, the mean of the cells each new cell covers
    (`adaptive_avg_pool2d`, no aliasing), otherwise bilinear with align_corners=False.
    """
    height, width = features.shape[-2:]
    if (height, width) == tuple(size):
        return features
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def apply_adapter(adapter: nn.Module | None, student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map through `adapter`, in the shape of the teacher's.

    Args:
        adapter: an `Adapter`, any module called with the student's map alone, or None.

    Raises:
        ValueError: `loss: student_features must {rule}, got {value}`: the shapes differ, or a
            BatchNorm has one value a channel.
    """
    if isinstance(own := unwrapped(adapter), Adapter):
        _check_values(own, teacher)
        _check_sizes(own, student, teacher)
        student = cast(nn.Module, adapter)(student, (teacher.shape[2], teacher.shape[3]))
    elif adapter is not None:
        student = adapter(student)
    if student.shape != teacher.shape:
        when = "(kd.adapter is None)" if adapter is None else "after kd.adapter"
        rule = f"have the teacher's shape {list(teacher.shape)} {when}"
        raise ValueError(f"loss: student_features must {rule}, got {list(student.shape)}")
    return student


def _check_values(adapter: Adapter, teacher: Tensor) -> None:
    """Raise for one value per channel, as BatchNorm does; SyncBatchNorm counts all ranks."""
    one = teacher.shape[0] * teacher.shape[2] * teacher.shape[3] == 1
    if one and isinstance(adapter.norm, nn.BatchNorm2d) and adapter.norm.training:
        rule = "give the BatchNorm of kd.adapter more than 1 value per channel in train mode"
        got = "got 1 sample of 1 cell (drop_last=True in the DataLoader, or larger batches)"
        raise ValueError(f"loss: student_features must {rule}, {got}")


def _check_sizes(adapter: Adapter, student: Tensor, teacher: Tensor) -> None:
    """Raise for maps whose sizes are those the adapter was made for, the other way round."""
    if torch.compiler.is_compiling():
        return
    sizes = (*student.shape[2:],), (*teacher.shape[2:],)
    if sizes[0] != sizes[1] and sizes[::-1] == adapter._sizes:
        rule = f"have the size {sizes[1]} that the adapter was made for"
        got = f"{sizes[0]}, the teacher's size (student_size and teacher_size are swapped)"
        raise ValueError(f"loss: student_features must {rule}, got {got}")


def _as_size(name: str, size: int | Size | None) -> Size | None:
    """A size given as one number or a pair, checked and returned as a pair."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, numbers.Integral) else size
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"Adapter: {name} must be one number or (H, W), got {size!r}")
    return positive("Adapter", name, pair[0]), positive("Adapter", name, pair[1])


def _size_matching(
    channels: tuple[int, int], student_size: Size | None, teacher_size: Size | None, *, bias: bool
) -> nn.Conv2d | nn.ConvTranspose2d:
    """The convolution of the table in `Adapter`; a bias where no BatchNorm follows."""
    (h_s, w_s), (h_t, w_t) = student_size or (1, 1), teacher_size or (1, 1)
    if h_s % h_t == w_s % w_t == 0:
        stride = h_s // h_t, w_s // w_t
        kernel = stride[0] | 1, stride[1] | 1
        padding = kernel[0] - stride[0], kernel[1] - stride[1]  # 1 where the stride is even
        return nn.Conv2d(*channels, kernel, stride, padding, bias=bias)
    if h_t % h_s == w_t % w_s == 0:
        stride = h_t // h_s, w_t // w_s
        padding = stride[0] // 2, stride[1] // 2
        kernel = stride[0] + 2 * padding[0], stride[1] + 2 * padding[1]
        return nn.ConvTranspose2d(*channels, kernel, stride, padding, bias=bias)
    return nn.Conv2d(*channels, 1, bias=bias)


def _body(kind: str, channels: int) -> list[nn.Module]:
    """The layers after the first ReLU: two more convolutions, or none."""
    if kind not in ("conv", "separable"):
        return []
    depthwise = kind == "separable"
    groups, side = (channels, 1) if depthwise else (1, 3)
    convolutions = (
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False),
        nn.Conv2d(channels, channels, side, padding=side // 2, bias=False),
    )
    followed = ((each, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) for each in convolutions)
    return [layer for layers in followed for layer in layers]
