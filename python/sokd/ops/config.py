"""The choice of the reader of tensors, and the report on the installation."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from sokd import _core
from sokd.ops.installation import release_of, whole

# torch releases on which sokd_tch is proven. Elsewhere the layout of a tensor in libtorch can
# differ and reading one can abort the process, so the release is checked before the import.
PROVEN = ((2, 13), (2, 14), (2, 15))

_why_not_tch: str | None = None


def choose_reader() -> None:
    """Select the reader "tch" where it is installed and proven, else "dlpack" or "portable"."""
    global _why_not_tch
    try:
        _core.select_reader("dlpack")
    except ValueError:  # torch before 2.10
        _core.select_reader("portable")
    _why_not_tch = None
    proven = "sokd_tch is proven on torch " + ", ".join(f"{a}.{b}" for a, b in PROVEN)
    if release_of(torch.__version__) not in PROVEN:
        _why_not_tch = proven
        return
    try:
        module = whole("sokd_tch")
        if release_of(module.BUILT_FOR) in PROVEN:
            _core.use_tch_reader(module.reader)
        else:
            _why_not_tch = f"{proven}, and built for {module.BUILT_FOR}"
    except Exception as error:  # built for another Python or torch, or broken
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sokd_tch"
        why = " ".join(str(error).split()) or type(error).__name__
        _why_not_tch = "sokd_tch is not installed" if missing else f"sokd_tch does not load: {why}"


@cache
def why_no_cuda() -> str | None:
    """The reason why no CUDA kernels are available; None if they are.

    Opens the driver and NVRTC without initialising them, so the process may still fork.
    """
    if not _core.build_info()["cuda"]:
        return "this build has none"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    try:
        _core.cuda_open(nvrtc_names(torch.version.cuda))
    except RuntimeError as error:
        return str(error).removeprefix("cuda_open: ")
    return None


def nvrtc_names(release: str) -> list[str]:
    """Candidate paths of NVRTC: what torch has loaded, NVIDIA's wheels, torch itself."""
    major = release.split(".")[0]
    name = f"libnvrtc.so.{major}"
    wheels = find_spec("nvidia")
    roots = [Path(root) for root in (wheels and wheels.submodule_search_locations) or ()]
    paths = [root / part / "lib" / name for root in roots for part in (f"cu{major}", "cuda_nvrtc")]
    # some builds bundle it under another name, next to its builtins and its variant
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*"))
    paths += [path for path in bundled if "builtins" not in path.name and ".alt." not in path.name]
    return [name, *(str(path) for path in paths if path.is_file())]


def describe() -> str:
    """The lines that `show_config` prints."""
    build = _core.build_info()
    why = f" ({_why_not_tch})" if _why_not_tch else ""
    rows = {
        "sokd": build["version"],
        "torch": torch.__version__,
        "reader": f"{build['reader']}{why}; NumPy arrays by numpy",
        "simd": build["simd"],
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads())",
        "cuda": f"{_cuda()}; {torch.cuda.device_count()} devices visible",
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())


def _cuda() -> str:
    why = why_no_cuda()
    if why is not None:
        return f"no kernels ({why}); the reference path is used"
    try:
        info = _core.cuda_info()
    except RuntimeError as error:
        return str(error).removeprefix("cuda_info: ")
    cache = f"kernel cache {info['cache']}" if info["cache"] else "no kernel cache"
    return f"driver for {info['driver']}, NVRTC {info['nvrtc']}, {cache}"


def show_config() -> None:
    """Print the versions, the reader in use, the SIMD level, the threads and the state of CUDA."""
    print(describe())
