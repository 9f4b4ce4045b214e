"""Schedules beside Trainer's: their shapes, and that a stopped training goes on with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import fresh, plan_of
from tiny_training import every_tensor, tiny_arguments, tiny_trainer

from hftl import ImageArguments, optim, parse
from hftl.arguments import to_recipe


def test_slanted_triangles_are_those_of_the_paper() -> None:
    steps, cut = 200, 20
    for step in range(steps):
        part = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / 0.1 - 1))
        assert optim.slanted_triangular(step, steps, cut) == pytest.approx((1 + part * 31) / 32)


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=50, cycle_momentum=False)
    for step in range(50):
        assert 2.0 * optim.one_cycle(step, 50, 15) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_few_steps_have_a_rate_too(name: str, steps: int) -> None:
    for rise in range(steps + 1):
        factors = [optim.SCHEDULES[name](step, steps, rise) for step in range(steps + 1)]
        assert all(0 < factor <= 1 for factor in factors)
        assert max(factors[:steps]) > 0.03


def test_the_rate_rises_first_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    """Over a tenth of the steps, to the full rate, and then falls."""
    default = parse(ImageArguments, ["--model=m", "--dataset=d"])
    model = fresh("bert")
    (stage,) = plan_of("full", model).stages
    flags = [f"--warmup_steps={default.warmup_steps}", f"--lr_scheduler_type={default.lr_scheduler_type.value}"]
    trainer = tiny_trainer(model, stage, tmp_path, "--max_steps=30", *flags, rows=12)
    trainer.create_optimizer_and_scheduler(30)
    rates = []
    for _ in range(30):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    top = trainer.optimizer.param_groups[0]["initial_lr"]
    assert rates[:4] == pytest.approx([0, top / 3, 2 * top / 3, top])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < top / 50


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_every_group_follows_and_a_stopped_training_goes_on(name: str, tmp_path: Path) -> None:
    flags = [
        f"--lr_scheduler_type={name}",
        "--warmup_steps=0.5",
        "--save_strategy=steps",
        "--save_steps=3",
        "--save_total_limit=3",
    ]

    def trained(folder: str, *more: str, checkpoint: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = fresh("bert")
        (stage,) = plan_of("full", model, "--layer_decay=0.5", "--learning_rate=1e-3").stages
        trainer = tiny_trainer(model, stage, tmp_path / folder, *flags, "--max_steps=6", *more, rows=12)
        trainer.train(resume_from_checkpoint=checkpoint)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        starts = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        factor = optim.SCHEDULES[name](6, 6, 3)
        assert rates == pytest.approx([factor * start for start in starts])
        assert len(set(starts)) > 2
        return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry], every_tensor(model)

    rates, whole = trained("whole")
    again, resumed = trained("resumed", checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert rates[3:] == again[3:]
    assert len(set(rates)) > 4
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_what_rises_how_long_is_kept_in_the_recipe() -> None:
    model = fresh("bert")
    assert (
        to_recipe(tiny_arguments(model, "--warmup_steps=0.1", "--lr_scheduler_type=one_cycle"))["warmup_steps"] == 0.1
    )

    recipe = to_recipe(parse(ImageArguments, ["--lr_scheduler_type=one_cycle"]))
    assert (recipe["lr_scheduler_type"], recipe["warmup_steps"]) == ("one_cycle", 0.3)
