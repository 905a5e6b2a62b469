"""Validation errors in one line: the field, the value received and what is allowed.

Knows pydantic models but no method; `em_sampler.params` and the server's strategies both use it.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

MAX_EXACT_FLOAT = 2.0**53  # below it, a float that is a whole number is that number and no other
MAX_PROBLEM_CHARS = 200

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class ParamsError(ValueError):
    """A setting that cannot be used.

    Attributes:
        field: its dotted path, such as `em_inf.threshold`.
        problem: the rest of the message.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def validate(model: type[AnyModel], settings: Mapping[str, Any], path: str) -> AnyModel:
    """Validate `settings` against `model`.

    A float that is a whole number may stand for an integer, as in JSON Schema: clients in some languages write 5.0.

    Raises:
        ParamsError: if a setting cannot be used: that of the first unknown name, or else of the first such setting.
            Its field begins with `path`.
    """
    known = _known(model, settings, path)
    try:
        return model.model_validate(known)
    except ValidationError as error:
        raise _to_params_error(model, error, path) from None


def as_whole(value: object) -> object:
    """Return a float that is a whole number as an integer, and anything else as it is."""
    exact = isinstance(value, float) and abs(value) < MAX_EXACT_FLOAT and value.is_integer()
    return int(value) if exact and isinstance(value, float) else value


def _known(model: type[BaseModel], settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a copy of `settings`, and of those within them, in which every name is known.

    It ends at the first unknown name: pydantic would make an error of each, and clients choose how many there are.

    Raises:
        ParamsError: if a name is unknown.
    """
    known = {}
    for name, value in settings.items():
        if name not in model.model_fields:
            problem = f"unknown field; known fields are {', '.join(model.model_fields)}"
            raise ParamsError(f"{path}.{shorten_name(name)}", problem)
        inner = model.model_fields[name].annotation
        nested = isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel)
        known[name] = _known(inner, value, f"{path}.{name}") if nested else as_whole(value)  # type: ignore[arg-type]
    return known


def _to_params_error(model: type[BaseModel], error: ValidationError, path: str) -> ParamsError:
    """Make a `ParamsError` of the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    *parents, name = first["loc"] or (None,)
    for parent in parents:
        inner = model.model_fields[str(parent)].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)  # our models have no other kind of nesting
        model, path = inner, f"{path}.{parent}"
    if first["type"] == "value_error":  # a rule over several fields
        problem = str(first["ctx"]["error"])  # may echo a value, such as a pattern
        problem = problem if len(problem) <= MAX_PROBLEM_CHARS else problem[:MAX_PROBLEM_CHARS] + "..."
        return ParamsError(f"{path}.{name}" if name else path, problem)
    return ParamsError(f"{path}.{name}", f"got {shorten(first['input'])}; must be {allowed_values(model, str(name))}")


def allowed_values(model: type[BaseModel], name: str) -> str:
    """Say in words what the field `name` may hold, such as `a number from 0 up to 20`."""
    schema = model.model_json_schema()["properties"][name]
    schema = {**schema, **schema.get("anyOf", [{}])[0]}  # of an optional field, the type that is not null
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "const" in schema or "type" not in schema:
        return str(schema.get("const", "an object"))
    if schema["type"] in ("boolean", "string"):
        length = (
            f" of {schema.get('minLength', 0)} to {schema['maxLength']} characters" if "maxLength" in schema else ""
        )
        return {"boolean": "true or false", "string": "text"}[schema["type"]] + length
    kind = "an integer" if schema["type"] == "integer" else "a number"
    low = f"above {schema['exclusiveMinimum']:g}," if "exclusiveMinimum" in schema else f"from {schema['minimum']:g}"
    if "exclusiveMaximum" in schema:
        return f"{kind} {low} below {schema['exclusiveMaximum']:g}"
    return f"{kind} {low} up to {schema['maximum']:g}" if "maximum" in schema else f"{kind} {low} up"


def shorten(value: object, limit: int = 60) -> str:
    """Return the value as JSON, as the client wrote it, short enough for an error message."""
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge integer"
    if value == "":
        return '"" (empty text)'
    text = _as_json(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def shorten_name(name: object, limit: int = 40) -> str:
    """Return the beginning of a field's name, with what would break a line escaped as in JSON."""
    return _as_json(str(name)[:limit])[1:-1]


def _as_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace").decode()  # JSON can hold half a surrogate pair, a response cannot
