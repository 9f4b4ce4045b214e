"""AdaLoRA's ranks, shared out among the layers while they train (Zhang et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hftl.folder import is_main_process

#: beside a checkpoint: what the importance of each rank was estimated from, and which ranks are left
_FILE = "adalora.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankSchedule(TrainerCallback):
    """Calls PEFT's allocation after every step, and adds the gradient of the term that keeps P and Q orthogonal.

    PEFT adds that term to a loss that the model computes itself; here the loss is ours. Ranks are given up from a tenth
    of the steps on until half of them are done, and stay for the rest.

    PEFT would cut a layer's matrices to its ranks in every checkpoint, and the optimizer's moments would not fit them:
    here they keep their size, with zeros for the ranks that were given up.
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        """Keep the PEFT model; `settings` are those that were given for its configuration."""
        self.model, self.settings = model, settings
        self.config = model.peft_config["default"]
        self.pattern: dict[str, list[bool]] = {}

    @property
    def _allocator(self) -> Any:
        return self.model.base_model.rankallocator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fit the schedule to the number of steps; go on with what a checkpoint holds."""
        total = state.max_steps
        self.config.total_step = total
        self.config.tinit = min(self.settings.get("tinit", total // 10), max(0, total - 2))
        # Before the last allocation there must be a step that says what matters.
        latest = total - max(self.config.tinit + 1, 2)
        self.config.tfinal = min(self.settings.get("tfinal", total // 2), max(0, latest))
        if not state.global_step:  # what a training before this one left
            self.pattern = {}
            self._allocator.reset_ipt()
        file = Path(args.output_dir, f"checkpoint-{state.global_step}", _FILE)
        if state.global_step and file.is_file():
            self._load(load_file(file, device=str(args.device)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of `orth_reg_weight` times the mean of |P'P - I| and |QQ' - I| over all layers."""
        matrices = [
            (parameter, parameter if ".lora_A." in name else parameter.T)
            for name, parameter in self.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        distances = [
            torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)) for _, rows in matrices
        ]
        term = self.config.orth_reg_weight * torch.stack(distances).mean()
        parameters = [parameter for parameter, _ in matrices]
        # Not backward(): several processes would wait for each other's gradients once more.
        for parameter, gradient in zip(parameters, torch.autograd.grad(term, parameters), strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(gradient)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give up the least important ranks; the gradients are still there. One step alone says too little of them."""
        if state.max_steps < 2:
            return
        self.config.rank_pattern = self.pattern
        self.model.base_model.update_and_allocate(state.global_step + 1)
        self.pattern, self.config.rank_pattern = self.config.rank_pattern or {}, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write beside the checkpoint what PEFT keeps in memory alone."""
        if is_main_process():
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{kind}/{name}": value.contiguous()
                for kind in _AVERAGES
                for name, value in getattr(self._allocator, kind).items()
            }
            pattern = {f"pattern/{name}": torch.tensor(ranks) for name, ranks in self.pattern.items()}
            save_file({**tensors, **pattern}, folder / _FILE)

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "pattern":
                self.pattern[name] = tensor.tolist()
            else:
                getattr(self._allocator, kind)[name] = tensor
