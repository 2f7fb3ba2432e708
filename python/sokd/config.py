"""Which reader of tensors is in use, and a page that says what this installation can do."""

from __future__ import annotations

import torch

from sokd import _core

# torch releases on which reading tensors through libtorch's C++ API was proven for this build. Elsewhere the
# layout may differ and reading would abort the process, so the choice is made before the first such call.
PROVEN = ("2.13", "2.14", "2.15")


def choose_reader() -> None:
    """Select "tch" where this build has it and the running torch is a proven one, else "portable"."""
    running = ".".join(torch.__version__.split(".")[:2])
    built = _core.build_info()["tch_built_for"] is not None
    _core.select_reader("tch" if built and running in PROVEN else "portable")


def describe() -> str:
    """The lines that `show_config` prints."""
    build = _core.build_info()
    built_for = build["tch_built_for"]
    tch = f"built for {built_for}" if built_for else "not built"
    none = "no CUDA kernels in this build: the reference path serves"
    cuda = "kernels in this build" if build["cuda"] else none
    rows = {
        "sokd": build["version"],
        "torch": f"{torch.__version__}; reader tch is {tch}",
        "reader": f"{build['reader']}; NumPy arrays by numpy",
        "simd": build["simd"],
        "threads": f"{torch.get_num_threads()}, as torch.set_num_threads says",
        "cuda": f"{cuda}; {torch.cuda.device_count()} devices visible",
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())


def show_config() -> None:
    """Print the versions, the reader in use, the SIMD level, the threads and the state of CUDA."""
    print(describe())
