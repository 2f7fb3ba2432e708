"""The Distiller's `method=`: names, callables or modules, with weights and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sokd.kd.dam import masked
from sokd.kd.features import not_negative, total
from sokd.methods.common import Method, Shape, Step
from sokd.methods.registry import METHODS, build, one_of_names, options_of

__all__ = ["Called", "Chosen", "Recipe", "chosen"]

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
Chosen = str | Method | FeatureLoss | Mapping[Any, float] | None


class Called(Method):
    """A loss(f_s, f_t) as a method, on masked maps of one shape, summed over the layers."""

    name: ClassVar[str] = "feature"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    adapts: ClassVar[bool] = True
    default_weight: ClassVar[float] = 1.0

    def __init__(self, loss: FeatureLoss) -> None:
        super().__init__()
        self.loss = loss  # where it is a module, a submodule: its parameters are trained

    def forward(self, step: Step) -> Tensor:
        layers = zip(step.adapted, step.teacher, step.weight, strict=True)
        return total([self._term(*layer) for layer in layers])

    def _term(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        term = self.loss(masked(student, weight), masked(teacher, weight))
        if not isinstance(term, Tensor) or term.numel() != 1:
            got = f"shape {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(f"Distiller: method must return a scalar tensor, got {got}")
        return term.reshape(())


@dataclass(frozen=True)
class Recipe:
    """One method of a Distiller, before the shapes are known."""

    name: str
    source: str | Method | FeatureLoss
    weight: float
    options: dict[str, Any]

    @property
    def kind(self) -> type[Method] | Method:
        """The class or method with `needs` and `adapts`."""
        if isinstance(self.source, str):
            return METHODS[self.source]
        return self.source if isinstance(self.source, Method) else Called

    def make(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], **found: Any
    ) -> Method:
        """Make the method for layer pairs of these shapes, its options and those in `found`."""
        if isinstance(self.source, str):
            shapes = {"student_shapes": student_shapes, "teacher_shapes": teacher_shapes}
            return build(self.source, **shapes, **{**found, **self.options})
        return self.source if isinstance(self.source, Method) else Called(self.source)


def chosen(method: Chosen, options: Mapping[str, Any]) -> list[Recipe]:
    """The recipes for `method`, each with the options that apply to it.

    Raises:
        TypeError: not a method, or an option that no method has.
        ValueError: an unknown name, two methods of one name, or a weight out of range.
    """
    weighted: list[tuple[Any, Any]] = [] if method is None else [(method, None)]
    if isinstance(method, Mapping):
        weighted = list(method.items())
    made = [_recipe(source, weight, options) for source, weight in weighted]
    names = [recipe.name for recipe in made]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Distiller: method must have one entry for each name, got {name!r} twice"
            )
    known = {option for recipe in made for option in recipe.options}
    for option in options:
        if option not in known:
            possible = sorted(
                {o for r in made if isinstance(r.source, str) for o in options_of(r.source)}
            )
            rule = (
                f"be arguments of Distiller or options of its methods "
                f"({', '.join(possible) or 'none'})"
            )
            raise TypeError(f"Distiller: options must {rule}, got {option}")
    return made


def _recipe(source: Any, weight: Any, options: Mapping[str, Any]) -> Recipe:
    if isinstance(source, str):
        if source not in METHODS:
            raise ValueError(f"Distiller: method must {one_of_names(source)}")
        own = {option: value for option, value in options.items() if option in options_of(source)}
        return Recipe(source, source, _weight(source, weight, METHODS[source].default_weight), own)
    if isinstance(source, Method):
        return Recipe(source.name, source, _weight(source.name, weight, source.default_weight), {})
    if not callable(source):
        rule = "be a name, a dict of name -> weight, or a callable (f_s, f_t) -> scalar"
        raise TypeError(f"Distiller: method must {rule}, got {type(source).__name__}")
    name = _name_of(source)
    return Recipe(name, source, _weight(name, weight, Called.default_weight), {})


def _name_of(function: Any) -> str:
    is_module = isinstance(function, nn.Module)
    name: str = type(function).__name__.lower() if is_module else getattr(function, "__name__", "")
    return name if name.isidentifier() else Called.name  # a lambda, a partial


def _weight(name: str, weight: Any, default: float) -> float:
    return default if weight is None else not_negative("Distiller", f"method[{name!r}]", weight)
