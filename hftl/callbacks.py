"""What happens beside a training step: progress, the log file, and an orderly stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hftl.compute import wait_for_all
from hftl.folder import is_main_process, say
from hftl.metrics import written
from hftl.side_by_side import is_copy

#: after fewer steps than this an epoch leaves no checkpoint by itself: few rows make many epochs of a few steps each
STEPS_WORTH_KEEPING = 80
#: a run in a file rather than a terminal gets a line of progress every so many seconds
_SECONDS_BETWEEN_LINES = 30.0


def ends_epoch(epochs: float) -> bool:
    """Whether an epoch ends there, but for rounding."""
    return abs(epochs - round(epochs)) < 1e-6


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C arrived, and the checkpoint to go on from is written.

    Not an Exception, so that nothing on the way takes it for an error to handle.
    """

    def __init__(self, number: int) -> None:
        """Keep the number of the signal."""
        self.number = number
        super().__init__(signal.Signals(number).name)


class StopSignals(TrainerCallback):
    """On SIGTERM or Ctrl-C write a checkpoint after the current step, then stop; on a second signal stop at once."""

    def __init__(self) -> None:
        """Start to listen; `close` gives the signals back."""
        #: the signal that came to this process, and the one that all processes stop for
        self.received, self.number, self.process = 0, 0, os.getpid()
        # Python tells the main thread alone; a training in another one cannot be asked to stop.
        here = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if here}
        for number in self.previous:
            signal.signal(number, self._receive)
        self.training = False

    def listen_here(self) -> None:
        """In a process that trains beside the one that began to listen."""
        self.process = os.getpid()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker, which inherited this handler: the main process decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if is_copy() and self.received:  # the terminal tells all processes, and then the one that began this one does
            return
        if self.received or not self.training:
            raise Interrupted(number)
        self.received = number
        if not is_copy():
            say(f"\n{signal.Signals(number).name} received: writing a checkpoint after this step.")

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """From here on a checkpoint can be written."""
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """No step follows that could end in a checkpoint."""
        self.training = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint when a signal came, to this process or to another.

        Behind the last step of an epoch it is asked for when the epoch has ended: before it is evaluated, training
        that goes on would begin the next one, and never know how good this one was.
        """
        self.number = self.received
        if args.world_size > 1:  # all must stop after the same step, or one would wait for the others for ever
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        ends = state.global_step >= state.max_steps or control.should_training_stop or ends_epoch(state.epoch or 0.0)
        if self.number and not ends:
            control.should_save = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for it after an epoch whose last step a signal came to."""
        if self.number:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is there: stop."""
        if self.number:
            wait_for_all()  # rank 0 may still be writing
            raise Interrupted(self.number)


class TimeLimit(TrainerCallback):
    """Ends a training at a moment, as if an epoch ended there: the model is evaluated, and kept if it is the best.

    A training that is too slow to make all its steps until then has its rate fall by the share of the time instead, so
    that it ends where the schedule ends (Li et al. 2020, "Budgeted Training"; by the clock as in Izsak et al. 2021).
    """

    def __init__(self, until: float, least_epochs: float = 1.0, at_once: int = 1) -> None:
        """Keep the moment, as `time.time()` counts, and what holds for the runs of a training.

        Args:
            until: the moment.
            least_epochs: with fewer of them a further run is not begun.
            at_once: so many train side by side.
        """
        self.until, self.least_epochs, self.at_once = until, least_epochs, at_once
        #: when the first step ended, which may have compiled something, and the part of the schedule behind it then
        self.began: float | None = None
        self.behind = 0.0

    def epochs_left(self, seconds: float) -> float:
        """Epochs of so many seconds each that there is time for; below 0 where it is over."""
        return (self.until - time.time()) / seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the time anew, from the end of the next step."""
        self.began = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Let the rate fall with the time, and stop when it is up."""
        now, schedule = time.time(), kwargs.get("lr_scheduler")
        if isinstance(schedule, LambdaLR):
            self._follow_the_clock(schedule, state, now)
        if now > self.until and state.global_step < state.max_steps:
            say("the time is up")
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy == "steps"
            control.should_save = args.save_strategy == "steps"
        return control

    def _follow_the_clock(self, schedule: LambdaLR, state: Any, now: float) -> None:
        if self.began is None:  # after an interruption the schedule may be further than the steps
            self.began = now
            self.behind = min(1.0, max(state.global_step, schedule.last_epoch) / state.max_steps)
        elif self.began < self.until:
            share = self.behind + (1 - self.behind) * min(1.0, (now - self.began) / (self.until - self.began))
            # Not from where the schedule is: a lead that a slow start gave would carry it beyond its end.
            schedule.last_epoch = max(state.global_step, share * state.max_steps)


class EveryFewEpochs(TrainerCallback):
    """Evaluates after every few epochs, and after the last, rather than after each.

    Checkpoints are written with the evaluations, and after other epochs that have enough steps.
    """

    def __init__(self, epochs: int) -> None:
        """Keep how many."""
        self.epochs = epochs
        #: the step of the last checkpoint
        self.kept = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the steps from where the training begins, which may be a checkpoint."""
        self.kept = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Take back what Trainer asks for after each epoch."""
        if round(state.epoch or 0) % self.epochs and not control.should_training_stop:
            control.should_evaluate = False
            control.should_save &= state.global_step - self.kept >= STEPS_WORTH_KEEPING
        return control

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the next steps from here."""
        self.kept = state.global_step


class ReadableProgress(ProgressCallback):
    """A bar with the time left in a terminal, a line now and then elsewhere, and a line for each evaluation."""

    def __init__(self, stage: str, headline: Sequence[tuple[str, str]] = ()) -> None:
        """Name the stage that is shown, and the scores of an evaluation with what they are called."""
        super().__init__()
        self.stage, self.headline = stage, headline
        self.last_line = time.monotonic()
        self.started = self.last_line
        self.first_step = 0
        self.show_bar = sys.stderr.isatty() and not is_copy()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if self.show_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar, or print a line when the last one is old."""
        if self.show_bar:
            super().on_step_end(args, state, control, **kwargs)
        elif time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            done = state.global_step - self.first_step
            left = (self.last_line - self.started) / done * (state.max_steps - state.global_step)
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            shown = "" if loss is None else f", loss {loss:.3f}"
            say(f"{self.stage}: step {state.global_step} of {state.max_steps}{shown}, about {left:.0f} s left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.show_bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation."""
        if self.show_bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print an evaluation as a line; the losses between are in the log file."""
        if not state.is_world_process_zero or not logs or "eval_loss" not in logs:
            return
        shown = [*self.headline, ("loss", "loss")]
        parts = [f"{text} {written(name, logs[f'eval_{name}'])}" for name, text in shown if f"eval_{name}" in logs]
        when = f"epoch {logs.get('epoch', state.epoch or 0):.3g}"
        if "penalty" in logs:
            when = f"solved in {logs['seconds']:.1f} s with penalty {logs['penalty']:.2g}"
        elif logs.get("head") == "as it was":
            when = f"solved in {logs['seconds']:.1f} s, the head stays as it was"
        elif "seconds" in logs:
            when = f"scored in {logs['seconds']:.1f} s"
        line = f"{self.stage}: {when}, validation {', '.join(parts)}"
        self.training_bar.write(line) if self.training_bar is not None else say(line)


class LogFile(TrainerCallback):
    """Every log entry of every stage as a line of JSON."""

    def __init__(self, path: Path, stage: str) -> None:
        """Name the file, which is appended to, and the stage; what a kill left of a last line is cut off."""
        self.path, self.stage = path, stage
        if is_main_process() and not is_copy() and path.is_file():
            whole, _, rest = path.read_bytes().rpartition(b"\n")
            if rest:
                os.truncate(path, len(whole) + bool(whole))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append one line."""
        if is_main_process() and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")
