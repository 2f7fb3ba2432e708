"""The readers of torch tensors and of NumPy arrays, and forked processes."""

import ctypes
import os
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.cases import DTYPES, LAYOUTS, everything, laid_out
from support.raises import raises
from torch import Tensor

import sokd
from sokd import _core, ops, reference
from sokd.ops import config
from sokd.ops.installation import release_of
from sokd.reference import Plan

SHAPE = (2, 5, 6, 7)
FALLBACK = "dlpack" if hasattr(Tensor, "__dlpack_c_exchange_api__") else "portable"


def run_everything(dtype=torch.float32, layout="contiguous"):
    """One result of each operator and each gradient."""
    torch.manual_seed(1)
    plan = everything(SHAPE, 2, torch.float32)
    features, student = (laid_out(SHAPE, layout, dtype).detach().requires_grad_() for _ in range(2))
    plan["theta"].requires_grad_()
    refined = ops.refine(features, **plan, seed=3)
    maps = features.detach().sigmoid()
    found = ops.areas(maps, maps[:, :2], maps[:, :2])
    loss = ops.masked_mse(student, refined.detach(), found.coverage)
    total = loss + refined.float().square().sum()
    gradients = torch.autograd.grad(total, (features, student, plan["theta"]))
    stacked = {name: part.detach()[None] for name, part in plan.items()}
    dots = ops.refine_dots(features.detach(), student.detach(), stacked)
    drawn = ops.draw(torch.tensor([1]), torch.tensor([2]), 9)
    return [refined.detach(), *found, loss.detach(), *gradients, dots, *drawn]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_readers_agree(dtype, layout, reader):
    assert _core.build_info()["reader"] == reader
    own = run_everything(dtype, layout)
    _core.select_reader("portable")
    assert all(map(torch.equal, own, run_everything(dtype, layout)))


def test_an_unknown_reader_is_refused():
    with pytest.raises(ValueError) as caught:
        _core.select_reader("other")
    known = str(caught.value).removeprefix("select_reader: name must be one of ")
    assert known in {
        "portable, got 'other'",
        "portable, dlpack, got 'other'",
        "portable, tch, got 'other'",
        "portable, dlpack, tch, got 'other'",
    }


@pytest.fixture
def choose(monkeypatch):
    """choose(module, release): the reader, and why it is not tch, with `module` as sokd_tch."""
    before = _core.build_info()["reader"]

    def run(module, release="2.13.0"):
        monkeypatch.setitem(sys.modules, "sokd_tch", module)
        monkeypatch.setattr(torch, "__version__", release)
        config.choose_reader()
        reader = next(line for line in config.describe().splitlines() if line.startswith("reader"))
        return reader.removeprefix("reader").strip().removesuffix("; NumPy arrays by numpy")

    yield run
    _core.select_reader(before)


@pytest.mark.parametrize("release, chosen", [
    ("2.13.0", "tch"),
    ("2.15.1+cu130", "tch"),
    ("2.12.1", f"{FALLBACK} (sokd_tch is proven on torch 2.13, 2.14, 2.15)"),
    ("2.16.0", f"{FALLBACK} (sokd_tch is proven on torch 2.13, 2.14, 2.15)"),
])  # fmt: skip
def test_the_guard_chooses_by_the_running_torch(release, chosen, choose):
    assert choose(pytest.importorskip("sokd_tch"), release) == chosen


def test_without_sokd_tch_the_next_reader_serves(choose):
    assert choose(None) == f"{FALLBACK} (sokd_tch is not installed)"


@pytest.mark.parametrize("value", ["7", "torch.utils.dlpack.to_dlpack(torch.ones(1))"])
def test_without_the_exchange_of_dlpack_the_portable_reader_serves(value):
    """In a new process, because the lookup in torch is cached."""
    code = f"""
        import sys, torch
        sys.modules["sokd_tch"] = None
        torch.Tensor.__dlpack_c_exchange_api__ = {value}
        import sokd
        sokd.ops.refine(torch.ones(1, 2, 3, 3))
        print(sokd._core.build_info()["reader"])
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "portable\n"


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32))
def read_version_2(_, view):
    """Writes its version and reads nothing, as a later release of sokd_tch would."""
    view[0] = 2
    return 1


NAME = b"sokd_tch.reader"  # a capsule does not keep it alive


def capsule_of(function):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    return new(ctypes.cast(function, ctypes.c_void_p), NAME, None)


@pytest.mark.parametrize("reader, why", [
    (capsule_of(read_version_2),
     "must fill version 1 of the view, got version 2; install the sokd-tch of this sokd"),
    (None, "must be the capsule sokd_tch.reader, got None"),
])  # fmt: skip
def test_another_view_is_refused(reader, why, choose):
    expected = f"{FALLBACK} (sokd_tch does not load: use_tch_reader: reader {why})"
    assert choose(SimpleNamespace(reader=reader, BUILT_FOR="2.13.0")) == expected


def test_a_build_for_a_torch_that_is_not_proven_is_left_aside(choose):
    built = SimpleNamespace(reader=capsule_of(read_version_2), BUILT_FOR="2.12.1")
    why = "sokd_tch is proven on torch 2.13, 2.14, 2.15, and built for 2.12.1"
    assert choose(built) == f"{FALLBACK} ({why})"


@pytest.mark.parametrize("code, why", [
    ("raise ImportError('libtorch.so: undefined\\nsymbol')", "libtorch.so: undefined symbol"),
    ("import not_there", "No module named 'not_there'"),
    ("raise ValueError", "ValueError"),
])  # fmt: skip
def test_a_sokd_tch_that_does_not_load_is_left_aside(tmp_path, code, why):
    """A build for another libtorch or another Python raises ImportError."""
    (tmp_path / "sokd_tch.py").write_text(code)
    code = "import sokd, torch; sokd.ops.refine(torch.ones(1, 2, 3, 3)); sokd.show_config()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    if release_of(torch.__version__) in config.PROVEN:
        assert f"(sokd_tch does not load: {why})" in done.stdout


def test_show_config(capsys):
    sokd.show_config()
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(lines) == ["sokd", "torch", "reader", "simd", "threads", "cuda"]
    assert lines["sokd"] == sokd.__version__ == version("sokd")
    assert lines["torch"].startswith(torch.__version__)
    assert lines["reader"].startswith(_core.build_info()["reader"])
    assert lines["threads"].startswith(str(torch.get_num_threads()))


# --- NumPy
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_arrays_give_the_same_as_tensors(dtype):
    plan = everything(SHAPE, 2, torch.float32)
    arrays = {name: part.numpy() for name, part in plan.items()}
    features = np.random.randn(*SHAPE).astype(dtype)
    tensor = torch.from_numpy(features)
    refined = ops.refine(features, **arrays, seed=3)
    assert isinstance(refined, np.ndarray) and refined.dtype == dtype
    assert np.array_equal(refined, ops.refine(tensor, **plan, seed=3).numpy())
    loss = ops.masked_mse(features, refined, np.ones((2, 6, 7), np.float32))
    assert isinstance(loss, np.ndarray) and loss.shape == ()
    assert loss == ops.masked_mse(tensor, torch.from_numpy(refined), torch.ones(2, 6, 7)).numpy()
    maps = [1 / (1 + np.exp(-part)) for part in (features, features[:, :2], features[:, 2:4])]
    found = ops.areas(*maps, k=5, teacher=tuple(maps))
    tensors = [torch.from_numpy(part.copy()) for part in maps]
    for one, two in zip(found, ops.areas(*tensors, k=5, teacher=tuple(tensors)), strict=True):
        assert isinstance(one, np.ndarray) and np.array_equal(one, two.numpy())
    stacked = {name: part[None] for name, part in arrays.items()}
    dots = ops.refine_dots(features, refined, stacked)
    parts = {name: part[None] for name, part in plan.items()}
    twin = ops.refine_dots(tensor, torch.from_numpy(refined), parts)
    assert isinstance(dots, np.ndarray) and np.array_equal(dots, twin.numpy())
    pairs = ops.refine_dots(features, refined, stacked, by_sample=True)
    assert isinstance(pairs, np.ndarray) and pairs.shape == (2, 1, len(features))


@pytest.mark.parametrize("view", [
    lambda a: a[:, ::-1],
    lambda a: a[..., ::2],
    lambda a: a.transpose(0, 2, 1, 3),
    lambda a: a[:, :, 1:],
])  # fmt: skip
def test_numpy_views_of_any_stride(view):
    features = view(np.random.randn(*SHAPE))
    sigma = np.ones(1)
    copy = np.ascontiguousarray(features)
    of_both = [ops.refine(each, sigma=sigma, seed=1) for each in (features, copy)]
    assert np.array_equal(*of_both)
    assert ops.masked_mse(features, copy) == 0


@pytest.mark.parametrize("is_tensor", [True, False])
def test_maps_that_are_not_aligned_are_refused(is_tensor, reader):
    """`frombuffer` makes such maps from a file with a header of any length."""
    memory = np.zeros(4 * 5 * 6 * 7 * 4 + 4, np.uint8)
    offset = (1 - memory.ctypes.data) % 4
    if is_tensor:
        features = torch.frombuffer(memory, dtype=torch.float32, count=4 * 5 * 6 * 7, offset=offset)
    else:
        features = memory[offset:][: 4 * 5 * 6 * 7 * 4].view(np.float32)
    features = features.reshape(4, 5, 6, 7)
    message = "masked_mse: student must be aligned to its elements, got an address 1 bytes off"
    with raises(ValueError, message):
        ops.masked_mse(features, features)


def test_a_tensor_without_memory_is_refused(reader):
    """FSDP frees the storage of parameters between steps; PyTorch's own operators crash on them."""
    features = torch.ones(SHAPE)
    features.untyped_storage().resize_(0)
    with raises(ValueError, "refine: features must have memory, got a tensor of no storage"):
        ops.refine(features)
    assert ops.refine(torch.ones(2, 0, 6, 7)).shape == (2, 0, 6, 7)


def test_numpy_arrays_that_may_not_be_written_are_only_read():
    features = np.random.randn(*SHAPE)
    features.flags.writeable = False
    before = features.copy()
    ops.refine(features, sigma=np.ones(1))
    assert np.array_equal(features, before)


# --- processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's, about threads and fork
def test_a_forked_child_computes_the_same():
    """A DataLoader's workers fork after parallel calls in the parent."""
    features, plan = torch.randn(4, 16, 32, 32), everything((4, 16, 32, 32), 4, torch.float32)

    def work():  # nothing of PyTorch's own thread pool, which does not survive a fork
        refined, loss = torch.empty_like(features), torch.empty(())
        _core.refine_forward(refined, features, (*plan.values(), None, 1), (2, 0, None))
        _core.masked_mse(loss, None, features, refined, None, "elements", 1.0, (2, 0, None))
        return refined.numpy().tobytes(), loss.item()

    expected = work()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() == expected else 2
        finally:
            os._exit(status)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hung")
    assert os.waitstatus_to_exitcode(status) == 0


def test_operators_release_the_gil_and_run_in_threads():
    from concurrent.futures import ThreadPoolExecutor

    features, plan = torch.randn(4, 16, 32, 32), everything((4, 16, 32, 32), 4, torch.float32)
    expected = reference.refine(features, **plan)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: ops.refine(features, **plan), range(16)):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_written_outside_the_output():
    """The memory around outputs that Rust writes to stays as it was."""
    room = torch.full((3, 2, 5, 6, 7), 42.0)
    for layout in LAYOUTS:
        features = laid_out(SHAPE, layout, torch.float32)
        plan = everything(SHAPE, 2, torch.float32)
        raw, resources = (*(plan[name] for name in Plan._fields[:5]), None, 1), (2, 0, None)
        _core.refine_forward(room[1], features, raw, resources)
        _core.refine_backward((room[1], None, None, None), features, features, raw, resources)
        assert (room[0] == 42).all() and (room[2] == 42).all()
    loss = torch.full((3,), 42.0)
    _core.masked_mse(loss[1], room[1], features, features, None, "elements", 1.0, resources)
    assert (room[0] == 42).all() and (room[2] == 42).all() and loss[0] == loss[2] == 42


def test_import_order_does_not_matter_to_the_user():
    code = textwrap.dedent(
        """
        import sokd, torch
        x = torch.ones(1, 2, 3, 3)
        assert torch.equal(sokd.ops.refine(x), x)
        """
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
