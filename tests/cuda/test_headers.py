"""The CUDA functions and constants that the Rust host declares are those of NVIDIA's headers."""

import re
import subprocess
from pathlib import Path

import pytest
from support.cuda.cubins import ROOT, headers
from support.cuda.emulator import COMPILER

# header, source, the return type of its functions, the number of functions that the source binds
LIBRARIES = [("cuda.h", "driver.rs", "CUresult", 16), ("nvrtc.h", "nvrtc.rs", "nvrtcResult", 13)]
NUMBERS = {
    "COMPUTE_CAPABILITY_MAJOR": ["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"],
    "COMPUTE_CAPABILITY_MINOR": ["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"],
    "CAPTURE_MODE_RELAXED": ["CU_STREAM_CAPTURE_MODE_RELAXED"],
    "OUT_OF_MEMORY": ["CUDA_ERROR_OUT_OF_MEMORY"],
    "STREAM_CAPTURE_IMPLICIT": ["CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"],
    "BAD_IMAGE": [
        "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_PTX",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    ],
}  # fmt: skip
TYPES = {
    "c_int": "int", "c_uint": "unsigned", "c_char": "char", "c_void": "void", "usize": "size_t",
}  # fmt: skip

# Whether a type of Rust's (R) is passed as the header's (C): the same type; an int for an enum; a
# Handle for a pointer to an opaque structure.
JUDGE = """
#include <string_view>
#include <type_traits>
struct Handle;
template <class R, class C> struct Fits : std::is_same<R, C> {};
template <class C> struct Fits<int, C> {
    static constexpr bool value = [] {
        if constexpr (std::is_enum_v<C>) return sizeof(C) == sizeof(int);
        else return std::is_same_v<int, C>;
    }();
};
template <class C> struct Fits<Handle, C>
    : std::bool_constant<std::is_pointer_v<C> && std::is_class_v<std::remove_pointer_t<C>>> {};
template <class R, class C> struct Fits<R*, C*> : Fits<R, C> {};
template <class R, class C> struct Fits<const R*, const C*> : Fits<R, C> {};
template <class... R> struct Takes {
    template <class Out, class... C> static constexpr bool of(Out (*)(C...), Out = {}) {
        if constexpr (sizeof...(R) == sizeof...(C)) return (Fits<R, C>::value && ...);
        else return false;
    }
};
#define TEXT_OF(name) #name
#define TEXT(name) std::string_view(TEXT_OF(name))
"""


def functions(source: str) -> dict[str, tuple[list[str], str]]:
    """The types of each bound function's arguments, and of what it returns; "" is a result code."""
    block = source.split("bindings! {")[1].split("\n}\n")[0]
    found = re.findall(r'= "(\w+)"\(([^)]*)\)(?: -> ([^,]+))?,', block)
    return {name: (re.findall(r"\w+: ([^,]+?)\s*(?:,|$)", text), out) for name, text, out in found}


def in_c(rust: str) -> str:
    """`*mut *const c_char` as `const char**`."""
    if rust.startswith("*mut "):
        return in_c(rust.removeprefix("*mut ")) + "*"
    if rust.startswith("*const "):
        inner = rust.removeprefix("*const ")
        return f"{in_c(inner)} const*" if inner.startswith("*") else f"const {in_c(inner)}*"
    return TYPES.get(rust, rust)


def program(header: str, source: str, result: str) -> str:
    """A program that compiles if the header declares the same as the source."""
    lines = [f"#include <{header}>", JUDGE]
    for name, (arguments, out) in functions(source).items():
        types = ", ".join(map(in_c, arguments))
        returned = in_c(out) if out else result
        takes = f"Takes<{types}>::of<{returned}>"
        lines += [
            f"static_assert({takes}(static_cast<decltype(&{name})>(nullptr)));",
            # the version of the function that the header gives by default
            f'static_assert(TEXT({re.sub(r"_v[0-9]+$", "", name)}) == "{name}");',
        ]
    for name, (number, several) in numbers(source).items():
        values = [int(value) for value in (several or number).split(",")]
        pairs = zip(values, NUMBERS[name], strict=True)
        lines += [f"static_assert({value} == {of_header});" for value, of_header in pairs]
    return "\n".join(lines) + "\n"


def numbers(source: str) -> dict[str, tuple[str, str]]:
    found = re.findall(
        r"^const (\w+): (?:c_int = (\d+)|\[c_int; \d\] = \[([\d, ]+)\]);", source, re.M
    )
    return {name: (number, several) for name, number, several in found}


def compiles(text: str, folder: Path) -> str:
    """The compiler's messages."""
    path = folder / "judge.cpp"
    path.write_text(text)
    command = [COMPILER, "-std=c++17", "-fsyntax-only", *(f"-I{each}" for each in headers()), path]
    return subprocess.run(command, capture_output=True, text=True).stderr


def text_of(source: str) -> str:
    return (ROOT / "src/cuda" / source).read_text()


@pytest.fixture(autouse=True)
def _there() -> None:
    if not headers():
        pytest.skip("this torch brings no CUDA headers")


@pytest.mark.parametrize("header, source, result, count", LIBRARIES)
def test_functions_and_numbers_are_those_of_the_header(
    header: str, source: str, result: str, count: int, tmp_path: Path
) -> None:
    assert len(functions(text_of(source))) == count
    assert compiles(program(header, text_of(source), result), tmp_path) == ""


def test_every_number_of_the_driver_is_compared() -> None:
    assert numbers(text_of("driver.rs")).keys() == NUMBERS.keys()


@pytest.mark.parametrize("text, other", [
    ('"cuInit"(flags: c_uint)', '"cuInit"(flags: *mut c_uint)'),
    ('"cuInit"(flags: c_uint)', '"cuInit"()'),
    ("(stream: Handle, status: *mut c_int)", "(status: *mut c_int, stream: Handle)"),
    ("(stream: Handle, status: *mut c_int)", "(stream: Handle, status: c_int)"),
    ("cuCtxPushCurrent_v2", "cuCtxPushCurrent"),
    ("code: c_int, name: *mut *const c_char", "code: c_int, name: *mut *mut c_char"),
    ("= 906;", "= 907;"),
    ("[200, 209, 218, 222]", "[200, 209, 218, 221]"),
])  # fmt: skip
def test_a_difference_is_found(text: str, other: str, tmp_path: Path) -> None:
    source = text_of("driver.rs")
    assert source.count(text) == 1
    other_source = program("cuda.h", source.replace(text, other), "CUresult")
    assert "static assertion failed" in compiles(other_source, tmp_path)
