"""Names that are clearly meant for `em_inf` or `strategy` but are not those fields: vLLM ignores unknown ones."""

import difflib
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from em_sampler.params import EXTRA_ARGS_KEY, FLAT_PREFIX, METHODS
from em_sampler.validation import ParamsError, shorten_name
from server.strategies.registry import STRATEGY_KEY

MAX_NAMES = 100  # of unknown fields that are looked at: who sends more has not misspelt one
MAX_CHARS = 40
MIN_LIKENESS = 0.8  # of difflib: "stratgy" has 0.93, "strategies" after its plural is cut 0.93, "strict" 0.57

_SETTINGS = {name.replace("_", ""): name for model in METHODS.values() for name in model.model_fields}
_EM_INF = re.compile(r"em[-_. ]?inf(?:[-_. ]+(?P<separated>.*)|(?P<joined>.*))")


def refuse_misspelt(fields: Mapping[str, Any]) -> None:
    """Refuse unknown top-level `fields` of a request that are meant for us; everything else is left to vLLM.

    Raises:
        ParamsError: if there is one; names it, and the field that was meant.
    """
    for name, value in islice(fields.items(), MAX_NAMES):
        if value is None or value is False or name in (EXTRA_ARGS_KEY, STRATEGY_KEY):
            continue  # spelt well: handled as a field, or refused by the route
        if meant := _meant(name):
            raise ParamsError(f"body.{shorten_name(name)}", f"unknown field; did you mean body.{meant}?")
        if name == "extra_body" and isinstance(value, Mapping):
            _refuse_extra_body(value)


def refuse_misspelt_flat(xargs: Mapping[str, Any]) -> None:
    """Refuse names in `vllm_xargs` that are meant for `em_inf`; everything else is left to other plugins.

    Raises:
        ParamsError: if there is one; names it, and the name that was meant.
    """
    for name in islice(xargs, MAX_NAMES):
        if name == EXTRA_ARGS_KEY or name.startswith(FLAT_PREFIX):
            continue
        if (meant := _meant(name)) and meant != STRATEGY_KEY:
            problem = f"unknown field; did you mean {meant.replace('.', '_')}?"
            raise ParamsError(f"body.vllm_xargs.{shorten_name(name)}", problem)


def _refuse_extra_body(fields: Mapping[str, Any]) -> None:
    for name in islice(fields, MAX_NAMES):
        if meant := _meant(name):
            problem = f"unknown field; did you mean body.{meant}? (extra_body is an argument of OpenAI's Python client)"
            raise ParamsError(f"body.extra_body.{shorten_name(name)}", problem)


def _meant(name: str) -> str | None:
    """Return the field that `name` is meant for, such as `em_inf.threshold`, or None."""
    lower = name[:MAX_CHARS].lower()
    if found := _EM_INF.fullmatch(lower):
        setting = _SETTINGS.get(re.sub(r"[-_. ]", "", found["separated"] or found["joined"] or ""))
        if setting:
            return f"{EXTRA_ARGS_KEY}.{setting}"
        return EXTRA_ARGS_KEY if found["separated"] is not None or not found["joined"] else None
    singular = re.sub(r"ies$", "y", lower)
    likeness = difflib.SequenceMatcher(None, singular, STRATEGY_KEY).ratio()
    return STRATEGY_KEY if likeness >= MIN_LIKENESS else None
