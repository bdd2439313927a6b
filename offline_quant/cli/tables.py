"""Tables on standard output."""

import rich.box
from rich.console import Console
from rich.table import Table

output = Console(highlight=False, markup=False, emoji=False)


def _show(title: str, table: Table) -> None:
    """Print a table below its title, which may be wider."""
    output.print(f"\n{title}", style="italic", soft_wrap=True, markup=False, highlight=False)
    output.print(table)


def _table(*columns: str) -> Table:
    """A table that fits 80 columns: no frame, words to the left and figures to the right."""
    table = Table(box=rich.box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer", "projection", "figure", "") else "right")
    return table


def _layer_number(prefix: str) -> str:
    """The decoder layer's number: tables have no room for whole tensor prefixes."""
    return next((part for part in prefix.split(".") if part.isdecimal()), prefix)
