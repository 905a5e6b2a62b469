"""A row of a question file, and how the text of its fields is read. Errors name the line, the field and the value."""

from dataclasses import dataclass
from typing import Any

from loadtest.inputs import shortened
from loadtest.scenario import ScenarioError


@dataclass(frozen=True)
class Row:
    """The fields of one question, as its file has them."""

    place: str  # for errors: "line 3"
    fields: dict[str, Any]

    def first(self, *names: str) -> tuple[str, str]:
        """Return the name and the text of the first of some fields that the row has.

        Raises:
            ScenarioError: if it has none of them, or it is no text.
        """
        for name in names:
            if name in self.fields:
                return name, self._text(name)
        raise ScenarioError(f"{self.place}: has no field {' or '.join(names)}; has {', '.join(self.fields) or 'none'}")

    def text(self, *names: str) -> str:
        """Return the text of the first of some fields that the row has, as `first`."""
        return self.first(*names)[1]

    def optional(self, name: str) -> str:
        """Return the text of a field; none if the row does not have it or it is empty."""
        return self._text(name) if self.fields.get(name) else ""

    def error(self, name: str, problem: str) -> ScenarioError:
        """Return the error for a field."""
        return ScenarioError(f"{self.place}: {name}: got {shortened(self.fields[name])}; {problem}")

    def _text(self, name: str) -> str:
        """Return text or a number as text; joins a list of lines, as unit tests may be written."""
        value = self.fields[name]
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(name, "must be text or a number")
        if not str(value).strip():
            raise ScenarioError(f"{self.place}: {name}: is empty")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise self.error(name, "has half of a surrogate pair") from None
        return str(value)
