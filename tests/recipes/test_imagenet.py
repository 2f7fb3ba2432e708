"""imagenet.py from end to end on an ImageFolder of real photographs, a few tiles of each."""

import imagenet
import pytest
import torch
from PIL import Image
from support.recipes import checkpoint, load_without_sokd
from torch import nn
from torchvision import models

PHOTOGRAPHS = ("astronaut", "cat", "coffee")  # of scikit-image; each a class
SMALL = [
    *("--epochs", "1", "--batch-size", "4", "--workers", "0"),
    *("--size", "32", "--train-samples", "8"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each photograph cut into tiles of 96: four to train, two to test."""
    skimage = pytest.importorskip("skimage", reason="scikit-image is not installed")
    root = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(skimage.data, name)())
        for tile in range(6):
            part = root / ("train" if tile < 4 else "val") / name
            part.mkdir(parents=True, exist_ok=True)
            left, top = 96 * (tile % 3), 96 * (tile // 3)
            photograph.crop((left, top, left + 96, top + 96)).save(part / f"{tile}.jpg")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path):
    """A resnet34 with BatchNorm statistics of one batch, so that its maps are of order 1."""
    made = models.resnet34(num_classes=3)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        made(torch.randn(16, 3, 32, 32))
    torch.save({"state_dict": made.state_dict()}, tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt")


def test_the_row_of_the_paper(folder, teacher, tmp_path, capsys):
    """ReviewKD with SoKD, resumed and evaluated."""
    given = [*SMALL, "--data", str(folder), "--teacher-weights", teacher]
    given += ["--row", "resnet34:resnet18:reviewkd+sokd", "--lr", "0.001"]
    given += ["--out", str(tmp_path / "out"), "--search-every", "2", "--sokd-option", "search=None"]
    imagenet.main(given)
    printed = capsys.readouterr().out
    assert "accepted: reviewkd+sokd 72.53, reviewkd 71.61, student alone 69.75" in printed
    saved = checkpoint(tmp_path / "out")
    assert saved["step"] == 2 and saved["parts"]["model"].keys() >= {"student.fc.weight"}
    expected = {"search_epochs": 5, "lr": 0.001, "weight_decay": 1e-4, "milestones": [30, 60, 90]}
    assert expected.items() <= saved["options"].items()
    network = "models.resnet18(num_classes=3)"
    load_without_sokd(tmp_path / "out" / "student.pt", "from torchvision import models", network)
    result = imagenet.main([*given, "--resume", "auto"])
    figures = imagenet.main([*given, "--eval-only"])
    assert figures["top1"] == result["last_top1"] and figures["top5"] == 100


def test_a_teacher_of_ones_own(folder, tmp_path):
    given = [*SMALL, "--data", str(folder), "--out", str(tmp_path / "out"), "--max-steps", "1"]
    imagenet.main([*given, "--teacher-only", "--teacher", "resnet18"])
    saved = torch.load(tmp_path / "out" / "teacher.pt")["model"]
    models.resnet18(num_classes=3).load_state_dict(saved)


def test_other_networks_find_their_layers(folder, tmp_path):
    torch.save(models.squeezenet1_0(num_classes=3).state_dict(), tmp_path / "t.pt")
    given = [*SMALL, "--data", str(folder), "--out", str(tmp_path / "out"), "--max-steps", "1"]
    pair = ["--teacher", "squeezenet1_0", "--student", "squeezenet1_1", "--no-sokd", "--size", "64"]
    weights = ["--teacher-weights", str(tmp_path / "t.pt")]
    imagenet.main([*given, *pair, *weights, "--method", "fitnet=1"])
    assert checkpoint(tmp_path / "out")["step"] == 1


def test_teachers_of_torchvision(monkeypatch):
    """Without a network: the address to fetch and the option that takes the file."""

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(SystemExit) as ended:
        imagenet.pretrained("resnet34", 1000)
    said = ended.value.code
    assert said.startswith(
        "torchvision's resnet34 was not downloaded (no route to host); fetch http"
    )
    assert said.endswith("resnet34-b627a593.pth elsewhere and name the file by --teacher-weights")
    for name in ("resnet35", "fasterrcnn_resnet50_fpn"):
        with pytest.raises(SystemExit, match=f"needed: torchvision has no ImageNet .* of '{name}'"):
            imagenet.pretrained(name, 1000)
    with pytest.raises(SystemExit, match="resnet34 has 1000 classes, --data has 3: fetch"):
        imagenet.pretrained("resnet34", 3)
    monkeypatch.setattr(models, "get_model", lambda name, weights: nn.Identity())
    assert isinstance(imagenet.pretrained("resnet34", 1000), nn.Identity)


def test_an_unknown_network_is_refused():
    with pytest.raises(SystemExit, match="no network 'resnet35' in"):
        imagenet.build("resnet35", 3)
