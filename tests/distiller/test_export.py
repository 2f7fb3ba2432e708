"""`export()` works after any number of steps; its result saves, scripts, loads without sokd."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.utils.prune as nn_prune
from support.distiller_cases import Net, batch, make, objective
from support.raises import raises
from torch import Tensor, nn

from sokd.distiller import Distiller
from sokd.distiller.taps import Tap


class Normed(Net):
    """Old-style weight norm: the weight is an attribute with a graph after each forward pass."""

    def __init__(self, width: int, norm) -> None:
        super().__init__(width)
        self.stage2[0] = norm(self.stage2[0])
        self.head = norm(self.head)


class Keeping(Net):
    """Keeps its last features in an attribute, a list, a dict of lists and an object."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.last, self.every, self.named, self.bag = None, [], {}, Bag()

    def features(self, x: Tensor) -> Tensor:
        self.last = super().features(x)
        self.every.append(self.last.mean())
        self.named["maps"] = [self.last]
        self.bag.tensor = self.last * 2
        return self.last


class Bag:
    tensor: Tensor


class Hooked(Net):
    """Keeps a feature by a bound method as a hook."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kept = None
        self.stem.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.kept = output


STUDENTS = {
    "plain": Net,
    "weight norm": lambda width: Normed(width, nn.utils.weight_norm),
    "spectral norm": lambda width: Normed(width, nn.utils.spectral_norm),
    "parametrised": lambda width: Normed(width, nn.utils.parametrizations.weight_norm),
    "keeping": Keeping,
    "hooked": Hooked,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def trained(make_student, steps: int) -> Distiller:
    torch.manual_seed(0)
    distiller = make(models=(Net(6), make_student(3)))
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        objective(distiller).backward()
        optimiser.step()
    return distiller


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("make_student", STUDENTS.values(), ids=STUDENTS)
def test_export_after_any_number_of_steps(make_student, steps):
    distiller = trained(make_student, steps)
    exported, x = distiller.export(), batch()[0]
    expected = distiller.student.eval()(x)
    assert torch.equal(exported(x), expected)
    assert not any(isinstance(hook, Tap) for hook in all_hooks(exported))
    assert sum(isinstance(hook, Tap) for hook in all_hooks(distiller.student)) == 2
    assert exported.state_dict().keys() == distiller.student.state_dict().keys()
    own = {id(p) for p in distiller.student.parameters()}
    assert not own & {id(p) for p in exported.parameters()}
    assert objective(distiller.train()).isfinite(), "and the training goes on"


def all_hooks(model: nn.Module) -> list:
    return [hook for part in model.modules() for hook in part._forward_hooks.values()]


def test_the_copy_trains_by_itself():
    distiller = trained(STUDENTS["weight norm"], 1)
    exported = distiller.export().train()
    before = distiller.student.head.weight_v.detach().clone()
    exported(batch()[0]).sum().backward()
    assert exported.head.weight_v.grad.any()
    with torch.no_grad():
        exported.head.weight_v.add_(1)
    assert torch.equal(distiller.student.head.weight_v, before)


@pytest.mark.parametrize("make_student", STUDENTS.values(), ids=STUDENTS)
def test_an_export_can_be_saved_and_copied(make_student):
    exported, x = trained(make_student, 1).export(), batch()[0]
    if exported.__class__.__name__.startswith("Parametrized") or has_parametrizations(exported):
        torch.save(exported.state_dict(), io.BytesIO())  # PyTorch pickles no parametrised module
        twin = copy.deepcopy(exported)
    else:
        twin = saved(exported)
    assert torch.equal(twin(x), exported(x))


def has_parametrizations(model: nn.Module) -> bool:
    return any(hasattr(part, "parametrizations") for part in model.modules())


def test_scripts_and_traces():
    distiller = make(models=(net(6), net(3)), layers={"0": "0"})
    objective(distiller).backward()
    exported, x = distiller.export(), batch()[0]
    for script in (torch.jit.script(exported), torch.jit.trace(exported, x)):
        assert torch.equal(script(x), exported(x))
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(x), exported(x))


def net(width: int) -> nn.Module:
    last = nn.Flatten(), nn.Linear(64 * width, 5)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), *last)


def test_an_export_loads_where_sokd_is_not_installed(tmp_path):
    distiller = make(models=(net(6), net(3)), layers={"0": "0"})
    objective(distiller).backward()
    torch.save(distiller.export(), tmp_path / "student.pt")
    torch.save(distiller.export()(batch()[0]), tmp_path / "expected.pt")
    torch.save(batch()[0], tmp_path / "x.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['sokd'] = None\n"
        "load = lambda name: torch.load(f'{sys.argv[1]}/{name}.pt', weights_only=False)\n"
        "assert torch.equal(load('student')(load('x')), load('expected'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_the_student_itself_keeps_its_hooks_in_a_pickle():
    """They are of sokd, which is why `export` is what is saved."""
    student = make(models=(net(6), net(3)), layers={"0": "0"}).student
    assert b"sokd.distiller.taps" in pickle.dumps(student)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def prune(student: Net) -> None:
    nn_prune.l1_unstructured(student.stage1[0], "weight", 0.5)


def keep(student: Net) -> None:
    student.stem.register_forward_hook(Keeper())


class Keeper:
    """A hook that keeps what it saw last."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output


@pytest.mark.parametrize("change", [prune, keep], ids=["pruned", "kept in inference mode"])
def test_exports_of_changed_students(change):
    student = Net(3)
    change(student)
    distiller = make(models=(Net(6), student))
    objective(distiller).backward()
    with torch.inference_mode():
        distiller.eval()(*batch())
    exported, x = distiller.export(), batch()[0]
    expected = student.eval()(x)
    assert torch.equal(exported(x), expected) and torch.equal(saved(exported)(x), expected)


def test_a_student_that_cannot_be_copied():
    distiller = make()
    distiller.student.lock = threading.Lock()
    text = (
        "Distiller: student must hold only what copy.deepcopy copies, for export(), got one that "
        "does not (cannot pickle '_thread.lock' object); remove that part, or save "
        "distiller.student.state_dict()"
    )
    with raises(TypeError, text):
        distiller.export()
    del distiller.student.lock
    assert torch.equal(distiller.export()(batch()[0]), distiller.eval()(batch()[0]))


def test_an_export_can_be_exported():
    distiller = make()
    objective(distiller).backward()
    exported, x = distiller.export(), batch()[0]
    program = torch.export.export(exported, (x,))
    torch.testing.assert_close(program.module()(x), exported(x))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["distributed checkpoint", "safetensors"])
def test_states_in_other_formats(way, tmp_path):
    made, loaded = (trained(Net, steps) for steps in (2, 0))
    wanted, state = made.state_dict(), loaded.state_dict()
    if way == "safetensors":
        files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        files.save_model(made, str(tmp_path / "made"))
        files.load_model(loaded, str(tmp_path / "made"))
    else:
        dcp.save(made.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        loaded.load_state_dict(state)
    assert all(torch.equal(wanted[name], value) for name, value in loaded.state_dict().items())
    assert objective(loaded) == objective(made)
