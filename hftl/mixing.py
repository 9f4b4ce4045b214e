"""Training images mixed with others of their batch: mixup and cutmix."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2


class MixedImages:
    """Mixes each image of a batch with its neighbour, and the labels with it.

    mixup (Zhang et al. 2018): a weighted mean of two pictures, the weight from Beta(a, a). cutmix (Yun et al. 2019): a
    rectangle of one pasted into the other, labels by area. With both, each batch draws one of them (as in timm). What
    is drawn comes from torch's generator of the CPU.

    Args:
        classes: number of classes.
        mixup: a of mixup; None leaves it out.
        cutmix: a of cutmix; None leaves it out.
    """

    def __init__(self, classes: int, mixup: float | None, cutmix: float | None) -> None:
        """Keep the settings."""
        ways: list[Any] = [] if mixup is None else [v2.MixUp(alpha=mixup, num_classes=classes)]
        ways += [] if cutmix is None else [v2.CutMix(alpha=cutmix, num_classes=classes)]
        self.mix = v2.RandomChoice(ways)

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (rows, 3, height, width) mixed; `labels` become shares, shape (rows, classes)."""
        pixels, labels = self.mix(batch["pixel_values"], batch["labels"])
        return {**batch, "pixel_values": pixels, "labels": labels}
