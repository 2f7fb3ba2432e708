"""Any layer's output as a map [B, C, H, W], and which pairs of them can be distilled."""

from __future__ import annotations

from torch import Tensor

from sokd.distiller.inputs import Given, Grid
from sokd.kd.features import Layout, same_aspect, tokens_to_map

__all__ = ["as_map", "check_pair"]


def as_map(
    features: Tensor, layout: Layout, which: tuple[str, str], given: Given | None = None
) -> Tensor:
    """features as [B, C, H, W]: maps, tokens [B, N, C], vectors [B, C] (as 1x1 maps); a view.

    Args:
        which: "student" or "teacher", and the layer's name for an error.
        given: the properties of the inputs to check against; None: no such check.

    Raises:
        TypeError, ValueError: `Distiller: {name} must {rule}, got {value}`.
    """
    side, name = which
    if not features.is_floating_point():
        raise TypeError(f"Distiller: {name} must be floating point, got {features.dtype}")
    if features.is_nested:
        rule = "be a tensor of one size (nn.TransformerEncoder: enable_nested_tensor=False)"
        raise TypeError(f"Distiller: {name} must {rule}, got a nested tensor")
    rank, shape = features.dim(), list(features.shape)
    if rank not in (2, 3, 4) or 0 in shape[1:]:
        rule = "be a map [B, C, H, W], tokens [B, N, C] or a vector [B, C]"
        raise ValueError(f"Distiller: {name} must {rule}, got {shape}")
    features = layout.ordered(features)
    given = Given() if given is None else given
    if given.batches is not None and features.shape[0] not in given.batches:
        rule = f"have the batch size of x, {min(given.batches)}, in its first dimension"
        hint = f" ({side}_order='NBC' for tokens [N, B, C])" if rank == 3 else ""
        raise ValueError(f"Distiller: {name} must {rule}{hint}, got {shape}")
    if rank == 2:
        return features[:, :, None, None]
    if rank == 4:
        _check_order(features, layout, which, given)
        return features
    if layout.grid is None and not given.has_grid(features):
        rule = f"have a grid, because x is not a batch of images ({side}_grid=(H, W), e.g. (1, N))"
        raise ValueError(f"Distiller: {name} must {rule}, got {shape}")
    maps = tokens_to_map(
        features, tokens=layout.tokens, grid=layout.grid, op="Distiller", name=name
    )
    _check_grid(maps, layout, which, given, shape)
    return maps


def _check_order(features: Tensor, layout: Layout, which: tuple[str, str], given: Given) -> None:
    """Raise for [B, H, W, C], which read as [B, C, H, W] has another aspect than the images."""
    if given.image is None or layout.order in ("BCHW", "BHWC"):
        return
    rows, cells, channels = features.shape[1:]
    if same_aspect((rows, cells), given.image) and not same_aspect((cells, channels), given.image):
        side, name = which
        rule = f"be [B, C, H, W] with the aspect of the images, {_sides(given.image)}"
        hint = f"{side}_order='BHWC' if the channels are last, 'BCHW' if they are not"
        raise ValueError(f"Distiller: {name} must {rule} ({hint}), got {list(features.shape)}")


def _check_grid(
    maps: Tensor, layout: Layout, which: tuple[str, str], given: Given, shape: list[int]
) -> None:
    """Raise for a guessed square where the images are not square, and for a swapped grid."""
    side, name = which
    cells = maps.shape[2]
    if layout.grid is not None:
        _check_swap(layout.grid, side, given)
        return
    if given.image is None:
        return
    if max(given.image) * cells >= min(given.image) * (cells + 1):
        rule = f"be tokens of images of {_sides(given.image)} (pass {side}_grid=(H, W), and "
        rule += f"{side}_tokens for the others)"
        got = f"{shape}, guessed to be a {cells} x {cells} grid"
        raise ValueError(f"Distiller: {name} must {rule}, got {got}")


def _check_swap(grid: Grid, side: str, given: Given) -> None:
    """Refuse a named grid (W, H): the aspect of the images, turned."""
    if given.image is None or same_aspect(grid, given.image):
        return
    if same_aspect((grid[1], grid[0]), given.image):
        rule = f"be (H, W) as the images are, {_sides(given.image)}"
        raise ValueError(f"Distiller: {side}_grid must {rule}, got {tuple(grid)}")


def _sides(size: Grid) -> str:
    return f"{size[0]} x {size[1]}"


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str]) -> None:
    """Raise for two maps that an adapter could match, but that do not belong together.

    Raises:
        ValueError: the batch sizes differ; one is a vector and the other a map; the aspects differ
            by more than the rounding of strides (a transposed map, dimensions in another order, or
            a wrong grid of tokens).
    """
    (of_student, of_teacher), shape = names, list(student.shape)
    wanted: str | None = None
    if student.shape[0] != teacher.shape[0]:
        wanted = f"have the batch size of {of_teacher}, {teacher.shape[0]}"
    elif (student.shape[2:].numel() == 1) != (teacher.shape[2:].numel() == 1):
        wanted = f"be a map where {of_teacher} is one, {list(teacher.shape)}"
    elif not same_aspect(_size(student), _size(teacher)):
        wanted = (
            f"have the aspect of {of_teacher}, {list(teacher.shape)} (for another layout pass "
            "student_order='BHWC', student_grid or the teacher's)"
        )
    if wanted:
        raise ValueError(f"Distiller: {of_student} must {wanted}, got {shape}")


def _size(features: Tensor) -> Grid:
    return features.shape[2], features.shape[3]
