"""Progress bars: rich's on a terminal where it is installed, else lines of text."""

import sys
import time
from contextlib import contextmanager


@contextmanager
def progress(total: int):
    """Yields `advance(label)`, to be called `total` times."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        Progress = None
    if Progress is None or not sys.stderr.isatty():
        yield plain(total)
        return
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def plain(total: int):
    started, done, shown = time.monotonic(), 0, -1

    def advance(label: str) -> None:
        nonlocal done, shown
        done += 1
        # A terminal sees every percent, a log file every tenth.
        part = 100 * done // total // (1 if sys.stderr.isatty() else 10)
        if part != shown:
            shown = part
            bar = "#" * (30 * done // total)
            line = f"{label:36} [{bar:30}] {done}/{total} steps, {time.monotonic() - started:.0f} s"
            print(line, file=sys.stderr, end="\r" if sys.stderr.isatty() and done < total else "\n", flush=True)

    return advance
