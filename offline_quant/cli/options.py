"""Options of a command from the fields of a config class."""

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from offline_quant.config import Panel

Command = Callable[..., None]


def options_of(config: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command one option for each field with a panel; the command takes them as `**options`.

    They stand behind the command's own required parameters. A tuple is given as text, see `split_lists`.

    Args:
        config: class with described fields.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        required = [p for p in own if p.default is p.empty]
        made = [
            _parameter(name, field, panel)
            for name, field in config.model_fields.items()
            if (panel := _panel(field)) is not None
        ]
        parameters = [
            p.replace(kind=p.KEYWORD_ONLY) for p in (*required, *made, *(p for p in own if p not in required))
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def split_lists(options: dict[str, Any], config: type[BaseModel]) -> dict[str, Any]:
    """Options as `config` takes them: lists were given with commas."""
    lists = {name for name, field in config.model_fields.items() if get_origin(field.annotation) is tuple}
    return {
        name: tuple(part.strip() for part in value.split(",")) if name in lists else value
        for name, value in options.items()
    }


def _panel(field: FieldInfo) -> Panel | None:
    return next((item for item in field.metadata if isinstance(item, Panel)), None)


def _parameter(name: str, field: FieldInfo, panel: Panel) -> inspect.Parameter:
    choices, default, kind = _choices(field.annotation), field.default, _type(field.annotation)
    text = f"{field.description} One of {', '.join(map(str, choices))}." if choices else field.description
    flag = [f"--{name.replace('_', '-')}"] if default is False else []  # without it there is a --no-... as well
    option = typer.Option(*flag, help=text, rich_help_panel=panel, show_default=default is not None)
    if field.is_required():
        default = inspect.Parameter.empty
    elif default is None:
        kind |= None
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Values of the Literal in an annotation."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _choices(part))


def _type(annotation: Any) -> Any:
    """Type that the command line reads. Values are checked later, all together, by the config."""
    if choices := _choices(annotation):
        annotation = type(choices[0])
    elif get_origin(annotation) is tuple:
        annotation = str
    elif parts := [part for part in get_args(annotation) if part is not NoneType]:
        annotation = parts[0]
    return annotation
