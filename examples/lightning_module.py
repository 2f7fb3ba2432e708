"""Lightning: a LightningModule around a `sokd.Distiller`.

    module = Distillation(student, teacher, example=images, layers="layer3", method="reviewkd")
    lightning.Trainer(max_epochs=240).fit(module, train_loader, validation_loader)
    torch.save(module.distiller.export().state_dict(), "student.pt")

`example` is required because Lightning reads the parameters before the first batch. Several devices
and mixed precision are options of the Trainer (`devices=`, `precision=`). Its checkpoints do not
contain the teacher.
"""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

import sokd


class Distillation(lightning.LightningModule):
    """`options` are those of `sokd.Distiller`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        example: Tensor,
        lr: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.distiller = sokd.Distiller(student, teacher, example=example, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.distiller.student(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        _, losses = self.distiller(*batch)
        self.log_dict(losses)
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits, losses = self.distiller(x, y)  # in eval mode: the student and the task's loss
        self.log("val_loss", losses["loss_ce"])
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
