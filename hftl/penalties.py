"""What is added to the loss in training: nearness to the pretrained model, and consistency.

A penalty is a function `(stage, model, batch, outputs) -> scalar`:

- `stage.reference` is the pretrained model without its output layer, in eval mode (None for `random:` models), and
  `stage.trainable` the names of what trains;
- `model` is the bare model, in training mode, and `batch` what it took, `labels` among it;
- `outputs` is what it gave, a `ModelOutput`, with `features`, what its output layer read, of shape (rows, features),
  and `blocks`, what up to four blocks gave, by the names of their modules.

The scalar is a mean over the rows of the batch, or depends on no row. The trainer weighs it by the batch's share in the
rows of the step, so that accumulated parts and several processes add up to the same as one batch. The loss of an
evaluation is without.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments, is_pretrained
from hftl.errors import UsageError, did_you_mean
from hftl.loading import import_scalar_function

if TYPE_CHECKING:
    from hftl.methods.plan import Plan, Stage

#: blocks whose outputs are watched: DELTA compares the last layer of each of the four stages of a ResNet
_WATCHED = 4
#: of the softmax over standardised channels, the Transfer Learning Library's
_TEMPERATURE = 5.0


def l2_sp(stage: Stage, model: nn.Module, batch: dict[str, torch.Tensor], outputs: dict[str, Any]) -> torch.Tensor:
    """Half the squared distance of the weights from the pretrained ones (Li et al. 2018, "L2-SP").

    It takes the place of weight decay, which the output layer keeps.
    """
    assert stage.reference is not None
    start = dict(stage.reference.named_parameters())
    moved = [
        (parameter - start[name]).square().sum()
        for name, parameter in model.named_parameters()
        if name in stage.trainable and name in start
    ]
    return torch.stack(moved).sum() / 2


def delta(stage: Stage, model: nn.Module, batch: dict[str, torch.Tensor], outputs: dict[str, Any]) -> torch.Tensor:
    """Half the squared distance of feature maps from those of the pretrained model (Li et al. 2019, "DELTA").

    Summed over channels and watched blocks, a mean over positions and rows. Padding does not count. The channels have
    the weights of `channel_weights` where a stage before has taught the head, as in the paper; else they are alike.
    """
    assert stage.reference is not None
    names = tuple(outputs["blocks"])
    with torch.no_grad(), watching(stage.reference, Watched(names)) as start:
        stage.reference(**backbones.inputs_of(batch))
    distances = [
        _distance(
            outputs["blocks"][name], start["blocks"][name], batch.get("attention_mask"), stage.channel_weights.get(name)
        )
        for name in names
    ]
    return torch.stack(distances).sum() / 2


def _distance(
    values: torch.Tensor, start: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared difference summed over channels by weight, mean over the positions of each row, mean over rows."""
    squares = _channels_last((values.float() - start.float()).square())
    if weights is not None:
        squares = squares * weights.to(squares.device)  # a product of matrices would be in half precision
    squares = squares.sum(dim=-1).flatten(start_dim=1)
    mask = None if mask is None else mask.flatten(end_dim=-2)  # of rows with several choices each choice is one
    if mask is None or mask.shape != squares.shape:
        return squares.mean()
    return ((squares * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    """Of what a block gives: they come last in tokens and Swin's maps (of videos too), whose sides stand before."""
    is_last = values.ndim < 4 or (values.shape[-3] == values.shape[-2] != values.shape[-1])
    return values if is_last else values.movedim(1, -1)


def channel_weights(
    model: nn.Module, loss: Callable[..., Any], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """How much the channels of the watched blocks matter: by the loss without each (Li et al. 2019, "DELTA").

    To first order, the gradient times what the channel gives (Molchanov et al. 2017), which takes one pass for all
    channels; with the head as the stage begins with it, a tenth of a solved one. Standardised, and by a softmax at a
    temperature of 5 times their number, as the Transfer Learning Library does it.

    Args:
        model: in eval mode, with a head that knows the classes; what of it needs a gradient is changed.
        loss: `(outputs, labels) -> scalar`.
        batches: what the model takes, and `labels`.

    Returns:
        By the names of the blocks a mean of 1, shape (channels,), on the CPU.
    """
    model.requires_grad_(True)
    blocks = Watched(watched(model).blocks)
    rises: dict[str, torch.Tensor] = {}
    for batch in batches:
        with watching(model, blocks) as seen:
            value = loss(model(**backbones.inputs_of(batch)), batch["labels"])
        gradients = torch.autograd.grad(value, list(seen["blocks"].values()))
        for (name, output), gradient in zip(seen["blocks"].items(), gradients, strict=True):
            rise = -_channels_last(output.detach().float() * gradient.float()).flatten(end_dim=-2).sum(dim=0)
            rises[name] = rises.get(name, 0) + rise.cpu()
    return {name: _attention(rise) for name, rise in rises.items()}


def _attention(rise: torch.Tensor) -> torch.Tensor:
    spread = rise.std(correction=0)
    standard = (rise - rise.mean()) / spread if spread > 0 else torch.zeros_like(rise)
    return (standard / _TEMPERATURE).softmax(dim=0) * len(rise)


def bss(stage: Stage, model: nn.Module, batch: dict[str, torch.Tensor], outputs: dict[str, Any]) -> torch.Tensor:
    """The square of the smallest singular value of a batch's features (Chen et al. 2019, "Batch Spectral Shrinkage").

    A batch that is cut into parts has other singular values: parts and processes each shrink their own.

    Raises:
        UsageError: the output layer does not read one vector a row.
    """
    features = outputs.get("features")
    if features is None or features.ndim != 2:
        raise UsageError(f"--penalty bss: the output layer of {type(model).__name__} does not read one vector a row.")
    return torch.linalg.svdvals(features.float())[-1].square()


def r_drop(stage: Stage, model: nn.Module, batch: dict[str, torch.Tensor], outputs: dict[str, Any]) -> torch.Tensor:
    """How far the predictions of two passes with other dropout are from each other (Wu et al. 2021, "R-Drop").

    Half of the Kullback-Leibler divergence each way. The cross entropy is that of the first pass, whose expectation is
    that of the paper's mean over both. A step costs twice the time.
    """
    again = model(**backbones.inputs_of(batch))["logits"]
    first, second = (logits.float().log_softmax(dim=-1) for logits in (outputs["logits"], again))
    divergence = nn.functional.kl_div
    return (
        divergence(first, second, reduction="batchmean", log_target=True)
        + divergence(second, first, reduction="batchmean", log_target=True)
    ) / 2


PENALTIES: dict[str, Callable[..., torch.Tensor]] = {"l2_sp": l2_sp, "delta": delta, "bss": bss, "r_drop": r_drop}

#: weights, where none is given
WEIGHTS = {
    "l2_sp": 0.01,  # the Transfer Learning Library's
    # The Transfer Learning Library's 0.01 for a sum over batches of 48 rows is 0.5 of a mean: too much where features
    # must move far. With 16 rows a class it costs 22 points on TREC and 35 on digits, 0.005 costs 7 and 6, this 4 and 2
    "delta": 0.001,
    "bss": 0.001,  # the paper's, for one singular value
    "r_drop": 0.5,  # the middle of the three that the paper tries on GLUE
}
#: those that compare with the pretrained model
NEED_REFERENCE = ("l2_sp", "delta")
#: those that do without the inputs, and so work where the frozen part ran once and was kept
WITHOUT_INPUTS = (l2_sp, bss, r_drop)


# --- from the flags to the stages ------------------------------------------------------------------------------------


def check(arguments: TransferArguments) -> None:
    """Refuse an unknown penalty, and settings that go with none; needs no model.

    Raises:
        UsageError: as said.
    """
    if arguments.penalty is None:
        if arguments.penalty_weight is not None:
            raise UsageError("--penalty_weight weighs a --penalty, and none is given: leave it out.")
        return
    find_penalty(arguments.penalty)
    if arguments.penalty_weight is not None and not arguments.penalty_weight >= 0:
        raise UsageError(f"--penalty_weight must be 0 or more, not {arguments.penalty_weight}.")
    if arguments.penalty in NEED_REFERENCE and arguments.reinit_blocks:
        raise UsageError(
            f"--penalty {arguments.penalty} stays near what --reinit_blocks throws away: leave one of them out."
        )
    for flag in ("torch_compile", "activation_checkpointing"):
        if getattr(arguments, flag):
            raise UsageError(f"--penalty watches layers in a way that --{flag} does not allow: leave one of them out.")


def find_penalty(name: str) -> Callable[..., torch.Tensor]:
    """A built-in penalty by name, or the function named by `module:function` or `file.py:function`.

    Raises:
        UsageError: there is none, or it does not take (stage, model, batch, outputs).
    """
    if name in PENALTIES:
        return PENALTIES[name]
    if ":" not in name:
        raise UsageError(
            f"Unknown penalty {name!r}.{did_you_mean(name, PENALTIES)} There are: {', '.join(PENALTIES)}, and "
            "module:function."
        )
    function = import_scalar_function(name, "--penalty")
    try:
        inspect.signature(function).bind(*[None] * 4)
    except TypeError as error:
        raise UsageError(
            f"--penalty {name}: the function must take (stage, model, batch, outputs): {error}."
        ) from error
    return function


def reference_model(model: nn.Module, arguments: TransferArguments) -> nn.Module | None:
    """A copy of the pretrained model, in eval mode and without its output layer, which knows nothing yet.

    None where no penalty looks at it, or nothing is pretrained.
    """
    own = str(arguments.penalty) not in PENALTIES
    if arguments.penalty is None or not is_pretrained(arguments) or not (own or arguments.penalty in NEED_REFERENCE):
        return None
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for prefix in backbones.structure(model).head:
        reference.set_submodule(prefix, nn.Identity())
    return reference


def with_penalty(plan: Plan, arguments: TransferArguments, reference: nn.Module | None) -> Plan:
    """The plan with the penalty that was asked for, in every stage that trains more than the head.

    Raises:
        UsageError: there is no such stage.
    """
    if arguments.penalty is None:
        return plan
    weight = WEIGHTS.get(arguments.penalty, 1.0) if arguments.penalty_weight is None else arguments.penalty_weight
    head = set(backbones.head_parameters(plan.model))
    added: dict[str, Any] = {
        "penalty": find_penalty(arguments.penalty),
        "penalty_weight": weight,
        "reference": reference,
    }
    stages = tuple(stage if stage.trainable <= head else replace(stage, **added) for stage in plan.stages)
    if stages == plan.stages:
        raise UsageError(
            f"--penalty {arguments.penalty}: --method {arguments.method} trains the head alone. Leave it out."
        )
    return replace(plan, stages=stages, settings=plan.settings | {"penalty_weight": weight})


# --- what a forward pass shows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """Names of modules: of blocks, and of the layer whose input is the features."""

    blocks: tuple[str, ...]
    output: str | None = None


def watched(model: nn.Module) -> Watched:
    """What penalties look at in a model: the ends of up to four blocks at even distances, and the last linear layer."""
    parts = backbones.structure(model)
    modules = {backbones.plain_name(model, name): name for name, _ in model.named_modules()}
    fixed = backbones.pooling_layer(backbones.without_adapters(model))
    count = len(parts.blocks) - 1  # not the first: embeddings of positions have no rows
    ends = sorted({math.ceil(count * part / _WATCHED) for part in range(1, _WATCHED + 1)})
    inside = [[prefix for prefix in parts.blocks[end] if prefix in modules and prefix not in fixed] for end in ends]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and backbones.is_below_any(backbones.plain_name(model, name), parts.head[:1])
    ]
    return Watched(tuple(modules[prefixes[-1]] for prefixes in inside if prefixes), linear[-1] if linear else None)


@contextlib.contextmanager
def watching(model: nn.Module, names: Watched) -> Iterator[dict[str, Any]]:
    """What the watched modules give in the passes made meanwhile: `blocks`, and `features` where there are any."""
    blocks: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {"blocks": blocks}
    hooks = []
    for name in names.blocks:

        def keep(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
            blocks[name] = output[0] if isinstance(output, tuple | list) else output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    if names.output is not None:
        layer = model.get_submodule(names.output)
        hooks.append(layer.register_forward_pre_hook(lambda module, inputs: seen.update(features=inputs[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
