"""How many processes prepare rows beside a training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hftl import compute, machine
from hftl.arguments import is_sharded
from hftl.features import mostly_frozen
from hftl.methods.plan import prepare_modules

if TYPE_CHECKING:
    from torch import nn

    from hftl.data import Splits
    from hftl.methods import Stage
    from hftl.tasks.classification import ClassificationTask

#: times as fast as the computation rows are to be prepared: rows differ, and a GPU makes more of a whole batch
_AHEAD = 2.0
#: processes that prepare rows for a GPU where it is not measured how many keep pace: 700 to 7,000 images a second
_UNMEASURED = 8


def most_workers(task: ClassificationTask) -> int:
    """What `--dataloader_num_workers` says, else as many as the cores leave; tokenised texts need none.

    A training image takes 1 ms of a core, 11 ms if it is a photo of 6 megapixels, and a step of efficientnet_lite0, a
    small network, 46 ms an image (measured): on a CPU one worker keeps pace with the network on four cores, and on two
    it takes up what the network's threads leave idle between steps. A process with a core to itself has nothing to
    gain.
    """
    if task.arguments.dataloader_num_workers >= 0:
        return task.arguments.dataloader_num_workers
    cores = machine.cores() // compute.local_processes()
    if task.modality.is_text or cores < 2:
        return 0
    return max(1, cores // 4) if task.arguments.use_cpu else cores - 1


def data_workers(task: ClassificationTask, stage: Stage, model: nn.Module, rows: Any, splits: Splits) -> int:
    """As many as keep pace with a stage in which rows are prepared: where there may be several, both are timed.

    What is found holds for the stages that follow, and is put into the arguments. The modes of the model's modules are
    the trainer's to set afterwards.

    Args:
        task: with resolved arguments, their precision included.
        stage: the one that begins.
        model: all of it, as no cut has left it.
        rows: the training rows.
        splits: where the loss gets its weights from.
    """
    arguments, most = task.arguments, most_workers(task)
    # Where a batch, or the whole model, may not fit.
    spares_memory = arguments.auto_find_batch_size or arguments.activation_checkpointing or is_sharded(arguments)
    if arguments.dataloader_num_workers < 0 and most > 1:
        most = min(most, _UNMEASURED if spares_memory else _keep_pace(task, stage, model, rows, splits))
    arguments.dataloader_num_workers = most
    return most


def _keep_pace(task: ClassificationTask, stage: Stage, model: nn.Module, rows: Any, splits: Splits) -> int:
    batch = compute.typical_batch(rows, task.collate)
    preparing = compute.seconds_to_prepare(rows, task.collate)
    count, device = task.arguments.per_device_train_batch_size, task.arguments.device
    batch = {name: value[:count].to(device) for name, value in batch.items()}
    prepare_modules(model.to(device), stage)
    model.eval()  # so that nothing is drawn, and no statistics move
    loss, training = stage.loss or task.loss(splits), not mostly_frozen(stage, model)
    computing = compute.seconds_a_row(model, batch, loss, training, task.arguments.precision)
    return math.ceil(_AHEAD * preparing / computing)
