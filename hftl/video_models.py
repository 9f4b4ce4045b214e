"""Networks of torchvision and PyTorchVideo for videos, as one ordinary model of transformers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForVideoClassification,
    PreTrainedConfig,
    PreTrainedModel,
    VideoMAEImageProcessor,
)
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import ImageClassifierOutput

from hftl.errors import UsageError, did_you_mean

#: `image_mean` and `image_std`
Normalisation = dict[str, tuple[float, ...]]
#: what most of these networks were trained with (Kinetics-400, as both libraries say)
_KINETICS: Normalisation = {"image_mean": (0.43216, 0.394666, 0.37645), "image_std": (0.22803, 0.22145, 0.216989)}
_IMAGENET: Normalisation = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_PLAIN: Normalisation = {"image_mean": (0.45, 0.45, 0.45), "image_std": (0.225, 0.225, 0.225)}
#: torchvision's architectures → frames and side in pixels that their weights are for, and what they normalise by
TORCHVISION: Mapping[str, tuple[int, int, Normalisation]] = MappingProxyType(
    {
        "r3d_18": (16, 112, _KINETICS),
        "mc3_18": (16, 112, _KINETICS),
        "r2plus1d_18": (16, 112, _KINETICS),
        "mvit_v1_b": (16, 224, _PLAIN),
        "mvit_v2_s": (16, 224, _PLAIN),
        "swin3d_t": (32, 224, _IMAGENET),
        "swin3d_s": (32, 224, _IMAGENET),
        "swin3d_b": (32, 224, _IMAGENET),
    }
)
#: … and PyTorchVideo's
PYTORCHVIDEO: Mapping[str, tuple[int, int, Normalisation]] = MappingProxyType(
    {
        "c2d_r50": (8, 224, _PLAIN),
        "i3d_r50": (8, 224, _PLAIN),
        "slow_r50": (8, 224, _PLAIN),
        "slowfast_r50": (32, 224, _PLAIN),
        "slowfast_r101": (32, 224, _PLAIN),
        "x3d_xs": (4, 160, _PLAIN),
        "x3d_s": (13, 160, _PLAIN),
        "x3d_m": (16, 224, _PLAIN),
        "x3d_l": (16, 312, _PLAIN),
    }
)
#: of the frames of SlowFast's fast path its slow one sees every fourth (Feichtenhofer et al. 2019)
_ALPHA = 4


class VideoConfig(PreTrainedConfig):
    """Settings of a `VideoModel`.

    Attributes:
        architecture: a key of `TORCHVISION` or `PYTORCHVIDEO`.
        num_frames: frames of a video that it reads.
        image_size: their side in pixels.
        dropout: part of the features that are left out in training.
    """

    model_type = "hftl_video"
    architecture: str = "r3d_18"
    num_frames: int = 16
    image_size: int = 112
    dropout: float = 0.0


class VideoModel(PreTrainedModel):
    """A network of another library without its head, and a linear layer on its features."""

    config_class = VideoConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        """The architecture, with weights that have learned nothing."""
        super().__init__(config)
        self.network, features = headless(config.architecture)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(features, config.num_labels)
        self.two_paths = config.architecture.startswith("slowfast")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The libraries' own networks are drawn as they come."""
        if module is getattr(self, "classifier", None):
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits of shape (rows, classes).

        Args:
            pixel_values: shape (rows, frames, 3, height, width), as transformers' models of videos take it.
            labels: class ids, shape (rows,), for the loss.
        """
        frames: Any = pixel_values.transpose(1, 2)
        if self.two_paths:
            count = frames.shape[2]
            slow = torch.linspace(0, count - 1, max(1, count // _ALPHA), device=frames.device).long()
            frames = [frames.index_select(2, slow), frames]
        logits = self.classifier(self.dropout(self.network(frames).flatten(1)))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def settings(architecture: str, label_names: Sequence[str], **sizes: int) -> VideoConfig:
    """The configuration of an architecture, at its usual sizes but for those that are given.

    Raises:
        UsageError: there is no such architecture.
    """
    known = {**TORCHVISION, **PYTORCHVIDEO}
    if architecture not in known:
        raise UsageError(
            f"--model random:{architecture}: no such architecture of videos.{did_you_mean(architecture, known)} There "
            f"are: {', '.join(known)}, and those of transformers (random:videomae)."
        )
    frames, side, _ = known[architecture]
    labels = dict(enumerate(label_names))
    return VideoConfig(
        architecture=architecture,
        **{"num_frames": frames, "image_size": side, **sizes},
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )


def normalisation(architecture: str) -> Normalisation:
    """Mean and deviation of the pixels that an architecture's published weights are for."""
    return {**TORCHVISION, **PYTORCHVIDEO}[architecture][2]


def headless(architecture: str) -> tuple[nn.Module, int]:
    """A network whose answer is its features, with random weights, and how many these are.

    Raises:
        UsageError: there is no such architecture, or its library is not installed.
    """
    if architecture not in {**TORCHVISION, **PYTORCHVIDEO}:  # the configuration may come from elsewhere
        raise UsageError(f"hftl has no architecture of videos {architecture!r}.")
    network, features = (_torchvision if architecture in TORCHVISION else _pytorchvideo)(architecture)
    for module in network.modules():
        # torchvision's own classes of convolutions only choose sizes when they are built; adapters know torch's class.
        if isinstance(module, nn.Conv3d) and type(module).forward is nn.Conv3d.forward:
            module.__class__ = nn.Conv3d
    return network, features


def write_checkpoint(
    architecture: str, state: Mapping[str, torch.Tensor], folder: Path, resized: int | None = None
) -> None:
    """A folder with published weights as a `VideoModel`, its head not trained, and with an image processor.

    Args:
        architecture: a key of one of the tables.
        state: of the library's own model.
        folder: which is there.
        resized: pixels of the shorter side before the crop; by default an eighth more than the crop, as is usual.

    Raises:
        UsageError: the weights are not those of the installed architecture.
    """
    config = settings(architecture, ["0", "1"])
    model = VideoModel(config)
    found = model.network.load_state_dict(dict(state), strict=False)
    others = [key for key in found.unexpected_keys if not _is_of_a_head(key, architecture)]
    if found.missing_keys or others:
        raise UsageError(f"The weights of {architecture} are not those of the installed version of its library.")
    model.save_pretrained(folder)
    by = normalisation(architecture)
    processor(config.image_size, by, resized or config.image_size * 8 // 7).save_pretrained(folder)


def _is_of_a_head(key: str, architecture: str) -> bool:
    return key.startswith(("fc.", "head.")) if architecture in TORCHVISION else ".proj." in key


def processor(side: int, by: Normalisation | None = None, resized: int | None = None) -> VideoMAEImageProcessor:
    """What makes a model's pixels of frames: the shorter side to `resized`, by default to the crop's."""
    return VideoMAEImageProcessor(
        size={"shortest_edge": resized or side}, crop_size={"height": side, "width": side}, **(by or {})
    )


def pytorchvideo_address(architecture: str) -> str:
    """Where the weights of a network are.

    Raises:
        UsageError: the package is not installed.
    """
    return sys.modules[getattr(_hub(architecture), architecture).__module__].checkpoint_paths[architecture]


def pytorchvideo_network(architecture: str) -> Any:
    """PyTorchVideo's own model, with its head and random weights.

    Raises:
        UsageError: the package is not installed.
    """
    return getattr(_hub(architecture), architecture)(pretrained=False)


def _hub(architecture: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is compiled by means that torch has others for now
            from pytorchvideo.models import hub
    except ImportError as error:
        raise UsageError(
            f"{architecture} is a network of PyTorchVideo, which is not installed: pip install 'hftl[video]'"
        ) from error
    return hub


def _torchvision(architecture: str) -> tuple[nn.Module, int]:
    from torchvision import models

    network: Any = models.get_model(architecture, weights=None)
    name = "fc" if hasattr(network, "fc") else "head"
    head = getattr(network, name)
    last = next(layer for layer in head.modules() if isinstance(layer, nn.Linear))
    setattr(network, name, nn.Identity())
    return network, last.in_features


def _pytorchvideo(architecture: str) -> tuple[nn.Module, int]:
    network = pytorchvideo_network(architecture)
    head = network.blocks[-1]
    features = head.proj.in_features
    head.proj, head.activation, head.dropout = nn.Identity(), None, None
    # The means are over windows as large as the maps that the published sizes give: over all of a map it is the same
    # there, and works at other sizes too.
    for block in network.blocks[-2:]:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.AvgPool3d):
                block.set_submodule(name, nn.AdaptiveAvgPool3d(1))
    return network, features


AutoConfig.register(VideoConfig.model_type, VideoConfig)
AutoModelForVideoClassification.register(VideoConfig, VideoModel)
