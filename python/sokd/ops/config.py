"""Which reader of tensors is in use, and a page that says what this installation can do."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from sokd import _core

# torch releases on which reading tensors through libtorch's C++ API was proven for this build.
# Elsewhere the layout may differ and reading would abort the process, so the choice is made before
# the first such call.
PROVEN = ("2.13", "2.14", "2.15")


def choose_reader() -> None:
    """Select "tch" where this build has it and the running torch is proven, else "portable"."""
    running = ".".join(torch.__version__.split(".")[:2])
    built = _core.build_info()["tch_built_for"] is not None
    _core.select_reader("tch" if built and running in PROVEN else "portable")


@cache
def why_no_cuda() -> str | None:
    """Why there are no CUDA kernels here; None: there are.

    Opens the driver and NVRTC. Neither is initialised, so a later fork is as free as without sokd.
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
    # some builds bundle it under another name, beside its builtins and its variant
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*"))
    paths += [path for path in bundled if "builtins" not in path.name and ".alt." not in path.name]
    return [name, *(str(path) for path in paths if path.is_file())]


def describe() -> str:
    """The lines that `show_config` prints."""
    build = _core.build_info()
    built_for = build["tch_built_for"]
    tch = f"built for {built_for}" if built_for else "not built"
    rows = {
        "sokd": build["version"],
        "torch": f"{torch.__version__}; reader tch is {tch}",
        "reader": f"{build['reader']}; NumPy arrays by numpy",
        "simd": build["simd"],
        "threads": f"{torch.get_num_threads()}, as torch.set_num_threads says",
        "cuda": f"{_cuda()}; {torch.cuda.device_count()} devices visible",
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())


def _cuda() -> str:
    why = why_no_cuda()
    if why is not None:
        return f"no kernels ({why}): the reference path serves"
    try:
        info = _core.cuda_info()
    except RuntimeError as error:
        return str(error).removeprefix("cuda_info: ")
    kept = (
        f"compiled kernels kept in {info['cache']}"
        if info["cache"]
        else "compiled kernels are not kept"
    )
    return f"driver for {info['driver']}, NVRTC {info['nvrtc']}, {kept}"


def show_config() -> None:
    """Print the versions, the reader in use, the SIMD level, the threads and the state of CUDA."""
    print(describe())
