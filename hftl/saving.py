"""The files of a finished run: written beside their places, the model checked by loading it again."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from hftl import __version__, backbones, compute, folder, merging
from hftl.answers import write_answers
from hftl.arguments import to_recipe
from hftl.data import Splits
from hftl.folder import CHECKPOINTS, FOUND_IN_DATA, LOGS, METRICS, PARTIAL, PREDICTIONS, RECIPE, say
from hftl.pretrained import save_model
from hftl.probes.beside import FOLDER as PROBE
from hftl.problems import Problem
from hftl.run import load_saved
from hftl.tasks.classification import ClassificationTask
from hftl.trainer import TransferTrainer

#: How far logits may move by saving and loading (nothing), or by merging adapters (rounding), relative to the largest;
#: bitsandbytes' kernel for weights of 4 bits on a CPU keeps their scales in 16 bits (9e-4 seen).
_TOLERANCE = {"saving": 1e-5, "merging": 1e-3, "few bits": 1e-2}


def write_run(
    task: ClassificationTask,
    trainer: TransferTrainer,
    splits: Splits,
    data: dict[str, Any],
    records: list[dict[str, Any]],
    results: dict[str, Any],
) -> None:
    """Write every file of the run beside its place, check the model by loading it again, and move them in."""
    from hftl.card import write_card

    arguments = task.arguments
    path = Path(str(arguments.output_dir))
    partial = path / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    batch = task.collate([data["validation"][index] for index in range(min(8, len(data["validation"])))])
    final = Path(str(trainer.args.output_dir), "final")
    written = None if arguments.keep_checkpoints else final  # both stay, and one may be edited
    save_checked(task, _whole_model(task, trainer), batch, partial, written)
    probe = final / PROBE
    if probe.is_dir():
        shutil.copytree(probe, partial / PROBE)
    folder.write_text(partial / RECIPE, yaml.safe_dump(to_recipe(arguments), sort_keys=False, allow_unicode=True))
    split = folder.scored_split(results)
    write_answers(partial / PREDICTIONS, task.problem, splits, split, *results[split][:2])
    largest = max(reversed(records), key=lambda record: record["trainable_parameters"])  # of equal ones the last
    metrics = {
        "train": {
            "seconds": sum(record["seconds"] for record in records if "beside" not in record),
            "samples_per_second": largest["samples_per_second"],
            "peak_memory_mb": _peak_memory_mb(records),
            "trainable_parameters": largest["trainable_parameters"],
            "total_parameters": largest["total_parameters"],
            "stages": records,
            "seed": arguments.seed,
            "precision": arguments.precision,
            "hardware": compute.hardware(),
            "versions": _versions(),
        },
        **{name: scores for name, (_, _, scores) in results.items()},
        **task.problem.kept(task.label_names),
    }
    folder.write_json(partial / METRICS, metrics)
    folder.write_json(path / LOGS / FOUND_IN_DATA, splits.found())  # file names may be in it: logs are never pushed
    write_card(partial, task, arguments, splits, metrics)
    folder.publish(path)
    folder.finish(path, arguments.keep_checkpoints)


def _whole_model(task: ClassificationTask, trainer: TransferTrainer) -> Any:
    """The trained model in this process alone; where it is sharded, from the weights that the last stage gathered."""
    if not trainer.is_sharded:
        return trainer.bare_model()
    return task.auto_class.from_pretrained(Path(str(trainer.args.output_dir), "final"), dtype=torch.float32)


def save_checked(
    task: ClassificationTask, model: Any, batch: dict[str, torch.Tensor], target: Path, written: Path | None = None
) -> None:
    """Save the model, adapters merged and also by themselves; load it in plain transformers and compare logits.

    Where an adapter cannot be merged, or the merged model gives other logits, the model is kept beside it. Weights that
    stand in the folder `written` are not written again.

    Raises:
        RuntimeError: the saved model gives other logits. The checkpoints stay.
    """
    model = model.eval()
    device = next(model.parameters()).device
    expected = _logits(model, batch, device)
    channels_last = any(weights.ndim > 3 and not weights.is_contiguous() for weights in model.parameters())
    kind = "saving"
    if hasattr(model, "peft_config"):
        merging.save_adapter(model, target / merging.ADAPTER)
        kind = "few bits" if backbones.is_quantised(model) else "merging"
        model = _merged_or_kept(task.problem, model, batch, expected, target)
    if model is not None:
        save_model(model, target, written=written)
    elif kind == "merging":
        kind = "saving"
    loaded = load_saved(task.auto_class, target, task.arguments.trust_remote_code)
    task.save_processor(target)
    if (target / merging.BASE).is_dir():  # a model by itself, to start from
        task.save_processor(target / merging.BASE)
    loaded = loaded.to(device).eval()
    if channels_last:  # the order of sums differs from layout to layout
        loaded = backbones.to_channels_last(loaded)
    difference = _difference(task.problem, loaded, batch, expected)
    if not difference <= _TOLERANCE[kind]:
        raise RuntimeError(
            f"The saved model gives other logits than the trained one (difference {difference:.3g} of the largest, "
            f"allowed {_TOLERANCE[kind]:.3g}). Nothing was published; the training checkpoints are in "
            f"{target.parent / CHECKPOINTS}."
        )


def _merged_or_kept(
    problem: Problem, model: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor, target: Path
) -> Any | None:
    """The ordinary model with the adapters in it; or None, and what they belong to is saved beside them."""
    state: dict[str, torch.Tensor] | None = None
    reason: str | None = "the base has 8 or 4 bits, and what is added to it would be rounded"
    if not backbones.is_quantised(model):
        state, reason = merging.base_state(model), merging.merge(model)
    inner = model.get_base_model()
    if reason is None:
        difference = _difference(problem, inner, batch, expected)
        if difference <= _TOLERANCE["merging"]:
            return inner
        reason = f"the merged model's logits differ by {difference:.2g} of the largest"
    say(f"adapter: not merged, since {reason}; it is kept with its base, in {merging.ADAPTER}/ and {merging.BASE}/")
    _save_unmerged(model, state, target)
    return None


def _save_unmerged(model: Any, state: dict[str, torch.Tensor] | None, target: Path) -> None:
    """Save the model without its adapters, as `base_state` gave it, and the configuration above both.

    A plain `from_pretrained` of the run folder then fails for want of weights, instead of giving another model. A
    quantised model has no state that could be given: its adapters are removed.
    """
    if state is None:
        merging.put_back_trained_parts(model)
        model.unload()
    save_model(model.get_base_model(), target / merging.BASE, state)
    shutil.copy(target / merging.BASE / "config.json", target / "config.json")


def _difference(problem: Problem, model: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    """How far a model's logits are from the expected ones, relative to what is much."""
    logits = _logits(model, batch, next(model.parameters()).device)
    return float((logits - expected).abs().max()) / problem.scale_of(expected)


def _logits(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    inputs = backbones.inputs_of(batch, device)
    with torch.inference_mode():
        return model(**inputs).logits.float()


def _peak_memory_mb(records: list[dict[str, Any]]) -> float:
    """Of this process, with what trained beside it at one time."""
    beside: Counter[str] = Counter()
    for record in records:
        if "beside" in record:
            beside[record["beside"]] += record["peak_memory_mb"]
    return compute.peak_memory() / 1e6 + max(beside.values(), default=0)


def _versions() -> dict[str, str]:
    """Of what may make a difference."""
    names = ("torch", "transformers", "timm", "peft", "accelerate", "datasets", "scikit-learn")
    found = {name: compute.version_of(name) for name in names}
    return {"hftl": __version__, "python": platform.python_version(), **found}
