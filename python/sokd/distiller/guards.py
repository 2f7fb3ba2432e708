"""Warnings and errors of a Distiller about models, inputs and losses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sokd.distiller.copies import as_eval
from sokd.distiller.inputs import batch_size, is_input, kinds
from sokd.distiller.outputs import untrained_entries
from sokd.kd.features import mixed_dtypes_allowed
from sokd.kd.sanity import Watch
from sokd.kd.sokd import SoKD, parts_in
from sokd.kd.virtual import unwrapped
from sokd.ops.distributed import agreed, is_sharded, place
from sokd.ops.torch_internals import is_replica

if TYPE_CHECKING:
    from sokd.distiller import Distiller

__all__ = [
    "ANOTHER_TEACHER",
    "NO_COPY",
    "WRITES_INPUT",
    "check_base",
    "check_devices",
    "check_eager",
    "check_finite",
    "check_maps",
    "check_models",
    "check_searched",
    "check_size",
    "check_start",
    "check_teacher",
    "explained",
    "look",
]

PASS_ALL = "pass it the distiller's parameters, e.g. SGD(distiller.parameters(), lr=...)"
TEACHER_TRAINS = (
    "sokd: the teacher was in train mode and has been set to eval mode; call teacher.eval() after "
    "teacher.train()"
)
FROZEN = (
    "sokd: no parameter of the student requires grad, so the student does not learn; call "
    "student.requires_grad_() (a Distiller freezes its teacher; for two networks that teach each "
    "other, pass a copy.deepcopy as each teacher)"
)
LOGITS_WITHOUT_GRADIENT = (
    "sokd: the student's logits have no gradient, so their losses do not train the student; "
    "compute them without .detach() and torch.no_grad()"
)
LARGER = (
    "sokd: the student has {student:,} parameters, more than the teacher's {teacher:,}; the order "
    "is Distiller(student, teacher)"
)
UNTRAINED = (
    "sokd: the student returns several outputs of one width; {taken!r} is taken as the logits, and "
    "losses of the logits do not train {rest} (logits= selects another one, task= a loss of all)"
)
ANOTHER_TEACHER = (
    "Distiller: the teacher is the one that it was made with; make another Distiller, or load the "
    "weights into it (distiller.teacher.load_state_dict)"
)
NO_COPY = (
    "Distiller: student must hold only what copy.deepcopy copies, for export(), got one that does "
    "not ({error}); remove that part, or save distiller.student.state_dict()"
)
WRITES_INPUT = (
    "Distiller: the teacher changed its input in place in this pass, but not in the first one, so "
    "the student would get the changed input; clone it in the teacher (x = x.clone())"
)
NO_GRADIENT = (
    "Distiller: {which} must give a map with a gradient, got one without; it is frozen, runs under "
    "no_grad, or is checkpointed with use_reentrant=True (use use_reentrant=False)"
)
SCRIPTED = (
    "Distiller: {side} must be an eager module where layers are used, because TorchScript runs "
    "no hooks (method='kd' with sokd=False uses no layers), got {kind}"
)
OTHER_BASE = (
    "Distiller: the state fits base={base!r} or other methods, not this object; to load it make "
    "the Distiller with its methods and sokd={{'base': {base!r}}}"
)
EMPTY = "Distiller: x must hold at least one sample, got none"
INPUTS = (
    "Distiller: x must be an input of both models, a tensor, a dict of keywords or a list of "
    "images (the x of a loader's batch (x, y)), got {got}"
)
OTHER_INPUTS = (
    "Distiller: x must be an input of the {side}'s forward({names}), several as a dict of "
    "keywords, got {got}"
)
NO_TARGET = (
    "Distiller: task must be a loss (output, y) where the student's forward({names}) takes no "
    "target, got {task!r} with a {got}"
)
ONE_SAMPLE = (
    "Distiller: x must hold more than one sample where a BatchNorm in train mode has one value per "
    "channel, got 1 (drop_last=True in the DataLoader)"
)
LOST_IN_PARALLEL = (
    "Distiller: the model must run in one thread per process, got torch.nn.DataParallel; "
    "use DistributedDataParallel(distiller)"
)
WRAPPED_INSIDE = (
    "Distiller: student must be wrapped together with the adapters and heads, whose {count} "
    "parameters would not be averaged over the ranks: DistributedDataParallel(Distiller(student, "
    "teacher, ...)), got a student in DistributedDataParallel"
)
SHARDED_INSIDE = (
    "Distiller: student must be sharded together with the adapters and heads, whose {count} "
    "parameters would not be averaged over the ranks: fully_shard(distiller, "
    "ignored_params=set(distiller.kd.policy.parameters())), got a student sharded alone"
)


def check_models(student: Any, teacher: Any) -> None:
    """Raise TypeError or ValueError unless these are two modules that share no parameter."""
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Distiller: {name} must be an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise TypeError(LOST_IN_PARALLEL)
    made_in_inference = sum(p.is_inference() for p in student.parameters() if not is_lazy(p))
    if made_in_inference:
        rule = "be made outside torch.inference_mode(), where no parameter can be trained"
        raise ValueError(f"Distiller: student must {rule}, got {made_in_inference} such parameters")
    trained = {id(parameter) for parameter in student.parameters()}
    shared = sum(id(parameter) in trained for parameter in teacher.parameters())
    if shared:
        rule = "share no parameter with the student, because it is frozen (use copy.deepcopy)"
        raise ValueError(f"Distiller: teacher must {rule}, got {shared} of them")


def check_size(distiller: Distiller) -> None:
    """Warn of a student with more parameters than its teacher: the two may be swapped."""
    student, teacher = (
        sum(p.numel() for p in model.parameters() if not is_lazy(p))
        for model in (distiller.student, distiller.teacher)
    )
    if student > teacher > 0:
        Watch.of(distiller).warn(LARGER, student=student, teacher=teacher)


def check_eager(**models: nn.Module) -> None:
    """Refuse TorchScript, whose layers cannot be hooked."""
    for side, model in models.items():
        if isinstance(unwrapped(model), torch.jit.ScriptModule):
            raise TypeError(SCRIPTED.format(side=side, kind=type(model).__name__))


def check_start(distiller: Distiller) -> None:
    """The checks before the first step: devices, wrappers, the ranks' policies."""
    if is_replica(distiller):
        raise TypeError(LOST_IN_PARALLEL)
    check_devices(distiller)
    if place()[1] == 1:
        return
    own = [parameter for parameter in distiller.own_parameters() if parameter.requires_grad]
    if own and isinstance(distiller.student, nn.parallel.DistributedDataParallel):
        raise ValueError(WRAPPED_INSIDE.format(count=len(own)))
    if is_sharded(distiller.student.parameters()) and not all(is_sharded([each]) for each in own):
        raise ValueError(SHARDED_INSIDE.format(count=len(own)))
    policy = None if distiller.kd is None else distiller.kd.policy
    if policy is not None:  # the same draws on every rank, whatever each rank's seed was
        for tensor in (*policy.parameters(), policy.seed, policy.counter):
            agreed(tensor.data)


def check_base(kd: SoKD, state: Mapping[str, Any]) -> None:
    """Refuse a Distiller's state of the other `base`, which decides whether kd has an adapter."""
    parts = parts_in(state, "kd.")
    has, had = kd.adapter is not None, "adapter" in parts
    if parts and "dam" not in parts and has != had:
        raise RuntimeError(OTHER_BASE.format(base="keep" if had else "replace"))


def check_searched(distiller: Distiller, model: Any) -> None:
    """Raise ValueError for a search of a model without a parameter of the Distiller's student.

    A module without parameters may call the student with weights of its own (`functional_call`).
    """
    own = {id(each) for each in distiller.student.parameters()}
    given = [id(each) for each in model.parameters()] if isinstance(model, nn.Module) else []
    if given and own.isdisjoint(given):
        rule = "be the Distiller's student, as in PolicySearch(distiller.kd, distiller.student)"
        is_teacher = unwrapped(model) is unwrapped(distiller.teacher)
        got = "its teacher" if is_teacher else f"another {type(model).__name__}"
        raise ValueError(f"Distiller: model must {rule}, got {got}")


def check_devices(distiller: Distiller) -> None:
    """Raise unless the two models share a device."""
    student, teacher = _devices(distiller.student), _devices(distiller.teacher)
    if student and teacher and not student & teacher:
        rule = f"be on the student's device {_one(student)} (distiller.to moves both)"
        raise ValueError(f"Distiller: teacher must {rule}, got {_one(teacher)}")


def _devices(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def _one(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def check_maps(
    distiller: Distiller,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    names: Sequence[tuple[str, str]],
) -> None:
    """Raise for maps of two dtypes, and for a map of a trained student without a gradient."""
    trained = torch.is_grad_enabled() and _is_trained(distiller.student)
    for student, teacher, (of_student, of_teacher) in zip(students, teachers, names, strict=True):
        if student.dtype != teacher.dtype and not mixed_dtypes_allowed(student):
            rule = (
                f"have the dtype of {of_teacher}, {teacher.dtype} (distiller.to converts both "
                f"models)"
            )
            raise TypeError(f"Distiller: {of_student} must {rule}, got {student.dtype}")
        if trained and not student.requires_grad:
            raise ValueError(NO_GRADIENT.format(which=of_student))


def _is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def check_teacher(distiller: Distiller, parts: Iterable[nn.Module]) -> None:
    """Put a teacher in train mode back into eval mode, and warn once. `parts`: its modules."""
    if any(part.training for part in parts):
        as_eval(distiller.teacher)
        Watch.of(distiller).warn(TEACHER_TRAINS)


# ----------------------------------------------------------------------------------- unclear errors


@contextmanager
def explained(distiller: Distiller, x: Any, targets: Sequence[Any] = ()) -> Iterator[None]:
    """Raise an error from inside the models as one about the argument that caused it.

    `targets`: the further arguments of the student.
    """
    if batch_size(x) == 0:
        raise ValueError(EMPTY)
    try:
        yield
    except ValueError as error:
        if batch_size(x) == 1 and "more than 1 value per channel" in str(error):
            raise ValueError(ONE_SAMPLE) from error
        raise
    except (TypeError, AttributeError) as error:
        if not is_input(x):
            raise TypeError(INPUTS.format(got=kinds(x))) from error
        misfit = _no_such_call(distiller, x, targets)
        if misfit is not None:
            raise misfit from error
        raise
    except RuntimeError as error:
        misfit = _misfit(distiller, x, str(error))
        if misfit is not None:
            raise misfit from error
        raise


def _no_such_call(distiller: Distiller, x: Any, targets: Sequence[Any]) -> Exception | None:
    """The error about a call that the signature of a model's forward does not allow."""
    models = {"student": distiller.student, "teacher": distiller.teacher}
    for side, model in models.items():
        try:
            signature = inspect.signature(unwrapped(model).forward)
        except (TypeError, ValueError):
            continue
        names = ", ".join(signature.parameters)
        if not _accepts(signature, x):
            return TypeError(OTHER_INPUTS.format(side=side, names=names, got=kinds(x)))
        if side == "student" and not _accepts(signature, x, *targets):
            got = kinds(targets[0])
            return TypeError(NO_TARGET.format(names=names, task=distiller.task, got=got))
    return None


def _accepts(signature: inspect.Signature, x: Any, *target: Any) -> bool:
    try:
        signature.bind(**x) if isinstance(x, Mapping) else signature.bind(x, *target)
    except TypeError:
        return False
    return True


def _misfit(distiller: Distiller, x: Any, error: str) -> Exception | None:
    parameter, of_teacher = map(_first, (distiller.student, distiller.teacher))
    if parameter is None or not isinstance(x, Tensor):
        return None
    if x.device != parameter.device:
        rule = f"be on the device of the student's parameters, {parameter.device}"
        return ValueError(f"Distiller: x must {rule}, got {x.device}")
    if torch.is_autocast_enabled(x.device.type):
        return None
    if of_teacher is not None and of_teacher.dtype != parameter.dtype:
        own = f"{parameter.dtype} of the student's parameters"
        rule = f"have the dtype {own} (distiller.to converts both models)"
        return TypeError(f"Distiller: teacher must {rule}, got {of_teacher.dtype}")
    # the messages of a convolution with and without a bias (pixels as bytes); other layers may
    # accept integers
    integers = "Input type" in error or "expected scalar type" in error
    if x.dtype != parameter.dtype and (x.is_floating_point() or integers):
        rule = f"have the dtype {parameter.dtype} of the student's parameters"
        return TypeError(f"Distiller: x must {rule}, got {x.dtype}")
    return None


def _first(model: nn.Module) -> nn.Parameter | None:
    """One of the parameters, for device and dtype."""
    return next((p for p in unwrapped(model).parameters() if p.is_floating_point()), None)


# ------------------------------------------------------------------------------------- after a step


def check_finite(losses: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> None:
    """Name a term that is NaN or infinite, and the first layer whose map is not finite.

    Read on the CPU only, because elsewhere it would synchronise with the device.

    Raises:
        FloatingPointError: a term is not finite.
    """
    for name, loss in losses.items():
        if loss.device.type != "cpu" or math.isfinite(loss.item()):
            continue
        bad = [layer for layer, features in maps.items() if not features.isfinite().all()]
        where = f"{bad[0]} is not finite either" if bad else "the maps of all layers are finite"
        raise FloatingPointError(
            f"Distiller: {name} must be finite, got {loss.item()}; {where} (check_finite=False "
            f"skips this check)"
        )


def look(
    distiller: Distiller, output: Any, logits: Tensor | None, losses: Mapping[str, Tensor]
) -> None:
    """Check one training step for parts of the student that are not trained.

    Args:
        output, logits: the student's output, and the logits in it.
    """
    watch, student = Watch.of(distiller), distiller.student
    used = "loss_ce" in losses or distiller.needs_logits
    if not _is_trained(student):
        if any(True for _ in student.parameters()):
            watch.warn(FROZEN)
    elif used and logits is not None and not logits.requires_grad:
        watch.warn(LOGITS_WITHOUT_GRADIENT)
    elif (
        used
        and distiller.logits is None
        and not callable(distiller.task)  # it gets the whole output
        and not isinstance(output, Tensor)
        and watch.first("outputs")
    ):
        found = untrained_entries(output, logits)
        if found is not None:
            watch.warn(UNTRAINED, taken=found[0], rest=", ".join(map(repr, found[1])))
    trained = (p for p in student.parameters() if p.requires_grad)
    own = {f"distiller.{name}": module for name, module in distiller.own_modules()}
    watch.optimiser(trained, own, PASS_ALL)
