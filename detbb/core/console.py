"""Consoles to write on, which no text from a file can steer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from detbb.core.errors import printable


class SafeConsole(Console):
    """A rich console that writes control characters out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(file: TextIO | None = None) -> Console:
    """The terminal, or `file` as plain text; 140 columns where no terminal has its own.

    In a notebook plain text, too: rich would send there what is meant for a file, and a kernel calls itself a terminal.
    """
    notebook = Console().is_jupyter
    if file is None and sys.stdout.isatty() and not notebook:
        return SafeConsole()
    plain = False if file is not None or notebook else None  # None: as the environment has it
    return SafeConsole(file=file, width=140, no_color=True, force_terminal=plain, force_jupyter=False)


def show(*items: RenderableType) -> None:
    """Lines and tables on the terminal."""
    terminal = console()
    for item in items:
        terminal.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))


def warn(text: object) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr)
