"""Hugging Face: two vision transformers, batches as dicts of keywords, the library's own Trainer.

    distiller = vision_pair(student, teacher)
    DistillationTrainer(model=distiller, args=arguments, train_dataset=data).train()
    distiller.export().save_pretrained("student")

`arguments`, a `TrainingArguments`, needs `remove_unused_columns=False`: the Trainer cannot infer
from the Distiller which columns its models take.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import sokd


def vision_pair(student: nn.Module, teacher: nn.Module, **options: Any) -> sokd.Distiller:
    """A Distiller of two ViTForImageClassification: the last patch tokens and the logits."""
    side, channels = student.config.image_size, student.config.num_channels
    example = {"pixel_values": torch.zeros(2, channels, side, side)}
    given = {"layers": "vit.layernorm", "method": {"fitnet": 1.0, "kd": 1.0}, "example": example}
    return sokd.Distiller(student, teacher, **{**given, **options})


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose model is a `sokd.Distiller`: the objective is the sum of its losses."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        logits, losses = model(inputs)  # a dict: the models are called as model(**inputs)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
