"""What is seen of a training run while it goes on, where its figures go, and how it is interrupted."""

from __future__ import annotations

import importlib.util
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from corolla.errors import InvalidSetting

if TYPE_CHECKING:
    from rich.console import Console

REPORTERS = ("trackio", "wandb", "tensorboard", "none")
"""Where figures may go. trackio and tensorboard keep them in files of this machine; wandb sends them to its service."""

_EVERY = 10.0  # seconds between two lines, where there is no terminal


def check_reporter(name: str) -> None:
    """Raises `InvalidSetting` for a reporter that there is not, or that is not installed."""
    if name not in REPORTERS:
        raise InvalidSetting("report-to", f"there is no {name!r}; there are {', '.join(REPORTERS)}")
    if name != "none" and importlib.util.find_spec(name) is None:
        how = "pip install wandb" if name == "wandb" else "pip install 'corolla[tune]'"
        raise InvalidSetting("report-to", f"{name} is not installed: {how}, or give --report-to none")


class TrainingBar(TrainerCallback):
    """A bar with the loss and the time that remains, or, where `console` is no terminal, a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._console = console
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=120.0)
        self._task = self._bar.add_task("tuning", total=None)
        self._begun = self._printed = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step
        self._bar.start()
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._bar.update(self._task, completed=state.global_step, description=f"tuning, loss {loss:.3f}")
        now = time.monotonic()
        last = state.global_step == state.max_steps
        if not self._console.is_terminal and (last or now - self._printed >= _EVERY):
            self._printed = now
            each = (now - self._begun) / max(1, state.global_step - self._first)
            remaining = each * (state.max_steps - state.global_step)
            self._console.print(f"step {state.global_step} of {state.max_steps}, loss {loss:.3f}, {remaining:.0f} s remaining")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away. Closing twice is no error."""
        self._bar.stop()


class Interruption(TrainerCallback):
    """Ends training after the step under way, and has it saved, when the process is asked to stop; `signal` is by which signal.

    A second signal of the kind interrupts at once.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.signal: signal.Signals | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        return control

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Until the block ends. On another than the main thread, which gets no signals, nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._asked) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self._console.print("stopping after this step, which is saved; again to stop at once")
