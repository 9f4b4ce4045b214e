r"""A modality of one's own in one file: clouds of points, each a .npy file of shape (points, 3), in class folders.

    python recipes/custom_modality.py --output_dir runs/clouds --num_train_epochs 30
    python recipes/custom_modality.py --model runs/clouds --dataset path/to/folder --method frozen --head knn

Without --dataset it makes boxes, balls and rods. Methods, kept features, heads, the report and `push` come with hftl.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hftl
from hftl import builtin, pretrained


def problem(value, full):
    """Why a file holds no cloud, or None."""
    try:
        shape = np.load(value, mmap_mode="r").shape
    except (ValueError, OSError) as error:
        return str(error)
    return None if len(shape) == 2 and shape[1] == 3 else f"its shape is {shape}, not (points, 3)"


CLOUD = hftl.Modality("cloud", "clouds of points", frozenset({".npy"}), ("cloud", "points", "file", "path"), problem)


@dataclass
class Arguments(hftl.TransferArguments):
    """The arguments of every task, and defaults of this one."""

    task: str = "cloud-classification"
    learning_rate: float | None = 3e-3


class CloudConfig(PreTrainedConfig):
    """Its size."""

    model_type, width = "cloud", 64


class CloudModel(PreTrainedModel):
    """The same layers for every point, then the largest value of each feature (PointNet, Qi et al. 2017)."""

    config_class, base_model_prefix, main_input_name = CloudConfig, "body", "points"

    def __init__(self, config):
        """Three layers and a head."""
        super().__init__(config)
        layers = [nn.Sequential(nn.Linear(size, config.width), nn.ReLU()) for size in (3, config.width, config.width)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, points, labels=None):
        """Logits of shape (rows, classes) for points of shape (rows, points, 3)."""
        return SequenceClassifierOutput(logits=self.head(self.body(points).amax(dim=1)))


class Clouds(hftl.FileDataset):
    """As many points of each cloud, about their middle."""

    column = CLOUD.name

    def example(self, value):
        """`points` of shape (256, 3)."""
        points = np.load(value).astype(np.float32)
        points = np.resize(np.random.default_rng(0).permutation(points), (256, 3))
        return {"points": torch.from_numpy(points - points.mean(axis=0))}


class CloudClassification(hftl.ClassificationTask):
    """One label a cloud."""

    name, modality, auto_class, arguments_class, batch_size = Arguments.task, CLOUD, CloudModel, Arguments, 16

    def load_model(self, splits):
        """A new network, or one of an earlier run with a new head."""
        if not str(self.arguments.model_name_or_path).startswith("random:"):
            source = pretrained.find_model(self.arguments.model_name_or_path)
            return pretrained.load_model(CloudModel, source, self.label_names, self.arguments)
        names = dict(enumerate(self.label_names))
        return CloudModel(CloudConfig(id2label=names, label2id={name: index for index, name in names.items()}))

    def dataset(self, rows, training):
        """Rows that are read when they are asked for."""
        return Clouds(rows)


def make_clouds(folder):
    """Boxes, balls and rods, turned at random."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for name in ("ball", "box", "rod"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                points = random.uniform(-1, 1, (300, 3)) * ([0.2, 0.2, 1] if name == "rod" else 1)
                points /= np.linalg.norm(points, axis=1, keepdims=True) if name == "ball" else 1
                np.save(folder / split / name / f"{number}.npy", points @ np.linalg.qr(random.normal(size=(3, 3)))[0])
    return str(folder)


def main(argv=None):
    """From the command line to the finished run."""
    arguments = hftl.parse(Arguments, argv, description=__doc__)
    arguments.dataset_name = arguments.dataset_name or make_clouds(builtin.cache_folder() / "clouds")
    arguments.model_name_or_path = arguments.model_name_or_path or "random:cloud"
    task = CloudClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    return hftl.fit(task, hftl.build_plan(model, arguments), splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
