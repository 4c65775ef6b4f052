"""A whole loss in a LightningModule: YOLOX's, of a head on one level."""

from __future__ import annotations

import lightning
import torch
from squares import CLASSES, Squares, Target, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detloss_triton import YOLOXLoss, sum_losses

STRIDE, WIDTH = 8, 32


class Detector(lightning.LightningModule):
    """The loss is a module without parameters, so it is a part of the model like any other."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Conv2d(c, WIDTH, 3, 2, 1) for c in (3, WIDTH, WIDTH)]
        self.trunk = nn.Sequential(*(nn.Sequential(step, nn.SiLU()) for step in steps))
        self.classify = nn.Conv2d(WIDTH, CLASSES, 1)
        self.measure = nn.Conv2d(WIDTH, 4, 1)
        self.is_object = nn.Conv2d(WIDTH, 1, 1)
        self.loss = YOLOXLoss(CLASSES, strides=[STRIDE])

    def training_step(self, batch: tuple[Tensor, list[Target]], index: int) -> Tensor:
        images, targets = batch
        features = self.trunk(images)
        heads = (self.classify, self.measure, self.is_object)
        losses = self.loss(*([head(features)] for head in heads), targets)
        total = sum_losses(losses)
        self.log_dict(losses, batch_size=len(images))
        self.log("loss", total, batch_size=len(images), on_step=False, on_epoch=True)
        return total

    def on_train_epoch_end(self) -> None:
        mean = self.trainer.callback_metrics["loss"].item()
        print(f"epoch {self.current_epoch + 1}: loss {mean:.3f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Detector(), DataLoader(Squares(80), 8, collate_fn=collate))


if __name__ == "__main__":
    main()
