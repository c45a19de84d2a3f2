"""Times TRL's optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Times steps without data loading; `wait` returns when the device is done."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self.wait = wait

    def on_step_begin(self, *_args, **_kwargs) -> None:
        """Starts timing."""
        self.wait()
        self.start = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs) -> None:
        """Stops timing."""
        self.wait()
        self.seconds.append(time.perf_counter() - self.start)
