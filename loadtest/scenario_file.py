"""Reads a scenario's YAML: plain values only, no key twice, of a bounded size. Knows nothing of a scenario's fields."""

import json
from typing import Any

import yaml

from loadtest.inputs import MAX_DEPTH, one_line, shortened

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000  # with each alias counted as what it stands for: ten lines of aliases can stand for a billion

# What PyYAML raises, besides its own errors, if a value is not of its tag's type: `!!int x`, `2001-99-99`.
_VALUE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, OverflowError)


def parse_yaml(text: str) -> Any:
    """Parse YAML as JSON has it: text, numbers, true, false, null, lists and mappings with text as keys.

    Raises:
        ValueError: if it is anything else; names the line or the field.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ValueError("the file is empty")
        _values(node, {}, MAX_DEPTH)
        content = loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    except _VALUE_ERRORS as error:
        raise ValueError(str(error) if type(error) is ValueError else f"a value is not of its tag: {error}") from None
    _check_plain(content, "")
    return content


def _values(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """Count the values of a node, aliases as what they stand for, and check its keys."""
    if node in known:
        return known[node]
    line = f"line {node.start_mark.line + 1}"
    if depth == 0:  # also if an alias stands inside what it stands for
        raise ValueError(f"{line}: nested deeper than {MAX_DEPTH}")
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise ValueError(f"{line}: the key {shortened(key)} occurs twice")
        children = [one for pair in node.value for one in pair]
    count = 1 + sum(_values(child, known, depth - 1) for child in children)
    if count > MAX_VALUES:
        raise ValueError(f"{line}: more than {MAX_VALUES:,} values")
    known[node] = count
    return count


def _check_plain(value: object, field: str) -> None:
    """Raise unless JSON can hold a value: requests and results are JSON."""
    if isinstance(value, dict):
        for key, one in value.items():
            place = f"{field}.{key}" if field else str(key)
            if not isinstance(key, str):
                raise ValueError(f"{place}: the key is {shortened(key)}; must be text, in quotes if need be")
            _check_plain(key, f"{field}: a key")
            _check_plain(one, place)
    elif isinstance(value, list):
        for position, one in enumerate(value):
            _check_plain(one, f"{field}.{position}")
    else:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError):
            problem = f"got {shortened(value)}; must be text, a number, true, false or null, as JSON has them"
            raise ValueError(f"{field or 'the file'}: {problem}") from None
