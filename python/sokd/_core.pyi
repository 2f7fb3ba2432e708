"""The compiled module. Outputs come first and are allocated by the caller."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict, type_check_only

from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "areas",
    "build_info",
    "check_areas",
    "check_masked_mse",
    "check_refine",
    "check_refine_dots",
    "cuda_info",
    "cuda_open",
    "cuda_warmup",
    "cuda_why_not",
    "draw",
    "masked_mse",
    "masked_mse_scale",
    "refine_backward",
    "refine_dots",
    "refine_forward",
    "select_reader",
    "use_tch_reader",
]

_Array = Tensor | NDArray[Any]
_Part = _Array | None
_Maps = Sequence[_Array]
# theta, hole, sigma, perm, keep, seed tensor, seed
_Plan = tuple[_Part, _Part, _Part, _Part, _Part, Tensor | None, int]
# threads, stream, allocator of scratch memory
_Resources = tuple[int, int, Callable[[int], Tensor] | None]

@type_check_only
class BuildInfo(TypedDict):
    version: str
    reader: Literal["tch", "dlpack", "portable"]
    simd: str
    cuda: bool

@type_check_only
class CudaInfo(TypedDict):
    driver: str
    nvrtc: str
    cache: PathLike[str] | None
    compiled: int
    cached: int

def refine_forward(
    refined: _Array, features: _Array, plan: _Plan, resources: _Resources
) -> None: ...
def refine_backward(
    wanted: tuple[_Part, ...],  # d_features, d_theta, d_sigma, d_straight
    upstream: _Array,
    features: _Array,
    plan: _Plan,
    resources: _Resources,
) -> None: ...
def refine_dots(
    dots: _Array, features: _Array, upstream: _Array, plans: _Plan, resources: _Resources
) -> None: ...
def areas(
    coverage: _Array,
    boxes: _Array,
    scores: _Array,
    heat: _Array,
    size: _Array,
    offset: _Array,
    teacher: _Maps | None,
    k: int,
    kernel: int,
    resources: _Resources,
) -> None: ...
def masked_mse(
    loss: _Array,
    d_student: _Part,
    student: _Array,
    teacher: _Array,
    weight: _Part,
    normalise: str,
    scale: float,
    resources: _Resources,
) -> None: ...
def masked_mse_scale(gradient: _Array, upstream: _Array, resources: _Resources) -> None: ...
def draw(
    uniforms: _Array, noise_seed: _Array, seed: _Array, counter: _Array, resources: _Resources
) -> None: ...
def check_refine(features: _Array, plan: _Plan, straight: _Part) -> None: ...
def check_refine_dots(features: _Array, upstream: _Array, plans: _Plan) -> None: ...
def check_areas(
    heat: _Array, size: _Array, offset: _Array, teacher: _Maps | None, k: int, kernel: int
) -> None: ...
def check_masked_mse(student: _Array, teacher: _Array, weight: _Part, normalise: str) -> None: ...
def select_reader(name: Literal["tch", "dlpack", "portable"]) -> None: ...
def use_tch_reader(reader: object) -> None: ...
def cuda_open(nvrtc: Sequence[str]) -> None: ...
def cuda_info() -> CudaInfo: ...
def cuda_warmup(
    device: int, dtypes: Sequence[str], layouts: Sequence[str], threads: int, stream: int = 0
) -> None: ...
def cuda_why_not(device: int) -> str | None: ...
def build_info() -> BuildInfo: ...
