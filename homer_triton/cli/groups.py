"""Groups of options: a dataclass declares each option once, and commands take whole groups.

A group's fields are options, `name: Annotated[type, typer.Option("--name", ...)] = default`. Its
class attribute `panel`, if it has one, is their heading in the help (`help`); an option that names
a `rich_help_panel` itself goes there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_type_hints

import typer


def with_groups(
    command: Callable[..., None] | None = None, *, but: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Give a command the options of its groups, except those in `but`.

    Each parameter that is annotated with a dataclass is a group. The command gets an instance of
    it, made from the options.
    """
    if command is None:
        return partial(with_groups, but=but)
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    members: dict[str, list[str]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and is_dataclass(hint):
            own = [option for option in _options(hint) if option.name not in but]
            members[parameter.name] = [option.name for option in own]
            parameters += own
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hint, kind=kind))

    def run(**arguments: Any) -> None:
        for name, own in members.items():
            group: Any = hints[name]
            arguments[name] = group(**{option: arguments.pop(option) for option in own})
        command(**arguments)

    # Python accepts a signature only if parameters with a default come last.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, __name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def given_options(group: Any) -> list[str]:
    """The options of a group that differ from their defaults, in the order of its fields."""
    return [
        str(_info(option.annotation).default)
        for option in _options(type(group))
        if getattr(group, option.name) != option.default
    ]


def _options(group: type) -> Iterator[inspect.Parameter]:
    """A group's fields as parameters: its own first, then those of its base classes."""
    hints = get_type_hints(group, include_extras=True)
    defaults = {field.name: field.default for field in fields(group)}
    for owner in group.__mro__:
        for name in inspect.get_annotations(owner):
            if name in defaults:
                default = defaults.pop(name)
                yield inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if default is MISSING else default,
                    annotation=_under(getattr(owner, "panel", None), hints[name]),
                )


def _under(panel: str | None, hint: Any) -> Any:
    """An option's annotation with this heading, unless the option names one itself."""
    info = copy(_info(hint))
    info.rich_help_panel = info.rich_help_panel or panel
    return Annotated[get_args(hint)[0], info]


def _info(hint: Any) -> typer.models.OptionInfo:
    """The option in an annotation; its `default` is its first name, such as "--model"."""
    (option,) = (part for part in hint.__metadata__ if isinstance(part, typer.models.OptionInfo))
    return option
