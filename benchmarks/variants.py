"""Implementations that are the engine again, run otherwise: another method, another dtype, other settings.

``engine[:METHOD][@DTYPE][/FIELD=VALUE]...`` as a baseline's name, so that one run alternates between both:

    engine:kl+lora/kl_rephrases=true     another method; the case's own options stay where it knows them
    engine@float32                       the same edits on the model in another dtype, unquantized
    engine/batch=1/edits=32              the first 32 edits, one at a time
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.cases import DTYPES, Case

_NAME = re.compile(r"engine(?::(?P<method>[^@/]+))?(?:@(?P<dtype>[^@:/]+))?(?P<settings>(?:/\w+=[^/=]+)*)")
#: Fields of a case that a variant may change by these names; other names are options of the method.
_FIELDS: Mapping[str, str] = {
    "batch": "batch_size",
    "batch_size": "batch_size",
    "edits": "edits",
    "layers": "layers",
    "steps": "steps",
}


def is_variant(name: str) -> bool:
    """Whether an implementation's name means the engine, run otherwise."""
    return name != "engine" and _NAME.fullmatch(name) is not None


def as_run(case: Case, implementation: str) -> Case:
    """The case as an implementation runs it: unchanged, save for a variant.

    Raises:
        ValueError: a method, field or value that does not exist.
    """
    found = _NAME.fullmatch(implementation)
    if found is None or not is_variant(implementation):
        return case
    changes: dict[str, Any] = {}
    options = dict(case.options or {})
    if found["dtype"]:
        if found["dtype"] not in DTYPES:
            raise ValueError(f"variant: dtype is one of {', '.join(DTYPES)} (got baseline={implementation!r})")
        changes |= {"dtype": found["dtype"], "quantize": "none"}
    if found["method"]:
        changes["method"] = found["method"]
        options = {key: value for key, value in options.items() if key in _settings(found["method"])}
    for setting in found["settings"].split("/")[1:]:
        key, _, value = setting.partition("=")
        if key in _FIELDS:
            changes[_FIELDS[key]] = _number(implementation, key, value)
        else:
            options[key] = _plain(value)
    made = replace(case, **changes, options=options or None)
    # More edits than the case has there are not.
    made = replace(made, edits=min(made.edits, case.edits))
    made.plan()
    return made


def same_work(case: Case, implementation: str) -> bool:
    """Whether an implementation must fit the very deltas that the engine fits on this case in exact arithmetic."""
    own = as_run(case, implementation)
    return (own.method, own.overrides, own.quantize, own.dtype) == (
        case.method,
        case.overrides,
        case.quantize,
        case.dtype,
    )


def _settings(method: str) -> set[str]:
    from fastedit.methods import resolve, setting_names

    return setting_names(resolve(method, {}))


def _number(implementation: str, key: str, value: str) -> int:
    if not value.isdigit():
        raise ValueError(f"variant: {key} is a number (got baseline={implementation!r})")
    return int(value)


def _plain(value: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
