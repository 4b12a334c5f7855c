"""How `--help` looks: options under headings, in plain text, and one-line summaries in full.

An option names its heading by typer's `rich_help_panel`; a group of options names one for all of
its own by the class attribute `panel` (`groups`). No rich is needed to print them.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

# The headings, in the order of the help.
MAIN = "Main options"
SERVER = "Server"
QUESTIONS = "Questions"
TEXT = "Text and prompt"
ANSWER = "Answer"
MODEL = "Model"
SETTINGS = "HOMER settings"
COST = "Memory and speed"
OTHER = "Output and others"
_HEADINGS = (MAIN, SERVER, QUESTIONS, TEXT, ANSWER, MODEL, SETTINGS, COST, OTHER)

# What a newcomer needs, in every command that has it: these come first, in this order.
_MAIN_OPTIONS = (
    "--model",
    "--text",
    "--data",
    "--context-file",
    "--context-len",
    "--tasks",
    "--prompt",
    "--method",
    "--methods",
    "--lengths",
    "--samples",
    "--output",
    "--host",
    "--port",
    "--max-new-tokens",
    "--device",
)

# Columns for an option's names; longer names get a line of their own.
_NAMES_WIDTH = 30
# Characters of a command's summary: all of its first sentence.
_WHOLE = 10_000


class Command(TyperCommand):
    """A command that prints its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for parameter in self.get_params(ctx):
            record = _record(parameter, ctx)
            if record is not None:
                heading, order = _place(parameter)
                sections.setdefault(heading, []).append((order, record))
        names = [name for rows in sections.values() for _, (name, _) in rows]
        width = max((len(name) for name in names if len(name) <= _NAMES_WIDTH), default=0)
        for heading in ("Arguments", *_HEADINGS):
            if heading in sections:
                rows = [row for _, row in sorted(sections[heading], key=lambda entry: entry[0])]
                with formatter.section(heading):
                    # Names of equal width make equal columns in all sections.
                    formatter.write_dl([(name.ljust(width), text) for name, text in rows])


class Group(TyperGroup):
    """A group of commands that prints each one's summary in full."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(_WHOLE)) for name, one in commands if not one.hidden]
            )


def _place(parameter: Any) -> tuple[str, int]:
    """A parameter's heading, and its order there; equal ones keep the command's order."""
    if parameter.param_type_name == "argument":
        return "Arguments", 0
    for order, name in enumerate(_MAIN_OPTIONS):
        if name in parameter.opts:
            return MAIN, order
    return getattr(parameter, "rich_help_panel", None) or OTHER, 0


def _record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """A parameter's names and its help, with what is true if it is left out; None if hidden.

    typer's own record adds number ranges and doubles the parentheses of defaults in words.
    """
    record = parameter.get_help_record(ctx)
    if record is None:
        return None
    shown, default = parameter.show_default, parameter.default
    notes = []
    if getattr(parameter, "show_envvar", False) and parameter.envvar:
        notes.append(f"environment variable: {parameter.envvar}")
    if parameter.required:
        notes.append("required")
    elif isinstance(shown, str):
        notes.append(f"default: {shown}")
    elif shown and isinstance(default, str | int | float) and not isinstance(default, bool):
        notes.append(
            f"default: {default:g}" if isinstance(default, float) else f"default: {default}"
        )
    text = parameter.help or ""
    return record[0], f"{text}  [{'; '.join(notes)}]" if notes else text
