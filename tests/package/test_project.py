"""What holds for the whole source tree: one operator, one name; one version; imports go down."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Set
from importlib.metadata import metadata
from pathlib import Path

import pytest

import sokd
from sokd import reference

ROOT = Path(__file__).parents[2]
OPERATORS = ("refine", "areas", "masked_mse")


def sources() -> list[Path]:
    """The files that are, or would be, in git; all files of the source folders where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    folders = (ROOT / name for name in ("src", "python", "tests", "benches", "docs"))
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


CODE = {".py", ".rs", ".cu", ".cuh", ".h", ".cpp"}
TEXTS = [path for path in sources() if path.suffix in {*CODE, ".pyi", ".md", ".toml", ".csv", ""}]


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_has_its_place_in_every_layer(operator: str) -> None:
    places = (
        f"src/ops/{operator}/mod.rs",
        f"src/ops/{operator}/naive.rs",
        f"python/sokd/ops/{operator}.py",
        f"tests/operators/test_{operator}.py",
        f"benches/bench_{operator}.py",
    )
    assert [place for place in places if not (ROOT / place).is_file()] == []


@pytest.mark.parametrize("operator", [*OPERATORS, "refine_dots"])
def test_twin_has_the_same_signature(operator: str) -> None:
    def shape_of(function: Callable[..., object]) -> list[tuple[object, ...]]:
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    assert shape_of(getattr(sokd.ops, operator)) == shape_of(getattr(reference, operator))


def test_one_version_everywhere() -> None:
    cargo = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    released = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cargo is not None and released is not None
    assert sokd.__version__ == cargo[1] == released[1] == metadata("sokd")["Version"]


def test_the_build_asks_this_python_for_its_torch() -> None:
    """Without an active venv, or in another one, as `path/to/venv/bin/pip install .` is."""
    script = (
        "import backend, os, shutil; print(shutil.which('python'), 'VIRTUAL_ENV' in os.environ)"
    )
    other = {"PATH": os.defpath, "VIRTUAL_ENV": "elsewhere"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=other,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(Path(sys.executable).parent / "python"), "False"]


def test_license_is_declared_and_present() -> None:
    assert metadata("sokd")["License-Expression"] == "MIT OR Apache-2.0"
    assert "Permission is hereby granted" in (ROOT / "LICENSE-MIT").read_text()
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE-APACHE").read_text()


def test_no_text_names_a_folder_of_one_machine() -> None:
    folder = re.compile(r"(?<![\w./-])/(?:home|root|Users|work)/\w+")
    found = {path.name: folder.findall(path.read_text()) for path in TEXTS}
    assert {name: folders for name, folders in found.items() if folders} == {}


def test_private_names_of_torch_are_in_one_file() -> None:
    private = re.compile(r"(?<!\")\btorch(?:\.\w+)*\._[a-zA-Z]\w*")
    found = {
        str(path.relative_to(ROOT)): private.findall(path.read_text())
        for path in (ROOT / "python" / "sokd").rglob("*.py")
        if path.name != "torch_internals.py"
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_imports_go_down() -> None:
    """Operators below the method, the method below what users make of it."""
    up = [
        f"{module} imports {imported}"
        for module, imports in import_graph().items()
        for imported in imports
        if storey(imported) > storey(module)
    ]
    assert up == []


def storey(module: str) -> int:
    floors = ({"ops", "reference", "_core"}, {"kd"}, {"methods", "distiller", "inspect"})
    room = f"{module}.".split(".")[1]
    return next((floor for floor, rooms in enumerate(floors) if room in rooms), len(floors))


def import_graph() -> dict[str, set[str]]:
    """Each module of the package with the package's modules that it imports."""
    package = ROOT / "python"
    paths = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((package / "sokd").rglob("*.py"))
    }
    return {
        module: imports_of(path, paths.keys() - {module} | {"sokd._core"})
        for module, path in paths.items()
    }


def imports_of(path: Path, known: Set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found & known
