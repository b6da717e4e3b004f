"""What a benchmark compares: a preset with some settings replaced, under a name."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from intra.config import Config, ScoringConfig, preset
from intra.errors import InTraError

__all__ = ["Method", "parse_methods"]

# it becomes part of a file's name, where two underscores separate
NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9.+_-]*(?<!_)")


@dataclass(frozen=True)
class Method:
    """A preset with some settings replaced."""

    name: str
    preset: str
    settings: Mapping[str, str]
    config: Config  # what the two make

    @property
    def text(self) -> str:
        """What `parse_methods` makes this method of."""
        if self.name == self.preset and not self.settings:
            return self.name
        return " ".join([f"{self.name}:", self.preset, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def training(self) -> Config:
        """Methods of which this is equal share one training: all settings, without those that only score."""
        return replace(self.config, scoring=replace(ScoringConfig(), lattice=self.config.scoring.lattice))

    @property
    def scoring(self) -> dict[str, str]:
        """All settings that only score, as text."""
        return {f"scoring.{name}": _text(value) for name, value in asdict(self.config.scoring).items()}


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    """The methods that `PRESET` or `NAME: PRESET key=value key=value` say.

    Raises one InTraError that tells of every wrong preset, key, value and name, with the nearest match.

    >>> parse_methods(["mfsa: fast model.attention=mfsa"])[0].settings
    {'model.attention': 'mfsa'}
    """
    found, problems = [], []
    for text in texts:
        try:
            found.append(_parse_method(text))
        except InTraError as error:
            problems.append(f"--method {text!r}: {error}")
    counts = Counter(method.name for method in found)
    problems += [f"--method: the name {name} is given {count} times" for name, count in counts.items() if count > 1]
    if not texts:
        problems.append("no method; give --method, e.g. --method fast")
    if problems:
        raise InTraError("; ".join(problems))
    return tuple(found)


def _parse_method(text: str) -> Method:
    before, colon, after = text.partition(":")
    words = (after if colon else text).split()
    if not words:
        raise InTraError("no preset; write PRESET or 'NAME: PRESET key=value'")
    base, *pairs = words
    if pairs and not colon:
        raise InTraError(f"a preset with settings needs a name of its own; write 'NAME: {text.strip()}'")
    name = before.strip() if colon else base
    problems = [] if NAME.fullmatch(name) else [
        f"the name is {name!r}; use letters, digits and . + - _, no two underscores in a row"]
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            problems.append(f"{pair!r} has no '='; settings are key=value, separated by blanks")
        elif key in settings:
            problems.append(f"{key} is given twice")
        settings[key] = value
    config = Config()
    try:
        config = preset(base)
        config = config.with_settings({key: value for key, value in settings.items() if f"{key}={value}" in pairs})
    except InTraError as error:
        problems.append(str(error))
    if problems:
        raise InTraError("; ".join(problems))
    return Method(name, base, settings, config)


def _text(value: Any) -> str:
    """A setting's value as `Config.with_settings` reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
