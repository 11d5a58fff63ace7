"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """A reader that has seen enough (`| head`) gets no more; the command ends as ever, not here."""
        self.quiet = True


def terminal() -> Console:
    """Standard output: a terminal at its width, anything else without an edge at which rows would be wrapped.

    Brackets are no markup: names of files and devices may hold them.
    """
    console = _Terminal(markup=False)
    return console if console.is_terminal else _Terminal(markup=False, width=200)
