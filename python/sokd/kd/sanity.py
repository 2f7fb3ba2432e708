"""Warnings about common training-script mistakes, each given once per module.

The checks read metadata (graph nodes, modes, the parameters of an optimiser), except for the share
of covered cells, which is read on the CPU only. They are skipped under `torch.compile`,
`torch.no_grad()`, a functorch transform or a dispatch mode.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sokd.kd.features import tensors_of
from sokd.ops.runtime import is_eager, warn_user
from sokd.ops.torch_internals import saved_training

if TYPE_CHECKING:
    from sokd.kd.features import Features
    from sokd.kd.sokd import SoKD

__all__ = ["Watch", "is_made_of", "leaves", "look", "look_at_mask"]

PATIENCE = 10  # consecutive steps before a warning

UNHELD = (
    "sokd: {parts} had gradients in {steps} steps of the student's optimiser, but no optimiser "
    "holds them; {fix}"
)
PASS_KD = "pass it kd's parameters too, e.g. SGD([*student.parameters(), *kd.parameters()], lr=...)"
DETACHED = (
    "sokd: student_features have no gradient, so an optimiser trains kd and not the student; "
    "pass them as the student returned them, without .detach() or torch.no_grad(), and check that "
    "the student's parameters require grad"
)
CROSSED = (
    "sokd: the student's maps are {student} and the teacher's {teacher}: the same sizes in another "
    "order; pair the layers by their size, or the larger maps are resized to the smaller"
)
TEACHER_GRAPH = (
    "sokd: teacher_features require grad, but no gradient flows to the teacher; call the teacher "
    "under torch.no_grad()"
)
# Detected in the teacher's graph only: under torch.no_grad() train mode leaves no trace.
TEACHER_TRAINS = (
    "sokd: the teacher ran in train mode; call teacher.eval() before the student's training"
)
MASK_FULL = (
    "sokd: the areas covered every cell for {steps} steps, so the mask selects nothing; "
    "use larger maps, a lower k or dam=None"
)
MASK_EMPTY = (
    "sokd: the areas covered no cell for {steps} steps, so no feature is distilled; "
    "look for NaN in the features or in kd.dam, and lower the learning rate"
)


class Watch:
    """The state of the checks of one module's training, and the warnings already given.

    `Watch.of(module)` returns the watch of a module; copies and pickles of it start with a new one.
    """

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._settled = False  # whether every optimiser that matters has been seen
        self._idle = False  # whether the student's features had no gradient in the last step
        self._student: list[weakref.ref[Tensor]] = []
        self._parts: Mapping[str, nn.Module | None] = {}
        self._fix = PASS_KD
        self._held: set[int] = set()  # ids of the parts' parameters that an optimiser holds
        self._steps = 0
        self._full = self._empty = 0

    @classmethod
    def of(cls, module: nn.Module) -> Watch:
        """The watch of this module."""
        return _watches.setdefault(module, cls())

    def first(self, what: str) -> bool:
        """Whether this is the first call for `what`, a check that runs in one step only."""
        is_first = what not in self._given
        self._given.add(what)
        return is_first

    def warn(self, text: str, **values: Any) -> None:
        """Warn once, at the line of the user's code that led here."""
        if text in self._given:
            return
        self._given.add(text)
        warn_user(text.format(**values))

    def order(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
        """Warn about layers of two sides whose maps have the same sizes in another order."""
        sizes = [
            [f"{each.shape[2]}x{each.shape[3]}" for each in side if each.dim() == 4]
            for side in (students, teachers)
        ]
        if sizes[0] != sizes[1] and sorted(sizes[0]) == sorted(sizes[1]):
            student, teacher = (", ".join(side) for side in sizes)
            self.warn(CROSSED, student=student, teacher=teacher)

    def teacher(self, features: Iterable[Tensor]) -> None:
        """Warn about a teacher with gradients, and about train mode in its graph."""
        outputs = [each for each in features if each.requires_grad]
        if not outputs or TEACHER_GRAPH in self._given:
            return
        self.warn(TEACHER_GRAPH)
        if any(_trains(node) for node in _nodes(outputs)):
            self.warn(TEACHER_TRAINS)

    def optimiser(
        self, student: Iterable[Tensor], parts: Mapping[str, nn.Module | None],
        fix: str = PASS_KD, *, idle: bool = False,
    ) -> None:  # fmt: skip
        """Watch the next step of an optimiser, to warn about parameters that it does not train.

        Args:
            student: the student's trained parameters.
            parts: the modules trained in addition to the student, by name.
            fix: the end of the warning about parts that no optimiser holds.
            idle: whether the student got no gradient in this step.
        """
        if not self._settled and not self._student:
            self._student = [weakref.ref(parameter) for parameter in student]
        self._parts, self._fix = parts, fix
        self._idle = idle and DETACHED not in self._given
        _listen()

    @property
    def waits(self) -> bool:
        """Whether the next step of an optimiser matters."""
        return self._idle or bool(self._student)

    def stepped(self, parameters: Mapping[int, Tensor]) -> None:
        """Record a step of an optimiser that holds these parameters, by id.

        A part may have a separate optimiser, which steps after the student's or less often.
        """
        trained = [
            (name, parameter)
            for name, part in self._parts.items()
            if part is not None
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        stepped = parameters.keys() & {id(parameter) for _, parameter in trained}
        if self._idle and stepped:
            self._idle = False
            self.warn(DETACHED)
        self._held |= stepped
        if not any(id(parameter()) in parameters for parameter in self._student):
            return
        self._steps += 1
        unheld = [(name, each) for name, each in trained if id(each) not in self._held]
        if unheld and self._steps < PATIENCE:
            return
        late = dict.fromkeys(name for name, parameter in unheld if parameter.grad is not None)
        if late:
            held = {name for name, parameter in trained if id(parameter) in self._held}
            parts = " and ".join(f"parts of {name}" if name in held else name for name in late)
            self.warn(UNHELD, parts=parts, steps=PATIENCE, fix=self._fix)
        self._settled, self._student, self._held = True, [], set()

    def mask(self, shares: Tensor) -> None:
        """Count the consecutive steps in which the areas of every sample cover all cells, or none.

        Args:
            shares: [layers], the share of cells that the areas cover; read on the CPU only.
        """
        if shares.device.type != "cpu":
            return
        values: list[float] = shares.tolist()
        self._full = self._full + 1 if max(values) >= 1 else 0
        self._empty = self._empty + 1 if min(values) <= 0 else 0
        if self._full == PATIENCE:
            self.warn(MASK_FULL, steps=PATIENCE)
        if self._empty == PATIENCE:
            self.warn(MASK_EMPTY, steps=PATIENCE)


_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()

# One hook for all modules, registered while one of them waits.
_handle: RemovableHandle | None = None


def _waiting() -> list[Watch]:
    return [watch for watch in list(_watches.values()) if watch.waits]


def _listen() -> None:
    """Register the hook if a module waits, else remove it."""
    global _handle
    if not _waiting():
        _let_go()
    elif _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def _let_go() -> None:
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


def _after_step(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    groups = optimiser.param_groups
    parameters = {id(parameter): parameter for group in groups for parameter in group["params"]}
    for watch in _waiting():
        watch.stepped(parameters)
    if not _waiting() and _is_last():
        _let_go()


def _is_last() -> bool:
    """Whether the hook is the last of all.

    The optimiser iterates over the hooks now, and an iterator that has more to give raises after a
    removal. A hook that others follow is removed by the next loss.
    """
    if _handle is None:
        return False
    hooks = _handle.hooks_dict_ref()
    return isinstance(hooks, OrderedDict) and next(reversed(hooks), None) == _handle.id


# -------------------------------------------------------------------------------------- SoKD's own


def look(kd: SoKD, student_features: Features, teacher_features: Features) -> None:
    """Check one training step of `kd`, after its statistics were recorded."""
    if not is_eager(kd.statistics) or not torch.is_grad_enabled():
        return
    watch = Watch.of(kd)
    students, teachers = tensors_of(student_features), tensors_of(teacher_features)
    watch.teacher(teachers)
    watch.order(students, teachers)
    # at a weight of 0 the heads have no gradient to train on
    parts = {"kd.adapter": kd.adapter, "kd.dam": kd.dam if kd.lambda_agreement else None}
    idle = kd.training and not all(each.requires_grad for each in students)
    watch.optimiser(leaves(students), parts, idle=idle)
    look_at_mask(kd)


def look_at_mask(kd: SoKD) -> None:
    """Check only the mask of a step, after its statistics were recorded."""
    if kd.dam is not None and is_eager(kd.statistics):
        Watch.of(kd).mask(kd.statistics[:, -1])


def _trains(node: Any) -> bool:
    name = node.name()
    return "NativeDropout" in name or ("BatchNorm" in name and saved_training(node))


def leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the graph behind the outputs: the parameters that their gradients reach."""
    for node in _nodes(outputs):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def is_made_of(total: Tensor, parts: Iterable[Tensor]) -> bool:
    """Whether all parts are in the graph behind the total."""
    missing = {part.grad_fn for part in parts}
    for node in _nodes([total]):
        missing.discard(node)
        if not missing:
            break
    return not missing


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the autograd graph behind the outputs, nearest first."""
    waiting = deque(output.grad_fn for output in outputs if output.grad_fn is not None)
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        fresh = [
            following
            for following, _ in node.next_functions
            if following is not None and following not in seen
        ]
        seen.update(fresh)
        waiting.extend(fresh)
