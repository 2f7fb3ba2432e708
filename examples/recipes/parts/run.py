"""One training run: its ranks, its place in the epochs, checkpoints, logs and evaluation.

with Run(args) as run:
    ...
    run.track(model=learner, optimizer=optimizer, schedule=schedule)
    for epoch in run.epochs():
        for batches in run.steps(loader):
            ...
            run.log(losses)
        run.end_epoch(run.evaluate(student, test))
    run.finish(student, ema)
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm

# What may differ between a run and its continuation; every other option makes another run.
FREE = {"out", "data", "download", "resume", "workers", "max_steps", "eval_only", "tensorboard"}
COUNTER = "num_batches_tracked"  # of a BatchNorm
STOPPED = 143  # exit code: 128 + SIGTERM, which torchrun and Slurm take for an interruption


class Run:
    """A training run: one rank of several under torchrun, else the only one."""

    def __init__(self, args: Namespace, writer: Any = None, *, figure: str = "top1") -> None:
        self.args, self.writer, self.out = args, writer, Path(args.out)
        self.figure = figure  # the one by which an epoch is the best
        self.rank, self.ranks = _from_torchrun("RANK", 0), _from_torchrun("WORLD_SIZE", 1)
        self.main = self.rank == 0
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", _from_torchrun("LOCAL_RANK", 0))
            torch.cuda.set_device(self.device)
        self.clock = Clock(self.device)
        self.epoch = self.step = 0  # where the run is; steps count in the epoch
        self.over = False  # --max-steps are done
        self.rows: list[dict[str, Any]] = []  # of the log, one for each evaluated epoch
        self.sums: dict[str, float] = {}  # of the epoch's losses
        self.unread: list[tuple[int, list[str], Tensor]] = []  # losses still on the device
        self.parts: dict[str, Any] = {}
        self.stop = False  # SIGTERM came
        self.vote: Any = None  # the ranks' exchange of it
        torch.manual_seed(args.seed)

    def __enter__(self) -> Run:
        if self.ranks > 1:
            _meet("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if self.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SystemExit(f"--out: {self.out} cannot be written to: {error}") from None
        if self.main and self.args.tensorboard and self.writer is None:
            self.writer = _tensorboard(self.out / "tensorboard")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.ranks > 1:
            if kind is None and self.vote is not None:
                self.vote[0].wait()
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def report(self, figures: dict[str, Any]) -> dict[str, Any]:
        self.say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    # --------------------------------------------------------------------------------------- models

    def parallel(self, learner: nn.Module) -> nn.Module:
        """The learner on its device, compiled and in DistributedDataParallel by the options."""
        memory = torch.channels_last if self.args.channels_last else torch.preserve_format
        learner.to(self.device, memory_format=memory)
        if self.args.sync_bn:
            if self.device.type != "cuda":
                raise SystemExit("--sync-bn needs GPUs: PyTorch's SyncBatchNorm has no CPU form")
            learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
        if self.args.compile:
            learner.compile()
        if self.ranks == 1:
            return learner
        # BatchNorm's statistics are rank 0's (`evaluate`); banks and policies stay equal anyway.
        place = [self.device] if self.device.type == "cuda" else None
        known = signature(DistributedDataParallel).parameters  # its name since PyTorch 2.13
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(learner, device_ids=place, **{name: False})

    def accumulating(self, model: nn.Module, last: bool) -> Any:
        """Gradients are averaged over the ranks in the last part of a step only."""
        return nullcontext() if last or self.ranks == 1 else model.no_sync()

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.args.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.args.amp != "no")

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """The result of `make`, called on rank 0 first, which may download."""
        made = make() if self.main else None
        self.total(torch.zeros(1))
        return made if self.main else make()

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, on the CPU."""
        numbers = numbers.cpu()
        if self.ranks > 1:
            dist.all_reduce(numbers)
        return numbers

    # ----------------------------------------------------------------------------- epochs and steps

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0."""
        while self.epoch < self.args.epochs and not self.over:
            yield self.epoch

    def steps(self, train: DataLoader) -> Iterator[list[tuple[Any, Any, Tensor]]]:
        """The steps of the epoch that are left: batches (x, y, index) whose gradients add up.

        After the last one a checkpoint is written. After any, SIGTERM ends the run with one.
        Outside the steps, where nothing would be lost, it ends the run at once.
        """
        handler = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield from self._steps(train)
        finally:
            signal.signal(signal.SIGTERM, handler)
        self._read_losses()
        self.save()

    def _steps(self, train: DataLoader) -> Iterator[list[tuple[Any, Any, Tensor]]]:
        order = train.batch_sampler
        order.epoch, order.first = self.epoch, self.step * self.args.accumulate
        batches = iter(train)
        bar = tqdm(
            total=order.steps, initial=self.step, desc=f"epoch {self.epoch + 1}", leave=False,
            disable=None if self.main else True,
        )  # fmt: skip
        with bar:
            while self.step < order.steps and not self.over:
                with self.clock("data"):
                    parts = [self._moved(*next(batches)) for _ in range(self.args.accumulate)]
                yield parts
                self.step += 1
                done = self.epoch * order.steps + self.step
                self.over = self.args.max_steps is not None and done >= self.args.max_steps
                if self.device.type == "cpu" or len(self.unread) == 50:  # reading waits for a GPU
                    self._read_losses()
                bar.update()
                if self._stopping():
                    self._read_losses()
                    self.save()
                    where = f"step {self.step} of epoch {self.epoch + 1}"
                    self.say(f"stopped by SIGTERM after {where}; --resume auto resumes there")
                    raise SystemExit(STOPPED)

    def _moved(self, x: Any, y: Any, index: Tensor) -> tuple[Any, Any, Tensor]:
        """The batch on the run's device; images and targets may be lists, targets dicts."""
        if self.args.channels_last and isinstance(x, Tensor):
            x = x.contiguous(memory_format=torch.channels_last)
        move = partial(Tensor.to, device=self.device, non_blocking=True)
        return tree_map_only(Tensor, move, (x, y, index))

    def _terminate(self, *_: Any) -> None:
        self.stop = True

    def _stopping(self) -> bool:
        """Whether some rank had SIGTERM; read one step later, so that no step waits for it."""
        if self.ranks == 1:
            return self.stop
        if self.vote is not None:
            work, flag = self.vote
            work.wait()
            if flag.item():
                self.vote = None
                return True
        flag = torch.tensor([float(self.stop)])
        self.vote = dist.all_reduce(flag, async_op=True), flag
        return False

    def log(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of a batch for the epoch's means, and for the watch on NaN."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.unread.append((self.step + 1, list(losses), values))

    def _read_losses(self) -> None:
        for step, names, values in self.unread:
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    where = f"step {step} of epoch {self.epoch + 1}"
                    raise SystemExit(f"{name} is {value} at {where}; {self._last()}")
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.unread.clear()

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Add the epoch's row to log.csv and log.jsonl: means of the losses, `figures`, seconds."""
        batches = max(1, self.step * self.args.accumulate) * self.ranks
        sums = self.total(torch.tensor(list(self.sums.values()), dtype=torch.float64))
        of_epochs = [*self.rows, figures | {"epoch": self.epoch + 1}]
        best = max(of_epochs, key=lambda row: row[self.figure])
        row = {"epoch": self.epoch + 1, "lr": self.parts["optimizer"].param_groups[0]["lr"]}
        row |= {name: value / batches for name, value in zip(self.sums, sums.tolist(), strict=True)}
        row |= figures
        row |= {f"best_{self.figure}": best[self.figure], "best_epoch": best["epoch"]}
        row |= {f"seconds_{name}": round(spent, 3) for name, spent in self.clock.read().items()}
        self.rows.append(row)
        if self.main:
            self._write_log()
            for name, value in row.items():
                if self.writer is not None and name != "epoch":
                    self.writer.add_scalar(name, value, self.epoch + 1)
        self.report({n: v for n, v in row.items() if not n.startswith("seconds")})
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.clock.seconds.clear()

    def _write_log(self) -> None:
        table = io.StringIO()
        lines = csv.DictWriter(
            table, list(self.rows[-1]), lineterminator="\n", extrasaction="ignore"
        )
        lines.writeheader()
        lines.writerows(self.rows)
        try:
            replace(self.out / "log.csv", table.getvalue().encode())
            text = "".join(f"{json.dumps(row)}\n" for row in self.rows)
            replace(self.out / "log.jsonl", text.encode())
        except OSError as error:
            self.say(f"the log was not written: {error}; the next epoch writes all of it")

    @contextmanager
    def evaluating(self, network: nn.Module) -> Iterator[None]:
        """The network in eval mode, without gradients, under the run's autocast and clock.

        On several ranks BatchNorm uses rank 0's statistics, as its checkpoint does.
        """
        if self.ranks > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        network.eval()
        with self.clock("evaluation"), self.autocast(), torch.no_grad():
            yield

    def evaluate(self, network: nn.Module, test: DataLoader) -> dict[str, float]:
        """Top-1, top-5 (%) and the cross entropy on the test set, each image in one rank's part."""
        counts = torch.zeros(4, dtype=torch.float64, device=self.device)
        with self.evaluating(network):
            for batch in test:
                x, y, _ = self._moved(*batch)
                logits = network(x).float()
                best = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                counts[0] += best[:, 0].sum()
                counts[1] += best.sum()
                counts[2] += F.cross_entropy(logits, y, reduction="sum")
                counts[3] += len(y)
            top1, top5, loss, images = self.total(counts).tolist()
        shares = {"top1": top1 / images, "top5": top5 / images}
        percent = {name: round(100 * share, 4) for name, share in shares.items()}
        return percent | {"test_loss": loss / images}

    # ---------------------------------------------------------------------------------- checkpoints

    def track(self, **parts: Any) -> None:
        """Register the contents of checkpoints, but None; continue from one by --resume."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        torch.manual_seed(self.args.seed + self.rank)  # from here on ranks draw differently
        path = self.out / "checkpoint.pt"
        if self.args.resume not in ("no", "auto"):
            path = Path(self.args.resume)
            if not path.exists():
                raise SystemExit(f"--resume: {path} is not there")
        if not path.exists():
            return
        if self.args.resume == "no":
            raise SystemExit(
                f"--out: {path} is there from an earlier run; --resume auto resumes it, "
                "another --out starts anew"
            )
        self._load(path)

    def _load(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SystemExit(f"--resume: {path} is no checkpoint of a recipe: {error}") from None
        if not isinstance(saved, dict) or "options" not in saved:
            raise SystemExit(f"--resume: {path} is no checkpoint of a recipe")
        then, now = saved["options"], self._options()
        other = [
            f"--{name.replace('_', '-')} {then.get(name)}, got {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if other:
            raise SystemExit(f"--resume: {path} was made with {'; '.join(other)}")
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        for name in ("epoch", "step", "rows", "sums"):
            setattr(self, name, saved[name])
        if not self.main:  # those of all ranks are rank 0's now
            self.sums = dict.fromkeys(self.sums, 0.0)
        self.clock.seconds.update(saved["seconds"])
        # PyTorch misses the optimiser's steps, which were taken before the checkpoint.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        _set_rng(saved["rng"][self.rank if self.rank < len(saved["rng"]) else 0])
        self.say(f"resumes from {path}: epoch {self.epoch + 1} after step {self.step}")

    def save(self) -> None:
        """Write OUT/checkpoint.pt by rank 0. Where that fails, the last good one stays."""
        rng = [_rng()] * self.ranks
        sums = self.total(torch.tensor(list(self.sums.values()), dtype=torch.float64))
        if self.ranks > 1:
            dist.all_gather_object(rng, _rng())
        if self.main:
            state = {
                "options": self._options(), "rng": rng, "epoch": self.epoch, "step": self.step,
                "rows": self.rows, "sums": dict(zip(self.sums, sums.tolist(), strict=True)),
                "seconds": dict(self.clock.read()),
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }  # fmt: skip
            try:
                replace(self.out / "checkpoint.pt", state)
            except (OSError, RuntimeError) as error:
                self.say(f"the checkpoint was not written: {error}; {self._last()}")
        self.total(torch.zeros(1))  # no rank ends before the file is there

    def _last(self) -> str:
        path = self.out / "checkpoint.pt"
        return f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.args).items() if name not in FREE}

    def finish(self, student: nn.Module, ema: AveragedModel | None = None) -> dict[str, Any]:
        """Write OUT/result.json, OUT/student.pt and OUT/ema.pt: {"model": state_dict, ...}.

        With --teacher-only OUT/teacher.pt instead of student.pt.
        """
        networks = {"teacher" if self.args.teacher_only else "student": student}
        networks |= {} if ema is None else {"ema": ema.module}
        name = self.figure
        last = self.rows[-1] if self.rows else {"epoch": 0, name: math.nan}
        best = max(self.rows, key=lambda row: row[name], default=last)
        result = {
            "last_epoch": last["epoch"], f"last_{name}": last[name],
            "best_epoch": best["epoch"], f"best_{name}": best[name],
        }  # fmt: skip
        if self.main:
            try:
                for file, network in networks.items():
                    weights = {k: v.cpu() for k, v in network.state_dict().items()}
                    replace(self.out / f"{file}.pt", {"model": weights, "epoch": self.epoch})
                replace(self.out / "result.json", json.dumps(result, indent=1).encode())
            except (OSError, RuntimeError) as error:
                raise SystemExit(f"the result was not written: {error}; {self._last()}") from None
        label = "top-1" if name == "top1" else name
        self.say(
            f"last epoch ({last['epoch']}) {label} {last[name]:.2f}, best epoch ({best['epoch']}, "
            f"chosen on the test set) {label} {best[name]:.2f}"
        )
        return result


def _from_torchrun(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone))


def _meet(backend: str) -> None:
    """Join the other ranks, in a store of this start alone.

    When torchrun 2.13 restarts its workers it hands out the old store, and Gloo would connect to
    the addresses of ranks that are gone.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    own = dist.PrefixStore(f"start {_from_torchrun('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=ranks)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--tensorboard needs the package tensorboard: pip install it") from None
    return SummaryWriter(str(folder))


class Alone(nn.Module):
    """A network trained by cross entropy, called as a Distiller is."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, y: Tensor, *, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.student(x)
        return logits, {"loss_ce": F.cross_entropy(logits, y)}


def averaged(decay: float | None, student: nn.Module) -> AveragedModel | None:
    """The moving average of weights and buffers for --ema, by its decay; None without it."""
    if not decay:
        return None
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def objective(
    losses: dict[str, Tensor], ce_weight: float, rise: float, task: Container[str] = ("loss_ce",)
) -> Tensor:
    """The sum of the terms: the task's by their weight, the others by their rise (0 to 1)."""
    return sum((ce_weight if name in task else rise) * term for name, term in losses.items())


def replace(path: Path, content: Any) -> None:
    """Write a file whole or not at all: bytes, or what torch.save takes."""
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        with fresh.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _rng() -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def weights_of(path: str, what: str) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, alone or as "model" or "state_dict" of a dict.

    Raises:
        SystemExit: no such file or dict.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):  # RepDistiller stores its options too
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{what}: {path} is not there") from None
    except Exception as error:
        raise SystemExit(f"{what}: {path} is no checkpoint: {error}") from None
    for key in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(v, Tensor) for v in saved.values()):
        raise SystemExit(f"{what}: {path} holds no state_dict, alone or as 'model' or 'state_dict'")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): v for name, v in saved.items()}


def load_weights(network: nn.Module, given: str | dict[str, Tensor], what: str) -> None:
    """Load a checkpoint: a file as `weights_of` reads it, or a state_dict.

    Raises:
        SystemExit: keys or shapes of another network, with their names.
    """
    path = given if isinstance(given, str) else "its state_dict"
    given = weights_of(given, what) if isinstance(given, str) else given
    own = network.state_dict()
    if all(name in given for name in own if not name.endswith(COUNTER)):
        # a frozen BatchNorm counts no batches
        kept = {name: value for name, value in given.items() if not name.endswith(COUNTER)}
        given = kept | {n: given.get(n, v) for n, v in own.items() if n.endswith(COUNTER)}
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} is not in the network" for name in given if name not in own]
    wrong += [
        f"{name} is {list(given[name].shape)} in the file, {list(own[name].shape)} in the network"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise SystemExit(f"{what}: {path} does not fit: {'; '.join(wrong[:4])}{more}")
    network.load_state_dict(given)


class Clock:
    """Seconds by name: the host's on a CPU and for "data", else the device's, read without a wait.

    `watch` parts what runs under "loss" in two: "forward" is what the networks take of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, Any, Any]] = []
        self.inside: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun, self.inside = self._now(name), name
        try:
            yield
        finally:
            self._spent(name, begun)
            self.inside = None

    def watch(self, *networks: nn.Module) -> None:
        for network in networks:
            begun: list[Any] = []
            network.register_forward_pre_hook(lambda *_, b=begun: b.append(self._now("forward")))
            network.register_forward_hook(lambda *_, b=begun: self._forward(b.pop()))

    def _forward(self, begun: Any) -> None:
        if self.inside == "loss":
            self._spent("forward", begun)
            self._spent("loss", begun, sign=-1)

    def _now(self, name: str) -> Any:
        if not self.cuda or name == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _spent(self, name: str, begun: Any, sign: int = 1) -> None:
        if isinstance(begun, float):
            self.seconds[name] += sign * (time.perf_counter() - begun)
        else:
            self.pending.append((name, sign, begun, self._now(name)))

    def read(self) -> dict[str, float]:
        """The seconds so far."""
        if self.pending:
            torch.cuda.synchronize()
        for name, sign, begun, ended in self.pending:
            self.seconds[name] += sign * begun.elapsed_time(ended) / 1e3
        self.pending.clear()
        return dict(self.seconds)
