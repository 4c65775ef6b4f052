"""Model, criterion and optimiser step in one CUDA graph; it needs a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detloss_triton import DetrCriterion, Targets, sum_losses

WEIGHTS = {"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2}
IMAGES, BOXES, QUERIES, CLASSES = 4, 8, 20, 3


class Detector(nn.Module):
    """Boxes and classes of queries, from a few numbers of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
        self.classify = nn.Linear(64, QUERIES * CLASSES)
        self.locate = nn.Linear(64, QUERIES * 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {
            "pred_logits": self.classify(features).unflatten(-1, (QUERIES, CLASSES)),
            "pred_boxes": self.locate(features).unflatten(-1, (QUERIES, 4)).sigmoid(),
        }


def batch(seed: int, device: torch.device) -> tuple[Tensor, Targets]:
    """Images (4, 16), and 1 to 4 boxes of each: packed, so that shapes repeat."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5, (IMAGES,), generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES, BOXES), generator=generator)
    boxes = 0.2 + 0.4 * torch.rand(IMAGES, BOXES, 4, generator=generator)
    is_box = torch.arange(BOXES) < counts[:, None]
    targets = labels.masked_fill(~is_box, -1), boxes * is_box[..., None], counts
    images = torch.rand(IMAGES, 16, generator=generator)
    return images.to(device), Targets(*(x.to(device) for x in targets))


def train(in_a_graph: bool, steps: int = 30) -> list[float]:
    """The loss at every step."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model, criterion = Detector().to(device), DetrCriterion(WEIGHTS, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, capturable=True)
    images, targets = batch(0, device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = sum_losses(criterion(model(images), targets))
        loss.backward()
        optimizer.step()
        return loss.detach()

    # Three steps on another stream: kernels are compiled, and the optimiser has its state.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if in_a_graph:
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = step()

    losses = []
    for seed in range(steps):
        new_images, new_targets = batch(seed % 4, device)
        images.copy_(new_images)
        for x, new in zip(targets, new_targets, strict=True):
            x.copy_(new)
        if in_a_graph:
            graph.replay()
        else:
            loss = step()
        losses.append(loss.clone())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    print(" ".join(f"{loss:.2f}" for loss in train(in_a_graph=True)))
