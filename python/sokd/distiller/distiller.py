"""The Distiller: distillation of any two models by any method, with SoKD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sokd.distiller import guards
from sokd.distiller.assemble import (
    Needs,
    Plug,
    checked_plug,
    find_heads,
    make_adapters,
    make_kd,
    with_adapter,
)
from sokd.distiller.auto import auto_layers
from sokd.distiller.copies import as_eval, bare_copy, untouched
from sokd.distiller.images import Images, images_of, inside
from sokd.distiller.inputs import Given
from sokd.distiller.maps import as_map, check_pair
from sokd.distiller.outputs import (
    Logits,
    Task,
    call,
    check_needs,
    checked_task,
    find_logits,
    is_for_model,
    labels_of,
    own_losses,
    task_losses,
)
from sokd.distiller.recipe import Chosen, chosen
from sokd.distiller.taps import Layers, Pair, Tap, Taps, layer_pairs
from sokd.kd import sanity
from sokd.kd.batches import apart, changed, copied
from sokd.kd.dam import Attention
from sokd.kd.features import kept, layouts, total
from sokd.kd.sokd import Match, SoKD, check_state
from sokd.kd.virtual import replayed, unwrapped
from sokd.methods.common import Method, Step, constant
from sokd.ops.runtime import is_eager
from sokd.ops.torch_internals import is_compiled

__all__ = ["Distiller"]

Losses = dict[str, Tensor]

NOT_READY = (
    "Distiller: the parameters do not exist before the shapes are known, and an optimiser made now "
    "would lack the adapters; pass example=, a batch of inputs, or call distiller.setup(x) first"
)


class Pass(NamedTuple):
    """The results of one forward pass of a model."""

    output: Any
    logits: Tensor | None
    maps: list[Tensor]  # [B, C, H, W], one for each pair of layers


class Distiller(nn.Module):
    """Distils a teacher into a student without changes to their code.

        distiller = sokd.Distiller(student, teacher, layers="stage2", example=images)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        output, losses = distiller(images, labels)
        sum(losses.values()).backward()

    In train mode `distiller(x, y)` is `(output, losses)`: what the student returned, and a dict of
    scalars whose sum is the objective: the task's (`loss_ce`), one for each method (`loss_<name>`,
    weighted), and SoKD's own (`sokd=` below). In eval mode `distiller(x)` is the student's output,
    and `distiller(x, y)` that and the task's loss. `distiller.logits_of(output)` picks the logits.

    `parameters()` and `state_dict()` are those of the student, adapters, methods and SoKD, which
    the optimiser must hold. They do not include the teacher, which is frozen, set to eval mode and
    run without gradients; `.to()` moves it too. `distiller.student` is the student itself. Its
    hooks are inactive outside a Distiller but are pickled with it; `distiller.export()` returns a
    copy without hooks, to be saved, scripted and loaded without sokd.

    These compile with `fullgraph=True`: the Distiller, once its shapes are known
    (`torch.compile(distiller)`); a training step around it; the student alone, by
    `torch.compile(student)` or `student.compile()`. The hooks are part of the graph. Compiled code
    skips the checks for common mistakes.

    Args:
        student, teacher: any two modules. They are called as `model(x)`, or `model(**x)` for a
            dict. Under DistributedDataParallel wrap the Distiller; for FSDP,
            `fully_shard(distiller, ignored_params=set(distiller.kd.policy.parameters()))`. A
            compiled model may be passed.
        layers: where features are taken: a dict of student layer -> teacher layer, a name, a list
            of names or (student, teacher) pairs, names as in `named_modules`, `name:key` for a
            layer that returns a dict or tuple; "auto": the last map of each resolution that both
            have, the output of a stage and with a gradient, no map of logits (`task=None` where the
            models return features). Maps [B, C, H, W], tokens [B, N, C] and vectors [B, C] (as 1x1
            maps) are matched by adapters. If a layer runs several times, its first output is used.
            Not read where nothing uses features (method="kd" with sokd=False).
        method: a name of `sokd.methods`, a dict of name -> weight (None: the method's own), a
            callable (f_s, f_t) -> scalar for maps of one shape, or None. A method's own options are
            further keywords.
        sokd: whether SoKD is plugged in. With base="keep" every method runs as it is, on the clean
            teacher, and SoKD's terms are added to it: `loss_sokd`, the masked loss of adapted
            student and refined teacher, and `loss_agreement`. With base="replace" the methods get
            the refined teacher and the mask, and `loss_sokd` is there only where no method uses
            features. `method=None` is `sokd.loss`: with base="keep" `loss_base` too. A dict:
            options of `SoKD`; a `SoKD`: that one. `distiller.kd`, None for False.
        adapter: "conv", "separable", "regressor" or "linear" (see `Adapter`), for SoKD and every
            method that reads adapted maps (fitnet, mgd, fgd, wkd, a callable); "default": that of
            `SoKD`.
        task: the task's loss: "auto", those that the student returns ("loss", or a dict of scalars,
            of which those with "loss" in their names count), else cross entropy with y;
            "model", the student is called as `student(x, y)` and returns its losses (also the
            default for y that is a list of dicts); a callable (output, y) -> scalar, as
            `loss_task`; None. A callable is called with the student's output, or with the part of
            it that `logits=` selects.
        logits: where the logits are in an output that is not a tensor: a key, an index or a
            function; None: "logits", "out", else the first tensor. Required if the first tensor is
            one of several [B, D] of different D, one of which may be an embedding.
        example: a batch of inputs for the dry run that finds the shapes (eval mode, no gradients).
            Buffers, modes, the random state and the batch stay as they were; lazy parameters are
            initialised. None: the first batch is used, and `parameters()` before it raises.
        student_tokens, teacher_tokens, student_grid, teacher_grid: of token features, see `SoKD`.
            A grid of None is a square, and raises where the images are not square.
        student_order, teacher_order: "BCHW" or "BHWC" of maps, "BNC", "NBC" or "BCN" of tokens;
            None: "BCHW" and "BNC", checked against the images. A list has one entry for each pair.
        check_finite: on the CPU, raise FloatingPointError for a term that is NaN or infinite, with
            the name of the term and the layer.

    Raises:
        TypeError, ValueError, RuntimeError: `Distiller: {argument} must {rule}, got {value}`.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, layers: Layers = "auto",
        method: Chosen = "fitnet",
        sokd: Plug = True, adapter: str = "default", task: Task = "auto", logits: Logits = None,
        example: Any = None, student_tokens: Any = None, teacher_tokens: Any = None,
        student_grid: Any = None, teacher_grid: Any = None, student_order: Any = None,
        teacher_order: Any = None,
        check_finite: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        guards.check_models(student, teacher)
        self.student = student
        for parameter in teacher.parameters():  # TorchScript modules have no requires_grad_()
            parameter.requires_grad = False
        self._constant = (as_eval(teacher),)  # in a tuple it is not a submodule
        self._teacher_parts = tuple(teacher.modules())
        self._recipes = chosen(method, options)
        self.weights = {recipe.name: recipe.weight for recipe in self._recipes}
        self._plug, self._adapter = with_adapter(checked_plug(sokd), adapter)
        self.task = checked_task(task)
        self.logits, self.check_finite = logits, check_finite
        self._given = {"student": (student_tokens, student_grid, student_order),
                       "teacher": (teacher_tokens, teacher_grid, teacher_order)}  # fmt: skip
        self.kd: SoKD | None = None
        self.adapters: nn.ModuleList | None = None
        self.methods = nn.ModuleDict()
        self.ready = self._checked = False
        self._read_target = True  # whether the rows of the next soft target are read
        self._copies: bool | None = None  # whether the teacher needs a copy of x; None: not known
        self._needs = Needs(self._recipes, self._plug)
        self.needs_logits = self._needs.logits
        guards.check_size(self)
        if self._needs.maps:
            guards.check_eager(student=student, teacher=teacher)
        self.pairs: list[Pair] = []
        self._layers: Layers = layers if self._needs.maps else ()
        if self._layers != "auto":
            self._tap(layer_pairs(layers) if self._needs.maps else [])
        if not self._needs.maps:
            self._build([], [], [])
        elif example is not None:
            self.setup(example)

    # ---------------------------------------------------------------------------------------- calls

    def forward(
        self, x: Any, target: Any = None, *, index: Tensor | None = None,
        boxes: Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> Any:  # fmt: skip
        """`(output, losses)` in train mode and with a target; in eval mode without one the output.

        Args:
            x: the models' input: a tensor, a list of images, or a dict of keywords.
            target: [B] class indices, or the target of `task`. None: no task loss.
            index: [B] int64, the samples' indices in the training set, for methods with a memory
                bank (crd).
            boxes: one [n, 4] for each image, for methods that read them (fgd): x1 y1 x2 y2 in
                pixels of x; [0, 4] for an image without boxes.
            image_sizes: (height, width) of each image in a padded batch x [B, C, H, W]: the layers'
                maps are distilled without their padding (not logits [B, K, H, W]).
            input_size: (height, width) of the padded input where x is not such a batch.
        """
        extra = {"index": index, "boxes": boxes}
        sizes = image_sizes, input_size
        if torch.compiler.is_compiling():
            return self._forward(x, target, extra, sizes)
        targets = self._targets_of(target) if self.training else ()
        with guards.explained(self, x, targets):
            return self._forward(x, target, extra, sizes)

    def _forward(self, x: Any, target: Any, extra: dict[str, Any], sizes: tuple[Any, Any]) -> Any:
        if not self.training:
            return self._evaluate(x, target)
        extra["images"] = images_of(x, *sizes)
        eager = not torch.compiler.is_compiling()
        if not self.ready:
            self.setup(x)
        if eager:
            self._check()
        teacher = self._teach(x)
        student = self._study(self.student, x, target)
        losses = self._task(student.output, student.logits, target)
        if eager:
            guards.check_maps(self, student.maps, teacher.maps, self._labels)
        losses.update(self._distil(student, teacher, target, extra))
        if eager:
            self._look(losses, student, teacher)
        return student.output, losses

    def _evaluate(self, x: Any, target: Any) -> Any:
        output = call(self.student, x)
        if target is None:
            return output
        losses = own_losses(output)
        if not losses and not self._is_models(target):
            losses = self._task(output, self._logits(output), target)
        return output, losses

    def _logits(self, output: Any) -> Tensor | None:
        return find_logits(
            output, self.logits, strict=self._needs.logits or not callable(self.task)
        )

    def _task(self, output: Any, logits: Tensor | None, target: Any) -> Losses:
        losses = task_losses(
            self.task, output, logits, target, where=self.logits, look=self._read_target
        )
        if "loss_ce" in losses and isinstance(target, Tensor) and target.is_floating_point():
            self._read_target = False
        return losses

    def step(
        self, model: nn.Module, batch: Any, *,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """The task's loss, the student's maps and the teacher's, for `sokd.PolicySearch.step`.

            search = sokd.PolicySearch(distiller.kd, distiller.student)
            search.step(distiller.step, (x, y))

        The hooks are in the student's own modules, so the maps are those at the search's virtual
        weights. The inner level of the search is the task's loss plus SoKD's own, whichever method
        is trained. `image_sizes` as in a call: the maps are 0 in the padding.
        """
        x, target = batch[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        images = images_of(x, image_sizes, None)
        self.setup(x)
        guards.check_searched(self, model)
        # a search evaluates the batch several times, and the student may write to its input
        passes = self._teach(x), self._study(model, copied(x), target)
        teacher, student = (each._replace(maps=inside(each.maps, images)[0]) for each in passes)
        losses = list(self._task(student.output, student.logits, target).values())
        task = torch.stack(losses).sum() if losses else student.maps[0].sum() * 0
        return task, student.maps, teacher.maps

    @torch.no_grad()
    def features(self, x: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's maps of x [B, C, H, W], one for each pair of layers.

        Computed in eval mode; models, random state and x stay as they are.
        """
        models = unwrapped(self.setup(x).student), self.teacher
        with guards.explained(self, x), untouched(*models), self._replayed():
            return self._study(models[0], copied(x), None).maps, self._teach(x).maps

    def logits_of(self, output: Any) -> Any:
        """The logits in the student's output, or the whole output if there are none."""
        logits = self._logits(output)
        return output if logits is None else logits

    def export(self) -> nn.Module:
        """A copy of the student for deployment, in eval mode, without wrappers and hooks.

        It can be saved, scripted and loaded without sokd, after any number of steps.
        """
        try:
            return as_eval(bare_copy(cast(nn.Module, unwrapped(self.student)), Tap))
        except TypeError as error:  # a lock, a file: "cannot pickle ..."
            raise TypeError(guards.NO_COPY.format(error=error)) from error

    # --------------------------------------------------------------------------------------- set-up

    @torch.inference_mode(False)
    def setup(self, example: Any) -> Distiller:
        """Find the shapes by a dry run on a batch of inputs, and make adapters, methods and SoKD.

        Later calls are no-ops.
        """
        if self.ready:
            return self
        if torch.compiler.is_compiling():
            raise RuntimeError(NOT_READY)
        guards.check_devices(self)
        student, teacher = unwrapped(self.student), self.teacher
        with guards.explained(self, example), untouched(student, teacher), self._replayed():
            if self._layers == "auto":
                self._tap(self._auto(student, teacher, example))
            named = self._layers != "auto"  # only layers that the user named give warnings
            maps, outputs = [], []
            for side, model in (("student", student), ("teacher", teacher)):
                x = copied(example)
                written = changed(x)
                output, taken = self._taps[side].run(model, partial(call, model, x), warn=named)
                outputs.append(output)
                maps.append(self._as_maps(side, taken, Given.of(example)))
                self._copies = written()
        for of_student, of_teacher, names in zip(*maps, self._labels, strict=True):
            check_pair(of_student, of_teacher, names)
        if named:
            sanity.Watch.of(self).order(*maps)
        shapes = [[tuple(features.shape[1:]) for features in side] for side in maps]
        self._build(shapes[0], shapes[1], outputs)
        return self

    def _auto(self, student: nn.Module, teacher: nn.Module, example: Any) -> list[Pair]:
        used = self.task is not None or self._needs.logits
        logits = partial(find_logits, where=self.logits, guess=False) if used else lambda _: None
        orders = {side: given[2] for side, given in self._given.items()}
        return auto_layers(
            student, teacher, lambda model: call(model, copied(example)), example,
            logits=logits, orders=orders,
        )  # fmt: skip

    def _tap(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        sides = {"student": self.student, "teacher": self.teacher}
        self._taps = {
            side: Taps(side, model, [pair[at] for pair in pairs], (self.teacher, self.student)[at])
            for at, (side, model) in enumerate(sides.items())
        }
        self._layouts = {
            side: layouts(
                side, len(pairs), *self._given[side], op="Distiller", layers="pairs of layers"
            )
            for side in sides
        }

    @torch.inference_mode(False)
    def _build(self, students: list[Any], teachers: list[Any], outputs: list[Any]) -> None:
        """Make SoKD, adapters and methods, on the student's device and in its dtype."""
        self.kd = make_kd(self._plug, students, teachers, self._needs)
        if self.kd is None and self._needs.adapted:
            self.adapters = make_adapters(students, teachers, self._adapter)
        models, shapes = (unwrapped(self.student), self.teacher), (students, teachers)

        def classes(side: int) -> int | None:
            try:  # an output in eval mode, which may have another form
                logits = self._logits(outputs[side])
            except (TypeError, ValueError):
                return None
            return None if logits is None or logits.dim() < 2 else logits.shape[1]

        for recipe in self._recipes:
            heads = find_heads(recipe, models, shapes, classes)
            self.methods[recipe.name] = recipe.make(students, teachers, **heads)
        place = next((p for p in self.student.parameters() if p.is_floating_point()), None)
        for module in (self.kd, self.adapters, self.methods):
            if module is not None:
                module.train(self.training)
                if place is not None:
                    module.to(place.device, place.dtype)
        self.ready = True

    def _replayed(self) -> AbstractContextManager[Callable[[], None]]:
        return replayed(parameter.device for parameter in self.student.parameters())

    # --------------------------------------------------------------------------------------- a step

    def _teach(self, x: Any) -> Pass:
        """The teacher's pass, with a copy of x if the teacher writes to its input."""
        compiling = torch.compiler.is_compiling()
        given = apart(x) if self._copies is False else copied(x)
        written = None if compiling else changed(given)
        with torch.no_grad():
            output, taken = self._taps["teacher"].run(
                self.teacher, lambda: call(self.teacher, given)
            )
            logits = self._logits(output)
            maps = self._as_maps("teacher", taken, None if compiling else Given.of(x))
        if written is not None and self._copies is not True:
            if self._copies is False and written():
                raise RuntimeError(guards.WRITES_INPUT)
            self._copies = written()
        return Pass(output, None if logits is None else constant(logits), [*map(constant, maps)])

    def _study(self, model: nn.Module, x: Any, target: Any) -> Pass:
        given = None if torch.compiler.is_compiling() else Given.of(x)
        targets = self._targets_of(target)
        output, taken = self._taps["student"].run(
            model, lambda: call(model, x, *targets), warn=self._warns(model)
        )
        return Pass(output, self._logits(output), self._as_maps("student", taken, given))

    def _warns(self, student: nn.Module) -> bool:
        """Whether this is its first pass in train mode, where the layers may act otherwise."""
        if torch.compiler.is_compiling() or not student.training or self._layers == "auto":
            return False
        first = sanity.Watch.of(self).first("student trains")
        return first and not any(map(is_compiled, (student, *unwrapped(student).modules())))

    def _is_models(self, target: Any) -> bool:
        """Whether the student is called with the target."""
        return target is not None and (
            self.task == "model" or (self.task == "auto" and is_for_model(target))
        )

    def _targets_of(self, target: Any) -> tuple[Any, ...]:
        """The student's arguments behind x."""
        return (target,) if self._is_models(target) else ()

    def _as_maps(self, side: str, taken: list[Tensor], given: Given | None) -> list[Tensor]:
        layers = zip(taken, self._layouts[side], self._taps[side].labels, strict=True)
        return [
            as_map(features, layout, (side, label), given) for features, layout, label in layers
        ]

    @property
    def _labels(self) -> list[tuple[str, str]]:
        """The names of the pairs' layers for messages."""
        return list(zip(self._taps["student"].labels, self._taps["teacher"].labels, strict=True))

    def _distil(
        self, student: Pass, teacher: Pass, target: Any, extra: Mapping[str, Any]
    ) -> Losses:
        """The methods' terms and SoKD's."""
        images: Images | None = extra["images"]
        students, _ = inside(student.maps, images)
        teachers, cells = inside(teacher.maps, images)
        matches = self._matched(students, teachers, cells)
        keeps = self._needs.keeps
        masks = [None if keeps else match.attention for match in matches]
        step = Step(
            student.logits, teacher.logits, labels_of(target), students,
            [match.clean if keeps else match.refined for match in matches],
            [match.student for match in matches],
            list(map(_omega, masks, cells)), **extra,
        )  # fmt: skip
        losses = {}
        for name, method in self.methods.items():
            check_needs(name, cast(Method, method).needs, step, target)
            losses[f"loss_{name}"] = self.weights[name] * method(step)
        return (
            losses if self.kd is None else {**losses, **self._own_terms(self.kd, matches, losses)}
        )

    def _matched(
        self, students: list[Tensor], teachers: list[Tensor], cells: list[Tensor | None]
    ) -> list[Match]:
        """The layers' maps as SoKD matches them; without SoKD, adapted if there are adapters."""
        if self.kd is not None:
            return self.kd.match(students, teachers, adapt=self._needs.adapted, valid=cells)
        if self.adapters is not None:
            students = [
                adapter(student, (teacher.shape[2], teacher.shape[3]))
                for adapter, student, teacher in zip(self.adapters, students, teachers, strict=True)
            ]
            students = list(map(kept, students, cells))
        pairs = zip(students, teachers, strict=True)
        return [Match(student, teacher, None, teacher) for student, teacher in pairs]

    def _own_terms(self, kd: SoKD, matches: list[Match], losses: Losses) -> Losses:
        """SoKD's terms, which are added to the methods'; records the statistics of the step."""
        added = {}
        if self._needs.own:
            added["loss_sokd"] = total(kd.distances(matches))
        kd.record(matches, [total(list((added or losses).values()))])
        if self._needs.base:
            added["loss_base"] = total(kd.bases(matches))
        agreement = [match.attention.agreement for match in matches if match.attention is not None]
        if agreement:
            added["loss_agreement"] = total(agreement)
        return added

    # --------------------------------------------------------------------------------------- guards

    def _check(self) -> None:
        if not self._checked:
            guards.check_start(self)
            self._checked = True
        for side, model in (("student", self.student), ("teacher", self.teacher)):
            self._taps[side].check_in_place(model)
        guards.check_teacher(self, self._teacher_parts)
        known = [recipe.name for recipe in self._recipes]
        unknown = [name for name in self.weights if name not in known]
        if unknown:
            rule = f"name methods of this Distiller ({', '.join(known) or 'none'})"
            raise ValueError(f"Distiller: weights must {rule}, got {unknown[0]!r}")

    def _look(self, losses: Losses, student: Pass, teacher: Pass) -> None:
        if not is_eager(*losses.values()):
            return
        if self.check_finite:
            labels = (label for taps in self._taps.values() for label in taps.labels)
            guards.check_finite(losses, dict(zip(labels, student.maps + teacher.maps, strict=True)))
        if torch.is_grad_enabled():
            guards.look(self, student.output, student.logits, losses)
            if self.kd is not None:
                sanity.look_at_mask(self.kd)

    # ---------------------------------------------------------------------------------- as a module

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # a submodule of that name would be trained, and never run
            raise AttributeError(guards.ANOTHER_TEACHER)
        super().__setattr__(name, value)

    @property
    def teacher(self) -> nn.Module:
        """The teacher, which is not a submodule."""
        return self._constant[0]

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules trained in addition to the student, by name."""
        for name, method in self.methods.items():
            yield f"methods.{name}", method
        if self.adapters is not None:
            yield "adapters", self.adapters
        for name in ("adapter", "dam"):
            part = getattr(self.kd, name, None)
            if part is not None:
                yield f"kd.{name}", part

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of `own_modules`."""
        for _, module in self.own_modules():
            yield from module.parameters()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`; every list of parameters comes from here.

        Raises:
            RuntimeError: before the shapes are known.
        """
        if not self.ready:
            raise RuntimeError(NOT_READY)
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`; if strict, refuse the state of other parts by name."""
        if strict and self.kd is not None:
            if self._needs.by_base:
                guards.check_base(self.kd, state_dict)
            check_state(self.kd, state_dict, "kd.")
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if not self.ready:
            raise RuntimeError(NOT_READY)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """As `nn.Module._apply` (`.to()` and its like), the teacher included."""
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._checked = False
        return cast(Distiller, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{student} -> {teacher}" for student, teacher in self.pairs)
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return (
            f"teacher={type(self.teacher).__name__}, layers: {pairs or 'none'}, weights: "
            f"{weights or 'none'}{self._idle_search()}"
        )

    def _idle_search(self) -> str:
        """The part of `repr` about a search that never steps."""
        if self.kd is None or self.kd.search is None or self._needs.adapted:
            return ""
        return ", search: no method reads an adapted map, so the policy stays uniform"


def _omega(mask: Attention | None, cells: Tensor | None) -> Tensor | None:
    """omega [B, H, W] of a layer: SoKD's, else 1 in the images and 0 in the padding."""
    if mask is None and cells is not None:
        return cells[:, 0]
    return None if mask is None else mask.weight
