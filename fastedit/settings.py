"""Settings as users give them: values that fit the annotations of a config's fields, numbers within their ranges."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text", NoneType: "None"}
#: What ``_fitted`` returns for a value that does not fit; None is a value.
_REFUSED = object()


#: Fields that are sizes of tensors, whichever config has them, and more than any of them is of use for: what is larger
#: would only be told by the memory that runs out.
SIZES = frozenset(
    {"rank", "neurons", "n", "values", "hidden", "condition", "inner", "blocks", "directions", "size", "key", "queries"}
    | {"width", "top_k", "sketch", "scope_size", "scope_hidden", "scope_segments"}
)
MOST_SIZE = 1 << 16


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known: the nearest that is, or all of them."""
    listed = list(known)
    close = difflib.get_close_matches(word, listed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(listed)}"


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def typed(owner: str, config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for fields of a config, as the fields are annotated: a list as a tuple, a whole number for a float.

    Args:
        owner: of the settings, for the message.
        config: a dataclass. values: by field.
    Raises:
        ValueError: a value of another type, which ``config`` itself would fail on later or not at all.
    """
    hints = _hints(config)
    return {name: typed_value(owner, name, hints[name], value) for name, value in values.items()}


def typed_value(owner: str, name: str, hint: Any, value: Any) -> Any:
    """One value as its annotation asks for it.

    Raises:
        ValueError: it does not fit.
    """
    fitted = _fitted(hint, value)
    if fitted is _REFUSED:
        raise ValueError(f"{owner}: {name} must be {_described(hint)} (got {name}={value!r:.80})")
    return fitted


def _fitted(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return next((fitted for one in arguments if (fitted := _fitted(one, value)) is not _REFUSED), _REFUSED)
    if origin is Literal:
        return value if value in arguments else _REFUSED
    if origin is tuple:
        return _fitted_items(arguments, value)
    if hint is bool:
        return value if isinstance(value, bool) else _REFUSED
    if isinstance(value, bool):
        return _REFUSED
    if hint is int:
        return int(value) if isinstance(value, Integral) and abs(int(value)) < 2**63 else _REFUSED
    if hint is float:
        return float(value) if isinstance(value, Real) and _is_finite(value) else _REFUSED
    return value if isinstance(value, hint) else _REFUSED


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _fitted_items(hints: Sequence[Any], value: Any) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return _REFUSED
    each = [hints[0]] * len(value) if hints[-1] is Ellipsis else hints
    if len(each) != len(value):
        return _REFUSED
    items = tuple(_fitted(hint, item) for hint, item in zip(each, value, strict=True))
    return _REFUSED if any(item is _REFUSED for item in items) else items


def _described(hint: Any) -> str:
    """What fits, in words: ``a whole number, a list of whole numbers or None``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [_described(one) for one in arguments]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is Literal:
        words = [repr(one) for one in arguments]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is tuple:
        items = {int: "whole numbers", float: "numbers", str: "texts"}[arguments[0]]
        return f"a list of {items}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {items}"
    return _WORDS[hint]


def check_ranges(
    owner: str,
    config: Any,
    *,
    at_least: Mapping[str, int] | None = None,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Refuse numbers out of their range; None, where a field may be that, is in it.

    Args:
        owner: of the settings, for the message. config: has the fields.
        at_least: smallest values by name. positive, not_negative, shares: names; a share lies in 0 to 1.
    Raises:
        ValueError: names the field, the rule and the value.
    """
    for name in SIZES.intersection(vars(config)) if owner != "solver" else ():
        _check_range(owner, config, name, f"is at most {MOST_SIZE}", high=MOST_SIZE)
    for name, least in (at_least or {}).items():
        _check_range(owner, config, name, f"is at least {least}", low=least)
    for name in positive:
        _check_range(owner, config, name, "is positive", above=0)
    for name in not_negative:
        _check_range(owner, config, name, "is not negative", low=0)
    for name in shares:
        _check_range(owner, config, name, "is a share, 0 to 1", low=0, high=1)


def _check_range(
    owner: str,
    config: Any,
    name: str,
    rule: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> None:
    value = getattr(config, name)
    # A tuple of layers is checked where the model is known; NaN is in no range
    if isinstance(value, int | float) and not (low <= value <= high and value > above):
        comma = "," if rule[-1].isdigit() else ""
        none = f"{comma} or None" if NoneType in get_args(get_type_hints(type(config))[name]) else ""
        raise ValueError(f"{owner}: {name} {rule}{none} (got {name}={value!r})")


def check_fit(owner: str, config: Any) -> None:
    """Refuse settings of a fit that are out of their range: those of its optimiser, and layers and names if it has any.

    Raises:
        ValueError: names the field, the rule and the value.
    """
    has = vars(config)
    check_ranges(
        "solver",
        config,
        at_least={"check_every": 1} if "check_every" in has else {},
        positive=[name for name in ("lr", "clip", "radius") if name in has],
        not_negative=[name for name in ("steps", "weight_decay", "stop_loss") if name in has],
    )
    check_ranges(owner, config, at_least={"layers": 1} if "layers" in has else {})
    for name in ("layers", "names"):
        given = getattr(config, name, None)
        if given == ():
            raise ValueError(f"{owner}: {name} names at least one (got {name}=())")
        if isinstance(given, tuple) and len(set(given)) != len(given):
            raise ValueError(f"{owner}: {name} names each once (got {name}={given!r})")


RETAIN = ("none", "nullspace", "replay")


def check_retain(owner: str, config: Any) -> None:
    """Refuse settings of what a sequence keeps of its earlier edits that are no possible ones.

    Raises:
        ValueError: names the field, the rule and the value.
    """
    if config.retain not in RETAIN:
        raise ValueError(f"{owner}: retain is one of {list(RETAIN)} (got retain={config.retain!r})")
    check_ranges(
        owner, config, at_least={"retain_replayed": 1}, not_negative=("retain_weight",), shares=("retain_share",)
    )
