"""Tables and numbers for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """``51.2 % [46.9, 55.5]``."""
    text = f"{100 * value:.1f} %"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


def short(text: str, width: int = 48) -> str:
    """The start of a text, on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", words: Sequence[str] = ()
) -> Table:
    """A table. The first column and those named in `words` are left-aligned text, the others right-aligned numbers."""
    made = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 or column in words else "right")
    for row in rows:
        made.add_row(*row)
    return made
