"""Which method suits a model and a data set, from figures that are measured: `hftl advise`.

The textbook's rule (Yosinski et al. 2014, Kornblith et al. 2019): few rows near to what the model learned, train the
head; many and near, everything; few and far, adapters or earlier blocks; many and far, everything. How near is
measured on the model's features of the training rows, see `Figures.skill`. Few texts are learned from in pairs.
"""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from sklearn.metrics import silhouette_score

from hftl import backbones, compute, machine, transferability
from hftl.arguments import parse, stage_arguments
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.features import PooledFeatures, longest_stage
from hftl.folder import say
from hftl.losses import CrossEntropyLoss
from hftl.methods import build_plan
from hftl.methods.adapters import takes_lora
from hftl.methods.plan import LEAST_STEPS, Plan, later_half, prepare_modules, with_least_steps
from hftl.problems import is_uneven
from hftl.ranking import Pooled, features_of, load_rows, require_two_rows
from hftl.tasks import find_task

#: the part of the error of guessing that the probe must take away. It is 0.98 on cats and dogs with EfficientNet-Lite0,
#: where training everything is no better than the head alone (0.979 to 0.989 and 0.989), and 0.57 on movie reviews with
#: MiniLM, where it is 10 points better (0.879 and 0.779)
NEAR = 0.95
#: training rows of the smallest class. Far from what the model knows, with 50 rows a class, everything trained beats
#: adapters and the head alone (MiniLM on movie reviews, one run each: 0.756, 0.726 and 0.682)
LARGE = 50
#: the probe above the nearest neighbours by so much: what tells the classes apart is in the features, but not what they
#: show most. Cats and dogs 0.005, digits, movie reviews and SST-2 0.08 to 0.10, TREC 0.18
HELD = 0.05
#: with less of the error of guessing taken away the features say next to nothing of the classes, and where rows are
#: many a training from scratch comes near to one from them (medical images, Raghu et al. 2019)
FOREIGN = 0.1
_FROM_SCRATCH = (
    "the features say next to nothing of the classes: a training from scratch (--model random:ARCHITECTURE) may do as "
    "well, so compare"
)
#: rows whose distances to each other make the silhouette
_SAMPLE = 1_000
#: a training that takes longer is worth a word about others
_LONG = 1_800.0
#: `lora` 3.3 points less, standard error over six data sets 1.0; `partial` with two blocks 5.6, 2.1
#: (benchmarks/quality.md)
_BETTER_THAN_THE_RULE = (
    "so says the textbook; measured with 16 a class of six data sets, lp_ft scores 3 points more than lora, and 6 more "
    "than partial with 2 blocks: try it too"
)


@dataclass(frozen=True)
class Figures:
    """What was seen of the data, the model and the machine.

    Attributes:
        counts: training rows of each class.
        inputs: size of pictures or length of texts, in words.
        hint: what to change about it, or nothing.
        hardware: the device, in words.
        probe: accuracy of a linear layer on rows left out, see `hftl.transferability`.
        neighbours: the same of the nearest neighbours.
        silhouette: mean silhouette of the classes by cosine, -1 to 1 (Rousseeuw 1987).
        logme: see `hftl.transferability`.
        blocks: of the backbone.
        adaptable: whether LoRA finds layers.
        pairs: whether rows are texts that the model has features of, so that it can be tuned on pairs of them.
        forward: seconds a row through the model.
    """

    counts: tuple[int, ...]
    inputs: str
    hint: str
    hardware: str
    probe: float
    neighbours: float
    silhouette: float
    logme: float
    blocks: int
    adaptable: bool
    pairs: bool
    forward: float

    @property
    def rows(self) -> int:
        """Training rows."""
        return sum(self.counts)

    @property
    def smallest(self) -> int:
        """Rows of the smallest class that has any."""
        return min(count for count in self.counts if count)

    @property
    def chance(self) -> float:
        """Accuracy of always saying the largest class."""
        return max(self.counts) / self.rows

    @property
    def skill(self) -> float:
        """The part of the error of guessing that the probe takes away: 1 where it is always right, 0 at chance."""
        return (self.probe - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Choice:
    """A method, what of the model it trains, and why; the lines name the figures that they rest on."""

    method: str
    blocks: str
    reasons: tuple[str, ...]
    unfreeze_blocks: int | None = None


def choose(figures: Figures) -> Choice:
    """The method for what was seen."""
    near, large = figures.skill >= NEAR, figures.smallest >= LARGE
    held = figures.probe - figures.neighbours >= HELD
    size = (
        f"{'large' if large else 'small'}: {figures.smallest:,} rows in the smallest class ({LARGE} and more are large)"
    )
    nearness = (
        f"{'near' if near else 'far'}: a linear layer on the frozen features is right on {figures.probe:.3f} of the "
        f"rows left out, which is {figures.skill:.0%} of the way from chance ({figures.chance:.3f}) to all "
        f"({NEAR:.0%} and more are near)"
    )
    half = later_half(figures.blocks)
    gap = f"the linear layer is {100 * (figures.probe - figures.neighbours):.1f} points above the nearest neighbours"
    if figures.pairs and not large:
        why = "texts in pairs teach more than their labels: 3 points above full with 16 a class, 2 with 64, 0 with 200"
        return Choice("setfit", f"all {figures.blocks}, on pairs, and then the head", (size, nearness, why))
    if near and not large:
        why = "the features separate the classes already, and more weights would learn the few rows by heart"
        return Choice("frozen", "the head alone", (size, nearness, why))
    if near:
        why = "enough rows to adapt everything; the head first, so that its first gradients do not spoil good features"
        return Choice("lp_ft", f"all {figures.blocks} and the head", (size, nearness, why))
    if large:
        why = "the features do not separate the classes well enough, and the rows suffice to change them"
        whys = (why,) if figures.skill >= FOREIGN else (why, _FROM_SCRATCH)
        return Choice("full", f"all {figures.blocks} and the head", (size, nearness, *whys))
    if held and figures.adaptable:
        why = f"{gap}: what tells the classes apart is in the features, and adapters of few weights bring it forward"
        blocks = f"adapters in all {figures.blocks} but the first"
        return Choice("lora", blocks, (size, nearness, why, _BETTER_THAN_THE_RULE))
    why = f"{gap}: the last features do not hold the classes, so that the later half is learned anew on earlier ones"
    if held:
        why = f"{gap}, and the model has no layers for adapters: the later half is trained"
    blocks = f"the last {half} of {figures.blocks}"
    return Choice("partial", blocks, (size, nearness, why, _BETTER_THAN_THE_RULE), unfreeze_blocks=half)


def look(found: Pooled, splits: Splits) -> Figures:
    """Every figure that a choice rests on, from the features of the training rows."""
    spectrum = transferability.decompose(transferability.with_constant(found.features))
    inputs, hint = found.task.inputs_in_words(splits, found.rows)
    blocks = backbones.structure(found.model).blocks
    random = np.random.default_rng(0).permutation(len(found.labels))[:_SAMPLE]
    groups = len(np.unique(found.labels[random]))
    can_tell = 1 < groups < len(random)  # every class one row, say: then there is no silhouette
    return Figures(
        counts=tuple(splits.counts),
        inputs=inputs,
        hint=hint,
        hardware=_hardware(found.task.arguments.device),
        probe=transferability.linear_probe(spectrum, found.labels),
        neighbours=transferability.nearest_neighbours(found.features, found.labels),
        silhouette=float(silhouette_score(found.features[random], found.labels[random], metric="cosine"))
        if can_tell
        else math.nan,
        logme=transferability.logme(spectrum, found.labels),
        blocks=len(blocks),
        adaptable=takes_lora(found.model),
        pairs=found.task.modality.is_text and type(found.source) is PooledFeatures,
        forward=found.seconds_a_row,
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    memory = psutil.virtual_memory().total / 1e9
    return f"{device.type}, {machine.cores()} cores ({machine.processor()[0]}), {memory:.0f} GB"


def advise(task_name: str, tokens: Sequence[str]) -> str:
    """What was seen, what to do and why, and the command to paste.

    Args:
        task_name: of a built-in task.
        tokens: flags as for `hftl train`, without a method.

    Raises:
        UsageError: the data or the model cannot be used, or a method is given.
    """
    task_class = find_task(task_name)
    arguments = parse(task_class.arguments_class, tokens)
    if "method" in arguments.given:
        raise UsageError("--method is what hftl advise says. Leave it out.")
    if arguments.finds_learning_rate:
        raise UsageError("--learning_rate auto: hftl advise says a rate itself. Leave it out, or run hftl lr-find.")
    splits = load_rows(arguments, task_class.modality)
    require_two_rows(splits)
    found = features_of(task_class(arguments), splits)
    figures = look(found, splits)
    choice = choose(figures)
    training, flags = _training(found, figures, choice)
    chosen = {"method": choice.method, "unfreeze_blocks": choice.unfreeze_blocks}
    own = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    command = ["hftl", "train", task_name, *tokens, *own, *flags]
    seen = [
        f"data:      {figures.rows:,} rows, {len(figures.counts)} classes, {figures.smallest:,} to "
        f"{max(figures.counts):,} rows a class ({max(figures.counts) / figures.smallest:.1f} to 1); {figures.inputs}",
        f"machine:   {figures.hardware}; {1 / figures.forward:,.0f} rows/s through the model",
        f"features:  linear layer {figures.probe:.3f}, nearest neighbours {figures.neighbours:.3f}, chance "
        f"{figures.chance:.3f}; silhouette {figures.silhouette:.2f}, LogME {figures.logme:.3f}",
    ]
    notes = [f"note:      {note}" for note in (*_imbalance(figures), figures.hint) if note]
    advice = [f"because    {reason}" for reason in choice.reasons]
    lines = [*seen, "", f"method:    {choice.method}", f"blocks:    {choice.blocks}", *training, *advice, *notes]
    return "\n".join([*lines, "", shlex.join(command)])


def _imbalance(figures: Figures) -> tuple[str, ...]:
    ratio = max(figures.counts) / figures.smallest
    uneven = is_uneven(figures.counts)
    return (f"classes are {ratio:.0f} to 1: macro F1 chooses the checkpoint, look at it too",) if uneven else ()


def _training(found: Pooled, figures: Figures, choice: Choice) -> tuple[list[str], tuple[str, ...]]:
    """Rate and length in words, and as flags; one batch of the method's longest stage is timed."""
    if choice.method == "frozen":
        return ["rate:      none: the head is solved on the kept features", "length:    seconds"], ()
    blocks = choice.unfreeze_blocks or found.task.arguments.unfreeze_blocks
    arguments = stage_arguments(found.task.arguments, method=choice.method, unfreeze_blocks=blocks)
    plan = build_plan(copy.deepcopy(found.model), arguments)
    rate, head = plan.settings["learning_rate"], plan.settings.get("head_learning_rate")
    stage = longest_stage(plan.stages, plan.model)
    epochs = with_least_steps(stage, math.ceil(figures.rows / found.task.rows_a_step)).epochs
    default = arguments.learning_rate is None
    source = f"the default of {choice.method} for models of this kind and width" if default else "as given"
    seconds = epochs * figures.rows * _seconds_a_row(found, plan)
    reason = (
        f"enough for {LEAST_STEPS} steps" if epochs > stage.epochs else "more gained nothing on a few thousand rows"
    )
    reason = "three times as many learn a few dozen texts by heart" if stage.headless else reason
    reason = "as given" if "num_train_epochs" in arguments.given else reason
    lines = [
        f"rate:      {rate:.2g}{'' if head is None else f', new layers {head:.2g}'} ({source})",
        f"length:    {epochs:g} epochs ({reason}), about {_time(seconds)}",
    ]
    if seconds > _LONG:
        lines.append("           shorter: --method auto --time_budget 10m finds what fits, or --max_train_samples")
    flags = {"learning_rate": f"{rate:.3g}", "num_train_epochs": f"{epochs:g}"}
    return lines, tuple(f"--{name}={value}" for name, value in flags.items() if name not in arguments.given)


def _seconds_a_row(found: Pooled, plan: Plan) -> float:
    """Forward and backward of a plan's longest stage, timed on a batch of typical rows."""
    arguments = found.task.arguments
    prepare_modules(plan.model, longest_stage(plan.stages, plan.model))
    plan.model.to(arguments.device)
    batch = compute.typical_batch(found.rows, found.task.collate)
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    return compute.seconds_a_row(plan.model, batch, CrossEntropyLoss(), True, arguments.precision)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def main(task_name: str, tokens: Sequence[str]) -> None:
    """`hftl advise`."""
    say(f"\n{advise(task_name, tokens)}")
