"""`make matrix`: the wheel in a fresh environment for each row of environments.txt, one table out.

Every environment is made in a temporary folder and deleted after its row. A row passes when the
operators give the golden bits, a training with SoKD, search and Distiller gives the known losses,
`torch.compile(fullgraph=True)` traces both, and the tests that depend on torch pass.

`--rows ci` runs every row that it has: where a CPython is missing, the row runs on the CPython that
runs this program, and a line says so.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RECORD = ROOT / "docs" / "results" / "compatibility.json"
COLUMNS = ("torch", "CPython", "NumPy", "bits", "training", "compile", "tests", "CPU s", "GB")
TEST_NEEDS = ("pytest>=8", "hypothesis>=6", "scipy>=1.10", "setuptools<80")  # inductor of torch 2.5
# What depends on torch: a minute of a core. Left out are the statistics of random draws, inductor
# and the tests of two processes (a minute each), and the build, CUDA and the demonstration.
TESTS = (
    *(f"tests/operators/test_{name}.py" for name in ("errors", "readers", "torch")),
    "tests/operators/test_torch_internals.py",
    *(f"tests/kd/test_{name}.py" for name in ("adapter", "attention", "dam", "loss", "loss_modes")),
    *(f"tests/kd/test_{name}.py" for name in ("match", "online", "policy", "search", "sokd")),
    *("tests/kd/test_wrap.py", "tests/distiller/test_distiller.py"),
)
# Older releases warn of things that the newest, with which `make test` runs, does not.
PYTEST = ("-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "--tb=line", *TESTS)
PYTEST += ("-k", "not inductor and not ranks")
LIMIT = 3600  # seconds for each command of a row
UNTRACEABLE = "Dynamo is not supported on Python"


@dataclass
class Row:
    """An environment, and what was found in it, by column."""

    torch: str
    python: str
    numpy: str
    ci: bool
    listed: bool = True  # runs as environments.txt has it
    cells: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # the output of what failed, by column

    @property
    def name(self) -> str:
        return f"{self.torch} {self.python} {self.numpy}"


def rows() -> Iterator[Row]:
    for line in (FOLDER / "environments.txt").read_text().splitlines():
        if words := line.partition("#")[0].split():
            yield Row(*words[:3], ci=words[3:] == ["ci"])


def interpreter(version: str) -> str | None:
    """A CPython of this version that runs, on PATH or of pyenv (whose link on PATH may be dead)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        if shutil.which(candidate) and run(candidate, "-c", "import venv").returncode == 0:
            return candidate
    return None


def substitute(row: Row) -> str:
    """The CPython that runs this program, with a NumPy that suits it, and a line that says so."""
    found = platform.python_version()
    print(f"matrix: NO CPYTHON {row.python} HERE: {row.torch} runs on {found}", flush=True)
    row.python, row.numpy, row.listed = found, "numpy", False
    return sys.executable


def run(*command: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options: dict[str, Any] = {"cwd": ROOT, "env": clean, "text": True, "timeout": LIMIT}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"not done in {LIMIT} s")


def processor_seconds() -> float:
    """Those of all commands that have ended: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Clock:
    """The time since it was made, of the wall and of the processor."""

    def __init__(self) -> None:
        self.began, self.used = time.monotonic(), processor_seconds()

    def report(self, row: Row, what: str) -> None:
        spent = processor_seconds() - self.used
        seconds = f"{time.monotonic() - self.began:.0f} s, {spent:.0f} s of a core"
        print(f"matrix: {row.name}: {what}, {seconds}", flush=True)


def wheel_for(row: Row, wheels: list[Path]) -> Path | None:
    """The newest wheel that the row's CPython takes: the stable ABI has no free-threaded build."""
    tag = f"-cp{row.python.replace('.', '')}-" if row.python.endswith("t") else "-abi3-"
    fitting = [path for path in wheels if tag in path.name]
    return max(fitting, key=lambda path: path.stat().st_mtime, default=None)


def check(row: Row, wheels: list[Path], *, anywhere: bool) -> None:
    """Fill in the row's cells. `anywhere`: also on another CPython than the row's."""
    found = interpreter(row.python) or (substitute(row) if anywhere else None)
    wheel = wheel_for(row, wheels)
    row.cells.update(torch=row.torch, CPython=row.python, NumPy=row.numpy)
    if found is None or wheel is None:
        missing = f"CPython {row.python}" if found is None else "wheel for it"
        row.cells["bits"] = f"not run: no {missing} here"
        return
    started = Clock()
    with tempfile.TemporaryDirectory(prefix="sokd-matrix-") as folder:
        python = f"{folder}/bin/python"
        made = run(found, "-m", "venv", "--without-pip", folder)
        if made.returncode == 0:
            made = run(
                *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-cache"),
                *("--python", python, str(wheel), row.torch, row.numpy, *TEST_NEEDS),
            )
        if made.returncode:
            row.cells["bits"] = "not installed"
            row.failures["bits"] = made.stdout
        else:
            started.report(row, "installation")
            fill(row, python)
        row.cells["GB"] = f"{size_of(folder) / 1e9:.1f}"
    row.cells["CPU s"] = f"{processor_seconds() - started.used:.0f}"


def size_of(folder: str) -> int:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def fill(row: Row, python: str) -> None:
    code = "import platform, torch, numpy; print(torch.__version__, platform.python_version(), "
    names = run(python, "-W", "ignore", "-c", f"{code}numpy.__version__)").stdout.split()
    row.cells.update(zip(("torch", "CPython", "NumPy"), names, strict=False))
    checks = {
        **{name: (f"{FOLDER}/row.py", name) for name in ("bits", "training", "compile")},
        "tests": ("-m", "pytest", *PYTEST),
    }
    for name, arguments in checks.items():
        started = Clock()
        done = run(python, "-W", "ignore", *arguments)
        started.report(row, name)
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        if name == "compile" and UNTRACEABLE in done.stdout:
            row.cells[name] = "not by this torch"
        elif name == "tests":
            row.cells[name] = re.sub(r",? ?\d+ (warnings?|deselected)| in [\d.]+s.*", "", last[0])
        else:
            row.cells[name] = last[0] if done.returncode == 0 else "fails"
        if done.returncode and row.cells[name] != "not by this torch":
            row.failures[name] = done.stdout


def table(cells: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [tuple(row.get(name, "") for name in COLUMNS) for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """# Compatibility

`make matrix` wrote this table (`MATRIX=2.9`: the rows of one torch). For each row it installed
the wheel into a fresh environment, deleted it afterwards, and ran:

- **bits**: every operator and its gradients in four dtypes, compared bit by bit with
  `tests/matrix/golden.json`;
- **training**: three steps with SoKD, `PolicySearch` and `Distiller`, and three with the default
  `SoKD` and its online search, the same losses;
- **compile**: `sokd.loss` and a `Distiller` step under `torch.compile(fullgraph=True)`;
- **tests**: the tests of the operators in torch, of `sokd.kd` and of `Distiller`, without those of
  inductor and of several processes. Skipped are those of readers that are not there: `sokd_tch`
  everywhere, `dlpack` before torch 2.10.

"CPU s" is the processor time of a row, "GB" the size of its environment. A row is as it last ran;
later commits have more tests.

{table}

## What needs a newer torch

An older torch is refused at import: 2.4 has no `torch.library.register_vmap`, and its compiler does
not trace sokd. From torch 2.5 on everything works but for these:

- `torch.export` of `SoKD` needs 2.8: before, it loses the names of a policy's tables.
- The compiler of torch 2.5 does not trace `wrap(other.method, kd)`; functions and modules compile.
- `fully_shard` is public since 2.6.
- `torch.compile(dynamic=True)` may break the graph before 2.8 where two calls share a number.
- Before 2.8 the backward of `masked_mse` allocates one more map.
- The compiler of torch 2.5 runs on CPython 3.10 to 3.12.
- Code that torch 2.9 has compiled does not notice when a number of a module is changed, in any
  `nn.Module`: after a new `kd.search.lr` or `kd.lambda_areas` call `torch._dynamo.reset()`, or set
  `torch._dynamo.config.use_recursive_dict_tags_for_guards = False` beforehand.

Where torch lacks a private name that sokd reads, a fallback gives the same numbers
(`python/sokd/ops/torch_internals.py`).

The wheel for aarch64 (`make wheel PLATFORM=aarch64`) is checked as the one for x86-64 is, and the
Rust tests pass on it under qemu (`make cargo-test PLATFORM=aarch64`); its Python part has not run.

Free-threaded CPython (3.14t) takes no wheel of the stable ABI. One of its own builds, but has never
run: `maturin build --release --zig --target x86_64-unknown-linux-gnu -i python3.14t`. Importing it
turns the GIL on.

Two defects of inductor in torch 2.5 concern sokd's users; `backend="aot_eager"` has neither:

- After the first compilation the process flushes denormals to zero, compiled or not, and small
  gradients in float16 change by up to a half. Call `torch.set_flush_denormal(False)` afterwards.
- The noise of `sokd.reference.refine` (`sigma`) can be wrong when it is compiled. `sokd.ops`
  is not affected: inductor calls its kernels and does not rewrite them.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="+", help="of them, the newest that fits a row")
    parser.add_argument("--rows", default="all", help="all, ci, or a part of rows ('2.5.1 3.10')")
    options = parser.parse_args()
    wheels = [path.resolve() for path in options.wheels]
    chosen = [
        row
        for row in rows()
        if options.rows == "all" or (row.ci if options.rows == "ci" else options.rows in row.name)
    ]
    started = time.monotonic()
    for row in chosen:
        check(row, wheels, anywhere=options.rows == "ci")
        print(table([row.cells]).splitlines()[-1], flush=True)
        for name, output in row.failures.items():
            print(f"--- {name}\n{output[-4000:]}", flush=True)
    done = [row.cells for row in chosen]
    print(f"\n{table(done)}\n\nmatrix: {time.monotonic() - started:.0f} seconds")
    write_page(chosen)
    return int(not chosen or any(row.failures for row in chosen))


def write_page(done: list[Row]) -> None:
    """The page with these rows as they are now; what did not run stays as it last was."""
    known: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for row in (row for row in done if row.listed):
        known[row.name] = {**known.get(row.name, {}), **row.cells}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
    PAGE.write_text(page(known))


def page(known: dict[str, dict[str, str]]) -> str:
    """The page's text, from the cells of every row that was run."""

    def cells_of(row: Row) -> dict[str, str]:
        listed = {"torch": row.torch, "CPython": row.python, "NumPy": row.numpy}
        return known.get(row.name, {**listed, "bits": "not run yet"})

    return TEXT.format(table=table([cells_of(row) for row in rows()]))


if __name__ == "__main__":
    sys.exit(main())
