"""The model card: what the model is, how it was made, how well it does, how to load it."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from hftl.arguments import TransferArguments
from hftl.builtin import BUILTIN_ON_HUB
from hftl.data import Splits, labels_of
from hftl.folder import read_json, repository_of, say, scored_split, write_text
from hftl.inert import EVERYWHERE, in_markdown, public_name
from hftl.joined import as_flags, wished
from hftl.merging import ADAPTER, BASE
from hftl.metrics import written
from hftl.pretrained import find_model
from hftl.problems import Problem
from hftl.tasks.classification import ClassificationTask

_TEXT = """# {title}

The model {base} adapted to {task} on {dataset} with the method {method}, using hftl.

## Results

{results}
{repeats}{classes}
## Limits

{limits}

## How to use it

```python
{usage}
```
{probe}
## Training

| | |
| --- | --- |
{training}

`recipe.yaml` repeats the training: `hftl train {task} --config recipe.yaml{places}`.
{adapter}"""

_CLASSES = """
## Classes

{table}

Precision, recall and F1 are those on {split}.
"""

#: scores as the Hub reads them
EVALUATIONS = ".eval_results/hftl.yaml"
#: settings that name what a run was made from, the flags that say it, and where the card does
SOURCES = {
    "model_name_or_path": ("--model", "base_model"),
    "text_model": ("--text_model", "base_model"),
    "dataset_name": ("--dataset", "datasets"),
}
#: of an adapter's configuration
_ADAPTER_SIZES = {"rank": "r", "alpha": "lora_alpha"}
_PROBE = """
This is the ordinary model with a logistic head, whose scores are those of `ordinary_head`. The other scores are
those of the `{head}` head in `probe/`{joined}, which plain libraries do not know: `hftl predict`, `hftl evaluate` and
`hftl.load_run(FOLDER).predict` answer by it.
"""
#: words in the names of licences that are known to most
_USUAL = frozenset({"apache", "mit", "bsd", "cc", "cc0", "gpl", "lgpl", "agpl", "mpl", "isc", "unlicense", "openrail"})
#: where the adapter is not merged
_UNMERGED = """from peft import PeftModel
from {module} import {auto_class}
base = {auto_class}.from_pretrained({title}, subfolder="base")
model = PeftModel.from_pretrained(base, {title}, subfolder="adapter")"""


def write_card(
    target: Path, task: ClassificationTask, arguments: TransferArguments, splits: Splits, metrics: dict[str, Any]
) -> None:
    """Write README.md with the metadata that the Hub reads. No local path gets into it."""
    split = scored_split(metrics)
    bases = _bases(arguments)
    base = " and ".join(_place_on_hub(name) or public_name(name) for name in bases)
    dataset = public_name(arguments.dataset_name)
    method = public_name(arguments.method)
    title = repository_of(arguments)
    on_hub = list(filter(None, map(_place_on_hub, bases)))
    plain_library = task.auto_class.__module__.startswith("transformers")
    plain = metrics.get(f"ordinary_head_{split}", metrics[split])  # of what plain libraries load
    results = [
        EvalResult(
            task_type=task.hub_name or task.name, dataset_type=dataset, dataset_name=dataset, dataset_split=split,
            metric_type=kind, metric_name=name, metric_value=float(written(key, plain[key])),
        )
        for kind, name, key in task.problem.hub_metrics
        if key in plain
    ]  # fmt: skip
    origin = base_cards(arguments)
    header = ModelCardData(
        pipeline_tag=(task.hub_name or task.name) if plain_library else None,
        library_name="transformers" if plain_library else "hftl",
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        language=origin.get("language"),
        datasets=dataset if _is_on_hub(arguments.dataset_name) else None,
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        tags=["hftl", task.modality.name],
        base_model_relation=("adapter" if (target / BASE).is_dir() else "finetune") if on_hub else None,
        metrics=list(dict.fromkeys(kind for kind, _, _ in task.problem.hub_metrics)),
        model_name=title,
        eval_results=results,
    )
    rows = _results(task.problem, metrics)
    if getattr(arguments, "test_time_flip", False):
        rows.append("\nOf each image and its mirror image (`--test_time_flip`); plain transformers takes it alone.")
    if (windows := getattr(arguments, "test_time_windows", 1)) > 1:
        rows.append(
            f"\nOf {windows} windows of each longer recording (`--test_time_windows`); the lines of Python below "
            "take its beginning alone."
        )
    module = "transformers" if plain_library else task.auto_class.__module__
    unmerged = _UNMERGED.format(title=json.dumps(title), auto_class=task.auto_class.__name__, module=module)
    text = _TEXT.format(
        title=in_markdown(title), base=in_markdown(base), task=task.name, dataset=in_markdown(dataset),
        method=in_markdown(method), split=split,
        results="\n".join(rows), repeats=_repeats(task.problem, metrics, split),
        classes=_classes(splits, plain, split, metrics.get("thresholds")),
        limits=_limits(splits, plain, split, in_markdown(dataset), licence_of(origin), metrics["train"]),
        training=_training(metrics["train"]),
        probe=_probe(arguments) if f"ordinary_head_{split}" in metrics else "",
        usage=unmerged if (target / BASE).is_dir() else task.usage(title),
        places=_places(arguments), 
        adapter=_adapter(target, base) if len(bases) == 1 else "",  # two that are joined lie nowhere without it
    )  # fmt: skip
    if forbids_changes(licence_of(origin)) or _is_for_private_use(_words_of(licence_of(origin))):
        say(f"licence: {_of_licence(licence_of(origin))}")
    ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}").save(target / "README.md")
    if _is_on_hub(arguments.dataset_name) and task.problem.headline[0][0] in plain:
        _write_evaluation(target, task, plain, split)


def _results(problem: Problem, metrics: dict[str, Any]) -> list[str]:
    """The scores of each split as the lines of a table."""
    there = ("validation", "test", "ordinary_head_validation", "ordinary_head_test")
    shown = [*problem.headline, ("loss", "loss")]
    lines = [["split", *(words for _, words in shown)], ["---"] * (1 + len(shown))]
    for split in (name for name in there if name in metrics):
        scores = metrics[split]
        lines.append([split, *(written(key, scores[key]) if key in scores else "–" for key, _ in shown)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _classes(splits: Splits, scores: dict[str, float], split: str, thresholds: dict[str, float] | None) -> str:
    """The scores of each class or label, and where a label begins."""
    if not splits.problem.has_class_scores:
        return ""
    classes = [
        splits.problem.classes(labels, splits.label_names) for labels in (splits.train_labels, labels_of(splits.scored))
    ]
    head = ["class", "training rows", *(["threshold"] if thresholds else []), "precision", "recall", "F1"]
    lines = [head, ["---"] * len(head)]
    for name, count in classes[0].items():
        there = classes[1].get(name)
        own = [f"{scores[f'{kind}/{name}']:.4f}" if there else "–" for kind in ("precision", "recall", "f1")]
        lines.append([in_markdown(name), f"{count:,}", *([f"{thresholds[name]:.3f}"] if thresholds else []), *own])
    return _CLASSES.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines), split=split)


def _write_evaluation(target: Path, task: ClassificationTask, scores: dict[str, float], split: str) -> None:
    """The first score in the form that the Hub reads beside the card; it knows data sets of its own only."""
    arguments, (key, words) = task.arguments, task.problem.headline[0]
    entry = EvalResultEntry(
        dataset_id=str(arguments.dataset_name),
        task_id=arguments.dataset_config_name or "default",
        value=float(written(key, scores[key])),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        notes=f"{words} on {split}, by hftl",
    )
    (target / EVALUATIONS).parent.mkdir(exist_ok=True)
    write_text(target / EVALUATIONS, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def _is_on_hub(name: str | None) -> bool:
    return name is not None and not os.path.exists(os.path.expanduser(name)) and ":" not in name


def _place_on_hub(model: str) -> str | None:
    """Where the base model is on the Hub; of those of Keras and of packages where the same weights are."""
    if model.startswith("keras:"):
        return find_model(model)
    if model.startswith("builtin:"):
        return BUILTIN_ON_HUB.get(model.partition(":")[2])
    return model if _is_on_hub(model) else None


def base_card(name: str) -> dict[str, Any]:
    """The metadata of the base model's card; empty where there is none, or the Hub has none to give now."""
    if name.startswith("builtin:"):
        # As tensorflow/tpu and sentence-transformers/all-MiniLM-L6-v2, where the weights come from, say.
        return {"license": "apache-2.0"} | ({"language": "en"} if name == "builtin:minilm" else {})
    name = _place_on_hub(name) or name
    folder = Path(os.path.expanduser(name))
    if _is_on_hub(name) or (folder / "README.md").is_file():
        try:
            return ModelCard.load(name if _is_on_hub(name) else folder / "README.md").data.to_dict()
        except EntryNotFoundError:
            return {}
        except (HTTPError, OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:100]
            say(f"licence: the card of {name!r} cannot be read ({reason}): look for what it allows yourself")
    return {}


def _bases(arguments: TransferArguments) -> list[str]:
    """The names of the pretrained models."""
    return [str(name) for name in (arguments.model_name_or_path, getattr(arguments, "text_model", None)) if name]


def base_cards(arguments: TransferArguments) -> dict[str, Any]:
    """The metadata of the base models' cards, as far as it holds for what is made of all of them."""
    return _common([base_card(name) for name in _bases(arguments)])


def _common(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cards of all base models say alike, and the licence of one that forbids something."""
    alike = {name: value for name, value in cards[0].items() if all(card.get(name) == value for card in cards)}
    strictest = max(cards, key=_strictness)
    licence = {name: value for name, value in strictest.items() if name.startswith("license")}
    return alike | (licence if _strictness(strictest) else {})


def _strictness(card: Mapping[str, Any]) -> int:
    licence = licence_of(card)
    return 2 * forbids_changes(licence) + _is_for_private_use(_words_of(licence))


def licence_of(card: Mapping[str, Any]) -> str | None:
    """The name of a licence: "other" has one of its own."""
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name") or licence
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence) if licence else None


def forbids_changes(licence: str | None) -> bool:
    """Whether a licence lets nobody share changed versions: Creative Commons' "no derivatives"."""
    return bool(_words_of(licence) & {"nd", "noderivs", "noderivatives"})


def _words_of(licence: str | None) -> set[str]:
    return set(re.findall("[a-z]+", str(licence).lower()))


def _is_for_private_use(words: set[str]) -> bool:
    return bool(words & {"nc", "noncommercial", "research"}) or {"non", "commercial"} <= words


def _of_licence(licence: str | None) -> str:
    """What the licence of the base model means for who uses this one."""
    if licence is None:
        return "The licence of the base model is not known here: look for it before you use or share this one."
    forbids, words, licence = forbids_changes(licence), _words_of(licence), in_markdown(licence)
    if forbids:
        return f"The licence of the base model ({licence}) does not let changed versions be shared: this one neither."
    if _is_for_private_use(words):
        return f"The licence of the base model ({licence}) does not allow commercial use."
    terms = "" if words & _USUAL else ": it has terms of its own, which hold for this one too. Read them"
    return f"The licence is that of the base model, {licence}{terms}."


def _limits(
    splits: Splits, scores: dict[str, float], split: str, dataset: str, licence: str | None, train: dict[str, Any]
) -> str:
    """What one should know before relying on the model, as a list."""
    names = list(map(in_markdown, splits.label_names))
    trained = train["trainable_parameters"] > 0
    labels = splits.train_labels if trained else splits.train_labels[:0]
    lines = splits.problem.limits(scores, len(splits.scored), split, labels, names)
    if split == "validation":
        lines.append(
            "There was no test split: the model was chosen by these scores, new data may well give lower ones."
        )
    learned = f"{len(splits.train):,}" if trained else "no"
    lines.append(
        f"It has learned from {learned} rows of {dataset}: on data of another origin the scores may be far lower."
    )
    lines.append(_of_licence(licence))
    return "\n".join(f"- {line}" for line in lines)


def _training(train: dict[str, Any]) -> str:
    """The settings that matter, as lines of a table."""
    lines = []
    for stage in train["stages"]:
        share = f"{stage['trainable_parameters']:,} of {stage['total_parameters']:,} parameters"
        how = "solved on the features" if stage["steps"] else "scored as it is"
        if "learning_rate" in stage:
            rows = f" of {stage['rows_a_step']} rows" if "rows_a_step" in stage else ""  # not in older runs
            how = f"{stage['steps']:,} steps{rows}, rate {stage['learning_rate']:.2g}"
            how += f", head {stage['head_learning_rate']:.2g}" if "head_learning_rate" in stage else ""
        lines.append((in_markdown(stage["name"]), f"{share}, {how}"))
    lines += [(name, train[name]) for name in ("seed", "precision") if name in train]
    versions = ", ".join(f"{name} {version}" for name, version in train.get("versions", {}).items())
    lines += [("versions", versions)] if versions else []
    return "\n".join(f"| {name} | {text} |" for name, text in lines)


def _probe(arguments: TransferArguments) -> str:
    """Which head the scores are of."""
    flags = as_flags(wished(arguments))
    return _PROBE.format(head=arguments.head or "logistic", joined=f" (`{flags}`)" if flags else "")


def _places(arguments: TransferArguments) -> str:
    """Flags for what a recipe cannot name elsewhere: model and data that came from this machine."""
    named = {flag: getattr(arguments, key, None) for key, (flag, _) in SOURCES.items()}
    return "".join(
        f" {flag} PLACE"
        for flag, name in named.items()
        if name and not (_is_on_hub(name) or name.startswith(EVERYWHERE))
    )


def _adapter(target: Path, base: str) -> str:
    """What lies in the adapter's folder, where there is one."""
    path = target / ADAPTER / "adapter_config.json"
    if not path.is_file():
        return ""
    config = read_json(path)
    sizes = ", ".join(f"{name} {config[key]}" for name, key in _ADAPTER_SIZES.items() if config.get(key))
    layers = config.get("target_modules")
    where = f", in {len(layers)} layers" if isinstance(layers, list) else ""
    merged = "" if (target / BASE).is_dir() else "; `model.safetensors` is the model with it merged"
    kind = in_markdown(str(config.get("peft_type")))
    return (
        f"\nThe adapter by itself is in `{ADAPTER}/` ({kind}{', ' if sizes else ''}{sizes}{where}), for "
        f"`peft.PeftModel` on {in_markdown(base)}{merged}.\n"
    )


def _repeats(problem: Problem, metrics: dict[str, Any], split: str) -> str:
    """What the other seeds gave, where there were any."""
    key, words = problem.headline[0]
    if key not in metrics.get("repeats", {}).get(split, {}):
        return ""
    repeats = metrics["repeats"]
    mean, half_width = (written(key, repeats[split][key][name]) for name in ("mean", "half_width_95"))
    return (
        f"\nOver {len(repeats['seeds'])} seeds the {words} on {split} is {mean} ± {half_width} (mean and 95 % "
        f"interval). This is the model of seed {repeats['best_seed']}, chosen on validation.\n"
    )
