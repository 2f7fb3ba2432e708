"""Common mistakes of a training script: each is warned of once; a right script never is."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from support.kd_cases import trained
from support.raises import warns
from torch import Tensor, nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
)

from sokd.kd import sanity
from sokd.kd.dam import Attention
from sokd.kd.plugin import wrap
from sokd.kd.sokd import SoKD, loss

UNHELD = (
    "sokd: {} had gradients in 10 steps of the student's optimiser, but no optimiser holds them; "
    "pass it kd's parameters too, e.g. SGD([*student.parameters(), *kd.parameters()], lr=...)"
)
TEACHER_GRAPH = (
    "sokd: teacher_features require grad, but no gradient flows to the teacher; call the teacher "
    "under torch.no_grad()"
)
TEACHER_TRAINS = (
    "sokd: the teacher ran in train mode; call teacher.eval() before the student's training"
)
MASK_FULL = (
    "sokd: the areas covered every cell for 10 steps, so the mask selects nothing; "
    "use larger maps, a lower k or dam=None"
)
MASK_EMPTY = (
    "sokd: the areas covered no cell for 10 steps, so no feature is distilled; "
    "look for NaN in the features or in kd.dam, and lower the learning rate"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> tuple[nn.Module, SoKD]:
    torch.manual_seed(0)
    return nn.Conv2d(1, 3, 3, padding=1), trained(3, 4, heat_channels=3, k=1, policy=None)


def sgd(*held: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in held for p in module.parameters()], lr=1e-6, **options)


def said(student: nn.Module, kd: SoKD, *held: nn.Module, **options) -> list[str]:
    """Train with SGD, and return what was warned of."""
    loop = {name: options.pop(name) for name in ("steps", "every") if name in options}
    return said_with(student, kd, sgd(*held, **options), **loop)


def said_with(
    student: nn.Module, kd: SoKD, *optimisers, steps: int = 25, every: int = 1, to_none: bool = True
) -> list[str]:
    """Train with these optimisers, and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            maps = student(torch.randn(2, 1, 6, 6))
            loss(maps, torch.randn(2, 4, 6, 6), kd).backward()
            if step % every == every - 1:
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=to_none)
    return [str(warning.message) for warning in caught]


def test_a_right_script_is_left_alone():
    student, kd = small()
    assert said(student, kd, student, kd) == []
    assert said(student, kd, student, kd, every=12, steps=40) == [], "gradients were accumulated"
    assert said(student, kd, student, kd, foreach=True) == []


@pytest.mark.parametrize(
    ("held", "parts"),
    [([], "kd.adapter and kd.dam"), (["adapter"], "kd.dam"), (["dam"], "kd.adapter")],
    ids=["none", "adapter", "dam"],
)
def test_parameters_that_no_optimiser_holds(held, parts):
    student, kd = small()
    parts_held = [getattr(kd, name) for name in held]
    assert said(student, kd, student, *parts_held) == [UNHELD.format(parts)]
    assert said(student, kd, student) == [], "once is enough"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("to_none", [True, False])
def test_fused_optimisers(kind, to_none):
    def fused(*held: nn.Module) -> torch.optim.Optimizer:
        return kind([p for module in held for p in module.parameters()], lr=1e-4, fused=True)

    student, kd = small()
    text = UNHELD.format("kd.adapter and kd.dam")
    assert said_with(student, kd, fused(student), to_none=to_none) == [text]
    student, kd = small()
    assert said_with(student, kd, fused(student, kd), to_none=to_none) == []
    student, kd = small()
    assert said_with(student, kd, sgd(student), fused(kd), to_none=to_none) == []


def step(student: nn.Module, kd: SoKD, *optimisers) -> None:
    """One step in which `zero_grad` runs just before `backward`."""
    distilled = loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd)
    for optimiser in optimisers:
        optimiser.zero_grad()
    distilled.backward()
    for optimiser in optimisers:
        optimiser.step()


def test_an_optimiser_that_is_made_anew_in_every_step():
    student, kd = small()
    of_kd = torch.optim.SGD(kd.parameters(), lr=1e-4, fused=True)
    for _ in range(15):
        step(student, kd, sgd(student), of_kd)


def test_an_optimiser_of_kd_that_steps_less_often():
    student, kd = small()
    of_student, of_kd = sgd(student), sgd(kd)
    for index in range(15):
        step(student, kd, of_student, *([of_kd] if index % 6 == 5 else []))


@pytest.fixture
def hooks() -> Callable[[], int]:
    """Counts the hooks on optimisers, where no module of another test waits."""
    sanity._watches.clear()
    sanity._let_go()
    before = len(_global_optimizer_post_hooks)
    return lambda: len(_global_optimizer_post_hooks) - before


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_hook_is_there_until_the_first_step_of_the_student(hooks, options):
    student, kd = small()
    optimiser, other = sgd(student, kd, **options), sgd(nn.Linear(2, 2))
    maps = student(torch.randn(2, 1, 6, 6))
    loss(maps, torch.randn(2, 4, 6, 6), kd).backward()
    other.step()
    assert hooks() == 1, "an optimiser of something else"
    optimiser.step()
    assert hooks() == 0
    step(student, kd, optimiser)
    assert hooks() == 0


def test_the_hook_serves_several_modules_and_copies_until_the_last_has_been_seen(hooks):
    (student, kd), (another, of_another) = small(), small()
    copied = copy.deepcopy(kd)
    held = [sgd(student, kd, copied), sgd(another, of_another)]
    for module in (kd, copied):
        loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), module).backward()
    loss(another(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), of_another).backward()
    held[0].step()
    assert hooks() == 1
    held[1].step()
    assert hooks() == 0


def test_a_hook_of_others_behind_it_is_left_to_run(hooks):
    """While the optimiser iterates over its hooks, only the last of them can be removed."""
    student, kd = small()
    optimiser, seen = sgd(student, kd), []
    loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd).backward()
    behind = register_optimizer_step_post_hook(lambda *_: seen.append("behind"))
    try:
        optimiser.step()
        assert seen == ["behind"] and hooks() == 2
        loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd)
        assert hooks() == 1
    finally:
        behind.remove()


def test_hooks_of_others_all_run():
    student, kd = small()
    seen: list[str] = []
    register = register_optimizer_step_post_hook
    before = register(lambda *_: seen.append("before"))
    loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd).backward()
    after = register(lambda *_: seen.append("after"))
    try:
        sgd(student, kd).step()
        assert seen == ["before", "after"]
    finally:
        before.remove()
        after.remove()


def test_neither_kd_nor_student_is_kept_alive(hooks):
    student, kd = small()
    loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd)
    alive = [weakref.ref(kd), weakref.ref(student), weakref.ref(student.weight)]
    del student, kd
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]
    for _ in range(2):
        student, kd = small()
        optimiser = sgd(student, kd)
        step(student, kd, optimiser)
        step(student, kd, optimiser)
    assert hooks() == 0, "the next module takes the hook of one that is gone away"


def test_several_in_turn_and_at_once():
    pairs = [small(), small(), small()]
    held = [[*student.parameters(), *kd.parameters()] for student, kd in pairs[:2]]
    one = torch.optim.SGD([*held[0], *held[1], *pairs[2][0].parameters()], lr=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            for student, kd in pairs:
                loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd).backward()
            one.step()
    assert [str(each.message) for each in caught] == [UNHELD.format("kd.adapter and kd.dam")]


def test_steps_that_a_grad_scaler_leaves_out_do_not_count():
    student, kd = small()
    optimiser, scaler = sgd(student), torch.amp.GradScaler("cpu")

    def scaled(factor: float) -> None:
        optimiser.zero_grad()
        term = loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd)
        scaler.scale(term * factor).backward()
        scaler.step(optimiser)
        scaler.update()

    for _ in range(12):
        scaled(float("inf"))
    for _ in range(9):
        scaled(1.0)
    with pytest.warns(UserWarning, match="no optimiser holds them"):
        scaled(1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, in its own compiler
def test_a_compiled_step_of_the_optimiser():
    student, kd = small()
    optimiser = sgd(student, kd)
    compiled = torch.compile(optimiser.step, backend="eager")
    before = student.weight.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd).backward()
        compiled()
    assert not torch.equal(before, student.weight)


def test_a_part_held_in_part():
    student, kd = small()
    text = UNHELD.format("parts of kd.adapter")
    assert said(student, kd, student, kd.dam, kd.adapter.match) == [text]
    student, kd = small()
    rest = [module for name, module in kd.adapter.named_children() if name != "norm"]
    assert said(student, kd, student, kd.dam, *rest) == [text]


def test_a_loss_that_does_not_depend_on_a_part_is_meant_so():
    student, kd = small()
    kd.lambda_agreement = 0.0
    assert said(student, kd, student, kd.adapter) == []


def test_parameters_of_several_layers_are_one_part():
    student, _ = small()
    kd = trained([3, 3], [4, 4], policy=None, dam=None)
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-6)
    with warns(UNHELD.format("kd.adapter")):
        for _ in range(15):
            maps = student(torch.randn(2, 1, 6, 6))
            loss([maps, maps], [torch.randn(2, 4, 6, 6)] * 2, kd).backward()
            optimiser.step()


def test_frozen_parameters_are_meant_so():
    student, kd = small()
    kd.requires_grad_(False)
    assert said(student, kd, student) == []


DETACHED = (
    "sokd: student_features have no gradient, so an optimiser trains kd and not the student; "
    "pass them as the student returned them, without .detach() or torch.no_grad(), and check that "
    "the student's parameters require grad"
)


def test_a_student_that_cannot_learn():
    student, kd = small()
    student.requires_grad_(False)
    assert said(student, kd, kd) == [DETACHED]
    assert said(student, kd, kd) == [], "once is enough"
    assert said(student.requires_grad_(True), kd, student, kd) == []


@pytest.mark.parametrize("way", ["loss", "kd", "wrap"])
def test_features_that_a_hook_detached(way):
    student, kd = small()
    call = {"loss": lambda *maps: loss(*maps, kd), "kd": kd, "wrap": wrap(nn.MSELoss(), kd)}[way]
    optimiser, before = sgd(student, kd), student.weight.detach().clone()
    with warns(DETACHED) as caught:
        for _ in range(3):
            optimiser.zero_grad()
            call(student(torch.randn(2, 1, 6, 6)).detach(), torch.randn(2, 4, 6, 6)).backward()
            optimiser.step()
    assert torch.equal(before, student.weight)
    assert caught[0].filename == __file__, "at the line of optimiser.step()"


def test_one_of_two_layers_that_is_detached():
    student, _ = small()
    kd = trained([3, 3], [4, 4], policy=None, dam=None)
    maps, teacher = student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6)
    loss([maps, maps.detach()], [teacher, teacher], kd).backward()
    with pytest.warns(UserWarning, match="student_features have no gradient"):
        sgd(student, kd).step()


def test_detached_features_in_a_validation_are_legal():
    student, kd = small()
    optimiser = sgd(student, kd)
    step(student, kd, optimiser)
    maps, teacher = student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6)
    kd.eval()
    loss(maps.detach(), teacher, kd)
    optimiser.step()
    kd.train()
    with torch.no_grad():
        loss(maps.detach(), teacher, kd)
    optimiser.step()


def test_a_script_without_optimisers_is_left_alone():
    student, kd = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            loss(student(torch.randn(2, 1, 6, 6)), torch.randn(2, 4, 6, 6), kd).backward()
            for parameter in (*student.parameters(), *kd.parameters()):
                parameter.data -= 1e-4 * parameter.grad


def test_a_copy_is_told_itself_and_can_be_made_after_the_warning():
    student, kd = small()
    assert said(student, kd, student) == [UNHELD.format("kd.adapter and kd.dam")]
    for other in (copy.deepcopy(kd), pickle.loads(pickle.dumps(kd))):
        assert said(student, other, student) == [UNHELD.format("kd.adapter and kd.dam")]


def test_the_warning_points_at_the_users_line():
    _, kd = small()
    teacher = torch.randn(2, 4, 6, 6, requires_grad=True)
    with warns(TEACHER_GRAPH) as caught:
        loss(torch.randn(2, 3, 6, 6), teacher, kd)
        kd(torch.randn(2, 3, 6, 6), teacher)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Identity()], ids=["norm", "none"])
def test_a_teacher_with_gradients_and_in_train_mode(training, layer):
    _, kd = small()
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer).train(training)
    features = teacher(torch.randn(2, 1, 6, 6))
    with pytest.warns(UserWarning) as caught:
        loss(torch.randn(2, 3, 6, 6, requires_grad=True), features, kd).backward()
    seen = training and isinstance(layer, nn.BatchNorm2d)
    texts = [str(warning.message) for warning in caught]
    assert texts == [TEACHER_GRAPH, TEACHER_TRAINS][: 1 + seen]
    assert teacher[0].weight.grad is None


def test_a_teacher_under_no_grad_is_left_alone():
    _, kd = small()
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        features = teacher(torch.randn(2, 1, 6, 6))
    loss(torch.randn(2, 3, 6, 6), features, kd)


class Mask(nn.Module):
    """Covers `share` of the cells, with as many areas everywhere."""

    covers = 1.0

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float) -> Attention:
        coverage = torch.zeros(student.shape[0], *student.shape[2:])
        coverage.flatten()[: int(self.covers * coverage.numel())] = 2
        return Attention(torch.zeros(()), coverage, coverage, coverage, student.detach())


@pytest.mark.parametrize(("covers", "text"), [(1.0, MASK_FULL), (0.0, MASK_EMPTY)])
def test_a_mask_of_everything_or_nothing(covers, text):
    kd = SoKD(3, 3, adapter=None, policy=None, dam=Mask())

    def step(share: float) -> None:
        kd.dam.covers = share
        loss(torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6), kd)

    for share in [covers] * 9 + [0.5] + [covers] * 9:  # never ten in a row
        step(share)
    with warns(text):
        for _ in range(20):
            step(covers)


def test_nothing_is_said_without_gradients():
    kd = SoKD(3, 3, adapter=None, policy=None, dam=Mask())
    with torch.no_grad():
        for _ in range(20):
            loss(torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6), kd)
