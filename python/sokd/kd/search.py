"""The policy search: chi = (alpha, beta, magnitude), by bilevel optimisation next to the training.

    min_chi L_up(w*(chi), chi)    with    w*(chi) = argmin_w L_train(w, chi)                  [P]

    w' = w - xi * grad_w L_train(w, chi);  v = grad_w' L_up(w', chi)
    w+- = w +- eps * v;  eps = 0.01 / ||v||
    hypergradient = grad_chi L_up(w', chi)
                    - xi * [grad_chi L_train(w+, chi) - grad_chi L_train(w-, chi)] / (2 eps)

w is what the student's optimiser trains: the student and kd's adapter and DAM. A search step leaves
no trace in the training. Source: docs/method.md 2.5.
"""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sokd.kd.batches import changed
from sokd.kd.features import Features, not_negative, one_of, tensors_of
from sokd.kd.policy import Draw, Policy, fresh_seed
from sokd.kd.policy.relax import ControlVariate, estimate, score
from sokd.kd.virtual import Together, Weights, replayed, unwrapped
from sokd.ops.distributed import agreed, averaged, is_sharded
from sokd.ops.runtime import is_eager
from sokd.ops.torch_internals import total_norm

__all__ = ["PolicySearch", "Step"]

Step = Callable[[Any, Any], tuple[Tensor, Features, Features]]

_SECOND_STREAM = 2**62  # counters that no step reaches: the draws of RELAX's z~
_RADIUS = 0.01  # how far the finite difference reaches in the space of the weights [A]

_CHI = ("alpha", "beta", "magnitude")
# Options that a state's search and the search that loads it must share.
_AGREEING = ("objective", "estimator", "order")
_OF_STUDENT = "members.0."  # prefix of the student's weights: it is the first of `Together`

_SEARCHED = (
    "PolicySearch: kd must be made without a search of its own, which moves the policy in each "
    "loss, got one with search='online'"
)
_LEFT_OUT = (
    "PolicySearch: a step's hypergradient was not finite, and the policy stayed as it was; "
    "look for inf or NaN in the batch, the features and the losses"
)
_WRITTEN = (
    "PolicySearch: step must leave the batch as it is, which is evaluated several times, got one "
    "that was changed in place; call the student with a copy of its input (x.clone())"
)
_ANOTHER_MODEL = (
    "PolicySearch: step must run the model it is called with, with gradients, got a loss that does "
    "not depend on the student's parameters"
)
_NOTHING_TRAINED = (
    "PolicySearch: student must have parameters that require grad (or kd.adapter or kd.dam some), "
    "for its virtual step, got none; order=1 needs none"
)


class Run(NamedTuple):
    """One evaluation of a level."""

    loss: Tensor  # scalar
    draw: Draw  # the policy's, used in it
    lift: float  # factor of its gradients during the backward pass


# An evaluation of L_train or L_up: (weights, batch, objective) -> Run.
Evaluate = Callable[[Weights, Any, str], Run]


class PolicySearch:
    """Trains `kd.policy` next to the student.

        def step(model, batch):                      # called with the student, at virtual weights
            logits, f_s = model(batch[0])
            return F.cross_entropy(logits, batch[1]), f_s, teacher_features(batch[0])

        search = sokd.PolicySearch(kd, student)
        search.step(step, batch)                     # or search.step(step, batch, held_out=other)
        search.end_epoch()                           # after `epochs` of them, `step` is a no-op

    Args:
        kd: a `sokd.SoKD` with a policy; make the search after both modules are on their device.
        student: the student; wrappers of DistributedDataParallel and torch.compile are removed.
        objective: L_up: "consistency" [P], 1/2 mean (F_hat_t - Phi(F_s))^2; "task", the task's
            loss; "total" [A], that plus kd's.
        estimator: "gumbel" [P] or "relax" [A], see `sokd.kd.policy.relax`; sets
            `kd.policy.estimator`. None: that of `kd.policy`.
        order: 2, or 1 for the direct gradient alone (xi = 0).
        unroll: xi [A], finite, 0 or more.
        lr: of Adam(betas=(0.5, 0.999)) on the policy, 5e-3 as in the scripts of DADA's paper [S:
            3e-4 [A] hardly moves it]; no weight decay [S: the prototype's pulls chi to 0].
        epochs: how long the search lasts [A: 20; 50 for ResNet32x4 to 8x4, 10 for VGG, 5 on
            ImageNet].

    A step leaves weights, buffers (BatchNorm statistics, the policy's counter), gradients,
    optimisers and PyTorch's random state as they were. The search has a stream of draws of its own:
    one draw for each step, used in all evaluations of the step. Under torch.distributed the
    hypergradients are averaged, so all ranks keep one policy. A step whose hypergradient is not
    finite (or too large for Adam to square) changes only the stream's counter; on the CPU it is
    warned about once.
    """

    @torch.inference_mode(False)
    def __init__(
        self, kd: nn.Module, student: nn.Module, *, objective: str = "consistency",
        estimator: str | None = None, order: int = 2, unroll: float = 0.01, lr: float = 5e-3,
        epochs: int = 20,
    ) -> None:  # fmt: skip
        self.kd, self.student = unwrapped(kd), unwrapped(student)
        self.policy = _policy_of(self.kd)
        if getattr(self.kd, "search", None) is not None:
            raise ValueError(_SEARCHED)
        estimator = self.policy.estimator if estimator is None else estimator
        if not isinstance(self.student, nn.Module):
            got = type(student).__name__
            raise TypeError(f"PolicySearch: student must be an nn.Module, got {got}")
        _check_options(objective, estimator, order, unroll, lr, epochs)
        self.policy.estimator = estimator
        self.objective, self.estimator, self.order = objective, estimator, order
        self.unroll, self.epochs = unroll, epochs
        self.epoch = 0
        self.seed = agreed(fresh_seed().to(self.policy.alpha.device))
        self.counter = torch.zeros_like(self.seed)
        self.together = Together(self.student, self.kd)
        self._adam = _adam(self._chi, lr)
        self._warned = False
        self._control: ControlVariate | None = None
        if estimator == "relax":
            count, temperature = len(self.policy.policies), self.policy.temperature
            self._control = ControlVariate(
                count, temperature=temperature, seed=self.seed, dtype=self.policy.alpha.dtype
            )
            self._control_adam = _adam(self._control.parameters(), lr)

    @property
    def _chi(self) -> list[Tensor]:
        return [getattr(self.policy, name) for name in _CHI]

    @property
    def active(self) -> bool:
        """Whether the search continues."""
        return self.epoch < self.epochs

    def end_epoch(self) -> None:
        """Count an epoch of the student's training as over."""
        self.epoch += 1

    def step(self, step: Step, batch: Any, held_out: Any = None) -> Tensor | None:
        """Move the policy by one step of Adam along the hypergradient.

        Args:
            step: step(model, batch) -> (task loss, student features, teacher features); the
                teacher's without gradient. Called up to four times with the student itself, whose
                weights are virtual meanwhile. Order 2 refuses a `step` that runs another model;
                order 1, which uses no gradient of the student, cannot detect it.
            batch: for L_train, and for L_up too if `held_out` is None [A].
            held_out: for L_up.

        Mixed precision: call this method under torch.autocast, since kd's terms are computed after
        `step`; no GradScaler is needed. With weights in half precision rounding removes most of
        order 2's difference.

        Returns:
            L_up, a scalar without gradient; None once the search is over.

        Raises:
            TypeError, ValueError: `step` returned other values, ran another model or changed the
                batch, the teacher's features require grad, `kd.policy` was replaced or frozen, or
                there are no trained weights for order 2 to unroll.
            NotImplementedError: the student is sharded over the ranks.
        """
        if not self.active:
            return None
        if unwrapped(self.kd.policy) is not self.policy:
            rule = "be the policy that the search was made with; make a new search for another"
            raise ValueError(f"PolicySearch: kd.policy must {rule}, got a different one")
        for name in _CHI:
            if not getattr(self.policy, name).requires_grad:
                subject = f"PolicySearch: kd.policy.{name}"
                raise ValueError(f"{subject} must require grad, got one that is frozen")
        if is_sharded(self.student.parameters()):
            why = "virtual weights are not sharded; use DistributedDataParallel"
            got = "parameters of fully_shard"
            raise NotImplementedError(
                f"PolicySearch: student must hold whole parameters ({why}), got {got}"
            )
        self.policy.project()  # a probability set to 0 or 1 has no finite logit
        held_out = batch if held_out is None else held_out
        devices = {self.seed.device, *(parameter.device for parameter in self.student.parameters())}
        with replayed(devices) as rewind, torch.enable_grad():
            evaluate = partial(self._evaluate, step, rewind)
            if self.order == 1:
                upper, hypergradient = self._first(evaluate, held_out)
            else:
                upper, hypergradient = self._second(evaluate, batch, held_out)
        self._update(hypergradient)
        self.policy.project()
        self.counter += 1
        return upper

    def _update(self, found: list[Tensor]) -> None:
        """Adam's steps of chi, then of the control variate; none if any gradient is not finite."""
        found = [averaged(gradient) for gradient in found]
        # of the average, so that all ranks agree; squared, because Adam's state has the squares
        finite = torch.stack([gradient.square().isfinite().all() for gradient in found]).all()
        _apply(self._adam, self._chi, found[:3], finite)
        if self._control is not None:
            _apply(self._control_adam, list(self._control.parameters()), found[3:], finite)
        if not self._warned and finite.device.type == "cpu" and is_eager(finite) and not finite:
            self._warned = True
            warnings.warn(_LEFT_OUT, stacklevel=3)

    # ------------------------------------------------------------------------------- the two levels

    def _evaluate(
        self, step: Step, rewind: Callable[[], None], weights: Weights, batch: Any, objective: str
    ) -> Run:
        """A level's loss at `weights`; the evaluations of a step share draw and random state.

        `objective` "total" is L_train, the task's loss and kd's; `self.objective` is L_up.
        """
        rewind()
        return self.together.at(weights, lambda: self._run(step, batch, objective))

    def _run(self, step: Step, batch: Any, objective: str) -> Run:
        written = changed(batch)
        task, f_s, f_t = _checked(step(self.student, batch))
        if written():
            raise ValueError(_WRITTEN)
        draw = self.policy.draw_at(self.seed, self.counter, tensors_of(f_t)[0].shape[0])
        loss = task
        # differentiable also where chi's gradient is not needed: such a call records nothing in kd
        if objective == "consistency":
            loss = self.kd.consistency(f_s, f_t, draw=draw, differentiable=True)
        elif objective == "total":
            loss = task + self.kd.terms(f_s, f_t, draw=draw, differentiable=True)["total"]
        return Run(loss, draw, _lift(f_s))

    def _first(self, evaluate: Evaluate, held_out: Any) -> tuple[Tensor, list[Tensor]]:
        """L_up and its direct gradient for chi, at the weights as they are."""
        upper = evaluate(self._weights(), held_out, self.objective)
        direct = _gradients(upper, self._chi)
        return upper.loss.detach(), self._with_estimates(direct, upper)

    def _second(self, evaluate: Evaluate, batch: Any, held_out: Any) -> tuple[Tensor, list[Tensor]]:
        """L_up after one virtual step of the student, and its hypergradient for chi."""
        weights = self._weights()
        virtual = _leaves(_moved(weights, self._slope(evaluate, weights, batch), -self.unroll))
        upper = evaluate(virtual, held_out, self.objective)
        everything = _gradients(upper, [*self._chi, *virtual.values()])
        direct, v = everything[:3], everything[3:]
        norm = total_norm(v)
        ahead, behind = (
            evaluate(_moved(weights, v, sign * _RADIUS / norm.clamp_min(1e-30)), batch, "total")
            for sign in (1, -1)
        )
        #  xi / (2 eps) with eps = radius / norm; where v is 0, both evaluations are one and the
        # term is 0
        factor = -self.unroll * norm / (2 * _RADIUS)
        plus, minus = (_gradients(run, self._chi) for run in (ahead, behind))
        total = [d + factor * (a - b) for d, a, b in zip(direct, plus, minus, strict=True)]
        correction = factor * (ahead.loss - behind.loss).detach()
        return upper.loss.detach(), self._with_estimates(total, upper, ahead, correction)

    def _weights(self) -> Weights:
        return self.together.weights(but=self.policy.parameters())

    def _slope(self, evaluate: Evaluate, weights: Weights, batch: Any) -> list[Tensor]:
        """d L_train / d weights, the direction of the virtual step."""
        if not weights:
            raise ValueError(_NOTHING_TRAINED)
        origin = _leaves(weights)
        found = _derivatives(evaluate(origin, batch, "total"), origin.values())
        of_student = [
            d for name, d in zip(origin, found, strict=True) if name.startswith(_OF_STUDENT)
        ]
        if of_student and all(d is None for d in of_student):
            raise ValueError(_ANOTHER_MODEL)
        return _filled(found, origin.values())

    def _with_estimates(
        self, found: list[Tensor], upper: Run, train: Run | None = None,
        correction: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Replace the gradients of alpha and beta by RELAX's estimate; add the control variate's.

        Of the second-order term only the score remains: Q is the same in both evaluations and
        cancels.
        """
        if self._control is None:
            return found
        with torch.autocast(self.seed.device.type, enabled=False):
            groups = len(upper.draw.uniforms)
            conditional = self.policy.draw_at(self.seed, self.counter + _SECOND_STREAM, groups)
            estimates = estimate(upper.loss, self.policy, self._control, upper.draw, conditional)
            if train is not None and correction is not None:
                scores = score(self.policy, train.draw)
                estimates = [e + correction * s for e, s in zip(estimates, scores, strict=True)]
            spread = torch.cat([part.flatten() for part in estimates]).square().mean()
            of_control = torch.autograd.grad(spread, list(self._control.parameters()))
        return [*(part.detach() for part in estimates), found[2], *of_control]

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state to resume bit for bit, with those of kd, the student and its optimiser."""
        state = {name: getattr(self, name) for name in (*_AGREEING, "unroll", "epoch")}
        state |= {"seed": self.seed.clone(), "counter": self.counter.clone()}
        state["adam"] = self._adam.state_dict()
        if self._control is not None:
            state["control"] = self._control.state_dict()
            state["control_adam"] = self._control_adam.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the `state_dict` of a search with the same objective, estimator and order.

        The step sizes lr and unroll are loaded too, as torch.optim loads its lr; `epochs` is not,
        so that a search can be extended.

        Raises:
            ValueError: the state of another search or another policy; nothing has been loaded then.
        """
        self._check_state(state)
        self.unroll = state["unroll"]
        self.epoch = int(state["epoch"])
        self.seed.copy_(state["seed"])
        self.counter.copy_(state["counter"])
        _load(self._adam, state["adam"])
        if self._control is not None:
            self._control.load_state_dict(state["control"])
            _load(self._control_adam, state["control_adam"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        given = state if isinstance(state, Mapping) else {}
        for name in _AGREEING:
            own = getattr(self, name)
            if name in given and given[name] != own:
                raise ValueError(
                    f"PolicySearch: {name} must be the state's, {given[name]!r}, got {own!r}"
                )
        needed = self.state_dict().keys()
        if given.keys() != needed:
            got = ", ".join(map(str, given)) or "none" if given is state else type(state).__name__
            raise ValueError(f"PolicySearch: state must have {', '.join(needed)}, got {got}")
        _check_fits(self._adam, state["adam"])
        if self._control is not None:
            _check_fits(self._control_adam, state["control_adam"])
            _check_control(self._control, state["control"])


# ------------------------------------------------------------------------- weights and gradients


def _leaves(weights: Weights) -> Weights:
    """The same values as leaves of a new graph."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def _moved(weights: Weights, along: Sequence[Tensor], by: float | Tensor) -> Weights:
    """weights + by * along, each in its weight's dtype."""
    pairs = zip(weights.items(), along, strict=True)
    return {name: (weight + by * d).to(weight.dtype) for (name, weight), d in pairs}


def _gradients(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d inputs, zeros for what the loss does not depend on."""
    return _filled(_derivatives(run, inputs), inputs)


def _lift(features: Features) -> float:
    """Loss scale: 1024 for float16 maps, where an element's share of a mean underflows, else 1.

    1024 leaves room for a gradient of 60; a power of two rounds nothing.
    """
    first = tensors_of(features)[0]
    kind = first.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return 1024.0 if cast or first.dtype == torch.float16 else 1.0


def _derivatives(run: Run, inputs: Iterable[Tensor]) -> Sequence[Tensor | None]:
    if not run.loss.requires_grad:
        raise ValueError(
            "PolicySearch: loss must depend on the weights, got one without a gradient"
        )
    lifted = torch.full_like(run.loss, run.lift)
    found = torch.autograd.grad(run.loss, list(inputs), lifted, allow_unused=True)
    return found if run.lift == 1 else [None if d is None else d.float() / run.lift for d in found]


def _filled(found: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(of) if d is None else d for d, of in zip(found, inputs, strict=True)]


# ------------------------------------------------------------------------------------------ Adam


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    parameters = list(parameters)
    # keeps the number of steps on the device, where `_apply` can revert one without a
    # synchronisation
    capturable = parameters[0].device.type == "cuda"
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), capturable=capturable)


def _check_control(control: ControlVariate, state: Mapping[str, Tensor]) -> None:
    """Compare the shapes of a control variate and its state: Adam's moments may not exist yet."""
    own, got = (
        {name: list(value.shape) for name, value in of.items()}
        for of in (control.state_dict(), state)
    )
    if got != own:
        rule = f"have a control variate of the shapes {own}, as this search has"
        raise ValueError(f"PolicySearch: state must {rule}, got {got}")


def _check_fits(adam: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Compare the shapes of Adam's parameters with the moments in a state."""
    own = [list(parameter.shape) for parameter in adam.param_groups[0]["params"]]
    groups = state.get("param_groups") or [{"params": []}]
    kept = [state["state"].get(index, {}).get("exp_avg") for index in groups[0]["params"]]
    shapes = [
        shape if mean is None else list(mean.shape) for shape, mean in zip(own, kept, strict=False)
    ]
    if shapes != own or len(kept) != len(own):
        rule = f"have Adam's moments of the shapes {own}, as this search has"
        raise ValueError(f"PolicySearch: state must {rule}, got {shapes}")


def _load(adam: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Load a state, which may come from another device."""
    state = copy.deepcopy(state)
    for group, own in zip(state["param_groups"], adam.param_groups, strict=True):
        group["capturable"] = own["capturable"]
    adam.load_state_dict(state)


@torch.no_grad()
def _apply(
    adam: torch.optim.Adam, parameters: Sequence[Tensor], gradients: Sequence[Tensor],
    finite: Tensor,
) -> None:  # fmt: skip
    """One step with these gradients, undone unless `finite`; `.grad` stays as it was."""
    grads = [parameter.grad for parameter in parameters]
    before = [value.clone() for value in _values(adam, parameters)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    adam.step()
    after = _values(adam, parameters)
    # the first step creates the state
    before += [torch.zeros_like(value) for value in after[len(before) :]]
    for value, old in zip(after, before, strict=True):
        value.copy_(torch.where(finite.to(value.device), value, old))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def _values(adam: torch.optim.Adam, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and Adam's state of them, which is empty before its first step."""
    kept = [value for parameter in parameters for value in adam.state.get(parameter, {}).values()]
    return [*parameters, *kept]


# ------------------------------------------------------------------------------- input validation


def _checked(returned: Any) -> tuple[Tensor, Features, Features]:
    """The value that `step` returned, checked to be (loss, student features, teacher features)."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        several = isinstance(returned, (tuple, list))
        got = f"{len(returned)} values" if several else type(returned).__name__
        what = "(loss, student features, teacher features)"
        raise TypeError(f"PolicySearch: step must return {what}, got {got}")
    task, f_s, f_t = returned
    if not isinstance(task, Tensor) or task.numel() != 1:
        got = f"shape {list(task.shape)}" if isinstance(task, Tensor) else type(task).__name__
        raise TypeError(f"PolicySearch: loss must be a scalar tensor, got {got}")
    for name, features in (("student features", f_s), ("teacher features", f_t)):
        _check_features(name, features)
    if any(tensor.requires_grad for tensor in tensors_of(f_t)):
        got = "a tensor that requires grad"
        raise ValueError(f"PolicySearch: teacher features must not require grad, got {got}")
    return task.squeeze() if task.dim() else task, f_s, f_t


def _check_features(name: str, features: Any) -> None:
    if isinstance(features, Tensor):
        return
    got = type(features).__name__
    if isinstance(features, (list, tuple)) and features:
        others = [entry for entry in features if not isinstance(entry, Tensor)]
        if not others:
            return
        got = f"a list with {type(others[0]).__name__}"
    raise TypeError(f"PolicySearch: {name} must be a tensor or a list of tensors, got {got}")


def _policy_of(kd: Any) -> Policy:
    policy = unwrapped(getattr(kd, "policy", None))
    if not isinstance(policy, Policy):
        got = f"{type(kd).__name__} with {type(policy).__name__}"
        raise ValueError(f"PolicySearch: kd must have a Policy as kd.policy, got {got}")
    return policy


def _check_options(
    objective: str, estimator: str, order: int, unroll: float, lr: float, epochs: int
) -> None:  # fmt: skip
    one_of("PolicySearch", "objective", objective, ("consistency", "task", "total"))
    one_of("PolicySearch", "estimator", estimator, ("gumbel", "relax"))
    one_of("PolicySearch", "order", order, (1, 2))
    if objective == "task" and order == 1:  # no direct gradient
        raise ValueError("PolicySearch: order must be 2 for objective 'task', got 1")
    not_negative("PolicySearch", "unroll", unroll)
    not_negative("PolicySearch", "lr", lr)
    if not isinstance(epochs, numbers.Integral) or epochs < 0:
        raise ValueError(f"PolicySearch: epochs must be a whole number, 0 or more, got {epochs!r}")
