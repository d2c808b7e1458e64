"""Which frames of a video are shown at which times of another rate. Times are exact fractions of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")
ROUNDING = Fraction(1, 1000)  # seconds; Matroska and FLV keep times in milliseconds


def nearest_in_time(
    timed: Iterable[tuple[Fraction, T]],
    fps: float,
    last: Fraction = Fraction(0),
    lasts: Callable[[T], Fraction | None] = lambda item: None,
) -> Iterator[T]:
    """For every time i / fps the item of `timed` whose time is nearest, the earlier of two equally near ones.

    The choice ends with the last item, which is shown for as long as `lasts` says, else as long as the one before it,
    else `last` seconds. The moment at which it ends still counts if it is less than a step of 1 / fps from the last
    item: so 6 seconds at 24 a second give 49 items at 8 a second, and 144 at 24. Exact but for that end: a time that
    falls half-way between two frames must not depend on rounding.

    Args:
        timed: (seconds, item) in the order of time, from 0.
        fps: items per second to choose.
        last: seconds for which an only item is shown.
        lasts: seconds for which an item is shown, None where it does not say.
    """
    step = 1 / Fraction(fps)
    before: tuple[Fraction, T] | None = None
    wanted = Fraction(0)
    for time, item in timed:
        while wanted <= time:
            yield item if before is None or time - wanted < wanted - before[0] else before[1]
            wanted += step
        last = last if before is None else time - before[0]
        before = time, item
    if before is None:
        return
    end = before[0] + (lasts(before[1]) or last)
    while _is_shown(wanted, before[0], end, step):
        yield before[1]
        wanted += step


def _is_shown(wanted: Fraction, last: Fraction, end: Fraction, step: Fraction) -> bool:
    """Whether a time after that of the last frame still is of it, for `nearest_in_time`. Times may have been rounded,
    so that a clip read at its own rate must not get a frame more."""
    slack = min(ROUNDING, step / 8)
    return wanted < end - 2 * slack or (wanted <= end + 2 * slack and wanted - last < step - slack)


def frames_within(end: Fraction, last: Fraction, fps: Fraction) -> int:
    """For how many times i / fps `nearest_in_time` finds a frame, of which the last is shown from `last` to `end`."""
    count = int(last * fps // 1) + 1
    while _is_shown(count / fps, last, end, 1 / fps):
        count += 1
    return count
