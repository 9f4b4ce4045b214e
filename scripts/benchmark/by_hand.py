"""What a person would write by hand: bare loops, a Trainer on the same blocks, features with scikit-learn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmark.common import CORES, Clock, Settings, accuracy_of, model_folder, open_image, read_data

# ---- the same work as hftl, on its own objects -----------------------------------------------------------------------


def _hftl_parts(settings: Settings) -> tuple[Any, Any, dict[str, Any]]:
    """hftl's task, plan and data sets, without its checks of the data: the same rows, model and transforms."""
    from datasets import Dataset

    import hftl
    from hftl.data import Splits

    task_class = {
        "image": hftl.ImageClassification,
        "text": hftl.TextClassification,
        "audio": hftl.AudioClassification,
        "image-text": hftl.ImageTextClassification,
    }[settings["task"]]
    parts, names = read_data(settings)
    arguments = hftl.parse(task_class.arguments_class, settings["flags"])
    task = task_class(arguments)
    rows = {split: Dataset.from_list(part) for split, part in parts.items()}
    splits = Splits(rows["train"], rows["validation"], rows["test"], names, {})
    plan = hftl.build_plan(task.build_model(splits), arguments)
    return task, plan, {split: task.dataset(part, training=split == "train") for split, part in rows.items()}


def bare_loop(settings: Settings, clock: Clock) -> dict[str, Any]:
    """A PyTorch loop by hand with hftl's batches, precision, memory format, rates, schedule and evaluations."""
    import copy
    import math

    import torch
    import transformers

    import hftl
    from hftl import backbones, optim
    from hftl.methods.plan import frozen_modules
    from hftl.trainer import EpochSampler

    _ = hftl.ImageClassification, hftl.TextClassification, hftl.parse, hftl.build_plan
    clock.watch_steps()
    clock.imports_done()
    task, plan, data = _hftl_parts(settings)
    model, stage, batch_size = plan.model, plan.stages[0], task.batch_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbones.to_channels_last(model).to(device)
    frozen = frozen_modules(model, stage)
    order = EpochSampler(len(data["train"]), 42, lengths=getattr(data["train"], "lengths", None), batch_size=batch_size)
    workers = {"num_workers": CORES - 1, "persistent_workers": CORES > 1} if settings["task"] != "text" else {}
    options = {"collate_fn": task.collate, "pin_memory": device.type == "cuda", **workers}
    loader = torch.utils.data.DataLoader(data["train"], batch_size=batch_size, sampler=order, **options)
    loaders = {
        split: torch.utils.data.DataLoader(data[split], batch_size=32, **options) for split in ("validation", "test")
    }
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, stage, 0.01), fused=True)
    epochs = settings["epochs"]
    steps = settings.get("max_steps") or epochs * len(loader)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings["precision"])
    autocast = torch.autocast(device.type, dtype=half, enabled=half is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    loss_function = torch.nn.CrossEntropyLoss()

    def accuracy(split: str) -> float:
        model.eval()
        right = 0
        with torch.inference_mode(), autocast:
            for batch in loaders[split]:
                inputs = {name: value.to(device) for name, value in batch.items()}
                labels = inputs.pop("labels")
                right += int((model(**inputs).logits.argmax(-1) == labels).sum())
        return right / len(data[split])

    best, weights, done = -1.0, {}, 0
    for epoch in range(math.ceil(steps / len(loader))):
        order.set_epoch(epoch)
        if hasattr(data["train"], "set_epoch"):
            data["train"].set_epoch(epoch)
        model.train()
        for module in frozen:
            module.training = False
        for batch in loader:
            inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            labels = inputs.pop("labels")
            with autocast:
                logits = model(**inputs).logits
            scaler.scale(loss_function(logits.float(), labels)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
        score = accuracy("validation")
        if score > best:
            best, weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.save_pretrained(settings["output"])
    if task.processor is not None:  # those of images with texts are two
        task.processor.save_pretrained(settings["output"])
    return {"accuracy": accuracy("test"), "rows_a_step": batch_size, "precision": settings["precision"]}


def trainer_same_blocks(settings: Settings, clock: Clock) -> dict[str, Any]:
    """`transformers.Trainer` on hftl's model, order, rates and frozen modules: losses are comparable step by step."""
    import torch
    import transformers

    import hftl
    from hftl import optim
    from hftl.methods.plan import frozen_modules
    from hftl.trainer import EpochSampler

    _ = hftl.ImageClassification, hftl.parse, hftl.build_plan
    clock.watch_steps()
    clock.imports_done()
    task, plan, data = _hftl_parts(settings)
    model, stage, batch_size = plan.model, plan.stages[0], task.batch_size
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    frozen = frozen_modules(model, stage)
    order = EpochSampler(len(data["train"]), 42, batch_size=batch_size)

    class Epochs(transformers.TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.set_epoch(round(state.epoch or 0))
            data["train"].set_epoch(round(state.epoch or 0))

    class SameOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def compute_loss(self, model: Any, *others: Any, **more: Any) -> Any:
            for module in frozen:  # Trainer wakes them before every step; BatchNorm's statistics would drift
                module.training = False
            return super().compute_loss(model, *others, **more)

    order_of_dimensions = torch.channels_last if settings["channels_last"] else torch.contiguous_format
    model.to(memory_format=order_of_dimensions)

    def collate(examples: Any) -> dict[str, Any]:
        batch = task.collate(examples)
        return {**batch, "pixel_values": batch["pixel_values"].contiguous(memory_format=order_of_dimensions)}

    arguments = transformers.TrainingArguments(
        output_dir=settings["output"],
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=32,
        num_train_epochs=settings["epochs"],
        warmup_steps=int(0.1 * settings["epochs"] * -(-len(data["train"]) // batch_size)),
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, stage, 0.01), fused=True)
    trains = SameOrder(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        compute_metrics=accuracy_of,
        callbacks=[Epochs()],
        optimizers=(optimizer, None),
    )
    trains.train()
    trains.save_model()
    losses = [entry["loss"] for entry in trains.state.log_history if "loss" in entry]
    accuracy = trains.evaluate(data["test"])["eval_accuracy"]
    return {"accuracy": accuracy, "losses": losses, "rows_a_step": batch_size, "precision": "no"}


# ---- features by hand ------------------------------------------------------------------------------------------------


def features_by_hand(settings: Settings, clock: Clock) -> dict[str, Any]:
    """Each image decoded once and through the folded backbone once; scikit-learn's logistic regression on top."""
    import joblib
    import numpy as np
    import timm
    import torch
    from sklearn.linear_model import LogisticRegression
    from torchvision.transforms import InterpolationMode, v2

    clock.imports_done()
    parts, _ = read_data(settings)
    model = timm.create_model(f"local-dir:{model_folder(settings)}", pretrained=True, num_classes=0).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last)
    size, config = settings["image_size"], model.pretrained_cfg
    fold_batch_norm(model, torch.randn(2, 3, size, size, device=device))
    transform = v2.Compose(
        [
            v2.Resize(int(size / config["crop_pct"]), InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )

    class Images(torch.utils.data.Dataset):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            return transform(open_image(self.rows[index]["image"], size))

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings["precision"])

    def features(rows: Any) -> Any:
        loader = torch.utils.data.DataLoader(Images(rows), batch_size=32, num_workers=CORES - 1)
        with torch.inference_mode(), torch.autocast(device.type, dtype=half, enabled=half is not None):
            batches = [model(batch.to(device, memory_format=torch.channels_last)).float().cpu() for batch in loader]
        return torch.cat(batches).numpy()

    labels = {split: np.array([row["label"] for row in rows]) for split, rows in parts.items()}
    head = LogisticRegression(max_iter=1000).fit(features(parts["train"]), labels["train"])
    scores = {split: head.score(features(parts[split]), labels[split]) for split in ("validation", "test")}
    os.makedirs(settings["output"])
    joblib.dump(head, Path(settings["output"], "head.joblib"))
    torch.save(model.state_dict(), Path(settings["output"], "backbone.pt"))
    return {"accuracy": scores["test"], "rows": sum(map(len, parts.values())), "precision": settings["precision"]}


def fold_batch_norm(model: Any, example: Any) -> None:
    """Fold every BatchNorm that reads a convolution's output into that convolution, in place.

    Raises:
        RuntimeError: the folded model gives other features.
    """
    import torch

    producers: dict[int, Any] = {}
    kept, pairs, hooks = [], [], []

    def after_convolution(module: Any, _: Any, output: Any) -> None:
        producers[id(output)] = module
        kept.append(output)  # its id must not be given to another tensor

    def before_norm(module: Any, inputs: Any) -> None:
        if id(inputs[0]) in producers:
            pairs.append((producers[id(inputs[0])], module))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, torch.nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        expected = model(example)
        for hook in hooks:
            hook.remove()
        for convolution, norm in pairs:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            bias = torch.zeros_like(scale) if convolution.bias is None else convolution.bias
            convolution.bias = torch.nn.Parameter(norm.bias + (bias - norm.running_mean) * scale)
            convolution.weight.mul_(scale.reshape(-1, 1, 1, 1))
        folded = {id(norm) for _, norm in pairs}
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in folded:  # timm's norms hold the activation that follows
                    setattr(parent, name, getattr(child, "act", torch.nn.Identity()))
        difference = float((model(example) - expected).abs().max() / expected.abs().max())
    if not pairs or difference > 1e-3:
        raise RuntimeError(f"{len(pairs)} BatchNorm layers folded, features differ by {difference:.2g} of the largest")


def tensor_steps(settings: Settings, clock: Clock) -> dict[str, Any]:
    """A linear head trained on features that lie in memory as one tensor."""
    import torch

    clock.watch_steps()
    clock.imports_done()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, width, classes, size = settings["rows"], settings["width"], settings["classes"], settings["batch_size"]
    features, labels = torch.randn(rows, width, device=device), torch.randint(classes, (rows,), device=device)
    head = torch.nn.Linear(width, classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, fused=True)
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(rows, device=device).split(size):
            torch.nn.functional.cross_entropy(head(features[batch]), labels[batch]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {"rows_a_step": size}
