"""Steps of a head that is one linear layer, on kept features that lie in memory.

Trainer visits every module of the model in every step, several times, and takes one row after the other from its data
set: 3 ms for a step in which a linear layer of 1,280 features computes for 0.2 ms. What is left here of an epoch is the
steps; what surrounds them (optimizer, schedule, evaluation, checkpoints, log) stays Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.optimization import GreedyLR

from hftl.callbacks import ReadableProgress, StopSignals, TimeLimit
from hftl.compute import one_thread_if_small

#: most steps between two looks at the callbacks, and most products: a tenth of a second, in which a signal waits
_STRETCH, _PRODUCTS = 50, 2e9
#: what the features may take in memory
_MOST_BYTES = 2**31
_EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
#: callbacks that lose nothing where they see some of the steps alone
_SEE_SOME = (DefaultFlowCallback, ReadableProgress, StopSignals, TimeLimit)


@dataclass(frozen=True)
class HeadSteps:
    """The head of a trainer, and all that it learns from.

    Attributes:
        layer: makes the logits from the features.
        features: of shape (views, rows, features), on the layer's device.
        labels: of shape (rows, …), there too.
    """

    layer: nn.Linear
    features: torch.Tensor
    labels: torch.Tensor

    def run_epoch(
        self,
        trainer: Any,
        epoch: int,
        batches: Sequence[torch.Tensor],
        done: int,
        log_save_evaluate: Callable[[torch.Tensor | None, float], None],
    ) -> None:
        """What `Trainer._run_epoch` does, with events only where something comes of them.

        Args:
            trainer: whose epoch it is.
            epoch: its number.
            batches: row numbers of each step.
            done: steps of this epoch that an interrupted run has behind it.
            log_save_evaluate: what is due after an event, by the norm of the last gradient and the last rate.

        Raises:
            Diverged: a loss is not finite.
        """
        args, state, handler = trainer.args, trainer.state, trainer.callback_handler
        features = self.features[trainer.train_dataset.view]
        norm, rate = None, trainer._get_learning_rate()
        trainer.optimizer._opt_called = True  # what the schedule looks for at Accelerate's optimizer
        most = max(1, int(_PRODUCTS / (args.train_batch_size * self.layer.weight.numel())))
        while done < len(batches) and state.global_step < state.max_steps:  # an interrupted run may be at its last step
            trainer.control = handler.on_step_begin(args, state, trainer.control)
            stretch = batches[done : done + min(most, _until_event(args, state))]
            norm, rate = self._run_steps(trainer, features, stretch)
            done += len(stretch)
            state.epoch = epoch + done / len(batches)
            trainer.control = handler.on_step_end(args, state, trainer.control)
            log_save_evaluate(norm, rate)
            if trainer.control.should_epoch_stop or trainer.control.should_training_stop:
                break
        trainer.control = handler.on_epoch_end(args, state, trainer.control)
        log_save_evaluate(norm, rate)

    def _run_steps(
        self, trainer: Any, features: torch.Tensor, batches: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | None, float]:
        """Optimizer steps; of the last one the norm of the gradient and the rate."""
        weight, bias = self.layer.weight, self.layer.bias
        loss_of, schedule, most = trainer.compute_loss_func, trainer.lr_scheduler, trainer.args.max_grad_norm
        waits = isinstance(schedule, ReduceLROnPlateau | GreedyLR)  # for an evaluation
        trainer.optimizer.train()  # schedule-free optimizers evaluate other weights than they train
        optimizer = trainer.optimizer.optimizer  # Accelerate's looks for a library in every step, which takes 0.1 ms
        # In one piece, which has its norm and is scaled at once.
        gradient = weight.new_empty(sum(parameter.numel() for parameter in self.layer.parameters()))
        weight.grad = gradient[: weight.numel()].view_as(weight)
        if bias is not None:
            bias.grad = gradient[weight.numel() :]
        losses, norm, rate = [], None, 0.0
        with one_thread_if_small(len(batches[0]) * weight.numel()):
            for step, rows in enumerate(batches, start=trainer.state.global_step):
                trainer.seed(step)  # a loss of one's own may draw
                values, labels = features[rows], self.labels[rows]
                logits = nn.functional.linear(values, weight.detach(), None if bias is None else bias.detach())
                items = torch.as_tensor(trainer.items(labels), device=labels.device)
                loss = loss_of({"logits": logits.requires_grad_()}, labels, num_items_in_batch=items)
                # Behind the logits there is one layer, whose gradient takes less time than to record it.
                (logits_gradient,) = torch.autograd.grad(loss, logits)
                torch.mm(logits_gradient.T, values, out=weight.grad)
                if bias is not None:
                    torch.sum(logits_gradient, dim=0, out=bias.grad)
                losses.append(loss.detach())
                norm = torch.linalg.vector_norm(gradient)
                if most > 0:  # as torch.nn.utils.clip_grad_norm_
                    gradient *= (most / (norm + 1e-6)).clamp(max=1.0)
                rate = trainer._get_learning_rate()
                optimizer.step()
                if not waits:
                    schedule.step()
        optimizer.zero_grad()
        found = torch.stack(losses)
        if not found.isfinite().all():
            first = int(found.isfinite().int().argmin())
            trainer.not_finite(found[first], trainer.state.global_step + first)
        trainer._tr_loss += found.sum()
        trainer.state.global_step += len(losses)
        return norm, rate


def head_steps(trainer: Any) -> HeadSteps | None:
    """The steps of a trainer whose model is cut before its head; None where they need the model, or Trainer's loop."""
    args, cut, data = trainer.args, trainer.cut, trainer.train_dataset
    one_process = args.world_size == 1 and args.n_gpu <= 1
    if not one_process or args.gradient_accumulation_steps > 1 or args.fp16 or trainer.mixing is not None:
        return None
    if cut is None or cut.carried or cut.ragged or trainer.stage.penalty is not None:
        return None
    layer = cut.entry_module
    trained = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
    is_alone = type(layer) is nn.Linear and trained == {id(layer.weight), id(layer.bias)} - {id(None)}
    if not is_alone or any(map(_wants_each_step, trainer.callback_handler.callbacks)):
        return None
    views, rows = data.places.shape[:2]
    is_large = views * rows * layer.in_features * layer.weight.element_size() > _MOST_BYTES
    if is_large or len(data.shards.settings["shape"]) != 1:
        return None
    values, labels = data.matrix()
    values, labels = values.to(args.device, layer.weight.dtype), labels.to(args.device)
    with torch.no_grad(), cut.as_trained():
        expected = trainer.model(**cut.inputs(values[:2], {}))["logits"].float()
        # Not by calling the layer, to which the cut would hand over what it has at hand.
        found = nn.functional.linear(values[:2], layer.weight, layer.bias)
    tolerance = 2e-2 if args.bf16 else 1e-4
    # Something comes behind the layer, or outputs of zeros cannot tell.
    if not (found - expected).abs().max() < tolerance * expected.abs().max():
        return None
    return HeadSteps(layer, values.view(views, rows, -1), labels[:rows])


def _until_event(args: Any, state: Any) -> int:
    """Steps up to the next after which Trainer logs, evaluates, writes a checkpoint or stops; at most `_STRETCH`."""
    if state.global_step == 0 and args.logging_first_step:
        return 1
    every = {"logging": state.logging_steps, "eval": state.eval_steps, "save": state.save_steps}
    each = [int(steps) for kind, steps in every.items() if getattr(args, f"{kind}_strategy") == "steps" and steps]
    return min(_STRETCH, state.max_steps - state.global_step, *(steps - state.global_step % steps for steps in each))


def _wants_each_step(callback: TrainerCallback) -> bool:
    overrides = (getattr(type(callback), name) is not getattr(TrainerCallback, name) for name in _EVENTS)
    return type(callback) not in _SEE_SOME and any(overrides)
