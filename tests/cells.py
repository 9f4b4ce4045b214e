"""The table of tasks and methods: each cell a small training through its recipe, and what came of it.

As a script: the cells of a task in this process, one of several that know each other; the records go to a file.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import small_data
import tiny_models
import torch
from tiny_training import every_tensor

from hftl import auto, averaging, backbones, cli, training, video_models
from hftl.errors import UsageError
from hftl.methods import METHODS
from hftl.run import load_run, load_saved

QUICK = ["--report_to=none", "--precision=fp32", "--dataloader_num_workers=0", "--per_device_train_batch_size=4"]
IMAGES, VIDEOS = ["image-classification", "--dataset=images"], ["video-classification", "--dataset=videos"]
#: nothing is evaluated or written in the course of a training; the last weights are its result
UNCHOSEN = ["--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false"]
TEXTS = ["text-classification", "--dataset=texts"]
#: every task, one of them with two routes
TASKS = {
    "images": [*IMAGES, "--model=resnet"],
    "likeness": ["image-similarity", "--dataset=images", "--model=resnet", "--embedding_size=8"],
    "texts": [*TEXTS, "--model=bert"],
    "words": ["token-classification", "--dataset=words", "--model=bert"],
    "choices": ["multiple-choice", "--dataset=choices", "--model=bert"],
    "sounds as pictures": ["audio-classification", "--dataset=sounds", "--model=resnet", "--clip_seconds=0.5"],
    "sounds as waves": ["audio-classification", "--dataset=sounds", "--model=wav2vec2", "--clip_seconds=0.5"],
    "videos": [*VIDEOS, "--model=videomae"],
    "images with texts": ["image-text-classification", "--dataset=both", "--model=resnet", "--text_model=bert"],
}
#: further architectures
MODELS = {
    "VGG": [*IMAGES, "--model=vgg", "--image_size=32"],
    "Inception": [*IMAGES, "--model=inception", "--image_size=80"],
    "EfficientNet": [*IMAGES, "--model=efficientnet", "--image_size=32"],
    "ViT": [*IMAGES, "--model=vit"],
    "CLIP": [*IMAGES, "--model=clip"],
    "SigLIP": [*IMAGES, "--model=siglip"],
    "GPT": [*TEXTS, "--model=gpt2"],
    "SlowFast": [*VIDEOS, "--model=slowfast", "--frames=8", "--image_size=32"],
}


def small_slowfast(pretrained: bool = False) -> Any:
    """SlowFast with fewer channels and one block a stage."""
    from pytorchvideo.models.slowfast import create_slowfast

    return create_slowfast(model_depth=18, stem_dim_outs=(16, 2), model_num_class=400)


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    """`--method auto` climbs to its last rung without trials, and mixes by halves; SlowFast is small."""
    from pytorchvideo.models import hub

    before = hub.slowfast_r50, auto._EPOCHS_FOR_TRIALS, auto._EPOCHS_OF_RUN, averaging.MIXES
    # By a few rows any mix may be the best, also one with nothing of the training.
    hub.slowfast_r50, averaging.MIXES = small_slowfast, (0.5,)
    auto._EPOCHS_FOR_TRIALS, auto._EPOCHS_OF_RUN = 1e9, (3.0, 1.0)
    try:
        yield
    finally:
        hub.slowfast_r50, auto._EPOCHS_FOR_TRIALS, auto._EPOCHS_OF_RUN, averaging.MIXES = before


def write(place: Path) -> Path:
    """Data and models of every kind."""
    small_data.write_images(place / "images", {"train": 3, "val": 2, "test": 2}, size=32)
    small_data.write_texts(place / "texts", {"train": 9, "dev": 4, "test": 4})
    small_data.write_tagged(place / "words", {"train": 14, "dev": 4, "test": 4})
    small_data.write_choices(place / "choices", {"train": 9, "dev": 4, "test": 4})
    small_data.write_sounds(place / "sounds", {"train": 5, "val": 2, "test": 2})
    small_data.write_videos(place / "videos", {"train": 5, "val": 2, "test": 2}, frames=8)
    small_data.write_pairs(place / "both", {"train": 3, "val": 2, "test": 2})
    torch.manual_seed(0)
    tiny_models.write_tiny_cnn(place / "resnet", zero_init_last=False)
    tiny_models.write_timm_folder(place / "vgg", "vgg11_bn", mlp_ratio=0.01)
    tiny_models.write_timm_folder(place / "inception", "inception_v3")
    tiny_models.write_timm_folder(place / "efficientnet", "tf_efficientnet_lite0")
    tiny_models.write_tiny_image_model(place / "vit")
    for kind in ("clip", "siglip"):
        tiny_models.write_tiny_dual_encoder(place / kind, kind)
    tiny_models.write_tiny_text_model(place / "bert")
    tiny_models.write_tiny_text_model(place / "gpt2", kind="gpt2")
    tiny_models.write_tiny_waveform_model(place / "wav2vec2")
    tiny_models.write_tiny_video_model(place / "videomae")
    (place / "slowfast").mkdir()
    with shortened():
        video_models.write_checkpoint("slowfast_r50", small_slowfast().state_dict(), place / "slowfast")
    return place


class Watch:
    """What the trainings of a cell move, seen from outside; the logits that the last one had before it was saved."""

    def __init__(self) -> None:
        self.moved: set[str] = set()
        self.expected: set[str] = set()
        self.blocks: dict[str, int] = {}
        self.moves_statistics = False
        self.weights = hashlib.blake2b()
        self.batch: dict[str, torch.Tensor] = {}
        self.logits = torch.zeros(())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        run_stages, write_run = training._run_stages, training.write_run

        def stages(task: Any, plan: Any, all_stages: Any, *others: Any) -> Any:
            before = every_tensor(plan.model)
            found = run_stages(task, plan, all_stages, *others)
            for name, value in every_tensor(plan.model).items():
                self.weights.update(value.reshape(-1).view(torch.uint8).numpy())
                if not before[name].equal(value):
                    self.moved.add(name)
            self.expected |= set().union(*(stage.trainable for stage in all_stages))
            self.blocks |= backbones.parameter_blocks(plan.model)
            self.moves_statistics |= any(stage.batch_norm == "train" for stage in all_stages)
            return found

        def write(task: Any, trainer: Any, splits: Any, data: Any, *others: Any) -> None:
            batch = task.collate([data["validation"][row] for row in range(3)])
            self.batch = backbones.inputs_of(batch)
            self.logits = logits_of(trainer.bare_model(), self.batch)
            write_run(task, trainer, splits, data, *others)

        training._run_stages, training.write_run = stages, write
        try:
            yield
        finally:
            training._run_stages, training.write_run = run_stages, write_run

    def record(self, method: str, output: Path) -> dict[str, Any]:
        """What came of a cell.

        `wrong` are tensors that moved and should not have, `still` blocks that should have trained and did not.
        """
        allowed = self.expected | {name for name in self.moved - set(self.blocks) if self.moves_statistics}
        trained = {self.blocks[name] for name in self.expected}
        still = trained - {self.blocks[name] for name in self.moved if name in self.blocks}
        found = {
            "wrong": sorted(self.moved - allowed),
            "still": sorted(still),
            "trained": sorted(trained),
            "blocks": max(self.blocks.values()),
            "weights": self.weights.hexdigest(),
        }
        if self.batch:  # of the process that writes the run
            run = load_run(output)
            reloaded = logits_of(load_saved(run.task.auto_class, output), self.batch)
            found["difference"] = float((reloaded - self.logits).abs().max() / max(1.0, self.logits.abs().max()))
            if method == "auto":  # whose last training need not be the best
                before = run.metrics["test"]["accuracy"]
                found["difference"] = abs(run.evaluate(str(run.task.arguments.dataset_name))["accuracy"] - before)
        return found


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def flags_of(words: list[str], method: str) -> list[str]:
    flags = [*words[1:], f"--method={method}", "--save_only_model", *QUICK]
    flags += [] if method in ("frozen", "auto", "zero_shot") else ["--num_train_epochs=1", *UNCHOSEN]
    flags += ["--head_epochs=1"] if method in ("lp_ft", "surgical") else []
    flags += ["--per_device_train_batch_size=8"] if words[0] == "image-similarity" else []
    flags += ["--peft_type=LOKR"] if method == "peft" else []
    flags += ["--unfreeze_blocks=1"] if method == "partial" else []
    return [*flags, "--time_budget=30s"] if method == "auto" else flags


def cell(words: list[str], method: str, output: Path) -> dict[str, Any]:
    """One training, in the folder with the data: why it was refused, or what came of it."""
    gc.freeze()  # each training begins with a collection, which would walk over everything
    watch = Watch()
    try:
        with watch.watching(), shortened():
            cli.run_recipe(cli.find_recipe(words[0]), [*flags_of(words, method), f"--output_dir={output}"])
    except UsageError as error:
        return {"refused": str(error)}
    with shortened():
        return watch.record(method, output)


if __name__ == "__main__":
    task = sys.argv[1]
    records = {method: cell(TASKS[task], method, Path(f"two {task} {method}")) for method in METHODS}
    Path(f"{task} {os.environ['RANK']}.json").write_text(json.dumps(records))
