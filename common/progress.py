"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

import os
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """A bar with rate and remaining time on a terminal, else a line for every tenth of the items.

    Used as `with Progress(total, "images") as advance: advance(n)`.
    """

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done, self.printed_tenths = total, unit, 0, 0
        self.start = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], None]:
        if os.isatty(2):
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit=f" {self.unit}", smoothing=0.05)
        return self.advance

    def advance(self, count: int) -> None:
        """Report `count` further items."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.done * 10 // self.total > self.printed_tenths:
            self.printed_tenths = self.done * 10 // self.total
            rate = self.done / (time.perf_counter() - self.start)
            print(
                f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, "
                f"{(self.total - self.done) / rate:.0f} s to go",
                flush=True,
            )

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
