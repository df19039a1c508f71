"""How far a stream has got, and how long it will take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Progress:
    """State of a stream after a chunk.

    Args:
        points: Points that are done, of all branches, including those of earlier runs.
        total: Points in all, ``None`` if an iterator gives them.
        new_points: Points that this run has done.
        seconds: Time that this run took so far.
    """

    points: int
    total: int | None
    new_points: int
    seconds: float

    @property
    def points_per_second(self) -> float:
        """Mean speed of this run."""
        return self.new_points / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left at that speed, ``None`` if unknown."""
        if self.total is None or self.points_per_second == 0:
            return None
        return (self.total - self.points) / self.points_per_second

    def __str__(self) -> str:
        speed = f"{self.points_per_second:,.0f} points/s"
        if self.total is None:
            return f"{self.points:,} points  {speed}"
        share = self.points / self.total if self.total else 1.0
        bar = ("█" * round(20 * share)).ljust(20, "·")
        left = self.seconds_left
        remaining = "" if left is None else f"  {int(left) // 60}:{int(left) % 60:02d} left"
        return f"{bar} {share:4.0%}  {self.points:,} of {self.total:,} points  {speed}{remaining}"


class ProgressBar:
    """Draws the progress on one line of a terminal.

    Args:
        stream: Where to, standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.width = 0

    def __call__(self, progress: Progress) -> None:
        """Draws over what was drawn before."""
        text = str(progress)
        self.stream.write("\r" + text.ljust(self.width))
        self.stream.flush()
        self.width = len(text)

    def close(self) -> None:
        """Ends the line."""
        self.stream.write("\n")
        self.stream.flush()
