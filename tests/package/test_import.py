"""The modules that `import sokd` loads, the files it writes, and the errors it raises."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sokd

PACKAGE = Path(sokd.__file__).parent
REPAIR = "pip install --force-reinstall --no-deps sokd-*.whl, or `make build` in a clone"

SLOW = (
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes", "sympy", "scipy", "matplotlib", "torchvision",
)  # fmt: skip


def test_import_loads_no_compiler_and_no_optional_package() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import sokd; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "sokd.methods.crd" in loaded
    assert [name for name in loaded if name.startswith(SLOW)] == []


def run(code: str, *, path: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh process that finds the package in the folder `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def the_last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_an_old_torch_is_refused() -> None:
    done = run("import torch; torch.__version__ = '2.4.1+cu121'; import sokd")
    assert the_last_line(done) == "ImportError: sokd: torch must be 2.5 or newer, got 2.4.1+cu121"


def test_a_version_without_numbers_is_refused_and_a_pre_release_is_read() -> None:
    done = run("import torch; torch.__version__ = 'unknown'; import sokd")
    assert the_last_line(done) == "ImportError: sokd: torch must be 2.5 or newer, got unknown"
    run("import torch; torch.__version__ = '2.13rc1'; import sokd").check_returncode()


def test_missing_torch_is_refused() -> None:
    done = run("import sys; sys.modules['torch'] = None; import sokd")
    assert the_last_line(done).startswith("ImportError: sokd: PyTorch must be installed (")
    assert the_last_line(done).endswith("): pip install torch")


def test_missing_numpy_is_refused() -> None:
    done = run("import sys, torch; sys.modules['numpy'] = None; import sokd")
    assert the_last_line(done).startswith("ImportError: sokd: NumPy must be installed (")
    assert the_last_line(done).endswith("): pip install numpy")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to be damaged."""
    return shutil.copytree(PACKAGE, tmp_path / "sokd", ignore=shutil.ignore_patterns("__pycache__"))


def test_two_versions_over_each_other_are_refused(copy: Path) -> None:
    file = copy / "ops" / "installation.py"
    file.write_text(file.read_text().replace(f'"{sokd.__version__}"', '"0.0.9"'))
    assert the_last_line(run("import sokd", path=copy.parent)) == (
        f"ImportError: sokd: two versions are installed over each other, 0.0.9 and "
        f"{sokd.__version__} (the compiled module): {REPAIR}"
    )


@pytest.mark.parametrize(
    "damage",
    ["missing", "of another machine", "not a library", 10, 100, 1000, 100_000, -20_000],
)  # a number: cut off there
def test_a_compiled_module_that_does_not_load_is_refused(copy: Path, damage: str | int) -> None:
    (library,) = copy.glob("_core*.so")
    content = bytearray(library.read_bytes())
    library.unlink()
    if damage == "of another machine":
        # ELF's e_machine
        content[18:20] = b"\xb7\x00" if content[18:20] != b"\xb7\x00" else b"\x3e\x00"
        library.write_bytes(content)
    elif isinstance(damage, int):
        library.write_bytes(content[:damage])
    elif damage == "not a library":
        library.write_text("version https://git-lfs.github.com/spec/v1")
    line = the_last_line(run("import sokd", path=copy.parent))
    assert line.startswith("ImportError: sokd: the compiled module does not load (")
    assert line.endswith(f"): install the wheel for {sysconfig.get_platform()}: {REPAIR}")


def test_a_second_import_in_one_process_is_refused() -> None:
    """As after an interrupted import, or by a tool that drops modules to load them anew."""
    done = run("""
import sys, sokd
kept = sys.modules.copy()
for name in [name for name in kept if name.split(".")[0] == "sokd"]:
    del sys.modules[name]
import sokd
""")
    assert the_last_line(done) == (
        "ImportError: sokd: imported a second time in one process, where its operators stay "
        "registered: restart Python"
    )


def test_no_file_is_written_beside_the_package() -> None:
    """A read-only site-packages is enough: `import sokd`, a call and its backward write no file."""
    code = """
import os, sys, torch
written = []
def hook(event, args):
    writing = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing and args[0] != os.devnull:
        written.append(args[0])
    if event in ("os.mkdir", "os.rename", "os.remove"):
        written.append(args[0])
sys.addaudithook(hook)
import sokd
features = torch.randn(2, 8, 5, 5, requires_grad=True)
sokd.loss(features, torch.randn(2, 8, 5, 5), sokd.SoKD(8, 8)).backward()
sokd.show_config()
print(written)
"""
    assert run(code).stdout.splitlines()[-1] == "[]"
