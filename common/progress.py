"""How far a long run is: a bar on a terminal, plain lines elsewhere."""

import os
import time


class Progress:
    """A bar with rate and remaining time on a terminal, a line every tenth of the way elsewhere.

    Used as `with Progress(total, "images") as advance: advance(n)`.
    """

    def __init__(self, total, unit):
        self.total, self.unit, self.done, self.shown, self.start = total, unit, 0, 0, time.perf_counter()
        self.bar = None

    def __enter__(self):
        if os.isatty(2):
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit=f" {self.unit}", smoothing=0.05)
        return self.advance

    def advance(self, count):
        """Report `count` further items."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.done * 10 // self.total > self.shown:
            self.shown = self.done * 10 // self.total
            rate = self.done / (time.perf_counter() - self.start)
            print(
                f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, "
                f"{(self.total - self.done) / rate:.0f} s to go",
                flush=True,
            )

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()
