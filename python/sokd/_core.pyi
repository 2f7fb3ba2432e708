"""The compiled module. Outputs come first and are allocated by the caller; None where an argument says so."""

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
]

_Array = Tensor | NDArray[Any]
_Part = _Array | None
_Seed = int | Tensor
_Maps = Sequence[_Array]
_Allocate = Callable[[int], Tensor]

@type_check_only
class BuildInfo(TypedDict):
    version: str
    reader: Literal["tch", "portable"]
    tch_built_for: str | None
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
    refined: _Array,
    features: _Array,
    theta: _Part,
    hole: _Part,
    sigma: _Part,
    perm: _Part,
    keep: _Part,
    seed: _Seed,
    threads: int,
    stream: int = 0,
    allocate: _Allocate | None = None,
) -> None: ...
def refine_backward(
    d_features: _Part,
    d_theta: _Part,
    d_sigma: _Part,
    d_straight: _Part,
    upstream: _Array,
    features: _Array,
    theta: _Part,
    hole: _Part,
    sigma: _Part,
    perm: _Part,
    keep: _Part,
    seed: _Seed,
    threads: int,
    stream: int = 0,
    allocate: _Allocate | None = None,
) -> None: ...
def refine_dots(
    dots: _Array,
    features: _Array,
    upstream: _Array,
    theta: _Part,
    hole: _Part,
    sigma: _Part,
    perm: _Part,
    keep: _Part,
    seed: _Seed,
    threads: int,
    stream: int = 0,
    allocate: _Allocate | None = None,
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
    threads: int,
    stream: int = 0,
    allocate: _Allocate | None = None,
) -> None: ...
def masked_mse(
    loss: _Array,
    d_student: _Part,
    student: _Array,
    teacher: _Array,
    weight: _Part,
    normalise: str,
    scale: float,
    threads: int,
    stream: int = 0,
    allocate: _Allocate | None = None,
) -> None: ...
def masked_mse_scale(gradient: _Array, upstream: _Array, stream: int) -> None: ...
def draw(
    uniforms: _Array, noise_seed: _Array, seed: _Array, counter: _Array, stream: int = 0
) -> None: ...
def check_refine(
    features: _Array,
    theta: _Part,
    hole: _Part,
    sigma: _Part,
    perm: _Part,
    keep: _Part,
    straight: _Part,
    seed: _Seed,
) -> None: ...
def check_refine_dots(
    features: _Array,
    upstream: _Part,
    theta: _Part,
    hole: _Part,
    sigma: _Part,
    perm: _Part,
    keep: _Part,
    seed: _Seed,
) -> None: ...
def check_areas(
    heat: _Array, size: _Array, offset: _Array, teacher: _Maps | None, k: int, kernel: int
) -> None: ...
def check_masked_mse(student: _Array, teacher: _Array, weight: _Part, normalise: str) -> None: ...
def select_reader(name: Literal["tch", "portable"]) -> None: ...
def cuda_open(nvrtc: Sequence[str]) -> None: ...
def cuda_info() -> CudaInfo: ...
def cuda_warmup(
    device: int, dtypes: Sequence[str], layouts: Sequence[str], threads: int, stream: int = 0
) -> None: ...
def cuda_why_not(device: int) -> str | None: ...
def build_info() -> BuildInfo: ...
