"""A training loop in plain PyTorch, of a small detector like RT-DETR, in mixed precision."""

from __future__ import annotations

from typing import Any

import torch
from squares import CLASSES, SIZE, Squares, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detloss_triton import (
    Denoising,
    DetrCriterion,
    denoising_queries,
    normalised_targets,
    sum_losses,
)

WIDTH, QUERIES, LAYERS = 64, 20, 2


class Detector(nn.Module):
    """Queries that look at an image and move their boxes, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Conv2d(c, WIDTH, 3, 2, 1) for c in (3, WIDTH, WIDTH)]
        self.trunk = nn.Sequential(*(nn.Sequential(step, nn.SiLU()) for step in steps))
        self.place = nn.Parameter(torch.randn((SIZE // 8) ** 2, WIDTH))
        self.content = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.boxes = nn.Parameter(torch.randn(QUERIES, 4))
        self.label = nn.Embedding(CLASSES + 1, WIDTH)  # the last is of no box
        self.position = nn.Linear(4, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, LAYERS).layers
        self.classify, self.move = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor, denoising: Denoising | None) -> dict[str, Any]:
        pixels = self.trunk(images).flatten(2).transpose(1, 2) + self.place
        content = self.content.expand(len(images), -1, -1)
        boxes = self.boxes.sigmoid().expand(len(images), -1, -1)
        blocked = None
        if denoising is not None:  # its queries come first
            content = torch.cat([self.label(denoising.labels), content], 1)
            boxes = torch.cat([denoising.boxes, boxes], 1)
            blocked = denoising.blocked(QUERIES)
        own, spoilt = [], []
        for layer in self.layers:
            content = layer(content + self.position(boxes), pixels, tgt_mask=blocked)
            boxes = (self.move(content).float() + boxes.detach().logit(1e-3)).sigmoid()
            found = {"pred_logits": self.classify(content), "pred_boxes": boxes}
            own.append({name: x[:, -QUERIES:] for name, x in found.items()})
            spoilt.append({name: x[:, :-QUERIES] for name, x in found.items()})
        outputs = {**own[-1], "aux_outputs": own[:-1]}
        if denoising is not None:
            outputs |= {"dn_aux_outputs": spoilt, "dn_meta": denoising.meta}
        return outputs


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    model = Detector().to(device)
    weights = {"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2}
    criterion = DetrCriterion(weights, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    loader = DataLoader(Squares(320), 8, collate_fn=collate)
    for step, (images, in_pixels) in enumerate(loader):
        in_pixels = [{name: x.to(device) for name, x in t.items()} for t in in_pixels]
        targets = normalised_targets(in_pixels, (SIZE, SIZE))
        denoising = denoising_queries(targets, CLASSES, positives=10)
        with torch.autocast(device.type, half):
            outputs = model(images.to(device), denoising)
            loss = sum_losses(criterion(outputs, targets))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
