"""Our losses in a model of transformers, trained by its `Trainer`: a tiny RT-DETR at random."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from squares import CLASSES, SIZE, Squares
from torch import Tensor
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    Trainer,
    TrainingArguments,
)

from detloss_triton import normalised_targets
from detloss_triton.integrations.transformers import apply_to


def tiny_model() -> RTDetrForObjectDetection:
    """In place of `RTDetrForObjectDetection.from_pretrained(...)`, which downloads one."""
    levels = ["stage2", "stage3", "stage4"]
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1] * 4}
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**sizes, layer_type="basic", out_features=levels),
        encoder_in_channels=[32] * 3,
        encoder_hidden_dim=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_in_channels=[32] * 3,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=2,
        d_model=32,
        num_queries=20,
        num_denoising=10,
        num_labels=CLASSES,
    )
    return RTDetrForObjectDetection(config)


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Any]:
    """As an image processor of transformers packs them, boxes normalised."""
    targets = normalised_targets([target for _, target in samples], (SIZE, SIZE))
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    return {"pixel_values": torch.stack([image for image, _ in samples]), "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    model = apply_to(tiny_model())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(model, arguments, collate, Squares(320))
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}")


if __name__ == "__main__":
    main()
