"""Random programs of the public API: sequences of make, train, save, copy, cast, freeze, replace,
compile.

Each action either works, with finite losses and the right parameters moving, or raises an error of
sokd: a sentence that begins with the name of what was called.
"""

import copy
import io
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sokd
from sokd.methods import METHODS

# `loss: student_features must ...`, `sokd: ...`, `Distiller: ...`
OWN_ERROR = re.compile(r"^[A-Za-z_][\w.]*: \S")
CLASSES = 5
FORMS: list[Callable[[Tensor], Any]] = [
    lambda logits: logits,
    lambda logits: {"logits": logits},
    lambda logits: (logits, {"scale": 1.0}),
    lambda logits: [logits],
]
PLUGS: list[Any] = [
    True, True, False, {"granularity": "sample"}, {"dam": None}, {"policy": None},
    {"areas": "student", "k": 2}, {"estimator": "relax"}, {"normalise": "area"},
    {"base": "replace"}, {"heads": "bounded"}, {"preset": "paper"}, {"search": None},
    {"heads": "attention", "attention_temperature": 2.0},
    {"search": "online", "granularity": "batch"},
]  # fmt: skip
ADAPTERS = ("default", "default", "linear", "separable", "regressor", "conv")


class Tokens(nn.Module):
    """Maps [B, C, H, W] as tokens [B, N, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mT


class Net(nn.Module):
    """Two stages and a classifier; sizes, strides, normalisations, forms of output by chance."""

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        norm = rng.choice([nn.BatchNorm2d, nn.Identity, lambda c: nn.GroupNorm(1, c)])
        self.stage1 = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=rng.choice([1, 2]), padding=1), norm(width), nn.ReLU()
        )
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        if rng.random() < 0.2:
            self.stage2.append(Tokens())
        self.fc = nn.Linear(2 * width, CLASSES)
        if rng.random() < 0.2:
            self.fc = rng.choice([nn.utils.weight_norm, parametrizations.weight_norm])(self.fc)
        self.form, self.writes = rng.randrange(len(FORMS)), rng.random() < 0.1
        self.keeps = rng.random() < 0.1

    def forward(self, x: Tensor) -> Any:
        if self.writes and not torch.compiler.is_compiling():
            x.sub_(0.5)
        maps = self.stage2(self.stage1(x))
        if self.keeps:
            self.kept = maps
        return FORMS[self.form](self.fc(maps.mean(1 if maps.dim() == 3 else (2, 3))))


class Program:
    """One model pair with a Distiller or a SoKD, and what may be done to it."""

    def __init__(self, seed: int, *, compiles: bool) -> None:
        self.rng, self.log = random.Random(seed), [f"seed {seed}"]
        torch.manual_seed(seed)
        sokd.manual_seed(seed)
        self.side = self.rng.choice([5, 8, 9, 16])
        self.dtype = torch.float32
        self.student, self.teacher = Net(self.rng, 4), Net(self.rng, self.rng.choice([4, 6, 8]))
        self.search: sokd.PolicySearch | None = None
        self.compiles, self.calls = compiles, Counter[str]()
        self.make()

    def make(self) -> None:
        """A new Distiller; a single layer, both, or those found by itself."""
        names = self.rng.sample(sorted(METHODS), self.rng.choice([1, 1, 2]))
        options: dict[str, Any] = {"num_samples": 64, "negatives": 8} if "crd" in names else {}
        self.methods = names
        self.distiller = sokd.Distiller(
            student=self.student,
            teacher=self.teacher,
            layers=self.rng.choice(["stage2", ["stage1", "stage2"], "auto"]),
            method={name: self.rng.choice([0.0, 0.1, 1.0]) for name in names},
            sokd=self.rng.choice(PLUGS),
            adapter=self.rng.choice(ADAPTERS),
            example=torch.randn(2, 3, self.side, self.side, dtype=self.dtype),
            **options,
        )
        self.anew()

    def anew(self) -> None:
        """What depends on the Distiller's parameters."""
        self.optimizer = torch.optim.SGD(self.distiller.parameters(), lr=1e-3)
        self.called: Callable[..., Any] = self.distiller
        self.search = None

    def batch(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        size = self.rng.choice([1, 2, 3, 8])
        x = torch.randn(size, 3, self.side, self.side, dtype=self.dtype)
        extra: dict[str, Any] = {}
        if "crd" in self.methods:
            extra["index"] = torch.randint(0, 64, (size,))
        if "fgd" in self.methods:
            extra["boxes"] = [self.boxes(self.rng.choice([0, 1, 2])) for _ in range(size)]
        y = torch.randint(0, CLASSES, (size,))
        kind = self.rng.random()
        if kind < 0.1 and size > 1:  # a batch without any label has the loss NaN
            y[0] = -100
        elif kind < 0.2 and not {"dkd", "crd", "wkd"} & set(self.methods):
            y = torch.rand(size, CLASSES, dtype=self.dtype).softmax(1)
        return x, y, extra

    def boxes(self, count: int) -> Tensor:
        """[count, 4] inside the image."""
        corners = torch.rand(count, 2, 2).sort(1).values * self.side
        return corners.flatten(1).to(self.dtype)

    def train(self) -> None:
        self.distiller.train()
        x, y, extra = self.batch()
        frozen = [each.detach().clone() for each in self.teacher.state_dict().values()]
        policy, pixels = self.policy_state(), x.clone()
        _, losses = self.called(x, y, **extra)
        assert self.student.writes or torch.equal(x, pixels), "the batch changed"
        total = sum(losses.values())
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        self.optimizer.zero_grad()
        if not total.requires_grad:
            frozen_student = not any(p.requires_grad for p in self.student.parameters())
            assert frozen_student, "a student that is trained has no graph"
            return
        total.backward()
        learning = (p for p in self.student.parameters() if p.requires_grad)
        assert all(p.grad is not None for p in learning), "a part of the student has no gradient"
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in trained]
        self.optimizer.step()
        for parameter, old in zip(trained, before, strict=True):
            moved = not torch.equal(parameter, old)
            grad = parameter.grad
            assert moved <= (grad is not None), "a parameter moved without a gradient"
            step = 8 * torch.finfo(old.dtype).eps * old.abs() + 1e-6
            large = grad is not None and bool((grad.abs() * 1e-3 > step).any())
            assert moved >= large, "a parameter with a gradient did not move"
        for value, old in zip(self.teacher.state_dict().values(), frozen, strict=True):
            assert torch.equal(value, old), "the teacher changed"
        assert all(p.grad is None for p in self.teacher.parameters()), "the teacher has a gradient"
        searches = getattr(self.distiller.kd, "search", None) is not None
        assert searches or self.same_policy(policy), "the policy changed without a search"

    def policy_state(self) -> list[Tensor]:
        kd = self.distiller.kd
        parameters = [] if kd is None or kd.policy is None else kd.policy.parameters()
        return [p.detach().clone() for p in parameters]

    def same_policy(self, before: list[Tensor]) -> bool:
        return all(map(torch.equal, before, self.policy_state()))

    def evaluate(self) -> None:
        self.distiller.eval()
        x, y, _ = self.batch()
        with torch.no_grad():
            logits = self.distiller.logits_of(self.distiller(x.clone()))
            assert logits.shape == (len(x), CLASSES) and torch.isfinite(logits).all()
            assert all(torch.isfinite(loss) for loss in self.distiller(x, y)[1].values())

    def save_and_load(self) -> None:
        buffer = io.BytesIO()
        torch.save(self.distiller.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer)
        self.distiller.load_state_dict(state)
        for name, value in self.distiller.state_dict().items():
            same = torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0))
            assert same, name  # crd: NaN stands for a normaliser that no batch has set

    def copy(self) -> bool:
        normed = any(hasattr(net.fc, "weight_g") for net in (self.student, self.teacher))
        if self.student.keeps or normed:
            return False  # PyTorch copies no tensor with a graph
        self.distiller = copy.deepcopy(self.distiller)
        self.student, self.teacher = self.distiller.student, self.distiller.teacher
        self.anew()
        return True

    def cast(self) -> None:
        self.dtype = self.rng.choice([torch.float32, torch.float64, torch.bfloat16])
        self.distiller.to(self.dtype)
        self.anew()

    def freeze(self) -> None:
        part = self.rng.choice([self.student.stage1, self.student.fc, self.student])
        part.requires_grad_(self.rng.random() < 0.5)

    def end_search(self) -> bool:
        """The policy stays as it is from then on."""
        kd = self.distiller.kd
        if kd is None or kd.policy is None:
            return False
        kd.freeze_policy()
        policy = self.policy_state()
        self.train()
        assert self.same_policy(policy), "a frozen policy changed"
        return True

    def replace(self) -> bool:
        """A part of SoKD, a layer of the student's, a new kd of the user's own."""
        kd, way = self.distiller.kd, self.rng.random()
        if way < 0.2:
            self.student.stage2 = copy.deepcopy(self.student.stage2)
            return True
        if kd is None:
            return False
        if way < 0.8:
            setattr(kd, self.rng.choice(["policy", "dam"]), None)
        else:
            kd.policy = sokd.Policy(granularity=self.rng.choice(["batch", "sample"]))
        self.anew()
        return True

    def look(self) -> bool:
        self.distiller.eval()
        kd = self.distiller.kd
        if kd is None:
            return False
        assert all(torch.isfinite(value) for value in kd.diagnostics().values())
        assert kd.policy is None or sokd.inspect.table(kd)
        return True

    def search_step(self) -> bool:
        kd = self.distiller.kd
        if kd is None or kd.policy is None:
            return False
        if self.search is None:
            options = {
                "order": self.rng.choice([1, 2]),
                "objective": self.rng.choice(["consistency", "task", "total"]),
                "estimator": self.rng.choice(["gumbel", "relax", None]),
            }
            self.search = sokd.PolicySearch(kd, self.distiller.student, **options)
        x, y, _ = self.batch()
        before = copy.deepcopy(self.student.state_dict())
        self.search.step(self.distiller.step, (x, y))
        for name, value in self.student.state_dict().items():
            assert torch.equal(value, before[name]), f"the search changed the student's {name}"
        return True

    def export(self) -> None:
        model = self.distiller.export()
        x = torch.randn(2, 3, self.side, self.side, dtype=self.dtype)
        self.distiller.eval()
        with torch.no_grad():
            found, own = (self.distiller.logits_of(net(x.clone())) for net in (model, self.student))
        assert torch.equal(found, own)
        if not any(hasattr(part, "parametrizations") for part in model.modules()):
            buffer = io.BytesIO()
            torch.save(model, buffer)
            assert b"sokd" not in buffer.getvalue(), "an export depends on sokd"

    def compile(self) -> None:
        self.compiles = False
        torch.compiler.reset()  # after eight programs the compiler would leave the code as it is
        self.called = torch.compile(self.distiller, backend="aot_eager")
        self.train()

    def bare_loss(self) -> None:
        """`sokd.loss` alone, also on empty and one-cell maps."""
        batch, side = self.rng.choice([0, 1, 3]), self.rng.choice([1, 2, 7])
        kd = sokd.SoKD(
            4,
            6,
            heads=self.rng.choice(["attention", "bounded", "paper"]),
            k=self.rng.choice([1, 4]),
        )
        f_s = torch.randn(batch, 4, side, side, requires_grad=True)
        loss = sokd.loss(f_s, torch.randn(batch, 6, side, side), kd)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(f_s.grad).all()

    def wrapped(self) -> None:
        loss = sokd.wrap(F.mse_loss, sokd.SoKD(4, 6, base=self.rng.choice(["keep", "replace"])))
        f_s = torch.randn(3, 4, 4, 4, requires_grad=True)
        total = loss(f_s, torch.randn(3, 6, 4, 4))
        total.backward()
        assert torch.isfinite(total) and f_s.grad is not None and f_s.grad.any()

    def run(self, length: int) -> Counter[str]:
        actions: dict[Callable[[], bool | None], int] = {
            self.train: 8, self.evaluate: 2, self.save_and_load: 1, self.copy: 1, self.cast: 1,
            self.freeze: 1, self.replace: 1, self.look: 1, self.search_step: 2, self.export: 1,
            self.bare_loss: 1, self.wrapped: 1, self.make: 1, self.end_search: 1, self.compile: 0,
        }  # fmt: skip
        for _ in range(length):
            actions[self.compile] = 20 * self.compiles
            (action,) = self.rng.choices(list(actions), list(actions.values()))
            self.log.append(action.__name__)
            try:
                self.calls[action.__name__] += action() is not False  # False: nothing to be done
            except AssertionError:
                raise
            except Exception as error:
                if not OWN_ERROR.match(str(error)):
                    raise
                self.log.append(f"  refused: {error}")
                self.calls["refused"] += 1
        return self.calls


def run(sequences: int, *, first_seed: int = 0, length: int = 12) -> dict[str, Any]:
    """Run `count` programs, or fewer after Ctrl-C; their calls, and the programs that failed."""
    torch.set_num_threads(1)
    done, failures, count = Counter[str](), list[str](), 0
    try:
        for seed in range(first_seed, first_seed + sequences):
            failures += _run_one(seed, length, done)
            count += 1
    except KeyboardInterrupt:
        pass
    return {"programs": count, "calls": dict(done.most_common()), "failures": failures}


def _run_one(seed: int, length: int, done: Counter[str]) -> list[str]:
    """One program, compiled if its seed is a multiple of 200; how it failed, if it did."""
    program = None
    try:
        program = Program(seed, compiles=seed % 200 == 0)
        done.update(program.run(length))
    except Exception as error:
        if program is not None or not OWN_ERROR.match(str(error)):
            return [_failure(seed, program, error)]
        done["refused"] += 1
    return []


def _failure(seed: int, program: Program | None, error: BaseException) -> str:
    steps = "" if program is None else " > ".join(program.log[-6:])
    return f"seed {seed}: {type(error).__name__}: {str(error)[:300]} [{steps}]"


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(run(int(sys.argv[1]), first_seed=int(sys.argv[2])), indent=1))
