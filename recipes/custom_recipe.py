r"""A recipe of one's own: another task, another method and another loss in one file, without touching the package.

    python recipes/custom_recipe.py --model builtin:efficientnet_lite0 --dataset builtin:digits --gamma 1.5

The method can also be used alone, by any recipe:

    hftl train image-classification --method recipes/custom_recipe.py:norms_and_head \
        --model builtin:efficientnet_lite0 --dataset builtin:digits --horizontal_flip false
"""

from dataclasses import dataclass, field

import torch
from PIL import ImageOps

import hftl
from hftl import backbones


@dataclass
class Arguments(hftl.ImageArguments):
    """The arguments of image classification, and one more."""

    task: str = "even-light"
    gamma: float = field(default=2.0, metadata={"help": "How much the focal loss passes over easy rows."})
    horizontal_flip: bool = False
    method: str = f"{__file__}:norms_and_head"


class EvenLight(hftl.ImageClassification):
    """Image classification with the contrast of every image stretched over the whole range."""

    arguments_class = Arguments

    def open_image(self, value):
        """The picture of a row, in training and in prediction."""
        return ImageOps.autocontrast(super().open_image(value))


def norms_and_head(model, arguments):
    """Only the normalisation layers and the head train (Frankle et al. 2021)."""
    norms = tuple(f"{name}." for name in backbones.normalisation_modules(model))
    names = [name for name, _ in model.named_parameters() if name.startswith(norms)]
    trainable = frozenset(names + backbones.head_parameters(model))
    rate, head_rate = arguments.learning_rate or 1e-3, arguments.head_learning_rate or 3e-3
    loss = FocalLoss(arguments.gamma) if hasattr(arguments, "gamma") else None
    epochs = arguments.num_train_epochs or 3
    return hftl.Plan(model, (hftl.Stage("norms and head", trainable, rate, head_rate, epochs, loss=loss),))


class FocalLoss:
    """Cross entropy that passes over rows which are right already (Lin et al. 2017)."""

    def __init__(self, gamma):
        """Keep the exponent."""
        self.gamma = gamma

    def __call__(self, outputs, labels, num_items_in_batch=None):
        """The loss over all rows of an optimizer step, whatever the parts in which they come."""
        losses = torch.nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="none")
        total = ((1 - torch.exp(-losses)) ** self.gamma * losses).sum()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def main(argv=None):
    """From the command line to the finished run."""
    arguments = hftl.parse(Arguments, argv, description=__doc__)
    task = EvenLight(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    return hftl.fit(task, hftl.build_plan(model, arguments), splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
