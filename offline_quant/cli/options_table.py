"""Print the options of `bitsmoe quantize` as a Markdown table, for the docs.

python -m offline_quant.cli.options_table
"""

from typing import Any

import typer

from offline_quant.cli.commands import app
from offline_quant.config import Panel


def options_table() -> str:
    """All options of `bitsmoe quantize` as a Markdown table, grouped by panel."""
    command: Any = typer.main.get_command(app)
    options = [p for p in command.commands["quantize"].params if p.param_type_name == "option"]
    lines = ["| option | default | |", "|---|---|---|"]
    for panel in Panel:
        lines.append(f"| **{panel}** | | |")
        for option in options:
            if (option.rich_help_panel or Panel.FIRST) == panel:
                names = " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
                default = "required" if option.required else f"`{option.default}`" if option.show_default else ""
                if isinstance(option.default, bool):
                    default = "on" if option.default else "off"
                lines.append(f"| {names} | {default} | {option.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(options_table())
