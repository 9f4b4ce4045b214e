"""A Trainer for one stage: its parameters, its rates, its loss; frozen modules stay frozen."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DynamoBackend
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import ModelOutput

from hftl import backbones, batches, folder, optim, penalties
from hftl.arguments import TransferArguments
from hftl.averaging import AVERAGES, Averaging
from hftl.cpu_kernels import cpu_kernels
from hftl.cut import Cut
from hftl.errors import Diverged, UsageError
from hftl.exchange import GradientExchange, gradient_exchange
from hftl.first_token import first_token_alone, last_part
from hftl.head_steps import HeadSteps, head_steps
from hftl.methods import Stage
from hftl.methods.plan import prepare_modules
from hftl.word_rows import WordRows, word_rows

#: rows of a class that stand together at most: M of the "M per class" of Musgrave et al. 2020
_GROUP = 4


class TransferTrainer(Trainer):
    """`transformers.Trainer` for one stage of a plan.

    Args:
        stage: what trains, and at which rates.
        loss: `(outputs, labels, num_items_in_batch=None) -> scalar`; it reads `outputs["logits"]`.
        cut: where the model is cut; the data sets then hold kept activations, and the model runs from there on until
            `cut.remove()`.
        items: how many of what the loss is a mean over a batch has, by its labels.
        mixing: mixes the rows of a training batch; its draws are a function of (seed, step, process).
        average: none, ema, swa or soup; `average.finish()` after the training puts it in the place of the weights.
        others: as `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        loss: Any,
        model: nn.Module,
        args: TransferArguments,
        cut: Cut | None = None,
        items: Callable[[torch.Tensor], int] = len,
        mixing: Callable[[Any], Any] | None = None,
        average: str = "none",
        **others: Any,
    ) -> None:
        """Set which parameters train, and find the modules that do not."""
        self.stage, self.cut, self.mixing = stage, cut, mixing
        self.items = items
        self.frozen_modules = prepare_modules(model, stage)
        self.seeded_step = -1
        self.head_steps: HeadSteps | None = None
        self.exchange: GradientExchange | None = None
        self.words: WordRows | None = None
        self.evaluations: dict[int, Any] = {}
        self.chosen_evaluation: Any = None
        #: inputs whose logits are averaged in an evaluation, for a batch of it
        self.test_views: Callable[[Any], list[Any]] = lambda inputs: [inputs]
        _check_checkpointing(model, self.frozen_modules, args)
        _check_penalty(model, self.frozen_modules, stage, args)
        with _explained_settings():
            super().__init__(model=model, args=args, compute_loss_func=loss, **others)
        # Compiled code, by the flag or by the launcher, is made of torch's own functions.
        self.is_compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self.kernels = contextlib.nullcontext if self.is_compiled else cpu_kernels
        # What a step computes for the first token alone; a penalty may look at the others.
        stays_whole = self.is_compiled or self.is_sharded or stage.penalty is not None
        self.last_part = None if stays_whole else last_part(model)
        # Where there is no `exchange`: gradients that lie where they are exchanged need not be copied back.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.remove_callback(PrinterCallback)  # `hftl.callbacks` has what a person can read
        self.model_accepts_loss_kwargs = False  # the loss is ours: forward has no use for the number of rows
        self.rows_together = self._train_batch_size * args.gradient_accumulation_steps
        self.start: dict[str, torch.Tensor] | None = None
        self.watched = penalties.watched(model) if stage.penalty is not None else None
        if stage.reference is not None:
            stage.reference.to(self.args.device)
        if self.train_dataset is not None:
            self.add_callback(_EpochOfData(self))
        self.average: Averaging | None = None
        if average != "none":
            self.average = AVERAGES[average](self)
            self.add_callback(self.average)
        if cut is not None:
            cut.install()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer over the stage's parameter groups."""
        if self.optimizer is None:  # type: ignore[has-type]  # set by Trainer
            groups = optim.parameter_groups(self.model, self.stage, self.args.weight_decay)
            assert self.model is not None
            with _explained_settings():
                optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedules, and those of `hftl.optim`."""
        name = self.args.lr_scheduler_type
        if self.lr_scheduler is None and name in optim.SCHEDULES:  # type: ignore[has-type]  # set by Trainer
            rise = self.args.get_warmup_steps(num_training_steps)
            shaped: Any = optim.schedule(name, optimizer or self.optimizer, num_training_steps, rise)
            self.lr_scheduler = shaped
            self._created_lr_scheduler = True
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            if not self.args.lr_scheduler_kwargs:
                raise
            raise UsageError(f"--lr_scheduler_kwargs: {name} does not take them: {error}.") from error

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model (FSDP), or not in float32 (DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def end_workers(self) -> None:
        """End the data workers that wait for another epoch.

        Left to the garbage collector they would take 5 seconds for each data loader: it closes the queue by which they
        are told before it asks for that.
        """
        for loader in self.accelerator._dataloaders:
            inner = getattr(loader, "base_dataloader", loader)  # below Accelerate's
            if inner._iterator is not None:
                inner._iterator._shutdown_workers()
                inner._iterator = None

    def bare_model(self) -> Any:
        """The model as it was given, for another trainer or to be saved.

        Accelerate leaves its half precision around `forward`, and a mark by which the next Accelerator would take the
        model for its own, and train it in float32 and without `torch.compile`.
        """
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        vars(model).pop("_is_accelerate_prepared", None)
        return model

    def _inner_training_loop(self, batch_size: int | None = None, **settings: Any) -> Any:
        """Trainer's; with `--auto_find_batch_size` it is called again after each time that memory ran out.

        Trainer would go on with a tenth fewer rows a step, from the weights and moments that it had got to. Here the
        batch is halved (to a divisor of the rows of a step), the accumulation makes up for it, and training starts
        again from where it started: it ends as if it had begun with the batch that fits.

        Raises:
            UsageError: not even one row fits.
        """
        if self.args.auto_find_batch_size:
            self.end_workers()  # of the try before
            if self.start is None:
                state = self.bare_model().state_dict()
                self.start = {name: value.detach().cpu().clone() for name, value in state.items()}
            else:
                batch_size = _smaller(self._train_batch_size, self.rows_together)
                self.bare_model().load_state_dict(self.start)
                self.optimizer = self.lr_scheduler = None
                self.seeded_step = -1
            assert batch_size is not None
            self.args.gradient_accumulation_steps = self.rows_together // batch_size
            if batch_size < self.args.train_batch_size:
                folder.say(f"batch: {batch_size} rows, {self.args.gradient_accumulation_steps} times a step")
        if self.average is not None:
            self.average.start(resumed=settings.get("resume_from_checkpoint") is not None)
        # Compiled code is not made for sparse gradients; a static graph has no use for `no_sync`, in which its backward
        # pass fails (pytorch issue 143580).
        left = self.is_compiled or self.args.ddp_static_graph or self.is_sharded
        try:
            with contextlib.nullcontext() if left else self._own_gradients():
                return super()._inner_training_loop(batch_size, **settings)
        finally:
            self.head_steps = None  # which holds all features

    @contextlib.contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """On CPUs gradients of words by rows, and of the processes of one machine averaged there, where they can be."""
        by_rows = self.stage.penalty is None  # one that looks at all weights has a gradient for all words
        try:
            with contextlib.ExitStack() as stack:
                self.exchange = stack.enter_context(gradient_exchange(self.model, by_rows))
                if self.exchange is not None:
                    self.words = self.exchange.words
                elif by_rows and self.args.device.type == "cpu" and self.args.world_size == 1:
                    self.words = stack.enter_context(word_rows(self.model))
                yield
        finally:
            self.exchange = self.words = None

    def _run_epoch(self, **settings: Any) -> None:
        """Trainer's, or that of a linear head on kept features, which has no use for the model in a step."""
        epoch, begins = settings["epoch"], settings["epoch"] == settings["epochs_trained"]
        if begins:
            self.head_steps = head_steps(self)
        if self.head_steps is None:
            return super()._run_epoch(**settings)
        given = [settings[name] for name in ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")]
        self.head_steps.run_epoch(
            self,
            epoch,
            [torch.tensor(rows) for rows in settings["train_dataloader"].batch_sampler],
            settings["steps_trained_in_current_epoch"] if begins else 0,
            lambda norm, rate: self._maybe_log_save_evaluate(self._tr_loss, norm, *given, learning_rate=rate),
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One step, or one part of an accumulated one, seeded by `seed`.

        Raises:
            UsageError: the loss is not finite, or BatchNorm cannot train on the batch.
        """
        if self.seeded_step != self.state.global_step:
            self.seeded_step = self.state.global_step
            self.seed(self.seeded_step)
        inputs = self.mixing(inputs) if self.mixing is not None else inputs
        try:
            with contextlib.ExitStack() as stack:
                if self.exchange is not None:
                    stack.enter_context(model.no_sync())
                stack.enter_context(self.kernels())
                stack.enter_context(first_token_alone(self.last_part))
                loss = super().training_step(model, inputs, num_items_in_batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                "--batch_norm train: BatchNorm has no statistics of a single row whose maps are one pixel. Leave a "
                "last batch of one row out with --dataloader_drop_last, or take another --per_device_train_batch_size."
            ) from error
        if self.exchange is not None and self.accelerator.sync_gradients:
            self.exchange.average()
        elif self.words is not None:
            self.words.merge()
        if not torch.isfinite(loss):
            self.not_finite(loss, self.state.global_step)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        norm = self._clipped(self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        if grad_norm is None:
            grad_norm = self._clipped(math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _clipped(self, most: float) -> torch.Tensor | None:
        """The norm of gradients that are not Trainer's to clip."""
        if self.words is None:
            return None
        # Schedule-free optimizers, and others not of torch, add the decay to the gradient itself.
        keep = type(self.optimizer.optimizer).__module__.startswith("torch.optim")
        return self.words.clip(lambda weights: self.accelerator.clip_grad_norm_(weights, most), keep)

    def seed(self, step: int) -> None:
        """Make the randomness of a step a function of (seed, step, process), so that a resumed run repeats it."""
        # On a CPU torch.manual_seed would also queue the seed for every accelerator that is not there: 0.5 ms.
        seed_all = torch.default_generator.manual_seed if self.args.use_cpu else torch.manual_seed
        seed_all(self.args.seed + 1_000_003 * step + self.args.process_index)

    def not_finite(self, loss: torch.Tensor, done: int) -> None:
        """What happens when the loss is no number, behind so many steps.

        Raises:
            Diverged: always.
        """
        loss_name = "The loss" if self.stage.penalty is None else "The loss with its penalty"
        what = f"{loss_name} is {float(loss)} at step {done + 1} of stage {self.stage.name!r}"
        raise diverged(what, self.args.output_dir)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Rows, or words, of a step: Trainer counts numbers in labels that are not -100; a row may have several."""

        def total(count: Callable[[torch.Tensor], int]) -> Any:
            counted = [{"labels": batch["labels"].new_zeros(count(batch["labels"]))} for batch in batch_samples]
            return super(TransferTrainer, self)._get_num_items_in_batch(counted, device)

        if self.stage.penalty is not None:  # whose mean is over rows, whatever the loss counts
            self.rows_in_step = total(len)
        return total(self.items)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's, with the stage's penalty in training; frozen BatchNorm and dropout stay asleep.

        Trainer calls `model.train()` before every step, which would wake them.
        """
        if model.training:
            for module in self.frozen_modules:
                module.training = False
        if self.cut is not None:
            kept, labels = inputs["kept"], inputs.get("labels")
            carried = {name: inputs[name] for name in self.cut.carried}
            inputs = self.cut.inputs(kept, carried) | ({} if labels is None else {"labels": labels})
        if self.stage.penalty is None or self.watched is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The bare model: a second pass through DistributedDataParallel would prepare its reducer anew.
        bare, batch = self.accelerator.unwrap_model(model), dict(inputs)  # Trainer takes the labels out of `inputs`
        with penalties.watching(bare, self.watched) as seen:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with self.accelerator.autocast():
            penalty = self.stage.penalty(self.stage, bare, batch, ModelOutput({**outputs, **seen}))
        if num_items_in_batch is not None:  # as the loss: a part of the step's rows, times what DDP divides by
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            penalty = penalty * (processes * len(batch["labels"]) / self.rows_in_step)
        loss = loss + self.stage.penalty_weight * penalty
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *others: Any, **settings: Any) -> Any:
        """Trainer's, with the loss of the whole split: its own mean over processes counts the rows that pad a batch.

        Its answers come in the order of the rows, also where texts of like length were evaluated together.
        """
        self.evaluated = settings.get("metric_key_prefix", "eval")
        with contextlib.nullcontext() if self.average is None else self.average.shown():
            output = super().evaluation_loop(dataloader, *others, **settings)
        order = _longest_first(dataloader.dataset)
        if order is not None:
            back = np.argsort(order)
            # Arrays, tuples of them, or None.
            given = (output.predictions, output.label_ids)
            logits, labels = pytree.tree_map_only(np.ndarray, lambda values: values[back], given)
            output = output._replace(predictions=logits, label_ids=labels)
        logits, labels = output.predictions, output.label_ids
        if isinstance(logits, np.ndarray) and isinstance(labels, np.ndarray):
            loss = self.compute_loss_func({"logits": torch.from_numpy(logits)}, torch.from_numpy(labels))
            output.metrics[f"{settings.get('metric_key_prefix', 'eval')}_loss"] = float(loss)
        if settings.get("metric_key_prefix") == "eval":
            best = {step: kept for step, kept in self.evaluations.items() if step == self.state.best_global_step}
            self.evaluations = {**best, self.state.global_step: output}
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *others: Any, **settings: Any) -> Any:
        """Trainer's, with the mean logits of all `test_views`."""
        results = [
            super(TransferTrainer, self).prediction_step(model, view, *others, **settings)
            for view in self.test_views(inputs)
        ]
        loss, logits, labels = results[0]
        if len(results) == 1:
            return loss, logits, labels
        each = [result[1][0] if isinstance(result[1], tuple) else result[1] for result in results]
        return loss, torch.stack(each).mean(dim=0), labels

    @property
    def evaluation_of_the_best(self) -> Any:
        """What validation gave for the weights that training ended with, if this process evaluated them."""
        if self.chosen_evaluation is not None:
            return self.chosen_evaluation
        return self.evaluations.get(self.state.best_global_step) if self.args.load_best_model_at_end else None

    def _get_dataloader(self, *others: Any, **settings: Any) -> Any:
        """Trainer's, with workers that a signal to all processes of a run does not end: the main process decides.

        `--dataloader_drop_last` is for training: an evaluation has all its rows.
        """
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and bool(settings.get("is_training"))
        try:
            loader = super()._get_dataloader(*others, **settings)
        finally:
            self.args.dataloader_drop_last = drops
        inner = getattr(loader, "base_dataloader", loader)  # below Accelerate's
        inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
        shard = inner.batch_sampler
        if settings.get("is_training") and isinstance(shard, BatchSamplerShard):
            # BatchNorm has no statistics of one row.
            least = 2 if self.stage.batch_norm == "train" and backbones.batch_norms(self.model) else 1
            shares = EvenShares(shard.batch_sampler, self.args.world_size, self.args.process_index, least)
            object.__setattr__(inner, "batch_sampler", shares)  # a DataLoader forbids it; no other way leads there
        return loader

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's; but of equal scores the latest counts as the best.

        A few dozen rows give few different scores, and behind the later ones of equals the weights have seen more, and
        at lower rates. With 16 rows a class to train on and as many to validate (six data sets, `full`, 16 trainings)
        test scores are 1.3 ± 0.5 points higher than with the earliest, with the latest of those within a standard error
        of the highest 0.7 ± 0.7, and with the last weights 0.3 ± 0.8. Who stops early wants the earliest.
        """
        best = self.state.best_metric
        found = super()._determine_best_metric(metrics, trial)
        can_be_loaded = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if found or not can_be_loaded or self.args.early_stopping_patience:
            return found
        name = str(self.args.metric_for_best_model).removeprefix("eval_")
        equal = metrics[f"eval_{name}"] == best
        if equal:
            self.state.best_global_step = self.state.global_step
        return equal

    def score(self) -> float:
        """What chooses, on validation, of the weights that training ended with; evaluated where it is not known."""
        output = self.evaluation_of_the_best
        if output is None:
            return self.validate()[0]
        name = self.args.metric_for_best_model
        return next(value for key, value in output.metrics.items() if key in (f"eval_{name}", f"validation_{name}"))

    def validate(self) -> tuple[float, float]:
        """Evaluate the weights as they are on validation: the score that chooses, and the loss.

        `chosen_evaluation` becomes what this gave. The workers stay for the next call, where `predict` starts new ones
        each time: with 32 pictures they take longer than what they are for.
        """
        output = self.evaluation_loop(self.get_eval_dataloader(), "Validation", metric_key_prefix="validation")
        self.chosen_evaluation, metrics = output, output.metrics
        return metrics[f"validation_{self.args.metric_for_best_model}"], metrics["validation_loss"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.load(Path(checkpoint))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        rows = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        sampler, labels = self.args.sampler, None
        if sampler != "random":
            labels = getattr(data, "labels", None)
            if labels is None:
                raise UsageError(f"--sampler {sampler}: the task's training data set has no `labels`. Leave it out.")
        # Pairs are of any two rows, not of those of like length.
        lengths = None if self.stage.headless else getattr(data, "lengths", None)
        return EpochSampler(len(data), self.args.seed, lengths, rows, labels, grouped=sampler == "groups")

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Trainer's, with texts of like length together: 32 movie reviews as they come are half padding."""
        order = _longest_first(eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if order is None else order.tolist()

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: order, augmentation and dropout are functions of seed, epoch and step."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing, see `_save_rng_state`."""


def _longest_first(dataset: Any) -> np.ndarray[Any, Any] | None:
    lengths = getattr(dataset, "lengths", None)
    return None if lengths is None else batches.longest_first(lengths)


def _start_worker(seed: Callable[[int], None] | None, worker: int) -> None:
    """Make a data worker deaf to every SIGTERM but its parent's; a job scheduler sends it to all processes at once.

    The main process needs its workers for the step that it still does before it writes a checkpoint. macOS does not
    tell who sent a signal; there the workers end at once, and with them the run.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if seed is not None:
        seed(worker)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _smaller(batch_size: int, rows: int) -> int:
    """The largest divisor of `rows` that is at most half of `batch_size`.

    Raises:
        UsageError: the batch is one row already.
    """
    if batch_size == 1:
        raise UsageError(
            "The memory is too small for a single row: try --activation_checkpointing, --method lora or frozen, a "
            "smaller --image_size or --max_length, or a smaller model."
        )
    return next(size for size in range(batch_size // 2, 0, -1) if rows % size == 0)


def _check_checkpointing(model: Any, frozen: list[nn.Module], args: TrainingArguments) -> None:
    """Refuse activation checkpointing where the model has none, or where it would count batches twice.

    Raises:
        UsageError: as said.
    """
    if not args.activation_checkpointing:
        return
    inner = backbones.without_adapters(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise UsageError(f"--activation_checkpointing: {type(inner).__name__} does not have it. Leave it out.")
    still = {id(module) for module in frozen}
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and id(part) not in still for part in model.modules()):
        raise UsageError(
            "--activation_checkpointing runs every block twice, and BatchNorm would take each batch into its "
            "statistics twice: use --batch_norm frozen, or leave one of them out."
        )


def _check_penalty(model: nn.Module, frozen: list[nn.Module], stage: Stage, args: TrainingArguments) -> None:
    """Refuse a penalty where it would do nothing, or something else.

    Raises:
        UsageError: as said.
    """
    if stage.penalty is not None and args.n_gpu > 1:
        raise UsageError("--penalty needs a process for each GPU: start it with accelerate launch.")
    if stage.penalty is not penalties.r_drop:
        return
    still = {id(module) for module in frozen}
    awake = [module for module in model.modules() if id(module) not in still]
    if not any(map(backbones.is_random, awake)):
        raise UsageError(
            f"--penalty r_drop compares two passes with other dropout, and {type(model).__name__} has none where it "
            "trains. Take another penalty."
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in awake):
        raise UsageError(
            "--penalty r_drop runs every batch twice, and BatchNorm would take each batch into its statistics twice: "
            "use --batch_norm frozen, or leave one of them out."
        )


@contextlib.contextmanager
def _explained_settings() -> Iterator[None]:
    """Turn what Trainer and the optimizers raise for settings that they do not take into one clear error."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UsageError(f"These settings cannot be used: {' '.join(str(error).split())}") from error


def diverged(what: str, place: str | None) -> Diverged:
    """The error for a training that left the finite numbers, with what can be done; `place` holds the checkpoints."""
    kept = folder.last_checkpoint(Path(str(place)))
    note = f" The last good checkpoint is kept: {kept}." if kept else ""
    return Diverged(
        f"{what}: try a lower --learning_rate (a third of it), a longer --warmup_steps, or no half precision.{note}"
    )


class _EpochOfData(TrainerCallback):
    """Tells the data which epoch it is in; Trainer tells the sampler only through some of Accelerate's wrappers."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = math.floor((state.epoch or 0.0) + 1e-6)
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(epoch)
        sampler = _inner_sampler(kwargs["train_dataloader"])
        sampler.set_epoch(epoch)


def _inner_sampler(dataloader: Any) -> EpochSampler:
    """Our sampler below Accelerate's batch samplers."""
    sampler = dataloader.batch_sampler
    while not isinstance(sampler, EpochSampler):
        sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler
    return sampler


class EvenShares(BatchSamplerShard):
    """The batches of one process; what is left for the last step of an epoch is shared out among the processes.

    Accelerate fills that step up with rows from the start of the epoch, which would count twice: with 20 rows, two
    processes and 8 rows each it is 4 rows and 12 others.
    """

    def __init__(self, batches: BatchSampler, processes: int, process: int, least: int = 1) -> None:
        """Share out `batches`.

        Args:
            batches: of all processes, one after the other.
            processes: how many there are.
            process: the number of this one.
            least: rows that each process needs for a step; where there are fewer, those of the step come again.
        """
        super().__init__(batches, processes, process)
        self.least = least

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of row numbers; as many for every process."""
        step: list[list[int]] = []
        for batch in self.batch_sampler:
            step.append(batch)
            if len(step) == self.num_processes and len(batch) == self.batch_size:
                yield step[self.process_index]
                step = []
        left = list(itertools.chain.from_iterable(step))
        if left and not self.drop_last:
            count = max(len(left), self.least * self.num_processes)
            rows = list(itertools.islice(itertools.cycle(left), count))
            yield np.array_split(rows, self.num_processes)[self.process_index].tolist()


class EpochSampler(Sampler[int]):
    """An order of rows that depends on seed and epoch alone, whatever the processes, workers or interruptions.

    With lengths, rows of like length come together: shuffled, cut into pieces of 50 batches, each piece sorted by
    length, its batches shuffled (as `group_by_length` of transformers, but with the batches in random order, so that
    the lengths do not fall within each piece).

    With labels, as many rows are drawn as there are, of each class equally many: of frequent classes others each epoch,
    of rare ones every row before any is repeated (class-aware sampling, Shen et al. 2016). Or, grouped, each row once,
    up to four of a class behind each other and none alone that is not the only one of its class.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        labels: Sequence[int] | None = None,
        grouped: bool = False,
    ) -> None:
        """Start in epoch 0.

        Args:
            rows: number of rows.
            seed: of the order.
            lengths: one length a row, or None.
            batch_size: rows of one optimizer step over all processes.
            labels: the class ids to balance or to group, or None.
            grouped: whether rows of a class stand together.
        """
        self.rows, self.seed, self.batch_size, self.epoch = rows, seed, batch_size, 0
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.labels, self.grouped = None if labels is None else np.asarray(labels), grouped

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    def _order(self, random: np.random.Generator) -> np.ndarray[Any, Any]:
        """Row numbers, shuffled: each once, or each class equally often, or a class in groups."""
        if self.labels is None:
            return random.permutation(self.rows)
        members = np.split(
            np.argsort(self.labels, kind="stable"), np.cumsum(np.unique(self.labels, return_counts=True)[1])[:-1]
        )
        if self.grouped:
            parts = (np.array_split(random.permutation(rows), -(-len(rows) // _GROUP)) for rows in members)
            groups = [*itertools.chain.from_iterable(parts)]
            return np.concatenate([groups[place] for place in random.permutation(len(groups))])
        counts = np.full(len(members), self.rows // len(members))
        counts[random.permutation(len(members))[: self.rows % len(members)]] += 1
        drawn = [
            np.concatenate([random.permutation(rows) for _ in range(-(-count // len(rows)))])[:count]
            for rows, count in zip(members, counts, strict=True)
            if count
        ]
        return random.permutation(np.concatenate(drawn))

    def __iter__(self) -> Iterator[int]:
        """Row numbers, each once unless classes are balanced."""
        random = np.random.default_rng((self.seed, self.epoch))
        order = self._order(random)
        if self.lengths is None:
            return iter(order.tolist())
        batches = []
        for start in range(0, self.rows, 50 * self.batch_size):
            piece = order[start : start + 50 * self.batch_size]
            piece = piece[np.argsort(-self.lengths[piece], kind="stable")]
            batches += [piece[first : first + self.batch_size] for first in range(0, len(piece), self.batch_size)]
        # The last batch may be smaller and must stay last, or the batches behind it would be cut elsewhere.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        return iter(np.concatenate([batches[index] for index in random.permutation(len(batches))] + last).tolist())
