"""cifar100.py from the command line to the student's file, in this process and on one rank."""

import csv
import json
import os
import resource
import signal
import sys

import cifar100
import pytest
import torch
from parts import published
from parts.networks import NETWORKS, build
from support.cases import compiles
from support.recipes import (
    DISTIL,
    checkpoint,
    differences,
    load_without_sokd,
    options,
    write_idx,
)
from torch import nn

import sokd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A teacher's file, trained by the script."""
    out = tmp_path_factory.mktemp("teacher")
    more = ["--teacher-only", "--teacher", "resnet8", "--max-steps", "2"]
    cifar100.main(options(data, out, *more))
    return out / "teacher.pt"


@pytest.fixture
def run(data, teacher, tmp_path):
    """run("name", options ...): cifar100.main with --out name, a teacher and a tiny student."""

    def call(name, *more, **extra):
        given = options(data, tmp_path / name, *DISTIL, "--teacher-weights", str(teacher), *more)
        return cifar100.main(given, **extra)

    return call


def test_teacher_only_writes_a_public_checkpoint(teacher, data):
    saved = torch.load(teacher, weights_only=True)
    build("resnet8", 10).load_state_dict(saved["model"])
    assert saved["model"]["bn1.num_batches_tracked"] == 2
    more = ["--teacher-only", "--teacher", "resnet8", "--eval-only"]
    figures = cifar100.main(options(data, teacher.parent, *more))
    result = json.loads((teacher.parent / "result.json").read_text())
    assert figures["top1"] == result["last_top1"]


def test_logs_result_and_a_student_without_sokd(run, tmp_path, capsys):
    class Writer(list):
        def add_scalar(self, name, value, step):
            self.append((name, step))

    writer = Writer()
    result = run("out", "--method", "fitnet=2", "kd", "--accumulate", "2", writer=writer)
    out = tmp_path / "out"
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == ["1", "2"] and [r["epoch"] for r in lines] == [1, 2]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.05, 0.005])
    terms = {"loss_ce", "loss_fitnet", "loss_kd", "loss_agreement", "ema_top1", "best_epoch"}
    seconds = {
        f"seconds_{n}" for n in ["data", "search", "forward", "loss", "backward", "evaluation"]
    }
    assert terms | seconds <= rows[0].keys()
    assert all(float(rows[0][name]) > 0 for name in seconds)
    assert lines[1]["best_top1"] == max(line["top1"] for line in lines)
    assert result == json.loads((out / "result.json").read_text())
    assert result["last_epoch"] == 2 and result["last_top1"] == lines[1]["top1"]
    printed = capsys.readouterr().out
    assert "last epoch (2) top-1" in printed and "best epoch (" in printed
    assert {("loss_kd", 1), ("top1", 2)} <= set(writer)
    for name in ("student", "ema"):
        build("resnet8w8", 10).load_state_dict(torch.load(out / f"{name}.pt")["model"])
    imports = "from parts.networks import build"
    load_without_sokd(out / "student.pt", imports, "build('resnet8w8', 10)")
    figures = run("out", "--eval-only")
    assert figures["top1"] == result["last_top1"] and 0 <= figures["top5"] <= 100


def test_one_step_is_the_step_written_by_hand(run, data, teacher, tmp_path, monkeypatch):
    """The objective, SGD and accumulation: one step against a few lines of PyTorch."""
    seen = []
    original = cifar100.objective
    monkeypatch.setattr(cifar100, "objective", lambda *a: seen.append(a) or original(*a))
    more = "--no-sokd --method kd=0.5 --max-steps 1 --accumulate 2 --warmup-epochs 10"
    run("out", *more.split(), "--ce-weight", "0.3")
    assert [a[1:] for a in seen] == [(0.3, 0.1)] * 2

    torch.manual_seed(0)
    of = cifar100.of_32x32("fashion-mnist", str(data), False, None, 0)
    student, guide = build("resnet8w8", 10), build("resnet8", 10).eval()
    guide.load_state_dict(torch.load(teacher)["model"])
    keys = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:8]
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for half in (keys[:4], keys[4:]):
        x, y = (
            torch.stack(list(map(torch.as_tensor, part)))
            for part in zip(*(of.train[0, index][:2] for index in half), strict=True)
        )
        logits = student(x)
        with torch.no_grad():
            goal = guide(x)
        loss = 0.3 * nn.functional.cross_entropy(logits, y)
        loss = loss + 0.1 * 0.5 * sokd.methods.kd(logits, goal)
        (loss / 2).backward()
    optimizer.step()
    mine = torch.load(tmp_path / "out" / "student.pt")["model"]
    for name, value in student.state_dict().items():
        torch.testing.assert_close(mine[name], value, msg=name)


@pytest.mark.parametrize("more", [
    "--method crd --method-option negatives=8 dim=16 --amp bf16",
    "--method reviewkd at --channels-last",
    "--method none --amp bf16",
    "--method fitnet --sokd-option k=2 lambda_areas=1 --search-epochs 0 --train-samples 16",
    "--method sp --no-sokd --layers layer1=layer2",
])  # fmt: skip
def test_every_kind_of_run(run, more, tmp_path):
    run("out", *more.split(), "--max-steps", "1")
    assert checkpoint(tmp_path / "out")["step"] == 1


@compiles
def test_compiled(run, monkeypatch):
    """By dynamo and its eager backend; inductor would take a minute."""
    seen = []

    def compile(self):
        seen.append(type(self))
        nn.Module.compile(self, backend="eager", fullgraph=True)

    monkeypatch.setattr(sokd.Distiller, "compile", compile)
    run("out", "--compile", "--max-steps", "1")
    assert seen == [sokd.Distiller]


# ------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory):
    """The checkpoint of an uninterrupted run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    cifar100.main(options(data, out, *DISTIL, "--teacher-weights", str(teacher)))
    return checkpoint(out)


@pytest.mark.parametrize("batch", [2, 4])
def test_sigterm_and_resume_are_an_uninterrupted_run(run, whole, tmp_path, monkeypatch, batch):
    calls = []

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    original, handler = cifar100.objective, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cifar100, "objective", terminated)
    with pytest.raises(SystemExit) as stopped:
        run("out")
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    saved = checkpoint(tmp_path / "out")
    assert (saved["epoch"], saved["step"]) == divmod(batch, 3)
    torch.manual_seed(123)  # whatever the state of the process
    run("out", "--resume", "auto")
    assert differences(checkpoint(tmp_path / "out"), whole) == []
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 3


def test_resume_of_a_finished_run_changes_nothing(run, whole, tmp_path):
    assert differences(whole, whole | {"epoch": 7}) == [".epoch"]  # the comparison compares
    assert whole["parts"].keys() == {"model", "optimizer", "schedule", "scaler", "ema", "search"}
    torch.save(whole, tmp_path / "there.pt")
    run("out", "--resume", str(tmp_path / "there.pt"))
    assert differences(checkpoint(tmp_path / "out"), whole) == []


def test_a_worker_that_dies_ends_the_run_and_resume_goes_on(run, whole, tmp_path, monkeypatch):
    seeded = cifar100.of_32x32

    def with_death(*arguments):
        of = seeded(*arguments)
        transform, parent = of.train.transform, os.getpid()

        def deadly(image):
            fresh = (
                not (tmp_path / "died").exists() and (tmp_path / "out" / "checkpoint.pt").exists()
            )
            if fresh and os.getpid() != parent:  # of the second epoch
                (tmp_path / "died").touch()
                os._exit(1)
            return transform(image)

        of.train.transform = deadly
        return of

    monkeypatch.setattr(cifar100, "of_32x32", with_death)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run("out", "--workers", "1")
    assert (tmp_path / "died").exists() and checkpoint(tmp_path / "out")["epoch"] == 0
    run("out", "--workers", "0", "--resume", "auto")
    assert differences(checkpoint(tmp_path / "out"), whole) == []


def test_a_full_disk_leaves_the_last_good_checkpoint(run, whole, tmp_path, capsys):
    """RLIMIT_FSIZE: files end in the middle of a write with an error, as they do on a full disk."""
    run("out", "--max-steps", "3")
    good = checkpoint(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SystemExit, match=r"the result was not written: .*the last checkpoint"):
            run("out", "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint was not written: " in capsys.readouterr().out
    assert differences(checkpoint(tmp_path / "out"), good) == []
    assert not list((tmp_path / "out").glob("*.tmp"))
    run("out", "--resume", "auto")
    assert differences(checkpoint(tmp_path / "out"), whole) == []


# ---------------------------------------------------------------------------------------- bad input


def refused(call, *arguments):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert isinstance(ended.value.code, str)
    return ended.value.code


def test_a_loss_of_nan_stops_with_step_term_and_checkpoint(run, tmp_path, monkeypatch):
    def spoiled(self, step):
        calls.append(1)
        return step.student_logits.sum() * (float("nan") if len(calls) == 5 else 0)

    calls = []
    monkeypatch.setattr(sokd.methods.METHODS["kd"], "forward", spoiled)
    said = refused(run, "out", "--method", "kd", "--no-sokd")
    path = tmp_path / "out" / "checkpoint.pt"
    assert said == f"loss_kd is nan at step 2 of epoch 2; the last checkpoint is {path}"
    assert checkpoint(tmp_path / "out")["epoch"] == 0


def test_resume_with_other_options_is_refused(run, tmp_path):
    run("out", "--max-steps", "1")
    path = tmp_path / "out" / "checkpoint.pt"
    assert "is there from an earlier run; --resume auto" in refused(run, "out")
    said = refused(run, "out", "--resume", "auto", "--lr", "0.1")
    assert said == f"--resume: {path} was made with --lr 0.05, got 0.1"
    said = refused(run, "out", "--resume", "auto", "--student", "resnet8", "--seed", "3")
    assert "with --seed 0, got 3; --student resnet8w8, got resnet8" in said
    assert "not.pt is not there" in refused(run, "new", "--resume", str(tmp_path / "not.pt"))
    path.write_bytes(b"damaged")
    assert "is no checkpoint of a recipe" in refused(run, "out", "--resume", "auto")


def test_teachers_that_do_not_fit_are_refused_by_name(run, tmp_path, teacher):
    def with_weights(content):
        torch.save(content, tmp_path / "other.pt")
        return refused(run, "out", "--teacher-weights", str(tmp_path / "other.pt"))

    other = build("resnet14", 10).state_dict()
    assert "layer1.1.conv1.weight is not in the network; " in with_weights({"state_dict": other})
    classes = build("resnet8", 100).state_dict()
    said = with_weights({"model": classes})
    assert "fc.weight is [100, 64] in the file, [10, 64] in the network" in said
    less = {k: v for k, v in build("resnet8", 10).state_dict().items() if k != "fc.bias"}
    assert "fc.bias is missing" in with_weights(less)
    assert "holds no state_dict" in with_weights({"epoch": 3})
    assert "is not there" in refused(run, "out", "--teacher-weights", str(tmp_path / "no.pt"))
    wrapped = {f"module.{k}": v for k, v in torch.load(teacher)["model"].items()}
    assert "is no checkpoint: " in with_weights({"model": wrapped, "opt": vars})


def test_public_teachers_load(run, tmp_path, teacher):
    """RepDistiller's own form: options as a Namespace, weights of DataParallel."""
    from argparse import Namespace

    wrapped = {f"module.{k}": v for k, v in torch.load(teacher)["model"].items()}
    public = {"opt": Namespace(model="resnet8"), "model": wrapped, "best_acc": torch.tensor(70.0)}
    torch.save(public, tmp_path / "public.pt")
    run("out", "--teacher-weights", str(tmp_path / "public.pt"), "--max-steps", "1")


def test_options_that_are_none(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard needs the package" in refused(run, "out", "--tensorboard")
    assert "--method must be among none, fitnet, at" in refused(run, "out", "--method", "fitnot")
    assert "must be NAME or NAME=WEIGHT" in refused(run, "out", "--method", "kd=much")
    assert "no network 'resnet9'" in refused(run, "out", "--student", "resnet9")
    assert "--row must be TEACHER:STUDENT" in refused(run, "out", "--row", "resnet20")
    said = refused(run, "out", "--row", "resnet56:resnet20:sokd")
    assert said == "--row must name a method beside sokd, got 'resnet56:resnet20:sokd'"
    said = refused(run, "out", "--row", "resnet8:resnet8w8:kd", "--method", "at")
    assert said == "--row resnet8:resnet8w8:kd and --method must not both be given"
    said = refused(run, "out", "--row", "resnet8:resnet8w8:kd", "--sokd")
    assert said == "--row resnet8:resnet8w8:kd and --sokd must not both be given"
    for more in (["kd"], ["--sokd"]):
        said = refused(run, "out", "--method", "none", *more)
        assert said == "--method none must stand alone, without other methods and SoKD"
    (tmp_path / "file").touch()
    assert refused(run, "file").startswith(f"--out: {tmp_path / 'file'} cannot be written to: ")
    assert "--sync-bn needs GPUs" in refused(run, "out", "--sync-bn")


@pytest.mark.parametrize("more, said", [
    ("--sokd-option lamda_areas=1", "Distiller: sokd must hold options of SoKD (nearest: lambda_"),
    ("--sokd-option heads=hot", "SoKD: heads must be 'attention' or "),
    ("--sokd-option policy=None search=None", "PolicySearch: "),
    ("--method-option beta=1", "Distiller: options must be arguments of Distiller or options of "),
    ("--method kd=-1", "Distiller: "),
    ("--layers layer9=layer2", "Distiller: "),
    ("--method fgd", "--method must need no boxes, got 'fgd'; coco.py has them"),
    ("--method ofd", "--method ofd needs --layers that end before a ReLU, such as BatchNorms"),
])  # fmt: skip
def test_options_that_sokd_refuses(run, more, said):
    """In one line, without a traceback."""
    text = refused(run, "out", *more.split())
    assert text.startswith(said) and "\n" not in text


@pytest.mark.parametrize("given, rule", [
    ("--epochs 0", "must be 1 or more, got 0"), ("--batch-size 0", "must be 1 or more, got 0"),
    ("--seed -1", "must be 0 or more, got -1"), ("--lr nan", "must be 0.0 or more, got nan"),
    ("--lr inf", "must be 0.0 or more, got inf"), ("--ema 1.5", "must be from 0 to 1, got 1.5"),
    ("--workers 1.5", "invalid int value: '1.5'"), ("--method", "expected at least one argument"),
    ("--layers layer1", "must be STUDENT=TEACHER, got 'layer1'"),
    ("--method-option k", "must be NAME=VALUE, got 'k'"),
])  # fmt: skip
def test_values_out_of_range(given, rule, capsys):
    with pytest.raises(SystemExit, match="2"):
        cifar100.main(given.split())
    option = given.split()[0]
    assert capsys.readouterr().err.endswith(f"error: argument {option}: {rule}\n")


# ------------------------------------------------------------------------------------------- tables


def test_a_row_of_the_table(data, tmp_path, capsys):
    torch.save(build("resnet56", 10).state_dict(), tmp_path / "t.pt")
    given = options(data, tmp_path / "out", "--row", "resnet56:resnet20:kd", "--max-steps", "1")
    cifar100.main([*given, "--teacher-weights", str(tmp_path / "t.pt")])
    accepted = capsys.readouterr().out.splitlines()[-1]
    assert accepted.startswith("accepted: kd 70.66, student alone 69.06, teacher 72.34 (RepDist")
    saved = checkpoint(tmp_path / "out")["options"]
    expected = {"ce_weight": 0.1, "lr": 0.05, "weight_decay": 5e-4, "sokd": False}
    assert expected.items() <= saved.items() and saved["method"] == {"kd": None}


@pytest.mark.parametrize("methods, of_method, of_sokd", [
    ("fitnet", {"adapter": "regressor"}, {}), ("kd", {}, {}), ("lskd", {}, {}),
    ("dist", {"temperature": 4.0}, {}),
    ("fitnet+sokd", {}, {"preset": "paper"}),
])  # fmt: skip
def test_the_parts_of_a_row(tmp_path, monkeypatch, methods, of_method, of_sokd):
    args = {}
    monkeypatch.setattr(cifar100, "distil", lambda given, run: args.update(vars(given)))
    cifar100.main(["--row", f"resnet56:resnet20:{methods}", "--out", str(tmp_path / "out")])
    assert args["method_option"] == of_method and args["sokd_option"] == of_sokd
    assert args["ce_weight"] == (0.1 if methods in ("kd", "lskd") else 1.0)


def test_every_cell_of_the_tables_has_a_figure():
    rows = [f"{pair}:{m}" for pair in published.CIFAR100_PAIRS for m in published.CIFAR100]
    table = published.CIFAR100_PAIRS, published.CIFAR100, "source"
    for text in rows:
        row = published.parse_row(text)
        assert "none in" not in published.accepted(row, *table)
        assert {row.teacher, row.student} <= NETWORKS.keys()
    row = published.parse_row("resnet32x4:resnet8x4:fitnet+sokd")
    said = published.accepted(row, *table)
    assert said.startswith("fitnet 73.50, none in the table for fitnet+sokd, student alone 72.50")
    row = published.parse_row("resnet34:resnet18:reviewkd+sokd")
    imagenet = published.IMAGENET_PAIRS, published.IMAGENET, "source"
    assert published.accepted(row, *imagenet).startswith("reviewkd+sokd 72.53, reviewkd 71.61")
    for method, figure in (("crd", "75.48"), ("nst", "73.68")):
        row = published.parse_row(f"WRN-40-2:wrn-16-2:{method}")
        said = published.accepted(row, *table)
        assert said.startswith(f"{method} {figure}, student alone 73.26")
    row = published.parse_row("vgg19:vgg8:kd")
    assert published.accepted(row, *table) == "no accepted figure for vgg19 -> vgg8"


def test_published_settings():
    settings = published.cifar100_settings
    assert settings("vgg13", "MobileNetV2", ["kd"])["lr"] == 0.01
    assert settings("resnet32x4", "shufflev2", ["reviewkd"])["weights"]["reviewkd"] == 8
    assert settings("resnet56", "resnet20", ["reviewkd"])["weights"]["reviewkd"] == 0.6
    assert settings("resnet32x4", "resnet8x4", ["fitnet"])["search_epochs"] == 50
    dkd = settings("wrn_40_2", "wrn_16_2", ["dkd"])
    assert dkd["warmup_epochs"] == 20 and dkd["method_option"] == {"beta": 6.0}
