"""Rules of the source tree: one name for an operator, one version, imports go down."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Set
from graphlib import TopologicalSorter
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sokd
from sokd import _core, reference

ROOT = Path(__file__).parents[2]
OPERATORS = ("refine", "areas", "masked_mse")
VERSION = sokd.__version__


def sources() -> list[Path]:
    """The files in git or to be added; all files of the source folders where there is no git."""
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
    places = [f"src/ops/{operator}/mod.rs", f"src/ops/{operator}/naive.rs"]
    places += [f"python/sokd/ops/{operator}.py", f"tests/operators/test_{operator}.py"]
    places += [f"benches/bench_{operator}.py"]
    assert [place for place in places if not (ROOT / place).is_file()] == []


@pytest.mark.parametrize("operator", [*OPERATORS, "refine_dots"])
def test_twin_has_the_same_signature(operator: str) -> None:
    def shape_of(function: Callable[..., object]) -> list[tuple[object, ...]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape_of(getattr(sokd.ops, operator)) == shape_of(getattr(reference, operator))


def test_one_version_everywhere() -> None:
    """Cargo.toml states it, the changelog has its section, `installation` compares both halves."""
    released = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    suffixes = {*CODE, ".toml"}
    stating = [path for path in TEXTS if path.suffix in suffixes and VERSION in path.read_text()]
    assert released is not None and released[1] == VERSION == metadata("sokd")["Version"]
    compared = ROOT / "python" / "sokd" / "ops" / "installation.py"
    assert sorted(stating) == [ROOT / "Cargo.toml", compared]


def test_the_compiled_module_keeps_to_the_stable_abi() -> None:
    pytest.importorskip("abi3audit", reason="abi3audit is not installed")
    command = [sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10"]
    audit = subprocess.run([*command, _core.__file__], capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="this system has no readelf")
def test_the_compiled_module_needs_the_c_library_alone() -> None:
    """It links nothing of torch: a torch that lacks one symbol would refuse to load it."""
    command = ["readelf", "-d", _core.__file__]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", printed.stdout))
    c_library = {"libc", "libm", "libdl", "libpthread", "librt", "libgcc_s"}
    assert "libc" in needed
    assert {name for name in needed - c_library if not name.startswith("ld-linux")} == set()


@pytest.mark.skipif(
    shutil.which("cargo") is None or find_spec("maturin") is None,
    reason="a source distribution is made by cargo and maturin",
)
def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "maturin", "sdist", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    archive = f"sokd-{VERSION}"
    with tarfile.open(tmp_path / f"{archive}.tar.gz") as opened:
        names = {name.removeprefix(f"{archive}/") for name in opened.getnames()}
    tch = ("Cargo.toml", "Cargo.lock", "pyproject.toml", "backend.py", "build.rs")
    wanted = {f"tch/{name}" for name in (*tch, "src/lib.rs", ".cargo/config.toml")}
    wanted |= {"Cargo.lock", "LICENSE-MIT", "LICENSE-APACHE", "python/sokd/_core.pyi", "README.md"}
    assert wanted - names == set()
    built = {name for name in names if "target/" in name or name.endswith((".so", ".pyc"))}
    assert built == set()


def test_sokd_tch_is_built_with_the_torch_of_the_python_that_builds() -> None:
    """The Python that builds counts, not the active venv (`path/to/venv/bin/pip install ./tch`)."""
    pytest.importorskip("maturin", reason="maturin is not installed")
    script = (
        "import backend, os, shutil; print(shutil.which('python'), 'VIRTUAL_ENV' in os.environ)"
    )
    other = {"PATH": os.defpath, "VIRTUAL_ENV": "elsewhere"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tch", env=other, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(Path(sys.executable).parent / "python"), "False"]


def test_license_is_declared_and_present() -> None:
    assert metadata("sokd")["License-Expression"] == "MIT OR Apache-2.0"
    assert "Permission is hereby granted" in (ROOT / "LICENSE-MIT").read_text()
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE-APACHE").read_text()


def test_no_text_names_a_folder_of_one_machine() -> None:
    folder = re.compile(r"(?<![\w./-])/(?:home|root|Users|work)/\w+")
    found = {path.name: folder.findall(path.read_text()) for path in TEXTS}
    assert {name: folders for name, folders in found.items() if folders} == {}


# Names with an underscore that are public: of named tuples, of `sys`, the compiled module.
DOCUMENTED = {"_asdict", "_core", "_fields", "_getframe", "_replace"}
PRIVATE = re.compile(r"(?:^|\.)_(?!_)")
# Private methods of nn.Module that classes override; `torch_internals` lists them.
OVERRIDDEN = {"_apply", "_load_from_state_dict"}


def test_private_names_stay_in_their_module() -> None:
    """PyTorch's are in `torch_internals`; the package's own in the module that defines them."""
    found = {
        module: names
        for module, path in modules().items()
        if not module.endswith(".torch_internals")
        and (names := foreign_private_names(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(("source", "name"), [
    ("tensor._version", "_version"),
    ("self._buffers", "_buffers"),
    ("torch._C._len_torch_dispatch_stack()", "_C"),
    ("getattr(module, '_orig_mod', None)", "_orig_mod"),
    ("'torch._dynamo' in sys.modules", "torch._dynamo"),
    ("from torch.nn.modules.dropout import _DropoutNd", "_DropoutNd"),
    ("import torch._dynamo", "torch._dynamo"),
    ("from sokd.kd.sokd import _channels", "_channels"),
    ("def _apply(self):\n    super()._load_from_state_dict()", "_load_from_state_dict"),
    ("class A:\n    def f(self):\n        return super()._apply()", "_apply"),
])  # fmt: skip
def test_a_foreign_private_name_is_found(source: str, name: str) -> None:
    assert name in foreign_private_names(source)


def test_the_private_names_of_torch_are_explained() -> None:
    """Each with the release that brought it, and with what is done without it."""
    text = (ROOT / "python" / "sokd" / "ops" / "torch_internals.py").read_text()
    tree = ast.parse(text)
    assert all(f"`{name}` (since" in (ast.get_docstring(tree) or "") for name in OVERRIDDEN)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    reading = [node for node in functions if foreign_private_names(ast.unparse(node))]
    texts = {node.name: ast.get_docstring(node) or "" for node in reading}
    assert {"version", "raw_stream", "own_buffers"} <= texts.keys()
    unexplained = [name for name, text in texts.items() if not re.search(r"[Ss]ince \d", text)]
    assert unexplained == []
    comments = re.findall(r"((?:^# .*\n)+)^\w+: Callable", text, re.MULTILINE)
    assert len(comments) == text.count("= _find(")
    assert [each for each in comments if "Since " not in each or "Without:" not in each] == []


def foreign_private_names(source: str) -> list[str]:
    """The private names in a module's source that the module does not define itself."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {name for node in nodes for name in defined_by(node)}
    own -= {*dir(torch.nn.Module()), *dir(torch.Tensor)}
    overriding = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name in OVERRIDDEN
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and inner.attr == node.name
    }
    read = [name for node in nodes if id(node) not in overriding for name in read_by(node)]
    return [name for name in read if PRIVATE.search(name) and name not in own | DOCUMENTED]


def defined_by(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def read_by(node: ast.AST) -> list[str]:
    """The names that are looked up in something else: attributes, imports, texts that name one."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(alias.name for alias in node.names)]
    if isinstance(node, ast.Constant) and str(node.value).startswith("torch._"):
        return [str(node.value)]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
        return [name.value for name in node.args[1:2] if isinstance(name, ast.Constant)]
    return []


def test_imports_go_down() -> None:
    """Operators below the method, the method below what users make of it."""
    up = [
        f"{module} imports {imported}"
        for module, imports in import_graph().items()
        for imported in imports
        if storey(imported) > storey(module)
    ]
    assert up == []


def test_imports_make_no_circle() -> None:
    """A module can be read after those that it imports; for types alone it may refer back."""
    # CycleError names the circle
    tuple(TopologicalSorter(import_graph(types=False)).static_order())


def storey(module: str) -> int:
    floors = ({"ops", "reference", "_core"}, {"kd"}, {"methods", "distiller", "inspect"})
    room = f"{module}.".split(".")[1]
    return next((floor for floor, rooms in enumerate(floors) if room in rooms), len(floors))


def modules() -> dict[str, Path]:
    """The package's modules and their files."""
    package = ROOT / "python"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((package / "sokd").rglob("*.py"))
    }


def import_graph(*, types: bool = True) -> dict[str, set[str]]:
    """Each module of the package with the package's modules that it imports.

    `types`: whether imports for type checkers count, which never run.
    """
    paths = modules()
    return {
        module: imports_of(path, paths.keys() - {module} | {"sokd._core"}, types)
        for module, path in paths.items()
    }


def imports_of(path: Path, known: Set[str], types: bool) -> set[str]:
    tree, found = ast.parse(path.read_text()), set()
    if not types:
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found & known


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
