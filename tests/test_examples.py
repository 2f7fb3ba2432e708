"""The files of examples/ run, each where its library is installed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from distiller_cases import SMALL, Net, batch, models, one_thread  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"plain_pytorch", "lightning_module", "hugging_face"}


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
        teacher, student, example=x, layers="stage2", method="fitnet", sokd=SMALL
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    before = student.stem[0].weight.detach().clone()
    trainer.fit(module, loader, loader)
    assert not torch.equal(before, student.stem[0].weight)
    assert {"loss_fitnet", "loss_agreement", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
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
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, num_labels=3,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)

    huggingface = example("hugging_face")
    student = vit(1, 16)
    distiller = huggingface.vision_pair(vit(2, 24), student, sokd=SMALL)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = student.classifier.weight.detach().clone()
    trainer = huggingface.DistillationTrainer(model=distiller, args=arguments, train_dataset=Images())
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, student.classifier.weight)
    distiller.export().save_pretrained(tmp_path / "student")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.classifier.weight, student.classifier.weight)
