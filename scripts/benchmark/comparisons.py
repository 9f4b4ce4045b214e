"""What is compared with what, and how much is asked for: jobs of hftl against jobs of its peers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.common import BUILTIN
from benchmark.jobs import Job, job

Figures = dict[str, Any]
#: runs of one job
Runs = list[Figures]
#: steps in which rounding has not grown yet
_FIRST_STEPS = 10
RECIPE_NAMES = ["ImageArguments", "ImageClassification", "TextClassification", "build_plan", "fit", "parse"]
IMAGE_MODEL, TEXT_MODEL = "builtin:efficientnet_lite0", "builtin:minilm"
#: default rates of hftl for these models, for the peers that are tuned by hand
IMAGE_RATES = {"learning_rate": 2e-4, "head_learning_rate": 3e-3}
TEXT_RATES = {"learning_rate": 1e-4, "head_learning_rate": 1e-3}
#: what the example scripts of transformers have by default
EXAMPLE_SETTINGS = {"batch_size": 8, "learning_rate": 5e-5}


@dataclass(frozen=True)
class Comparison:
    """One row of the target table.

    Attributes:
        title: what is compared.
        ours: hftl's job.
        theirs: what it is compared with; the target is about the first `targets` of them.
        least: how often `theirs` must take the time (or memory) of `ours`; 0.8 means "within 1.25 times".
        measures: keys of the figures, of ours and of theirs.
        checks: what else must hold between all runs of both, by name.
        most_repeats: where one run takes long and scatters little.
    """

    title: str
    ours: Job
    theirs: tuple[Job, ...]
    least: float
    measures: tuple[str, str] = ("seconds", "seconds")
    checks: tuple[str, ...] = ()
    most_repeats: int = 99
    targets: int = 1


@dataclass(frozen=True)
class Setting:
    """What comparisons are made from.

    Attributes:
        data: folder of `benchmark.prepare`.
        many: folder of tables by number of training images.
        home: the `HFTL_HOME` with the built-in weights.
        options: of the command line.
        python: interpreters of the libraries that are installed, by name.
        minilm: the folder of the built-in text model.
    """

    data: Path
    many: dict[int, Path]
    home: Path
    options: argparse.Namespace
    python: dict[str, str]
    minilm: Path

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return 64 if self.options.quick else 224

    def epochs(self, count: int) -> int:
        """One where the script is only tried out."""
        return 1 if self.options.quick else count


def hftl_train(
    setting: Setting, name: str, task: str, *flags: str, before: Job | None = None, processes: int = 1
) -> Job:
    """`hftl train`."""
    argv = ["train", f"{task}-classification", *base_flags(setting, task), *flags, "--output_dir={output}"]
    return job(name, "hftl", before, processes, argv=argv, run="{output}")


def without_start_up(made: Job) -> Job:
    """The same job, timed from the end of the imports that a recipe causes anyway."""
    settings = {**json.loads(made.settings), "names": RECIPE_NAMES}
    return dataclasses.replace(made, name=f"{made.name}, no start-up", settings=json.dumps(settings, sort_keys=True))


def base_flags(setting: Setting, task: str) -> list[str]:
    """Model and data; what does not stand here is at its default."""
    if task == "text":
        return [f"--model={TEXT_MODEL}", f"--dataset={setting.data / 'texts'}"]
    if task in BUILTIN:
        texts = [f"--text_model={TEXT_MODEL}"] if task == "image-text" else []
        return [f"--model={IMAGE_MODEL}", f"--dataset=builtin:{BUILTIN[task]}", *texts]
    flags = [f"--model={IMAGE_MODEL}", f"--dataset={setting.data / 'images'}"]
    return [*flags, f"--image_size={setting.image_size}"] if setting.options.quick else flags


def peer(setting: Setting, name: str, kind: str, task: str, **settings: Any) -> Job:
    """A job of a peer with what all of them are told."""
    places = {"task": task, "data": str(setting.data / f"{task}s"), "output": "{output}"}
    return job(name, kind, image_size=setting.image_size, **{**places, **settings})


def frozen(setting: Setting) -> dict[str, Comparison]:
    """The head alone."""
    flags = ["--method=frozen"]
    cold = hftl_train(setting, "hftl frozen, cold", "image", *flags)
    column = ["--label_column=other_label", "--seed=7"]
    first = hftl_train(setting, "hftl frozen, filling the cache", "image", *flags, "--label_column=label")
    warm = hftl_train(setting, "hftl frozen, warm", "image", *flags, *column, before=first)
    # 5e-5 is made for whole networks: with it a head learns next to nothing, and hftl's accuracy would be no feat.
    plain = {"batch_size": 8, "learning_rate": IMAGE_RATES["head_learning_rate"], "epochs": setting.epochs(3)}
    head = peer(setting, "Trainer, head only, 3 epochs", "trainer", "image", head_only=True, **plain)
    # In both, since which is faster depends on the machine, and a person would take that one.
    by_hand, half = (
        peer(setting, f"features and LR by hand, {text}", "features_by_hand", "image", precision=precision)
        for text, precision in (("float32", "no"), ("bf16", "bf16"))
    )
    work = ("work_seconds", "work_seconds")
    return {
        "frozen-cold": Comparison("frozen, cold, whole process", cold, (head, by_hand), 4, checks=("accuracy",)),
        "frozen-warm": Comparison("frozen, warm, other seed and label column", warm, (head,), 10, checks=("accuracy",)),
        "frozen-bare": Comparison("frozen, cold", without_start_up(cold), (by_hand, half), 1 / 1.25, work, targets=2),
    }


def partial(setting: Setting) -> dict[str, Comparison]:
    """The last blocks; without augmentation, computed and kept in float32, so that both sides have the same losses."""
    flags = [
        "--method=partial",
        "--unfreeze_blocks=2",
        "--augmentation=none",
        f"--num_train_epochs={setting.epochs(5)}",
    ]
    exact = ["--logging_steps=1", "--precision=fp32", "--feature_cache_dtype=float32"]
    ours = hftl_train(setting, "hftl partial", "image", *flags, *exact)
    settings = {"flags": [*base_flags(setting, "image"), *flags, "--output_dir={output}"], "epochs": setting.epochs(5)}
    # The second only sums in another order: how far rounding leads two equal trainings apart.
    theirs = tuple(
        peer(setting, f"Trainer, same blocks{text}", "trainer_same_blocks", "image", channels_last=last, **settings)
        for text, last in (("", False), (", channels_last", True))
    )
    title = "partial, last 2 blocks, 5 epochs"
    return {"partial": Comparison(title, ours, theirs, 2.5, checks=("losses",))}


def full_image(setting: Setting) -> dict[str, Comparison]:
    """Everything trains, on images."""
    epochs = setting.epochs(3)
    flags = ["--method=full", f"--num_train_epochs={epochs}"]
    ours = hftl_train(setting, "hftl full", "image", *flags)
    plain = peer(setting, "Trainer as is", "trainer", "image", **EXAMPLE_SETTINGS, epochs=epochs)
    tuned_settings = {"batch_size": 32, "epochs": epochs, "tuned": True, **IMAGE_RATES}
    tuned = peer(setting, "Trainer tuned by hand", "trainer", "image", **tuned_settings)
    others = library(setting, "fastai", "image", str(setting.home / "efficientnet_lite0"), epochs)
    theirs = (plain, tuned, *others)
    return {
        "full-image": Comparison("full, images", ours, theirs, 1.5),
        "full-image-bare": against_bare(setting, "image", flags, epochs),
    }


def full_text(setting: Setting) -> dict[str, Comparison]:
    """Everything trains, on texts; one epoch, since padded to 128 tokens one takes minutes."""
    flags = ["--method=full", "--num_train_epochs=1"]
    ours = hftl_train(setting, "hftl full", "text", *flags)
    plain_settings = {**EXAMPLE_SETTINGS, "epochs": 1, "padding": "max_length"}
    plain = peer(setting, "Trainer as in the example scripts", "trainer", "text", **plain_settings)
    tuned_settings = {"batch_size": 16, "epochs": 1, "padding": "longest", "group_by_length": True, "tuned": True}
    tuned = peer(setting, "Trainer tuned by hand", "trainer", "text", **tuned_settings, **TEXT_RATES)
    theirs = (plain, tuned, *library(setting, "autogluon", "text", str(setting.minilm), 1))
    return {
        "full-text": Comparison("full, text", ours, theirs, 3),
        "full-text-bare": against_bare(setting, "text", flags, 1),
    }


def full_of_others(setting: Setting) -> dict[str, Comparison]:
    """Everything trains, on sounds as pictures and on images with texts."""
    made = {}
    for task, count in (("audio", 6), ("image-text", 3)):
        epochs = setting.epochs(count)
        flags = ["--method=full", f"--num_train_epochs={epochs}"]
        made[f"full-{task}-bare"] = against_bare(setting, task, flags, epochs)
    return made


def against_bare(setting: Setting, task: str, flags: list[str], epochs: int) -> Comparison:
    """The same work in a bare loop, both in float32: what hftl would choose here is no merit of its loop."""
    ours = hftl_train(setting, "hftl full, float32", task, *flags, "--precision=fp32")
    settings = {"flags": [*base_flags(setting, task), *flags, "--output_dir={output}"], "epochs": epochs}
    theirs = peer(setting, "bare loop by hand", "bare_loop", task, precision="no", **settings)
    return Comparison(f"full, {task}", ours, (theirs,), 1 / 1.03)


def library(setting: Setting, name: str, task: str, model: str, epochs: int) -> tuple[Job, ...]:
    """fastai or AutoGluon where it is installed; whether it is has been said."""
    if name not in setting.python:
        return ()
    made = peer(setting, name, name, task, model=model, epochs=epochs)
    return (dataclasses.replace(made, python=setting.python[name]),)


def lp_ft(setting: Setting) -> dict[str, Comparison]:
    """First the head, then everything, at hftl's defaults; the peers pad no more than a batch needs.

    All go through the rows four times: hftl once forward, from which it solves the head, and in three epochs; the peers
    in four epochs, the first, which the target is about, with the settings of the example scripts, the second with
    hftl's rates.
    """
    # Accuracies are near to each other: each repeat has a seed of its own.
    flags = ["--method=lp_ft", f"--num_train_epochs={setting.epochs(3)}", "--seed={seed}"]
    ours = hftl_train(setting, "hftl lp_ft, 1 pass + 3 epochs", "text", *flags)
    settings = {"epochs": 1 + setting.epochs(3), "padding": "longest", "seed": "{seed}"}
    plain = peer(setting, "Trainer, dynamic padding, 4 epochs", "trainer", "text", **settings, **EXAMPLE_SETTINGS)
    tuned_settings = {"batch_size": 16, "tuned": True, **TEXT_RATES}
    tuned = peer(setting, "Trainer tuned by hand, 4 epochs", "trainer", "text", **settings, **tuned_settings)
    return {"lp-ft": Comparison("lp_ft, text", ours, (plain, tuned), 1, checks=("accuracy",))}


def predict(setting: Setting) -> dict[str, Comparison]:
    """`hftl predict` on a table against `transformers.pipeline` on the same run, without the imports."""
    made = {}
    for task, batch_size, least in (("image", 32, 2.0), ("text", 1, 5.0)):
        # Trained for as long as it takes to have a precision and answers that are those of a trained model.
        before = hftl_train(setting, f"hftl {task}s, to predict with", task, "--num_train_epochs=1", "--method=full")
        table = str(setting.data / f"{task}s" / "train.csv")
        argv = ["predict", "{before}", table, "--output={output}.csv"]
        settings: dict[str, Any] = {"argv": argv, "names": ["load_run", "parse"], "answers": "{output}.csv"}
        ours = job(f"hftl predict, {task}s", "hftl", before, **settings)
        theirs_settings: dict[str, Any] = {"task": task, "table": table, "run": "{before}", "batch_size": batch_size}
        theirs = job(f"pipeline, batch {batch_size}", "pipeline", before, **theirs_settings)
        work = ("work_seconds", "work_seconds")
        made[f"predict-{task}"] = Comparison(f"predict, {task}s", ours, (theirs,), least, work, ("answers",))
    return made


def first_step(setting: Setting) -> dict[str, Comparison]:
    """From the start of the process to the end of the first optimizer step."""
    flags = ["--method=full", "--max_steps=1", "--eval_strategy=no", "--save_strategy=no"]
    ours = hftl_train(setting, "hftl, first step", "text", *flags, "--load_best_model_at_end=false")
    theirs = peer(setting, "imports and model", "load_only", "text")
    measures = ("first_step_seconds", "first_step_seconds")
    return {"first-step": Comparison("first step, text", ours, (theirs,), 1 / 1.3, measures)}


def memory(setting: Setting) -> dict[str, Comparison]:
    """Frozen features of few and of many images, of the largest process; at 96 pixels, as only the rows matter."""
    jobs = []
    for count, folder in sorted(setting.many.items()):
        flags = [f"--model={IMAGE_MODEL}", f"--dataset={folder}", "--image_size=96", "--method=frozen"]
        argv = ["train", "image-classification", *flags, "--output_dir={output}"]
        jobs.append(job(f"hftl frozen, {count:,} images", "hftl", argv=argv, run="{output}"))
    few, many = jobs
    measures = ("memory_mb", "memory_mb")
    return {"memory": Comparison("memory by number of images", many, (few,), 1 / 1.1, measures, most_repeats=1)}


def two_processes(setting: Setting) -> dict[str, Comparison]:
    """The same global batch on one process with all threads and on two that share them; training alone."""
    made = {}
    for task in ("image", "text"):
        one, two = (
            hftl_train(
                setting,
                f"hftl full, {text}",
                task,
                "--method=full",
                "--num_train_epochs=1",
                f"--per_device_train_batch_size={32 // count}",
                processes=count,
            )
            for count, text in ((1, "1 process"), (2, "2 processes"))
        )
        measures = ("train_seconds", "train_seconds")
        made[f"two-processes-{task}"] = Comparison(f"2 processes, full, {task}s", two, (one,), 0.9, measures)
    return made


def cached_step(setting: Setting) -> dict[str, Comparison]:
    """A step of the head on cached features."""
    flags = ["--method=frozen", "--num_train_epochs=5", "--feature_cache=on", "--head_solver=sgd"]
    ours = hftl_train(setting, "hftl frozen, cached, SGD", "image", *flags)
    with (setting.data / "images" / "train.csv").open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - 1
    settings: dict[str, Any] = {"rows": rows, "width": 1280, "classes": 2, "batch_size": 32, "epochs": 5}
    theirs = job("loop over a tensor in memory", "tensor_steps", **settings)
    measures = ("step_seconds", "step_seconds")
    return {"cached-step": Comparison("a cached step of frozen, SGD", ours, (theirs,), 1 / 1.2, measures)}


#: name → the function that makes it; some make several
COMPARISONS: dict[str, Callable[[Setting], dict[str, Comparison]]] = {
    "frozen-cold": frozen,
    "frozen-warm": frozen,
    "frozen-bare": frozen,
    "partial": partial,
    "full-image": full_image,
    "full-image-bare": full_image,
    "full-text": full_text,
    "full-text-bare": full_text,
    "full-audio-bare": full_of_others,
    "full-image-text-bare": full_of_others,
    "lp-ft": lp_ft,
    "predict-image": predict,
    "predict-text": predict,
    "first-step": first_step,
    "memory": memory,
    "two-processes-image": two_processes,
    "two-processes-text": two_processes,
    "cached-step": cached_step,
}


# ---- what came out ---------------------------------------------------------------------------------------------------


def summarise(comparison: Comparison, runs: dict[Job, Runs]) -> dict[str, Any]:
    """The figures of a comparison.

    `ratio` is theirs over ours, of the fastest runs, since what else a machine does only ever adds time; beside it
    the median, the lowest and the highest of the repeats' own ratios.
    """
    ours = runs[comparison.ours]
    own = [run[comparison.measures[0]] for run in ours]
    peers = []
    for other in comparison.theirs:
        values = [run[comparison.measures[1]] for run in runs[other]]
        ratios = [theirs / mine for theirs, mine in zip(values, own, strict=True)]
        peers.append(
            {
                **describe_runs(other, runs[other], comparison.measures[1]),
                "ratio": min(values) / min(own),
                "ratio_median": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    checks = {name: CHECKS[name](ours, [runs[other] for other in comparison.theirs]) for name in comparison.checks}
    fast = all(entry["ratio"] >= comparison.least for entry in peers[: comparison.targets])
    met = fast and all(check["holds"] for check in checks.values())
    return {
        "title": comparison.title,
        "measure": comparison.measures[0],
        "least": comparison.least,
        "targets": comparison.targets,
        "met": met,
        "hftl": describe_runs(comparison.ours, ours, comparison.measures[0]),
        "peers": peers,
        "checks": checks,
    }


def describe_runs(wanted: Job, runs: Runs, measure: str) -> dict[str, Any]:
    """Least and median of what was measured, the medians of the other figures, and the runs themselves."""
    values = [run[measure] for run in runs]
    made: dict[str, Any] = {"name": wanted.name, "min": min(values), "median": statistics.median(values)}
    for key in ("seconds", "step_seconds", "examples_per_second", "memory_mb", "gpu_memory_mb", "accuracy"):
        known = [run[key] for run in runs if run.get(key) is not None]
        made[key] = statistics.median(known) if known else None
    made["precision"] = runs[0].get("precision")
    made["runs"] = [{key: value for key, value in run.items() if key not in ("losses", "answers")} for run in runs]
    return made


def _accuracy(ours: Runs, peers: list[Runs]) -> dict[str, Any]:
    mine, other = (statistics.mean(run["accuracy"] for run in runs) for runs in (ours, peers[0]))
    return {"holds": mine >= other, "text": f"accuracy {mine:.4f} against {other:.4f}"}


def _losses(ours: Runs, peers: list[Runs]) -> dict[str, Any]:
    """The first steps within 1e-4; all within a thousandth, or as near as rounding lets two equal trainings be.

    It grows from step to step: after a hundred of them a peer is some hundredths apart from the same peer that only
    sums in another order. Which pair is further apart is chance, but twice as far is not.
    """
    mine, other = ours[0]["losses"], peers[0][0]["losses"]
    if len(mine) != len(other) or not mine:
        return {"holds": False, "text": f"{len(mine)} losses against {len(other)}"}
    largest, first = _apart(mine, other), _apart(mine[:_FIRST_STEPS], other[:_FIRST_STEPS])
    text = f"losses differ by at most {first:.1e} in the first {_FIRST_STEPS} steps, by {largest:.1e} in {len(mine)}"
    between = 0.0
    if len(peers) > 1:
        between = _apart(peers[1][0]["losses"], other)
        text += f"; those of the peer summed in two orders by {between:.1e}"
    return {"holds": first <= 1e-4 and largest <= max(1e-3, 2 * between), "text": text}


def _apart(mine: list[float], other: list[float]) -> float:
    """The largest relative difference of two lists of losses; below a hundredth, relative to that."""
    return max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(mine, other, strict=True))


def _answers(ours: Runs, peers: list[Runs]) -> dict[str, Any]:
    mine, other = ours[0]["answers"], peers[0][0]["answers"]
    same = sum(a == b for a, b in zip(mine, other, strict=True))
    return {"holds": same == len(other), "text": f"{same:,} of {len(other):,} answers are the same"}


CHECKS: dict[str, Callable[[Runs, list[Runs]], dict[str, Any]]] = {
    "accuracy": _accuracy,
    "losses": _losses,
    "answers": _answers,
}
