"""Groups of options that several commands take: a dataclass of options as one parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, in whose help the options of a group stand where its parameter does.

    Args:
        command: a function of which some parameters are annotated with a dataclass, whose fields
            are annotated as typer's options are.

    Returns:
        A function of all those options, which makes the dataclasses and calls the command.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []

    def take(name: str, annotation: Any, default: Any) -> None:
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
            )
        )

    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            take(name, hints[name], parameter.default)
            continue
        group = hints[name]
        groups[name] = group
        of_group = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            take(field.name, of_group[field.name], default)

    def gathered(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
    gathered.__module__ = command.__module__
    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return gathered
