"""torchvision's targets, straight into a whole loss: RTMDet's, of a head on one level."""

from __future__ import annotations

import torch
from squares import CLASSES, Squares, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detloss_triton import RTMDetLoss, sum_losses

STRIDE, WIDTH = 8, 32


class Detector(nn.Module):
    """Class logits (B, C, h, w), and distances to a box's sides (B, 4, h, w) in pixels."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Conv2d(c, WIDTH, 3, 2, 1) for c in (3, WIDTH, WIDTH)]
        self.trunk = nn.Sequential(*(nn.Sequential(step, nn.SiLU()) for step in steps))
        self.classify, self.measure = nn.Conv2d(WIDTH, CLASSES, 1), nn.Conv2d(WIDTH, 4, 1)
        nn.init.constant_(self.classify.bias, -4.0)  # at first hardly anything is an object

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.classify(features), self.measure(features).exp() * STRIDE


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, loss_of = Detector().to(device), RTMDetLoss(CLASSES, strides=[STRIDE])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step, (images, targets) in enumerate(DataLoader(Squares(320), 8, collate_fn=collate)):
        # {"boxes": xyxy in pixels, "labels"}. torchvision's own detectors have background for
        # class 0: of targets made for them, hand over labels - 1.
        targets = [{name: x.to(device) for name, x in target.items()} for target in targets]
        logits, distances = model(images.to(device))
        loss = sum_losses(loss_of([logits], [distances], targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    boxes = loss_of.decode([distances])  # (B, h * w, 4) xyxy in pixels, for inference
    best = logits.flatten(2).amax(1).argmax(1)
    print("likeliest box of the last image:", [round(x) for x in boxes[-1, best[-1]].tolist()])
    print("its true boxes:", targets[-1]["boxes"].int().tolist())


if __name__ == "__main__":
    main()
