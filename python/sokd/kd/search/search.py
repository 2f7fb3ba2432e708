"""The policy search: chi = (alpha, beta, magnitude), learned at two levels without a trace in the training.

    min_chi L_up(w*(chi), chi)    with    w*(chi) = argmin_w L_train(w, chi)                        [P]

    w' = w - xi * grad_w L_train(w, chi);  v = grad_w' L_up(w', chi);  w+- = w +- eps * v;  eps = 0.01 / ||v||
    hypergradient = grad_chi L_up(w', chi)
                    - xi * [grad_chi L_train(w+, chi) - grad_chi L_train(w-, chi)] / (2 eps)

w is what the student's optimiser trains: the student and kd's adapter and DAM. Source: docs/method.md 2.5.
"""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sokd.kd.policy import Policy, fresh_seed
from sokd.kd.policy.relax import ControlVariate, estimate, score
from sokd.kd.search.levels import Level, Run, Step, gradients, leaves, moved
from sokd.kd.virtual import Together, replayed, unwrapped
from sokd.ops.distributed import agreed, averaged, is_sharded
from sokd.ops.runtime import is_eager
from sokd.ops.torch_internals import total_norm

__all__ = ["PolicySearch", "Step"]

_SECOND_STREAM = 2**62  # counters that no step reaches: the draws of RELAX's z~
_RADIUS = 0.01  # how far the finite difference looks in the space of the weights [A]

_CHI = ("alpha", "beta", "magnitude")
_AGREEING = (
    "objective",
    "estimator",
    "order",
)  # what a state's search and the one that loads it share

_LEFT_OUT = (
    "PolicySearch: a step's hypergradient was not finite, and the policy stayed as it was; "
    "look for inf or NaN in the batch, the features and the losses"
)


class PolicySearch:
    """Trains `kd.policy` next to the student.

        def step(model, batch):                      # called with the student, at virtual weights
            logits, f_s = model(batch[0])
            return F.cross_entropy(logits, batch[1]), f_s, teacher_features(batch[0])

        search.step(step, batch)                     # or search.step(step, batch, held_out=other_batch)
        search.end_epoch()                           # after `epochs` of them, `step` does nothing

    Args:
        kd: a `sokd.SoKD` with a policy; make the search after both modules are on their device.
        student: the student; one wrapped by DistributedDataParallel or torch.compile is taken out of its
            wrapper.
        objective: L_up: "consistency" [P], 1/2 mean (F_hat_t - Phi(F_s))^2; "task", the task's loss;
            "total" [A], that plus kd's.
        estimator: "gumbel" [P] or "relax" [A], see `sokd.kd.policy.relax`; sets `kd.policy.estimator`. None: as
            `kd.policy` was made, "gumbel" unless it was told otherwise; a default that named one would undo
            `SoKD(estimator="relax")` silently.
        order: 2, or 1 for the direct gradient alone (xi = 0).
        unroll: xi [A], finite, 0 or more.
        lr: of Adam(betas=(0.5, 0.999)) on the policy; no weight decay [S: the prototype's pulls chi to 0].
        epochs: how long the search lasts [A: 20; 50 for ResNet32x4 to 8x4, 10 for VGG, 5 on ImageNet].

    A step leaves weights, buffers (BatchNorm statistics, the policy's counter), gradients, optimisers and
    PyTorch's random state as they were. The search draws from a stream of its own, one draw for each step,
    the same in all evaluations of the step. Under torch.distributed the hypergradients are averaged, so
    that all ranks keep one policy. A step whose hypergradient is not finite (or too large for Adam to square)
    changes nothing but the stream's counter; on the CPU a warning says so once.
    """

    def __init__(
        self, kd: nn.Module, student: nn.Module, *, objective: str = "consistency",
        estimator: str | None = None, order: int = 2, unroll: float = 0.01, lr: float = 3e-4,
        epochs: int = 20,
    ) -> None:  # fmt: skip
        self.kd, self.student = unwrapped(kd), unwrapped(student)
        self.policy = _policy_of(self.kd)
        estimator = self.policy.estimator if estimator is None else estimator
        if not isinstance(self.student, nn.Module):
            raise TypeError(
                f"PolicySearch: student must be an nn.Module, got {type(student).__name__}"
            )
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
            self._control = ControlVariate(count, temperature=temperature, seed=self.seed)
            self._control_adam = _adam(self._control.parameters(), lr)

    @property
    def _chi(self) -> list[Tensor]:
        return [getattr(self.policy, name) for name in _CHI]

    @property
    def active(self) -> bool:
        """Whether the search still goes on."""
        return self.epoch < self.epochs

    def end_epoch(self) -> None:
        """Say that an epoch of the student's training is over."""
        self.epoch += 1

    def step(self, step: Step, batch: Any, held_out: Any = None) -> Tensor | None:
        """Move the policy by one step of Adam along the hypergradient.

        Args:
            step: step(model, batch) -> (task loss, student features, teacher features); the teacher's without
                gradient. Called up to four times with the student itself, whose weights are virtual for
                that time. Order 2 refuses one that runs another model; order 1, which needs no gradient of
                the student, cannot tell.
            batch: for L_train, and for L_up too unless there is `held_out` [A].
            held_out: for L_up.

        Mixed precision: call this under torch.autocast as a whole, for kd's part comes after `step`; a
        GradScaler has no part in it. Weights in half precision round most of order 2's difference away.

        Returns:
            L_up, a scalar without gradient; None once the search is over.

        Raises:
            TypeError, ValueError: `step` returned something else or ran another model, the teacher's features
                require grad, `kd.policy` was replaced or frozen, or nothing is trained that order 2 could
                unroll.
            NotImplementedError: the student is sharded over the ranks.
        """
        if not self.active:
            return None
        if unwrapped(self.kd.policy) is not self.policy:
            rule = "be the policy that the search was made with; make a new search for another"
            raise ValueError(f"PolicySearch: kd.policy must {rule}, got a different one")
        for name in _CHI:
            if not getattr(self.policy, name).requires_grad:
                raise ValueError(
                    f"PolicySearch: kd.policy.{name} must require grad, got one that is frozen"
                )
        if is_sharded(self.student.parameters()):
            rule = "hold whole parameters (virtual weights are not sharded; DistributedDataParallel serves)"
            raise NotImplementedError(
                f"PolicySearch: student must {rule}, got parameters of fully_shard"
            )
        self.policy.project()  # a probability set to 0 or 1 has no finite logit
        held_out = batch if held_out is None else held_out
        devices = {self.seed.device, *(parameter.device for parameter in self.student.parameters())}
        with replayed(devices) as rewind, torch.enable_grad():
            level = Level(self, step, rewind)
            if self.order == 1:
                upper, hypergradient = self._first(level, held_out)
            else:
                upper, hypergradient = self._second(level, batch, held_out)
        self._apply(hypergradient)
        self.policy.project()
        self.counter += 1
        return upper

    def _apply(self, found: list[Tensor]) -> None:
        """Adam's steps with the gradients of chi, then of the control variate; none if one is not finite."""
        found = [averaged(gradient) for gradient in found]
        # of the average, so that all ranks decide alike; the squares are what Adam keeps
        finite = torch.stack([gradient.square().isfinite().all() for gradient in found]).all()
        _apply(self._adam, self._chi, found[:3], finite)
        if self._control is not None:
            _apply(self._control_adam, list(self._control.parameters()), found[3:], finite)
        if not self._warned and finite.device.type == "cpu" and is_eager(finite) and not finite:
            self._warned = True
            warnings.warn(_LEFT_OUT, stacklevel=3)

    # ------------------------------------------------------------------------------------------ hypergradient

    def _first(self, level: Level, held_out: Any) -> tuple[Tensor, list[Tensor]]:
        """L_up and its direct gradient for chi, at the weights as they are."""
        upper = level.upper(level.weights, held_out)
        direct = gradients(upper, self._chi)
        return upper.loss.detach(), self._with_estimates(direct, upper)

    def _second(self, level: Level, batch: Any, held_out: Any) -> tuple[Tensor, list[Tensor]]:
        """L_up after one virtual step of the student, and the gradient of the two together for chi."""
        weights = level.weights
        origin = leaves(weights)
        slope = level.slope(origin, batch)
        virtual = leaves(moved(weights, slope, -self.unroll))
        upper = level.upper(virtual, held_out)
        everything = gradients(upper, [*self._chi, *virtual.values()])
        direct, v = everything[:3], everything[3:]
        norm = total_norm(v)
        ahead, behind = (
            level.train(moved(weights, v, sign * _RADIUS / norm.clamp_min(1e-30)), batch)
            for sign in (1, -1)
        )
        # - xi / (2 eps) with eps = radius / norm; where v is 0, both evaluations are one and the term is 0
        factor = -self.unroll * norm / (2 * _RADIUS)
        plus, minus = (gradients(run, self._chi) for run in (ahead, behind))
        total = [d + factor * (a - b) for d, a, b in zip(direct, plus, minus, strict=True)]
        correction = factor * (ahead.loss - behind.loss).detach()
        return upper.loss.detach(), self._with_estimates(total, upper, ahead, correction)

    def _with_estimates(
        self,
        found: list[Tensor],
        upper: Run,
        train: Run | None = None,
        correction: Tensor | None = None,
    ) -> list[Tensor]:
        """With RELAX: alpha's and beta's gradients by its estimate, and the control variate's after them.

        Of the second-order term only the score remains: Q is the same in both evaluations and cancels.
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

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What a search resumed bit for bit needs, beside those of kd, the student and its optimiser."""
        state = {
            **{name: getattr(self, name) for name in _AGREEING},
            "unroll": self.unroll,
            "epoch": self.epoch,
            "seed": self.seed.clone(),
            "counter": self.counter.clone(),
            "adam": self._adam.state_dict(),
        }
        if self._control is not None:
            state |= {
                "control": self._control.state_dict(),
                "control_adam": self._control_adam.state_dict(),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of a search with the same objective, estimator and order returned.

        The step sizes, lr and unroll, are the state's afterwards, as a state of torch.optim's brings its lr;
        `epochs` stays what it is here, so that a search may be prolonged.

        Raises:
            ValueError: of another search or another policy; nothing is taken over then.
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


# ---------------------------------------------------------------------------------------------- small parts


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    parameters = list(parameters)
    # keeps the number of steps on the device, where `_apply` can take one back without waiting for it
    capturable = parameters[0].device.type == "cuda"
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), capturable=capturable)


def _check_control(control: ControlVariate, state: Mapping[str, Tensor]) -> None:
    """Whether a state is that of such a control variate; before its first step Adam's moments do not tell."""
    own, got = (
        {name: list(value.shape) for name, value in of.items()}
        for of in (control.state_dict(), state)
    )
    if got != own:
        rule = f"have a control variate of the shapes {own}, as this search has"
        raise ValueError(f"PolicySearch: state must {rule}, got {got}")


def _check_fits(adam: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Whether a state is that of as many parameters, of these shapes."""
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
    """Take over a state, which may be of another device."""
    state = copy.deepcopy(state)
    for group, own in zip(state["param_groups"], adam.param_groups, strict=True):
        group["capturable"] = own["capturable"]
    adam.load_state_dict(state)


@torch.no_grad()
def _apply(
    adam: torch.optim.Adam,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    finite: Tensor,
) -> None:
    """One step with these gradients, or none unless `finite`; each parameter's `.grad` ends as it was."""
    grads = [parameter.grad for parameter in parameters]
    before = [value.clone() for value in _values(adam, parameters)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    adam.step()
    after = _values(adam, parameters)
    before += [
        torch.zeros_like(value) for value in after[len(before) :]
    ]  # the first step makes the state
    for value, old in zip(after, before, strict=True):
        value.copy_(torch.where(finite.to(value.device), value, old))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def _values(adam: torch.optim.Adam, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters, and what Adam keeps of them: nothing yet before its first step."""
    kept = [value for parameter in parameters for value in adam.state.get(parameter, {}).values()]
    return [*parameters, *kept]


def _policy_of(kd: Any) -> Policy:
    policy = unwrapped(getattr(kd, "policy", None))
    if not isinstance(policy, Policy):
        got = f"{type(kd).__name__} with {type(policy).__name__}"
        raise ValueError(f"PolicySearch: kd must have a Policy as kd.policy, got {got}")
    return policy


def _check_options(
    objective: str, estimator: str, order: int, unroll: float, lr: float, epochs: int
) -> None:  # fmt: skip
    chosen: dict[str, tuple[Any, Sequence[Any]]] = {
        "objective": (objective, ("consistency", "task", "total")),
        "estimator": (estimator, ("gumbel", "relax")),
        "order": (order, (1, 2)),
    }
    for name, (value, allowed) in chosen.items():
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ValueError(
                f"PolicySearch: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}"
            )
    if objective == "task" and order == 1:
        raise ValueError(
            "PolicySearch: order must be 2 for objective 'task', got 1"
        )  # no direct gradient
    for name, number in (("unroll", unroll), ("lr", lr)):
        if not isinstance(number, numbers.Real) or not 0 <= number < math.inf:
            raise ValueError(
                f"PolicySearch: {name} must be a finite number, 0 or more, got {number!r}"
            )
    if not isinstance(epochs, numbers.Integral) or epochs < 0:
        raise ValueError(f"PolicySearch: epochs must be a whole number, 0 or more, got {epochs!r}")
