"""Which deltas are a change of weights: on every prompt and token the same linear maps, with other numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.engine.apply import require_sequence

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
        return f"acts on some tokens of a prompt (positions={delta.spec.positions!r}; one of 'all' acts on each)"
    return "asks another question" if "template" in delta.texts else ""


def require_linear(model: EditableModel, deltas: Sequence[EditDelta], export: str) -> None:
    """Refuse deltas beside what is no linear map with a weight of its own in one place.

    Raises:
        ValueError: names the module and what it is.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.hf.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for site in dict.fromkeys(site for delta in deltas for site in delta.spec.sites):
        module = model.module(site)
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"export: {export!r} writes changes of the base model's weights, and at {site.module_path!r} an "
                "adapter is a part of that already; merge it first, or edit the model without it (got a model of PEFT)"
            )
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"export: {export!r} writes changes of linear maps, and {site.module_path!r} is a "
                f"{type(module).__name__}, whose output the delta changes as a whole; fastedit.attach lets it act in "
                f"the stock model (got site={site.layer}.{site.name})"
            )
        if len(paths[id(module)]) > 1:
            raise ValueError(
                f"export: {export!r} writes changes of maps that stand in one place, and this one stands in several, "
                f"of which the delta changes one (got paths={paths[id(module)]})"
            )


def require_sum(deltas: Sequence[EditDelta], otherwise: str) -> None:
    """Refuse to add up deltas that were not fitted on top of each other.

    Args:
        deltas: in order. otherwise: what to do instead, for the message.
    Raises:
        ValueError: one was fitted in other company.
    """
    try:
        require_sequence(deltas)
    except ValueError as error:
        # What it says behind that is of ``applied``
        raise ValueError(
            f"export: deltas add up where they were fitted as a sequence, from its first edit on; {otherwise} (got: "
            f"{str(error).removeprefix('applied: ').partition(';')[0]})"
        ) from error
