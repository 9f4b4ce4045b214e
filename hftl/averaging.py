"""Weights averaged: over the steps of a training, its epochs or several trainings, and with the pretrained ones.

What is averaged are the parameters that train in the last stage, adapters included, and the running statistics of
BatchNorm layers where those train (`--batch_norm train`): the mean of statistics stands for those of the mean, which
needs no further pass over the rows and is close for weights of one training.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from hftl import backbones
from hftl.arguments import TransferArguments
from hftl.callbacks import ends_epoch
from hftl.compute import wait_for_all
from hftl.errors import UsageError
from hftl.folder import has_space, is_main_process, replacing, say
from hftl.methods import Plan, Stage
from hftl.metrics import SHARES, swapped_answers, written

if TYPE_CHECKING:
    from hftl.trainer import TransferTrainer

Tensors = dict[str, torch.Tensor]

#: about the last thousand steps; in shorter trainings the warm-up of the decay rules
EMA_DECAY = 0.999
#: the last quarter of the epochs (Izmailov et al. 2018, who train for 75 % of the time before they average) …
_SWA_PART = 0.25
#: … but no fewer than two
_SWA_LEAST = 2
#: checkpoints that a soup may be made of, as AutoGluon's top_k
INGREDIENTS = 3
#: in the folder of a training that is one of several: its weights
INGREDIENT = "ingredient.safetensors"
#: mixes of the pretrained and the fine-tuned backbone that are tried, as in the paper
MIXES = tuple(round(tenth / 10, 1) for tenth in range(11))


class Averaging(TrainerCallback):
    """What the three averages of a stage share: which tensors, and a file beside those of a checkpoint.

    Attributes:
        values: the average so far by name, or empty.
        count: the weights that are in it.
    """

    #: where `values` stand in a checkpoint
    file: ClassVar[str] = "average.safetensors"
    #: whether evaluations during the training see the average, so that the best checkpoint is that of the average
    evaluated: ClassVar[bool] = False

    def __init__(self, trainer: TransferTrainer) -> None:
        """Keep the trainer."""
        self.trainer = trainer
        self.values: Tensors = {}
        self.count = 0

    @property
    def tensors(self) -> Tensors:
        """What is averaged, as it stands in the model."""
        return averaged_tensors(self.trainer)

    def start(self, resumed: bool) -> None:
        """Forget what a training before this one left."""
        self.values, self.count = {}, 0

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint."""
        if is_main_process() and self.values:
            values = {name: value.contiguous() for name, value in self.values.items()}
            save_file(values, checkpoint / self.file, metadata={"count": str(self.count)})

    def load(self, checkpoint: Path) -> None:
        """Read the average from a checkpoint; before the first average there is none."""
        path = checkpoint / self.file
        if path.is_file():
            now = self.tensors
            self.values = {name: torch.empty_like(now[name]).copy_(value) for name, value in load_file(path).items()}
            with safe_open(path, "pt") as content:
                self.count = int(content.metadata()["count"])

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The average in the place of the weights."""
        shown = self.evaluated and bool(self.values)
        if shown:
            self._swap()
        try:
            yield
        finally:
            if shown:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.tensors.items():
            weights = tensor.clone()
            tensor.copy_(self.values[name])
            self.values[name].copy_(weights)

    def finish(self) -> dict[str, Any]:
        """Put the average into the trained model for good; what was chosen, for the record of the stage."""
        raise NotImplementedError


class ExponentialAverage(Averaging):
    """A moving average over the steps (Polyak and Juditsky 1992), its decay warmed up: min(d, (1 + t) / (10 + t)).

    The warm-up is that of TensorFlow's ExponentialMovingAverage: t steps in, about the last ninth of them count.
    """

    evaluated = True

    def start(self, resumed: bool) -> None:
        """As the other averages; what it moves with is found anew, once for all steps."""
        super().start(resumed)
        self.moving: Tensors = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the average towards the weights."""
        step = state.global_step
        now = self.moving = self.moving or self.tensors  # to find them takes a walk over all modules
        if not self.values:
            self.values = {name: tensor.detach().clone() for name, tensor in now.items()}
        decay = min(args.ema_decay or EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [now[name] for name in self.values], 1 - decay)
        self.count = step

    def finish(self) -> dict[str, Any]:
        """The average of the best checkpoint, or without one of the last step."""
        trainer = self.trainer
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        if best is not None:
            self.load(Path(best))
        put(self.tensors, self.values)
        self.values = {}
        which = "the best evaluation" if best is not None else "the last step"
        say(f"average: the moving average up to step {self.count}, {which}")
        return {"average": {"kind": "ema", "step": self.count}}


class StochasticAverage(Averaging):
    """The mean of the weights at the ends of the last epochs (SWA, Izmailov et al. 2018)."""

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the weights where an epoch ends; here rather than in `on_epoch_end`, before which a signal may stop."""
        last = state.global_step == state.max_steps
        if not last and not ends_epoch(state.epoch):
            return
        epochs = state.epoch * state.max_steps / state.global_step
        wanted = max(_SWA_LEAST, math.ceil(_SWA_PART * epochs - 1e-6))
        if epochs - state.epoch > wanted - 1 + 1e-6:
            return
        now = self.tensors
        if not self.values:
            self.values = {name: torch.zeros_like(tensor) for name, tensor in now.items()}
        self.count += 1
        torch._foreach_lerp_(list(self.values.values()), [now[name] for name in self.values], 1 / self.count)

    def finish(self) -> dict[str, Any]:
        """The mean; the best checkpoint does not matter."""
        put(self.tensors, self.values)
        score = self.trainer.validate()[0]
        say(f"average: the mean of the weights after the last {self.count} epochs, {_shown(self.trainer, score)}")
        return {"average": {"kind": "swa", "epochs": self.count, "score": score}}


class GreedySoup(Averaging):
    """The mean of the best checkpoints, as long as adding one does not harm on validation (Wortsman et al. 2022).

    Of the checkpoints of one training, as AutoGluon makes it. The weights of the three best evaluations stay on disk,
    without their optimizer; in memory there is the model alone.
    """

    @property
    def place(self) -> Path:
        """The folder of the ingredients."""
        return Path(str(self.trainer.args.output_dir), "soup")

    def start(self, resumed: bool) -> None:
        """Throw away what a training before this one cooked."""
        if not resumed and is_main_process():
            shutil.rmtree(self.place, ignore_errors=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keep the weights if they are among the best; a resumed training repeats what it had done."""
        if not is_main_process():
            return
        sign = 1 if args.greater_is_better else -1
        score = sign * float(metrics[f"eval_{args.metric_for_best_model}"])
        self.place.mkdir(exist_ok=True)
        path = self.place / f"{state.global_step}.safetensors"
        with replacing(path) as beside:
            _save_scored(self.tensors, beside, score)
        for unneeded in self._ingredients()[INGREDIENTS:]:
            unneeded.unlink()

    def _ingredients(self) -> list[Path]:
        """The kept weights, the best first, of equal ones the later."""
        return sorted(self.place.glob("*.safetensors"), key=lambda path: (-_score_in(path), -int(path.stem)))

    def finish(self) -> dict[str, Any]:
        """Cook what there is: one at least, since Trainer evaluates last."""
        wait_for_all()
        tried = self._ingredients()
        known = self.trainer.evaluations.get(int(tried[0].stem))
        chosen, score = cook(self.trainer, tried, known)
        steps = [int(path.stem) for path in chosen]
        shown = f"(steps {', '.join(map(str, steps))}), {_shown(self.trainer, score)}"
        say(f"average: a soup of {len(chosen)} of {len(tried)} checkpoints {shown}")
        return {"average": {"kind": "soup", "steps": steps, "tried": len(tried), "score": score}}


def cook(
    trainer: TransferTrainer, ingredients: Sequence[Path], known: Any = None, lenient: bool = False
) -> tuple[list[Path], float]:
    """Put the mean of ingredients into the model: of the first, and of each further one that keeps or raises the score.

    Args:
        trainer: whose validation split decides.
        ingredients: files of `averaged_tensors`, the best first.
        known: what an evaluation of the first gave, if this process has it.
        lenient: take one that lowers the score too, by no more than one standard error of the paired difference, where
            the score is a share of the rows or like one.

    Returns:
        What is in the mean, and its score.
    """
    lenient = lenient and trainer.args.metric_for_best_model in SHARES
    tensors = averaged_tensors(trainer)
    best, evaluation = -math.inf, None
    chosen: list[Path] = []
    for path in ingredients:
        _put_mean(tensors, [*chosen, path])
        if known is not None and not chosen:
            score, trainer.chosen_evaluation = _score_in(path), known
        else:
            score = trainer.validate()[0] * (1 if trainer.args.greater_is_better else -1)
        slack = 0.0
        if lenient and chosen:
            slack = _standard_error(str(trainer.args.metric_for_best_model), evaluation, trainer.chosen_evaluation)
        if score >= best - slack:
            best, evaluation = score, trainer.chosen_evaluation
            chosen.append(path)
    _put_mean(tensors, chosen)
    trainer.chosen_evaluation = evaluation
    return chosen, best if trainer.args.greater_is_better else -best


@torch.no_grad()
def _put_mean(tensors: Tensors, ingredients: Sequence[Path]) -> None:
    """Put the mean of files of tensors in their place, one tensor at a time: no second copy of the model is needed."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in ingredients]
        for name, tensor in tensors.items():
            tensor.copy_(files[0].get_tensor(name))
            for count, file in enumerate(files[1:], start=2):
                tensor.lerp_(file.get_tensor(name).to(tensor.device), 1 / count)


def _standard_error(metric: str, before: Any, now: Any) -> float:
    """Of the difference of two scores of the same rows, which have a class each; see `swapped_answers`."""
    answers = (np.asarray(evaluation.predictions).argmax(axis=1) for evaluation in (before, now))
    return float(np.linalg.norm(swapped_answers(metric, now.label_ids, *answers)))


def keep_ingredient(trainer: TransferTrainer, folder: Path) -> None:
    """Keep the weights that a training ended with, and their score on validation, for `soup_of_runs`."""
    score = trainer.score() * (1 if trainer.args.greater_is_better else -1)
    if is_main_process():
        _save_scored(averaged_tensors(trainer), folder / INGREDIENT, score)


def soup_of_runs(trainer: TransferTrainer, folders: Sequence[Path]) -> dict[str, Any]:
    """The mean of several trainings from the same start, the best first (a soup, Wortsman et al. 2022).

    Only a run that makes it worse by more than chance (of a score that is no share of the rows: worse) is left out: the
    runs are alike, and a validation split of usual size cannot tell which of them to leave out. On 2,000 movie reviews
    (MiniLM, `full` with its defaults, scored on 6,056 others) single runs have 0.843 to 0.844, the mean of two 0.850
    and of three 0.853; the two that a strict comparison takes, 0.850.

    Args:
        trainer: of the last of them.
        folders: where each left its ingredient.
    """
    ranked = sorted(folders, key=lambda folder: -_score_in(folder / INGREDIENT))
    chosen, score = cook(trainer, [folder / INGREDIENT for folder in ranked], lenient=True)
    runs = sorted(folders.index(path.parent) + 1 for path in chosen)
    shown = f"({', '.join(map(str, runs))}), {_shown(trainer, score)}"
    say(f"soup: the mean of {len(runs)} of {len(folders)} runs {shown}")
    return {"soup": {"runs": runs, "tried": len(folders), "score": score}}


AVERAGES = {"ema": ExponentialAverage, "swa": StochasticAverage, "soup": GreedySoup}


def changing_tensors(model: nn.Module, stage: Stage) -> Tensors:
    """Everything that a stage may change, by name: what may train, and all buffers."""
    parameters = ((name, tensor.detach()) for name, tensor in model.named_parameters() if name in stage.trainable)
    return {**dict(parameters), **dict(model.named_buffers())}


class KeepWeights(TrainerCallback):
    """Writes what a stage may change where its training ends, if the disk has room."""

    def __init__(self, stage: Stage, path: Path) -> None:
        """Keep which stage, and where."""
        self.stage, self.path = stage, path

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The best evaluation's weights are in the model."""
        tensors = changing_tensors(extract_model_from_parallel(model, keep_torch_compile=False), self.stage)
        # Copies: what shares its memory, or has its channels last, is not written.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        if has_space(self.path.parent, sum(tensor.nbytes for tensor in copies.values())):
            with replacing(self.path) as beside:
                save_file(copies, beside)


def averaged_tensors(trainer: TransferTrainer) -> Tensors:
    """Parameters that train in a trainer's stage, and statistics of its BatchNorm layers that do, by name."""
    model: Any = trainer.model
    tensors = {name: tensor.data for name, tensor in model.named_parameters() if name in trainer.stage.trainable}
    still = {id(module) for module in trainer.frozen_modules}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in still:
            buffers = {"running_mean": module.running_mean, "running_var": module.running_var}
            tensors |= {f"{prefix}.{name}": value for name, value in buffers.items() if value is not None}
    return tensors


def _save_scored(tensors: Tensors, path: Path, score: float) -> None:
    """Write weights with their score, larger is better."""
    values = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(values, path, metadata={"score": repr(score)})


def _score_in(path: Path) -> float:
    """The score that stands in a file of weights, larger is better."""
    with safe_open(path, "pt") as content:
        return float(content.metadata()["score"])


@torch.no_grad()
def put(tensors: Tensors, values: Tensors) -> None:
    """Copy values into the tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _shown(trainer: TransferTrainer, score: float) -> str:
    return f"validation {trainer.args.metric_for_best_model} {written(str(trainer.args.metric_for_best_model), score)}"


# --- with the pretrained weights -------------------------------------------------------------------------------------


def check_length(stage: Stage, steps_an_epoch: int, arguments: TransferArguments) -> None:
    """Refuse `--average swa` of a single epoch, and `--average soup` of none that is evaluated.

    Raises:
        UsageError: as said.
    """
    epochs = arguments.max_steps / steps_an_epoch if arguments.max_steps > 0 else stage.epochs
    if arguments.average == "swa" and stage.trainable and math.ceil(epochs) < _SWA_LEAST:
        raise UsageError("--average swa is the mean over several epochs: give --num_train_epochs 2 or more.")
    if arguments.average == "soup" and stage.trainable:
        length, unit = (epochs, "epochs") if arguments.eval_strategy == "epoch" else (epochs * steps_an_epoch, "steps")
        if arguments.eval_delay > length:
            raise UsageError(
                f"--eval_delay {arguments.eval_delay:g} leaves --average soup no evaluation in {length:g} {unit}: "
                "leave out one."
            )


def check_averaging(plan: Plan, arguments: TransferArguments) -> None:
    """Refuse averages of what there is not.

    Raises:
        UsageError: as said.
    """
    ends_with_head = plan.stages[-1].trainable <= set(backbones.head_parameters(plan.model))
    if arguments.soup_runs > 1 and ends_with_head:
        raise UsageError(
            f"--soup_runs: --method {arguments.method} ends with the head alone, of which one solution is the best: "
            "leave it out."
        )
    if not arguments.wise_ft:
        return
    if arguments.reinit_blocks:
        raise UsageError("--wise_ft mixes in what --reinit_blocks throws away: leave one of them out.")
    if hasattr(plan.model, "peft_config"):
        raise UsageError(
            f"--wise_ft: --method {arguments.method} leaves the backbone's weights alone, and a mix of adapters is no "
            "mix of weights. Use it with full, partial or lp_ft."
        )
    if ends_with_head:
        raise UsageError(
            f"--wise_ft: --method {arguments.method} ends with the head alone. Use it with full, partial or lp_ft."
        )


def _mixed(plan: Plan) -> set[str]:
    """Names of the backbone's parameters that any stage trains; with them the head, where it is one of texts."""
    blocks = backbones.parameter_blocks(plan.model)
    head = max(blocks.values())
    trained = set().union(*(stage.trainable for stage in plan.stages))
    body = {name for name in trained if blocks[name] < head}
    return trained if body and backbones.starts_from_texts(plan.model) else body


def pretrained_weights(plan: Plan) -> Tensors:
    """Copies of what is mixed: what any stage trains of the backbone, and its BatchNorm statistics that do."""
    names = _mixed(plan)
    values: Tensors = {name: tensor for name, tensor in plan.model.named_parameters() if name in names}
    if names and any(stage.batch_norm == "train" for stage in plan.stages):
        norms = backbones.normalisation_modules(plan.model)
        values |= {
            name: tensor
            for name, tensor in plan.model.named_buffers()
            if name.rpartition(".")[0] in norms and name.endswith(("running_mean", "running_var"))
        }
    return {name: tensor.detach().clone() for name, tensor in values.items()}


def interpolate(trainer: TransferTrainer, start: Tensors) -> dict[str, Any]:
    """Mix the pretrained with the fine-tuned backbone, the mix chosen on validation (WiSE-FT, Wortsman et al. 2022).

    Of a dual encoder whose head is made of texts the head is mixed too, as in the paper. Of others it is the fine-tuned
    one, since none knew the new classes before. That was fitted to the fine-tuned features, so that the mix helps most
    after `lp_ft`, whose head starts from the pretrained ones. Of equal scores that of least validation loss is taken.

    Args:
        trainer: of the last stage; its model holds the fine-tuned weights.
        start: the pretrained weights, as `pretrained_weights` gave them.
    """
    model: Any = trainer.model
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: everything[name].data for name in start}
    end = {name: tensor.clone() for name, tensor in tensors.items()}
    sign = 1 if trainer.args.greater_is_better else -1
    best, tried = (-math.inf, -math.inf), []
    mix, evaluation = 1.0, None
    for share in MIXES:
        _put_mix(tensors, start, end, share)
        score, loss = trainer.validate()
        tried.append({"mix": share, "score": score, "loss": loss})
        if (sign * score, -loss) > best:
            best, mix, evaluation = (sign * score, -loss), share, trainer.chosen_evaluation
    _put_mix(tensors, start, end, mix)
    trainer.chosen_evaluation = evaluation
    what = "zero-shot model" if backbones.starts_from_texts(model) else "pretrained backbone"
    parts = f"{mix:g} of the fine-tuned and {1 - mix:g} of the {what}"
    say(f"wise_ft: {parts}, {_shown(trainer, sign * best[0])}")
    return {"wise_ft": {"mix": mix, "tried": tried}}


@torch.no_grad()
def _put_mix(tensors: Tensors, start: Tensors, end: Tensors, share: float) -> None:
    """Put a mix into tensors, one at a time: beside the model no more than its fine-tuned weights need memory."""
    for name, tensor in tensors.items():
        tensor.copy_(torch.lerp(start[name].to(tensor), end[name], share))
