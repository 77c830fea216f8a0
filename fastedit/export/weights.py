"""Which deltas are a change of weights: on every prompt and token the same linear maps, with other numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from fastedit.deltas import EditDelta

#: Kinds that are a matrix added to a weight.
WEIGHT_KINDS = ("full", "low_rank")


def require_weights(deltas: Sequence[EditDelta], export: str) -> None:
    """Refuse deltas that no weights can stand for.

    Args:
        deltas: at least one. export: its kind, for the message.
    Raises:
        ValueError: names the delta, its kind and why; and what serves instead.
    """
    for number, delta in enumerate(deltas):
        why = _more_than_weights(delta)
        if why:
            raise ValueError(
                f"export: {export!r} writes changes of weights, and a delta of kind {delta.spec.kind!r} {why}; "
                f"fastedit.attach lets it act in the stock model (got deltas[{number}] of request {delta.request_id!r})"
            )


def _more_than_weights(delta: EditDelta) -> str:
    options = delta.spec.options
    if delta.spec.kind not in WEIGHT_KINDS:
        return "is none"
    if options.get("router") is not None:
        return f"acts on the prompts that its router {options['router']!r} chooses"
    if delta.spec.positions != "all":
        return f"acts on some tokens of a prompt (positions={delta.spec.positions!r})"
    return "asks another question" if "template" in delta.texts else ""
