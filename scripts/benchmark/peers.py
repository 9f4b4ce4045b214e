"""What is compared, each in a process of its own: `python -m benchmark.peers NAME RESULT.json SETTINGS`.

A peer reads the tables of `benchmark.prepare`, works to a saved and evaluated model, and gives back its test accuracy
and the like; the clock notes when the imports were done and when each optimizer step ended. Nothing heavy is imported
at the top, so that each process pays for its own imports only.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmark import jobs
from benchmark.by_hand import bare_loop, features_by_hand, tensor_steps, trainer_same_blocks
from benchmark.common import CORES, Clock, Settings, accuracy_of, model_folder, open_image, read_data, read_table

# ---- hftl ----------------------------------------------------------------------------------------------------------


def hftl_command(settings: Settings, clock: Clock) -> dict[str, Any]:
    """`hftl …` as from a shell; where it is timed without its start-up, the public names that it uses come first."""
    import hftl

    clock.watch_steps()
    for name in settings.get("names", []):
        getattr(hftl, name)
    if "names" in settings:
        clock.imports_done()
    from hftl.cli import main

    try:
        main(settings["argv"])
    except SystemExit as end:
        if end.code:
            raise
    if settings["argv"][0] == "predict":
        with Path(settings["answers"]).open(encoding="utf-8", newline="") as file:
            answers = [row["prediction"] for row in csv.DictReader(file)]
        return {"answers": answers, "rows": len(answers)}
    return _read_run(Path(settings["run"]))


def _read_run(run: Path) -> dict[str, Any]:
    import yaml
    from accelerate.state import AcceleratorState

    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    log = run / "logs" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return {
        "accuracy": metrics["test"]["accuracy"],
        "f1_macro": metrics["test"]["f1_macro"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "rows_a_step": recipe["per_device_train_batch_size"] * int(os.environ.get("WORLD_SIZE", "1")),
        "train_seconds": metrics["train"]["seconds"],
        # What Accelerate really used, whoever asked for it; None when nothing was trained by steps.
        "precision": AcceleratorState._shared_state.get("_mixed_precision"),
    }


# ---- transformers.Trainer --------------------------------------------------------------------------------------------


def trainer(settings: Settings, clock: Clock) -> dict[str, Any]:
    """A script as in the examples of transformers; `tuned` settings change what a person may tune by hand."""
    import torch
    import transformers

    clock.watch_steps()
    clock.imports_done()
    transformers.set_seed(int(settings.get("seed", jobs.SEED)))
    parts, names = read_data(settings)
    model, data, collate = (_image_parts if settings["task"] == "image" else _text_parts)(settings, parts, names)
    head = [name for name, _ in model.named_parameters() if "classifier" in name]
    if settings.get("head_only"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    tuned = {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "weight_decay": 0.01} if settings.get("tuned") else {}
    if settings.get("tuned") and settings["task"] == "image":
        tuned["dataloader_num_workers"] = CORES - 1
        model.to(memory_format=torch.channels_last)
    if settings.get("group_by_length"):
        tuned["train_sampling_strategy"] = "group_by_length"
    if settings.get("precision") in ("bf16", "fp16"):
        tuned[settings["precision"]] = True
    arguments = transformers.TrainingArguments(
        output_dir=settings["output"],
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=8 if not settings.get("tuned") else 32,
        learning_rate=settings["learning_rate"],
        num_train_epochs=settings["epochs"],
        max_steps=settings.get("max_steps", -1),
        eval_strategy="epoch",
        remove_unused_columns=False,
        disable_tqdm=True,
        **tuned,
    )
    optimizer = None
    if "head_learning_rate" in settings:
        parameters = dict(model.named_parameters())
        groups = [
            {"params": [p for name, p in parameters.items() if name not in head], "lr": settings["learning_rate"]}
        ]
        groups += [{"params": [parameters[name] for name in head], "lr": settings["head_learning_rate"]}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    trains = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        compute_metrics=accuracy_of,
        optimizers=(optimizer, None),
    )
    trains.train()
    trains.save_model()
    accuracy = trains.evaluate(data["test"])["eval_accuracy"]
    return {"accuracy": accuracy, "rows_a_step": settings["batch_size"], "precision": settings.get("precision", "no")}


def _image_parts(settings: Settings, parts: Any, names: list[str]) -> tuple[Any, dict[str, Any], Any]:
    import torch
    from PIL import Image
    from torchvision.transforms import InterpolationMode, v2
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(
        model_folder(settings),
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    size, config = settings["image_size"], model.config.pretrained_cfg
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    bicubic = InterpolationMode.BICUBIC
    training = v2.Compose([v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip(), *pixels])
    plain = v2.Compose([v2.Resize(int(size / config["crop_pct"]), bicubic), v2.CenterCrop(size), *pixels])

    class Images(torch.utils.data.Dataset):
        def __init__(self, rows: Any, transform: Any) -> None:
            self.rows, self.transform = rows, transform

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = self.rows[index]
            if settings.get("tuned"):
                image = open_image(row["image"], size)
            else:
                with Image.open(row["image"]) as file:
                    image = file.convert("RGB")
            return {"pixel_values": self.transform(image), "labels": row["label"]}

    def collate(examples: Any) -> dict[str, Any]:
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        if settings.get("tuned"):
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["labels"] for example in examples])}

    data = {split: Images(rows, training if split == "train" else plain) for split, rows in parts.items()}
    return model, data, collate


def _text_parts(settings: Settings, parts: Any, names: list[str]) -> tuple[Any, dict[str, Any], Any]:
    import datasets
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        default_data_collator,
    )

    tokenizer = AutoTokenizer.from_pretrained(model_folder(settings))
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(settings), num_labels=len(names))
    padding = "max_length" if settings["padding"] == "max_length" else False

    def encode(batch: Any) -> Any:
        return tokenizer(batch["text"], padding=padding, max_length=128, truncation=True)

    data = {}
    for split, rows in parts.items():
        data[split] = datasets.Dataset.from_list(rows).map(encode, batched=True, remove_columns=["text"])
    return model, data, default_data_collator if padding else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


# ---- other libraries -------------------------------------------------------------------------------------------------


def fastai(settings: Settings, clock: Clock) -> dict[str, Any]:
    """fastai's `fine_tune` on the same checkpoint: the head for one epoch, then everything."""
    import pandas
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, vision_learner

    clock.imports_done()
    parts, _ = read_data(settings)
    frame = pandas.DataFrame(
        [{**row, "validation": split == "validation"} for split in ("train", "validation") for row in parts[split]]
    )
    size = settings["image_size"]
    loaders = ImageDataLoaders.from_df(
        frame, path="/", fn_col="image", label_col="label", valid_col="validation", bs=32, num_workers=CORES - 1,
        item_tfms=Resize(int(size / 0.875)), batch_tfms=aug_transforms(size=size),
    )  # fmt: skip
    # With its own head, and the checkpoint's mean and deviation.
    learner = vision_learner(loaders, f"local-dir:{settings['model']}", metrics=accuracy)
    with learner.no_bar():
        learner.fine_tune(max(1, settings["epochs"] - 1))
    os.makedirs(settings["output"])
    learner.export(Path(settings["output"], "learner.pkl"))
    test = loaders.test_dl(pandas.DataFrame(parts["test"]), with_labels=True)
    return {"accuracy": float(learner.validate(dl=test)[1]), "rows": len(parts["train"]) * settings["epochs"]}


def autogluon(settings: Settings, clock: Clock) -> dict[str, Any]:
    """AutoGluon Multimodal at its defaults for this many epochs, on the same text checkpoint."""
    import pandas
    from autogluon.multimodal import MultiModalPredictor

    clock.imports_done()
    parts, _ = read_data(settings)
    frames = {split: pandas.DataFrame(rows) for split, rows in parts.items()}
    predictor = MultiModalPredictor(label="label", path=settings["output"], verbosity=1)
    predictor.fit(
        frames["train"],
        tuning_data=frames["validation"],
        hyperparameters={
            "model.names": ["hf_text"],
            "model.hf_text.checkpoint_name": settings["model"],
            "optim.max_epochs": settings["epochs"],
            "env.num_workers": 0,
        },
    )
    accuracy = predictor.evaluate(frames["test"], metrics=["accuracy"])["accuracy"]
    return {"accuracy": float(accuracy), "rows": len(parts["train"]) * settings["epochs"]}


# ---- prediction, start-up, a step ------------------------------------------------------------------------------------


def pipeline(settings: Settings, clock: Clock) -> dict[str, Any]:
    """`transformers.pipeline` on the run that hftl predicts with."""
    import torch
    import transformers

    clock.imports_done()
    column = "image" if settings["task"] == "image" else "text"
    values = [row[column] for row in read_table(Path(settings["table"]), column)]
    device = 0 if torch.cuda.is_available() else -1
    classify = transformers.pipeline(f"{settings['task']}-classification", settings["run"], device=device)
    options = {"top_k": 1} if settings["task"] == "image" else {"truncation": True}
    answers = classify(values, batch_size=settings["batch_size"], **options)
    first = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    return {"answers": [answer["label"] for answer in first], "rows": len(values)}


def load_only(settings: Settings, clock: Clock) -> dict[str, Any]:
    """The least that any training waits for: torch, transformers, tokenizer and model."""
    import torch
    import transformers

    clock.imports_done()
    transformers.AutoTokenizer.from_pretrained(model_folder(settings))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder(settings))
    if torch.cuda.is_available():
        model.to("cuda")
    return {"first_step_seconds": clock.now()}


PEERS = {
    "hftl": hftl_command,
    "trainer": trainer,
    "bare_loop": bare_loop,
    "trainer_same_blocks": trainer_same_blocks,
    "features_by_hand": features_by_hand,
    "fastai": fastai,
    "autogluon": autogluon,
    "pipeline": pipeline,
    "load_only": load_only,
    "tensor_steps": tensor_steps,
}


def main() -> None:
    """Run one peer; the first process writes its figures."""
    name, result, settings = sys.argv[1:]
    clock = Clock()
    raw = PEERS[name](json.loads(settings), clock)
    raw |= {"ended": clock.now(), "imported": clock.imported, "steps": clock.steps}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raw["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
