"""Pretrained models by the names of other libraries."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import small_data
import timm
import torch
import torchvision

import hftl
from hftl import backbones, origins, pretrained
from hftl.errors import UsageError


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The file that torchvision would fetch for its ResNet-18, with weights of its layout."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "hftl"))
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    file = tmp_path / "torch" / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    return state


def test_torchvision_s_own_weights(planted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    small_data.write_images(tmp_path / "images", {"train": 4, "val": 2}, size=16)
    settings = {"dataset": tmp_path / "images", "method": "frozen", "image_size": 32, "output_dir": tmp_path / "run"}
    run = hftl.finetune("image-classification", model="torchvision:resnet18", **settings)
    head = backbones.structure(run.model).trained_head
    for key, value in run.model.state_dict().items():
        if not backbones.is_below_any(key, head):
            assert torch.equal(value, planted[key.removeprefix("timm_model.")]), key
    assert run.task.processor.data_config["crop_pct"] == pytest.approx(224 / 256)
    assert run.task.processor.data_config["mean"] == pytest.approx((0.485, 0.456, 0.406))


def test_the_folder_is_made_once(planted: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretrained.find_model("torchvision:resnet18")
    monkeypatch.setattr(origins, "_write_torchvision", pytest.fail)
    assert pretrained.find_model("torchvision:resnet18:IMAGENET1K_V1") == folder


def test_other_answers_are_refused(
    planted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = functools.partial(timm.create_model, norm_layer=functools.partial(torch.nn.BatchNorm2d, eps=0.1))
    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(UsageError, match="gives other answers with the same weights"):
        pretrained.find_model("torchvision:resnet18")
    assert not list(tmp_path.glob("hftl/*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet5", ["no such model", "resnet50"]),
        ("torchvision:swin_t", ["timm does not have its layers", "resnet50"]),
        ("torchvision:resnet18:IMAGENET1K_V2", ["no 'IMAGENET1K_V2' of it", "IMAGENET1K_V1"]),
        ("torchvision:resnet18", ["cannot be fetched", "no connection"]),
        ("keras:EfficientNetB", ["no port", "EfficientNetB0"]),
        ("keras:VGG16", ["no port", "EfficientNetB0"]),  # timm has torchvision's, which are others
    ],
)
def test_what_there_is_not(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no connection")

    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        pretrained.find_model(name)
    assert all(word in str(caught.value) for word in [name, *words])
    assert not list(tmp_path.glob("torchvision*"))


def test_the_tables_name_what_timm_has() -> None:
    assert all(timm.is_model(architecture) for architecture in origins.TORCHVISION.values())
    assert set(origins.KERAS.values()) <= set(timm.list_pretrained())
    assert pretrained.find_model("keras:efficientnetb0") == "timm/tf_efficientnet_b0.aa_in1k"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v3", "mobilenet_v2", "densenet121", "mnasnet0_5"])
def test_timm_gives_the_same_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, **({"init_weights": False} if name == "inception_v3" else {}))
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    monkeypatch.setattr(type(torchvision.models.get_model_weights(name).DEFAULT), "get_state_dict", state_of(theirs))
    assert (Path(pretrained.find_model(f"torchvision:{name}")) / "model.safetensors").is_file()


def state_of(model: torch.nn.Module) -> Any:
    return lambda *_, **__: model.state_dict()


HUBCONF = """
import torch, torchvision

def bare_resnet18(pretrained=False):
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    assert pretrained
    network.load_state_dict(torch.load("WEIGHTS", weights_only=True), strict=False)
    return network

def whole_resnet18():
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load("WEIGHTS", weights_only=True))
    return network

def other_resnet18(pretrained=False):
    return torchvision.models.resnet34()

def shifted_resnet18(pretrained=False):
    network = bare_resnet18(pretrained)
    network.fc = torch.nn.Linear(512, 512)
    return network

def broken_resnet18(pretrained=False):
    raise KeyError("no such file")

def number_resnet18(pretrained=False):
    return 18

def mystery(pretrained=False):
    return torchvision.models.resnet18()
"""


@pytest.fixture
def planted_repository(
    planted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """A repository as torch.hub keeps it, and no network."""

    def fail(*_: object, **__: object) -> None:
        raise URLError("no connection")

    (file,) = (tmp_path / "torch" / "hub" / "checkpoints").iterdir()
    place = tmp_path / "torch" / "hub" / "acme_models_main"
    place.mkdir()
    (place / "hubconf.py").write_text(HUBCONF.replace("WEIGHTS", str(file)))
    monkeypatch.setattr("torch.hub.urlopen", fail)
    return planted


@pytest.mark.parametrize("entry", ["bare_resnet18", "main:whole_resnet18"])
def test_a_network_of_torch_hub(planted_repository: dict[str, torch.Tensor], tmp_path: Path, entry: str) -> None:
    small_data.write_images(tmp_path / "images", {"train": 4, "val": 2}, size=16)
    settings = {"dataset": tmp_path / "images", "method": "frozen", "image_size": 32}
    name = f"torchhub:acme/models:{entry}"
    with pytest.raises(UsageError, match=r"runs Python code of github\.com/acme/models.*--trust_remote_code runs it"):
        hftl.finetune("image-classification", model=name, **settings, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = hftl.finetune(
        "image-classification", model=name, **settings, trust_remote_code=True, output_dir=tmp_path / "run"
    )
    head = backbones.structure(run.model).trained_head
    for key, value in run.model.state_dict().items():
        if not backbones.is_below_any(key, head):
            assert torch.equal(value, planted_repository[key.removeprefix("timm_model.")]), key
    assert f"`{name}`" in (run.folder / "README.md").read_text() or name in (run.folder / "recipe.yaml").read_text()
    again = hftl.finetune("image-classification", model=name, **settings, output_dir=tmp_path / "again")  # kept
    assert again.metrics["validation"]["loss"] == pytest.approx(run.metrics["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acme/models", "write torchhub:OWNER/REPOSITORY:ENTRY"),
        ("acme/models:mystery", "timm has no architecture that 'mystery' names"),
        ("acme/models:other_resnet18", "of layer1.2 are left over, and more like them: it is of a larger model"),
        ("acme/models:shifted_resnet18", "gives other features with the same weights"),
        ("acme/models:broken_resnet18", "its code does not run here (KeyError: 'no such file')"),
        ("acme/models:number_resnet18", "is no network, but int"),
        ("acme/models:none_resnet18", "Cannot find callable none_resnet18"),
        ("acme/others:a_resnet18", "no internet"),
    ],
)
def test_what_torch_hub_cannot_give(
    planted_repository: dict[str, torch.Tensor], tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        pretrained.check_model_name(f"torchhub:{name}", trust_remote_code=True)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("hftl/torchhub*"))
