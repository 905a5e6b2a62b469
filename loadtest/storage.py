"""Results on disk: results.json, which holds everything, and stages.csv. A file is written completely or not at all."""

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from loadtest.inputs import parse_json, read_text, shortened
from loadtest.results import SCHEMA_VERSION, Latency, Percentiles, Results, StageResult


def write_json(results: Results, path: Path) -> None:
    """Write results.json, for `read_json`. NaN and infinity become strings: JSON has no numbers for them.

    Raises:
        OSError: if it cannot be written; a file that was at `path` is unchanged.
    """
    content = without_nan(results.model_dump(mode="json", by_alias=True))
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Results:
    """Read results.json.

    Raises:
        ValueError: if the file holds no results that this version can read; names the file and why.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or not all of it: {error}") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError(f"{path}: not the results of a load test: there is no schema_version")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version {shortened(content['schema_version'])}; this reads {SCHEMA_VERSION}")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def write_csv(results: Results, path: Path) -> None:
    """Write a row per stage: its fields in the schema's order, latencies flattened, lists and mappings as JSON.

    Raises:
        OSError: if it cannot be written; a file that was at `path` is unchanged.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(StageResult), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(stage) for stage in results.stages)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and move it to `path`: a full disk leaves what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(model: type[BaseModel]) -> list[str]:
    """Return the columns of a CSV: those of the schema, even if no stage has a value."""
    latency = [f"latency_{name}_{part}" for name in Latency.model_fields for part in Percentiles.model_fields]
    return [
        column
        for name, field in model.model_fields.items()
        for column in (latency if field.annotation is Latency else [field.serialization_alias or name])
    ]


def _flat(stage: StageResult) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in stage.model_dump(by_alias=True).items():
        if name == "latency":
            for kind, parts in value.items():
                row.update({f"latency_{kind}_{part}": one for part, one in (parts or {}).items()})
        else:
            row[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
    return row


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON does not have by their names."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
