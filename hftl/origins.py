"""Pretrained models by the names of other libraries: `torchvision:resnet50`, `keras:EfficientNetB0`, …"""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError

import torch

from hftl.builtin import cache_folder, explained_cache, in_order, made_once, write_timm_checkpoint
from hftl.errors import UsageError, did_you_mean, load_reason
from hftl.folder import say
from hftl.hub import check_hub
from hftl.weights import fill_from

#: torchvision's models whose layers timm has in the same order, where the names differ
_RENAMED = {
    **{
        f"efficientnet_b{size}": f"tf_efficientnet_b{size}" for size in (5, 6, 7)
    },  # BatchNorm's epsilon is that of these
    "efficientnet_v2_m": "tf_efficientnetv2_m",
    "efficientnet_v2_l": "tf_efficientnetv2_l",
    "mnasnet0_5": "mnasnet_050",
    "mnasnet0_75": "mnasnet_075",
    "mnasnet1_0": "mnasnet_100",
    "mobilenet_v2": "mobilenetv2_100",
}
#: … and where they do not
_SAME = (
    "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2",
    "efficientnet_b3", "efficientnet_b4", "inception_v3", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
TORCHVISION: Mapping[str, str] = MappingProxyType({**{name: name for name in _SAME}, **_RENAMED})

#: Keras Applications whose weights timm has ported. The source of both is named: with AutoAugment, as the accuracies in
#: Keras' table say, github.com/tensorflow/tpu/tree/master/models/official/efficientnet; github.com/google/automl
#: (efficientnetv2, ImageNet-1k alone); github.com/tensorflow/models (slim, mobilenet v3 and Inception-ResNet v2);
#: Xception's are Keras' own.
KERAS: Mapping[str, str] = MappingProxyType(
    {
        **{f"EfficientNetB{size}": f"tf_efficientnet_b{size}.aa_in1k" for size in range(8)},
        **{f"EfficientNetV2B{size}": f"tf_efficientnetv2_b{size}.in1k" for size in range(4)},
        **{f"EfficientNetV2{size}": f"tf_efficientnetv2_{size.lower()}.in1k" for size in "SML"},
        "InceptionResNetV2": "inception_resnet_v2.tf_in1k",
        "MobileNetV3Large": "tf_mobilenetv3_large_100.in1k",
        "MobileNetV3Small": "tf_mobilenetv3_small_100.in1k",
        "Xception": "legacy_xception.tf_in1k",
    }
)
#: how far the answers of the two implementations may lie apart, relative to the largest
_TOLERANCE = 1e-4
_HALF = (0.5, 0.5, 0.5)


def torchvision_model(name: str) -> str:
    """A folder with torchvision's own weights: of pictures in timm's architecture, which gives the same answers.

    Args:
        name: `resnet50`, or with one of its sets of weights `resnet50:IMAGENET1K_V1`; by default torchvision's own
            default.

    Raises:
        UsageError: there is no such model or set of weights, timm has not its layers, or it cannot be downloaded.
    """
    from torchvision import models

    from hftl import video_models

    architecture, _, tag = name.partition(":")
    known = {**TORCHVISION, **video_models.TORCHVISION}
    if architecture not in known:
        there = architecture in models.list_models()
        why = "timm does not have its layers, which hftl saves models in." if there else "there is no such model."
        raise UsageError(
            f"--model torchvision:{architecture}: {why}{did_you_mean(architecture, known)} There are: "
            f"{', '.join(TORCHVISION)}; of videos {', '.join(video_models.TORCHVISION)}."
        )
    sets: Any = models.get_model_weights(architecture)
    if tag and tag not in sets.__members__:
        raise UsageError(
            f"--model torchvision:{name}: there is no {tag!r} of it.{did_you_mean(tag, sets.__members__)} There are: "
            f"{', '.join(sets.__members__)}."
        )
    weights = sets[tag] if tag else sets.DEFAULT
    kind = _write_video if architecture in video_models.TORCHVISION else _write_torchvision
    write: Callable[[Path], None] = functools.partial(kind, architecture, weights)
    with explained_cache(f"torchvision:{name}"):
        return str(made_once(f"torchvision-{architecture}-{weights.name}", write))


def _write_torchvision(architecture: str, weights: Any, folder: Path) -> None:
    from torchvision import models

    with _explained_fetch(f"torchvision:{architecture}", weights.url):
        weights.get_state_dict(check_hash=True, weights_only=True)  # else torchvision would read any pickle
        theirs = models.get_model(architecture, weights=weights).eval()
    preset = weights.transforms()
    mean, std = preset.mean, preset.std
    ours = TORCHVISION[architecture]
    try:
        source = {key: value for key, value in theirs.state_dict().items() if not key.startswith("AuxLogits.")}
        state = in_order(source, ours)
    except ValueError as error:
        raise _differs(architecture, str(error)) from error
    settings = {"mean": mean, "std": std}
    if getattr(theirs, "transform_input", False):  # Inception's pixels are from -1 to 1, whatever they came as
        settings = {"mean": _HALF, "std": _HALF}
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    difference = _difference(theirs, (mean, std), ours, state, settings, crop)
    if not difference <= _TOLERANCE:
        raise _differs(architecture, f"by {difference:.1e}, relative")
    write_timm_checkpoint(
        ours,
        state,
        folder,
        **settings,
        input_size=(3, crop, crop),
        crop_pct=crop / resize,
        interpolation=preset.interpolation.value,
        tag=weights.name.lower(),
    )


def _write_video(architecture: str, weights: Any, folder: Path) -> None:
    from hftl import video_models

    with _explained_fetch(f"torchvision:{architecture}", weights.url):
        state = weights.get_state_dict(check_hash=True, weights_only=True)
    preset = weights.transforms()
    video_models.write_checkpoint(architecture, state, folder, int(preset.resize_size[0]))


def pytorchvideo_model(name: str) -> str:
    """A folder with PyTorchVideo's own weights of a network.

    Raises:
        UsageError: there is no such network, the package is not installed, or they cannot be downloaded.
    """
    from hftl import video_models

    known = video_models.PYTORCHVIDEO
    if name not in known:
        raise UsageError(
            f"--model pytorchvideo:{name}: there is no such model.{did_you_mean(name, known)} There are: "
            f"{', '.join(known)}."
        )
    address = video_models.pytorchvideo_address(name)

    def write(folder: Path) -> None:
        with _explained_fetch(f"pytorchvideo:{name}", address):
            state = torch.hub.load_state_dict_from_url(address, map_location="cpu", weights_only=True)["model_state"]
        video_models.write_checkpoint(name, state, folder)

    with explained_cache(f"pytorchvideo:{name}"):
        return str(made_once(f"pytorchvideo-{name}", write))


def torchhub_model(name: str, trusted: bool = False) -> str:
    """A folder with the weights of a network of torch.hub, in timm's architecture of the same kind.

    The repository's own code builds the network, once; what is kept and trained is an ordinary model of timm.

    Args:
        name: `owner/repository:entry`, or `owner/repository:branch:entry`; the entry's name has timm's name of the
            architecture in it (`dino_resnet50`).
        trusted: whether the repository's code may run.

    Raises:
        UsageError: it may not and has not yet, it fails, timm has no such architecture, or not these weights.
    """
    import timm

    repository, _, entry = name.rpartition(":")
    if repository.partition(":")[0].count("/") != 1 or not entry:
        raise UsageError(f"--model torchhub:{name}: write torchhub:OWNER/REPOSITORY:ENTRY.")
    spelled = entry.lower().replace("-", "_")
    architecture = max((one for one in timm.list_models() if one in spelled), key=len, default=None)
    if architecture is None:
        raise UsageError(
            f"--model torchhub:{name}: timm has no architecture that {entry!r} names, and hftl saves models in its "
            "layers. Save the network's state_dict, and use --model random:ARCH --weights FILE."
        )
    place = f"torchhub-{re.sub('[^A-Za-z0-9_.]+', '-', name)}"
    if not trusted and not (cache_folder() / place).is_dir():
        raise UsageError(
            f"--model torchhub:{name} runs Python code of github.com/{repository}: read that code, and "
            "--trust_remote_code runs it."
        )
    with explained_cache(f"torchhub:{name}"):
        return str(made_once(place, functools.partial(_write_torchhub, repository, entry, architecture)))


def _write_torchhub(repository: str, entry: str, architecture: str, folder: Path) -> None:
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    name = f"torchhub:{repository}:{entry}"
    with _explained_fetch(name, f"github.com/{repository}"):
        network = _network_of(repository, entry)
    ours: Any = timm.create_model(architecture).eval()
    state = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    count, total = fill_from(ours, state, f"--model {name}")
    say(f"model: {count} of the {total} tensors of {architecture} are those of {name}")
    by = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    pixels = torch.rand(2, *ours.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = network.eval()(pixels)
        features = ours.forward_head(ours.forward_features(pixels), pre_logits=True)
    if isinstance(theirs, torch.Tensor) and theirs.shape == features.shape:
        difference = float((theirs - features).abs().max() / theirs.abs().max())
        if not difference <= _TOLERANCE:
            raise UsageError(
                f"--model {name}: timm's {architecture} gives other features with the same weights (by "
                f"{difference:.1e}, relative). Choose a model of timm's own."
            )
    else:
        say(f"model: whether timm's {architecture} gives the same answers cannot be seen, since theirs are no features")
    say("model: pixels are normalised as ImageNet's, of which torch.hub says nothing")
    write_timm_checkpoint(architecture, ours.state_dict(), folder, **by, tag="torchhub")


def _network_of(repository: str, entry: str) -> torch.nn.Module:
    """What the entry gives with its pretrained weights.

    Raises:
        UsageError: the code fails, or gives something else.
    """
    try:
        try:
            found = torch.hub.load(repository, entry, trust_repo=True, skip_validation=True, pretrained=True)
        except TypeError as error:
            if "pretrained" not in str(error):  # an entry without such an argument has no other weights
                raise
            found = torch.hub.load(repository, entry, trust_repo=True, skip_validation=True)
    except (URLError, OSError):
        raise
    except Exception as error:  # code of others may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"--model torchhub:{repository}:{entry}: its code does not run here ({reason}).") from error
    if not isinstance(found, torch.nn.Module):
        raise UsageError(f"--model torchhub:{repository}:{entry} is no network, but {type(found).__name__}.")
    return found


@contextlib.contextmanager
def _explained_fetch(name: str, address: str) -> Iterator[None]:
    """Say what is fetched, and why it could not be: no connection; no room; a file that is not what it was."""
    say(f"model: {address} is fetched")
    try:
        yield
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UsageError(f"--model {name}: {address} cannot be fetched: {load_reason(error)}") from error


def _differs(architecture: str, how: str) -> UsageError:
    return UsageError(
        f"--model torchvision:{architecture}: timm's {TORCHVISION[architecture]} gives other answers with the same "
        f"weights in the installed versions of both libraries ({how}). Choose a model of timm's own."
    )


@torch.no_grad()
def _difference(
    theirs: torch.nn.Module,
    normalised: tuple[Any, Any],
    architecture: str,
    state: dict[str, torch.Tensor],
    settings: dict[str, Any],
    side: int,
) -> float:
    """How far the answers of the two implementations for the same pixels lie apart, relative to the largest."""
    import timm

    def channels(values: Any) -> torch.Tensor:
        return torch.tensor(values).view(1, 3, 1, 1)

    ours = timm.create_model(architecture).eval()
    ours.load_state_dict(state)
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = theirs((pixels - channels(normalised[0])) / channels(normalised[1]))
    found = ours((pixels - channels(settings["mean"])) / channels(settings["std"]))
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def keras_model(name: str) -> str:
    """The Hub id of timm's port of a model of Keras Applications.

    Raises:
        UsageError: there is no such model, or no port of its weights is known.
    """
    names = {known.lower(): known for known in KERAS}
    known = names.get(name.lower())
    if known is None:
        raise UsageError(
            f"--model keras:{name}: no port of the weights of such a model is known.{did_you_mean(name, KERAS)} There "
            f"are: {', '.join(KERAS)}."
        )
    check_hub()
    place = f"timm/{KERAS[known]}"
    say(f"model: keras:{known} is {place}")
    return place
