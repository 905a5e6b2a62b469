"""Validation errors in one line: the field, the value received and what is allowed.

Knows pydantic models but no method; `em_sampler.params` and the server's strategies both use it.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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

    Raises:
        ParamsError: if a setting cannot be used: the error of the first such setting. Its field begins with `path`.
    """
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise _to_params_error(model, error, path) from None


def _to_params_error(model: type[BaseModel], error: ValidationError, path: str) -> ParamsError:
    """Make a `ParamsError` of the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    *parents, name = first["loc"] or (None,)
    for parent in parents:
        inner = model.model_fields[str(parent)].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)  # our models have no other kind of nesting
        model, path = inner, f"{path}.{parent}"
    if first["type"] == "value_error":  # a rule over several fields
        return ParamsError(f"{path}.{name}" if name else path, str(first["ctx"]["error"]))
    field = f"{path}.{str(name)[:40]}"
    if name not in model.model_fields:
        return ParamsError(field, f"unknown field; known fields are {', '.join(model.model_fields)}")
    return ParamsError(field, f"got {shorten(first['input'])}; must be {allowed_values(model, str(name))}")


def allowed_values(model: type[BaseModel], name: str) -> str:
    """Say in words what the field `name` may hold, such as `a number from 0 up to 20`."""
    schema = model.model_json_schema()["properties"][name]
    schema = {**schema, **schema.get("anyOf", [{}])[0]}  # of an optional field, the type that is not null
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "const" in schema or "type" not in schema:
        return str(schema.get("const", "an object"))
    if schema["type"] in ("boolean", "string"):
        length = f" of at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return {"boolean": "true or false", "string": "text"}[schema["type"]] + length
    kind = "an integer" if schema["type"] == "integer" else "a number"
    low = f"above {schema['exclusiveMinimum']:g}," if "exclusiveMinimum" in schema else f"from {schema['minimum']:g}"
    if "exclusiveMaximum" in schema:
        return f"{kind} {low} below {schema['exclusiveMaximum']:g}"
    return f"{kind} {low} up to {schema['maximum']:g}" if "maximum" in schema else f"{kind} {low} up"


def shorten(value: object, limit: int = 60) -> str:
    """Return the value as the client wrote it, short enough for an error message."""
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge integer"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."
