"""What a person sees: one rich progress bar a loop on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
PLAIN_SECONDS = 10.0  # between two plain lines
LARGE = 2**30  # bytes; to read or write as many takes seconds
MIB = 2**20


class Tick(Protocol):
    """Report a finished step, or several: tokens it took, and figures to show beside the bar."""

    def __call__(self, tokens: int = 0, *, steps: int = 1, **figures: float) -> None: ...


def say(text: str, style: str | None = None) -> None:
    """Print one line as it is: never wrapped, no markup."""
    console.print(text, style=style, soft_wrap=True, markup=False)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Tick]:
    """Show a bar of `total` steps, `done` of them finished before, with figures, tokens/s and the time left."""
    start = last = time.monotonic()
    seen = done
    tokens_seen = 0

    def describe(figures: dict[str, float]) -> str:
        rate = tokens_seen / max(time.monotonic() - start, 1e-9)
        parts = [f"{name} {value:.4g}" for name, value in figures.items()]
        return "  ".join([*parts, *([f"{rate:,.0f} tokens/s"] if tokens_seen else [])])

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total, completed=done, note="")

            def tick(tokens: int = 0, *, steps: int = 1, **figures: float) -> None:
                nonlocal tokens_seen
                tokens_seen += tokens
                bar.update(task, advance=steps, note=describe(figures))

            yield tick
        return

    def tick_plain(tokens: int = 0, *, steps: int = 1, **figures: float) -> None:
        nonlocal last, seen, tokens_seen
        seen, tokens_seen = seen + steps, tokens_seen + tokens
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or seen == total:
            left = (now - start) / (seen - done) * (total - seen)
            say(f"{label}: {seen}/{total}  {describe(figures)}  {left:.0f} s left")
            last = now

    yield tick_plain


Moved = Callable[[int], None]
"""Report so many bytes that were read or written."""


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Moved]:
    """Show a bar, in MiB, of reading or writing `total` bytes; nothing below a GiB, which is done at once."""
    if total < LARGE:
        yield lambda count: None
        return
    with progress(f"{label}, MiB", total // MIB) as tick:
        moved = 0

        def move(count: int) -> None:
            nonlocal moved
            before, moved = moved, moved + count
            if steps := moved // MIB - before // MIB:
                tick(steps=steps)

        yield move
