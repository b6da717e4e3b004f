"""The values of settings by their types: read from text, checked after a trip through JSON, named for people."""

import math
import types
import typing
from typing import Any, Literal

__all__ = ["fits_type", "parse_value", "type_in_words"]


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a setting; numbers are finite."""
    for option in _options(hint):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            fits = isinstance(value, str) and value in args
        elif origin is tuple:
            fits = isinstance(value, tuple) and all(fits_type(part, args[0]) for part in value) and (
                Ellipsis in args or len(value) == len(args))
        elif option is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif option is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, option)
        if fits:
            return True
    return False


def parse_value(text: str, hint: Any) -> Any:
    """The value that a text means for a type such as `int | None` or `tuple[int, ...]`. Raises ValueError."""
    for option in _options(hint):
        try:
            return _parse_one(text.strip(), option)
        except ValueError:
            continue
    raise ValueError(text)


def type_in_words(hint: Any) -> str:
    """A type in the words of the command line."""
    words: list[str] = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            words.extend(str(arg) for arg in typing.get_args(option))
        elif typing.get_origin(option) is tuple:
            args = typing.get_args(option)
            words.append("whole numbers such as 2,4,8" if Ellipsis in args else "HxW" if args[0] is int else
                         "two numbers such as 0.05,0.25")
        else:
            words.append({int: "a whole number", float: "a number", bool: "on or off", type(None): "none"}.get(
                option, "text"))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _parse_one(text: str, option: Any) -> Any:
    origin, args = typing.get_origin(option), typing.get_args(option)
    if option is type(None):
        if text.lower() in ("none", "null"):
            return None
    elif origin is Literal:
        if text in args:
            return text
    elif option is bool:
        if text.lower() in ("true", "on", "yes", "1", "false", "off", "no", "0"):
            return text.lower() in ("true", "on", "yes", "1")
    elif origin is tuple:
        parts = [part for part in text.strip("()[]").replace("x", ",").split(",") if part.strip()]
        numbers = tuple(args[0](part) for part in parts)
        if Ellipsis in args or len(numbers) == len(args):
            return numbers
    elif option in (int, float):
        number = option(text)
        if math.isfinite(number):
            return number
    raise ValueError(text)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
