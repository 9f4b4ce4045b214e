"""How the hardware is used: half precision where it pays, threads, BatchNorm folded into the layer before it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import math
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from hftl import __version__, backbones, builtin, merging
from hftl.arguments import TransferArguments
from hftl.cpu_kernels import cpu_kernels
from hftl.first_token import first_token_alone, last_part
from hftl.folder import read_json, say, write_json
from hftl.losses import Loss
from hftl.machine import cores, processor
from hftl.side_by_side import side_by_side

#: rows of a measured batch: the ratio of the precisions at 16 is that at 32, and it costs half
_MEASURED_ROWS = 16
#: passes each way; the fastest counts, so that the first ones warm up
_PASSES = 3
#: the work to come must be this many times the measurement, which then costs at most a tenth
_WORTH = 10
#: half precision must take less than this part of the time, or what it gains is not worth its rounding, or noise
_GAIN = 0.9
#: how far half precision may move the loss, relative to it; below a loss of 0.1, relative to 0.1
_LOSS_TOLERANCE, _LEAST_LOSS = 0.01, 0.1
#: below so many products a pass, threads wait for each other longer than they work (1,007 rows of 1,280 features, two
#: classes, on two cores with something else running: 1.1 s with one thread, 13.7 s with two)
_SMALL = 1e8
#: settings of glibc's malloc by their numbers in malloc.h: blocks that have pages of their own, and what may stay free
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
#: how far folding may move the outputs, relative to the largest: rounding of one more product a layer
_FOLDING_TOLERANCE = 1e-4


#: the version of an installed package; to read what it says of itself takes hundredths of a second
version_of = functools.cache(version)


def library_versions() -> list[str]:
    """Versions of hftl and of the libraries on which it depends what is made of an example."""
    return [__version__, *map(version_of, ("torch", "transformers", "timm", "torchvision", "pillow"))]


# --- threads and memory ----------------------------------------------------------------------------------------------


def local_processes() -> int:
    """Processes of this run on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def share_threads(on_cpu: bool) -> None:
    """Share the cores out among the processes on this machine; OMP_NUM_THREADS says otherwise.

    Each would else start a thread a core: two processes on two cores four threads, which wait for each other.

    Args:
        on_cpu: whether the model runs there; then it is said where a launcher left cores unused.
    """
    share = max(1, cores() // local_processes())
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is None and local_processes() > 1:
        torch.set_num_threads(share)
    # Accelerate and torchrun set 1 where nobody has said anything, which cannot be told from a wish.
    if on_cpu and wanted == "1" and share > 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        say(f"1 of {share} cores computes in each process, since OMP_NUM_THREADS is 1: set it to {share} for all")


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container that it runs in (cgroup v2)."""
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    free = psutil.virtual_memory().available
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def peak_memory() -> int:
    """Most bytes held: on the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def one_thread_if_small(products: float) -> Iterator[None]:
    """One thread on the CPU for passes of few products, see `_SMALL`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed for the next step, instead of giving it back to the system each time.

    It gives back every block above 32 MB at once, such as the activations of a convolution, and the next step waits for
    the system to fill new pages with zeros. EfficientNet-Lite0 trains in 1.02 s a step of 32 images, with that in 1.36
    to 1.97 s; a text model, whose blocks are smaller, as before. It costs up to a fifth more memory and holds until the
    process ends. What the person says of it, in a variable such as MALLOC_MMAP_MAX_, stays. Source: mallopt(3).
    """
    variables = ("MALLOC_MMAP_", "MALLOC_TRIM_", "MALLOC_TOP_PAD_")
    said = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith(variables) for name in os.environ
    )
    if platform.libc_ver()[0] == "glibc" and not said:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


# --- processes -------------------------------------------------------------------------------------------------------


def several_processes() -> bool:
    """Whether this run has processes that talk to each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_all() -> None:
    """Wait until every process of this run has come here."""
    if several_processes():
        torch.distributed.barrier()


def of_all_processes(value: Any) -> list[Any]:
    """The value of every process."""
    if not several_processes():
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


# --- precision -------------------------------------------------------------------------------------------------------


def autocast(precision: str, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager[Any]:
    """The context that computes in `precision` ("fp32", "bf16" or "fp16") on `device`."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=kinds[precision])


def has_native(precision: str, device: torch.device) -> bool:
    """Whether a device computes in `precision` by itself: bf16 without such instructions is slower than float32."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or (precision == "bf16" and torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of PyTorch 2.10 and later
    known = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cpu" and precision == "bf16" and known


def typical_batch(dataset: Any, collate: Any, size: int = _MEASURED_ROWS) -> dict[str, torch.Tensor]:
    """A batch to measure with; of texts the rows whose length is nearest to the mean.

    Args:
        dataset: examples, with `lengths` (one a row) where they vary.
        collate: examples → batch.
        size: rows in it, where there are as many.
    """
    lengths = getattr(dataset, "lengths", None)
    order = np.arange(len(dataset))
    if lengths is not None:
        order = np.argsort(np.abs(np.asarray(lengths) - np.mean(lengths)), kind="stable")
    return dict(collate([dataset[int(index)] for index in order[:size]]))


def seconds_to_prepare(dataset: Any, collate: Any) -> float:
    """What a row takes until it stands in a batch, in one thread; by the last rows, of which nothing is kept yet.

    Args:
        dataset: examples, one of which was prepared before: the first one imports and opens what the others need too.
        collate: examples → batch.
    """
    rows = range(max(0, len(dataset) - _MEASURED_ROWS), len(dataset))
    started = time.perf_counter()
    collate([dataset[row] for row in rows])
    return (time.perf_counter() - started) / len(rows)


def choose_precision(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    loss: Loss,
    *,
    training: bool,
    rows: float,
    arguments: TransferArguments,
    before: Callable[[], object] = lambda: None,
) -> str:
    """The precision of `--precision`; what `auto` is on a GPU the arguments know (see `checked_bf16`), and on a CPU it
    is measured.

    bf16 makes some models faster and others slower, so that the first time a model comes on a machine both are timed,
    not compiled, and the answer is kept in `precision.json` in the cache folder. It is float32, without a word, where
    the work to come is less than 10 times the measurement; and it is float32 where bf16 moves the loss by more than a
    hundredth.

    The first process measures and tells the others, so that all must call this together. Neither the model nor the
    state of the random generators changes.

    Args:
        model: a classification model whose modes (`training`) and `requires_grad` are those of the work to come.
        batch: what `forward` takes, and `labels` where there are any, on the device of the model;
            the first 16 rows are used.
        loss: of outputs and labels.
        training: time forward and backward; else forward alone.
        rows: rows to come, each as often as it goes through the model.
        arguments: their `precision`.
        before: called where something is measured, before it is.

    Returns:
        "fp32", "bf16" or "fp16".
    """
    if arguments.precision != "auto" or arguments.mixed_precision != "no":  # fp8, which the launcher asks for
        return arguments.precision
    answer = [""]
    if not several_processes() or torch.distributed.get_rank() == 0:
        answer = [_precision_of_cpu(model, batch, loss, training, rows, before)]
    if several_processes():
        torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def seconds_a_row(
    model: nn.Module, batch: dict[str, torch.Tensor], loss: Loss, training: bool, precision: str
) -> float:
    """What a row takes forward, in training also backward; the fastest of three passes.

    Args:
        model: on the device of the batch, in the modes of the work to come.
        batch: what `forward` takes, and `labels`.
        loss: of outputs and labels.
        training: whether gradients are computed.
        precision: of the computation.
    """
    inputs = backbones.inputs_of(batch)
    seconds = math.inf
    on_gpu = batch["labels"].device.type != "cpu"
    for _ in range(_PASSES):
        started = time.perf_counter()
        _pass(model, inputs, batch["labels"], loss, precision, training)
        if on_gpu:
            torch.accelerator.synchronize()  # kernels run on after the call
        seconds = min(seconds, time.perf_counter() - started)
    return seconds / len(batch["labels"])


def seconds_a_row_beside(
    model: nn.Module, batch: dict[str, torch.Tensor], loss: Loss, precision: str, count: int
) -> float:
    """What a row takes to train in one thread, while other processes do the same; the fastest of three passes.

    Args:
        model: on the CPU, in training mode.
        batch: what `forward` takes, and `labels`.
        loss: of outputs and labels.
        precision: of the computation.
        count: of the processes, with this one.
    """

    def train_on() -> None:
        while True:
            seconds_a_row(model, batch, loss, True, precision)

    with side_by_side(count) as others:
        for number in range(1, count):
            others.begin(number, train_on)
        _pass(
            model, backbones.inputs_of(batch), batch["labels"], loss, precision, training=True
        )  # they begin meanwhile
        return seconds_a_row(model, batch, loss, True, precision)


def _precision_of_cpu(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    loss: Loss,
    training: bool,
    rows: float,
    before: Callable[[], object],
) -> str:
    """The remembered answer, or a measured one where measuring pays, else float32."""
    batch = {name: value[:_MEASURED_ROWS] for name, value in batch.items()}
    count = len(next(iter(batch.values())))
    key = _key(model, batch, training)
    known = _remembered()
    if key not in known:
        if rows < _WORTH * 2 * _PASSES * count:
            return "fp32"
        before()
        known[key] = _measured(model, batch, loss, training)
        _remember(known)
    entry = known[key]
    say(f"precision: {entry['precision']} ({entry['reason']})")
    return entry["precision"]


def _measured(model: nn.Module, batch: dict[str, torch.Tensor], loss: Loss, training: bool) -> dict[str, str]:
    """What the two precisions do on one batch, in turns, with a copy of the model: the choice and its reason."""
    inputs = backbones.inputs_of(batch)
    with torch.random.fork_rng(devices=[]):
        labels, reason = _compared(copy.deepcopy(model).eval(), batch, loss)
        if reason:
            return {"precision": "fp32", "reason": reason}
        copied = copy.deepcopy(model)  # in the modes of the work to come
        seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
        try:
            for _ in range(_PASSES):
                for precision, times in seconds.items():
                    started = time.perf_counter()
                    _pass(copied, inputs, labels, loss, precision, training)
                    times.append(time.perf_counter() - started)
        except RuntimeError as error:  # no gradient in bf16, or no memory for two models
            return {"precision": "fp32", "reason": f"the measurement failed: {' '.join(str(error).split())[:200]}"}
    fastest = {precision: min(times) for precision, times in seconds.items()}
    chosen, other = ("bf16", "fp32") if fastest["bf16"] < _GAIN * fastest["fp32"] else ("fp32", "bf16")
    step = f"{len(labels)} rows {'trained' if training else 'predicted'} in {fastest[chosen]:.2g} s"
    return {"precision": chosen, "reason": f"{step}, {other} {fastest[other]:.2g} s"}


def checked_bf16(model: nn.Module, batch: dict[str, torch.Tensor], loss: Loss) -> str:
    """bf16, or fp32 where that moves the loss by more than a hundredth, which is said; the same in every process.

    Args:
        model: on the device of the batch; in eval mode at the end.
        batch: what `forward` takes, and `labels`; the first 16 rows are used.
        loss: of outputs and labels.
    """
    _, own = _compared(model.eval(), {name: value[:_MEASURED_ROWS] for name, value in batch.items()}, loss)
    reason = next(filter(None, of_all_processes(own)), "")
    if reason:
        say(f"precision: fp32 ({reason})")
    return "fp32" if reason else "bf16"


def _compared(model: nn.Module, batch: dict[str, torch.Tensor], loss: Loss) -> tuple[torch.Tensor, str]:
    """Labels of a batch, and why bf16 will not do for a model in eval mode; nothing where it does."""
    inputs = backbones.inputs_of(batch)
    logits = {"fp32": _logits(model, inputs, "fp32")}
    # Where there are no labels, how sure float32 is of its own answers stands for the loss.
    labels = batch["labels"] if "labels" in batch else logits["fp32"].argmax(dim=-1)
    try:
        logits["bf16"] = _logits(model, inputs, "bf16")
    except RuntimeError as error:  # an operation that bf16 does not have
        return labels, f"bf16 does not work with this model: {' '.join(str(error).split())[:200]}"
    losses = {name: float(loss({"logits": values}, labels)) for name, values in logits.items()}
    allowed = _LOSS_TOLERANCE * max(_LEAST_LOSS, losses["fp32"])
    if not abs(losses["bf16"] - losses["fp32"]) <= allowed:
        return labels, f"bf16 moves the loss from {losses['fp32']:.4g} to {losses['bf16']:.4g}"
    return labels, ""


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
    with autocast(precision, next(iter(inputs.values())).device):
        return model(**inputs).logits.float()


def _pass(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    loss: Loss,
    precision: str,
    training: bool,
) -> None:
    """One step without the optimizer, or one prediction."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(training))
        if training:  # as in a training without penalties
            stack.enter_context(cpu_kernels())
            stack.enter_context(first_token_alone(last_part(model)))
        with autocast(precision, labels.device):
            logits = model(**inputs).logits
        if training:
            loss({"logits": logits.float()}, labels).backward()
            model.zero_grad()


def _key(model: nn.Module, batch: dict[str, torch.Tensor], training: bool) -> str:
    """What the answer depends on: the machine, the model by its name and what trains, and the shape of a row."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    kind = f"training {trained:,} of them with hftl.cpu_kernels" if training else "inference"
    inner: Any = backbones.without_adapters(model)
    architecture = getattr(inner.config, "architecture", "")  # timm's, which all have one class
    # Of two checkpoints of one architecture bf16 may suit one alone: the values differ.
    name = " ".join(filter(None, [type(inner).__name__, architecture, getattr(inner.config, "_name_or_path", "")]))
    shapes = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in sorted(backbones.inputs_of(batch).items()))
    count = sum(parameter.numel() for parameter in parameters)
    return f"{machine()}; {name}, {count:,} parameters, {kind}; {shapes}"


def hardware() -> str:
    """What computes, and the operating system, in a few words without a name of this machine."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        device = f"{f'{count} x ' if count > 1 else ''}{torch.cuda.get_device_name()}"
    else:
        device = f"{processor()[0]}, {torch.get_num_threads()} threads a process"
    return f"{device}, {platform.system()} {platform.machine()}"


def machine() -> str:
    """The processor with its family, its threads and torch: virtual machines give families the same name."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{' '.join(processor())} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _remembered() -> dict[str, dict[str, str]]:
    """The answers in the cache folder; a damaged file is said, and made again."""
    path = builtin.cache_folder() / "precision.json"
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        for entry in content.values():
            if entry["precision"] not in ("fp32", "bf16") or not isinstance(entry["reason"], str):
                raise ValueError(entry)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        say(f"{str(path)!r} is damaged and is made again")
        return {}
    return content


def _remember(known: dict[str, dict[str, str]]) -> None:
    path = builtin.cache_folder() / "precision.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    except OSError as error:
        say(
            f"the measured precision cannot be kept in {str(path)!r} ({error.strerror}): it is measured again next time"
        )


# --- folding ---------------------------------------------------------------------------------------------------------


def folded(model: nn.Module, example: dict[str, torch.Tensor]) -> nn.Module:
    """A copy in eval mode for prediction, with every BatchNorm that can be folded into the layer before it.

    What follows a convolution or linear layer directly is seen by running the example once: the layer's output is the
    very tensor that the BatchNorm gets, and each is called exactly once. Adapters are merged first, if they can be. The
    copy of a convolutional model is in channels_last. The model itself does not change.

    The copy is compared with the model on the example. Where the outputs differ by more than 1e-4 of the largest (a
    convolution that standardises its weights, an output that something else reads too), the copy that is returned has
    neither folded layers nor merged adapters; and where there is nothing to fold it is an ordinary copy.

    Args:
        model: any model, on the device of the example.
        example: what `forward` takes; `labels` are left out. Two rows of real data do.

    Returns:
        The copy: its parameters are its own, and are not for training.
    """
    inputs = backbones.inputs_of(example)
    plain = _copy(model)
    expected = _outputs(plain, inputs)
    copied = plain
    if hasattr(plain, "peft_config"):
        copied = _copy(plain)
        if backbones.is_quantised(copied) or merging.merge(copied) is not None:
            return plain
        copied = backbones.to_channels_last(copied.get_base_model().eval())
    pairs = _foldable(copied, inputs)
    if not pairs and copied is plain:
        return plain
    if copied is plain:
        copied = _copy(plain)
    for layer, norm in pairs:
        _fold(copied, layer, norm)
    return copied if is_as_folded(_outputs(copied, inputs), expected) else plain


def is_as_folded(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether numbers are no further apart than the rounding of folded layers explains."""
    return bool((found - expected).abs().max() <= _FOLDING_TOLERANCE * expected.abs().max())


def _copy(model: nn.Module) -> Any:
    """A copy in eval mode, in the memory layout that suits it."""
    return backbones.to_channels_last(copy.deepcopy(model).eval())


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a classification model, or the tensor that another model gives, in float32."""
    outputs = model(**inputs)
    return (outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]).float()


def _foldable(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Names of layers and of the BatchNorm that alone reads what they give, as far as a run on `inputs` shows."""
    layers = {module: name for name, module in model.named_modules() if _is_foldable_layer(module)}
    norms = {module: name for name, module in model.named_modules() if _is_foldable_norm(module)}
    calls: Counter[nn.Module] = Counter()
    # The tensors are kept, or their ids would come again; another version has been changed in place (ReLU).
    given: dict[int, tuple[nn.Module, torch.Tensor, int]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def after_layer(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[module] += 1
        given[id(output)] = (module, output, output._version)

    def before_norm(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        calls[module] += 1
        if id(arguments[0]) not in given:
            return
        layer, output, version = given[id(arguments[0])]
        if output._version == version and (output.ndim == 2 or not isinstance(layer, nn.Linear)):
            pairs.append((layer, module))

    handles = [module.register_forward_hook(after_layer) for module in layers]
    handles += [module.register_forward_pre_hook(before_norm) for module in norms]
    try:
        _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    readers = Counter(layer for layer, _ in pairs)
    return [
        (layers[layer], norms[norm])
        for layer, norm in pairs
        if calls[layer] == calls[norm] == 1 and readers[layer] == 1
    ]


def _is_foldable_layer(module: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return isinstance(module, kinds) and not is_parametrized(module)


def _is_foldable_norm(module: nn.Module) -> bool:
    """torch's own with kept statistics, and timm's, which has dropout and activation behind it."""
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    timms = isinstance(module, nn.BatchNorm2d) and isinstance(getattr(module, "act", None), nn.Module)
    return isinstance(module, _BatchNorm) and module.running_mean is not None and (plain or timms)


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """Put the BatchNorm's scale and shift into the layer, and what else it does in its place."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    assert isinstance(norm, _BatchNorm)
    fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    model.set_submodule(layer_name, fuse(layer, norm))
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    replacement = nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
    model.set_submodule(norm_name, replacement.eval())
