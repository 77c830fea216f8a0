"""The weights that deltas change: which tensors of the model they are, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.backbone import EditableModel, Site
from fastedit.backbone.cpu_linear import OneDnnLinear
from fastedit.backbone.placement import kept_weight
from fastedit.deltas import EditDelta
from fastedit.export.weights import require_weights

#: The most numbers of a weight that are summed in float64 at a time.
_PART = 1 << 24


@dataclass(frozen=True)
class ChangedWeight:
    """One weight of the model, as the deltas leave it.

    Args:
        name: in the state dict of the model. site: "layer.name" of the map that it is of.
        base: as it is in the model. value: with the change, rounded once, in the type asked for; on the CPU.
        largest_change: the largest entry of the exact change.
        largest_rounding: the largest difference of an entry of ``value`` to the exact sum.
        relative_rounding: Euclidean norm of those differences over that of the change; 0 where nothing changes.
    """

    name: str
    site: str
    base: Tensor
    value: Tensor
    largest_change: float
    largest_rounding: float
    relative_rounding: float


def changed_weights(
    model: EditableModel, deltas: Sequence[EditDelta], export: str, *, dtype: torch.dtype | None = None
) -> Iterator[ChangedWeight]:
    """Yield the weights that deltas change, one at a time. Nothing is written to the model.

    The changes of all deltas and the weight are summed in float64, and rounded once.

    Args:
        model: the base. deltas: changes of weights, which act together. export: kind of export, for messages.
        dtype: of the values; None is that of each weight.
    Raises:
        ValueError: deltas that are no change of weights or have different sites, a quantized base, or a map that has
            no weight of its own to add a change to; names it.
    """
    require_weights(deltas, export)
    sites = deltas[0].spec.sites
    for number, delta in enumerate(deltas):
        if delta.spec.sites != sites:
            raise ValueError(
                f"export: deltas that are summed have the same sites (got deltas[{number}] of request "
                f"{delta.request_id!r} with others than deltas[0])"
            )
    if model.quantize != "none":
        raise ValueError(
            f"export: {export!r} adds to weights, and those of a quantized base are codes; load the base with "
            f"quantize='none', edit and export there, or let the deltas act by fastedit.attach (got "
            f"quantize={model.quantize!r})"
        )
    names = weight_names(model, sites)
    for site in sites:
        name = names[site]
        held = model.hf.get_parameter(name)
        base = kept_weight(model.hf, name) if held.is_meta else held.detach()
        transposed = _is_transposed(model.module(site))
        yield _summed(name, site, base, deltas, transposed, base.dtype if dtype is None else dtype)


def weight_names(model: EditableModel, sites: Sequence[Site]) -> dict[Site, str]:
    """Name of the weight of every site in the state dict.

    Raises:
        ValueError: a site whose change no weight can stand for; says why.
    """
    uses = parameter_uses(model.hf)
    names: dict[Site, str] = {}
    taken: dict[int, Site] = {}
    for site in sites:
        module = model.module(site)
        weight = module._parameters.get("weight")
        where = f"got {site.name!r} of layer {site.layer}, module {site.module_path!r}"
        if not _is_linear(module) or weight is None:
            raise ValueError(
                "export: a change can be added to the weight of a plain linear map; what stands beside another module "
                f"acts by fastedit.attach alone ({where}, a {type(module).__name__})"
            )
        others = [path for path, user in uses[id(weight)] if user is not module]
        if others:
            raise ValueError(
                f"export: the weight of an edited map is its own, as a change would reach {others[0]!r} too; "
                f"fastedit.attach lets the deltas act on the map alone ({where})"
            )
        if id(weight) in taken:
            raise ValueError(
                f"export: every edited map has a weight of its own, and layer {taken[id(weight)].layer} has this one "
                f"too ({where})"
            )
        taken[id(weight)] = site
        names[site] = f"{site.module_path}.weight"
    return names


def parameter_uses(hf: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By the id of a parameter, where it is used: names and their modules; tied weights have several."""
    uses: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in hf.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((f"{path}.{name}" if path else name, module))
    return uses


def _is_linear(module: nn.Module) -> bool:
    kind: Any = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward in (nn.Linear.forward, OneDnnLinear.forward)
    return _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a map keeps its weight as (d_in, d_out), as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _summed(
    name: str, site: Site, base: Tensor, deltas: Sequence[EditDelta], transposed: bool, dtype: torch.dtype
) -> ChangedWeight:
    value = torch.empty(base.shape, dtype=dtype)
    rows = max(1, _PART // site.d_in)
    target, source = (value.T, base.T) if transposed else (value, base)
    largest_change = largest_rounding = errors = changes = 0.0
    for start in range(0, site.d_out, rows):
        part = slice(start, start + rows)
        change = sum((_change(site, delta, part) for delta in deltas[1:]), _change(site, deltas[0], part))
        exact = source[part].to("cpu", torch.float64) + change
        target[part] = exact.to(dtype)
        rounding = target[part].double() - exact
        largest_change = max(largest_change, float(change.abs().max()))
        largest_rounding = max(largest_rounding, float(rounding.abs().max()))
        errors += float(rounding.square().sum())
        changes += float(change.square().sum())
    relative = (errors / changes) ** 0.5 if changes else 0.0
    return ChangedWeight(name, f"{site.layer}.{site.name}", base, value, largest_change, largest_rounding, relative)


def _change(site: Site, delta: EditDelta, rows: slice) -> Tensor:
    """Some rows of a delta's change (d_out, d_in) of a site, in float64."""
    prefix = f"{site.layer}.{site.name}"
    tensors: Mapping[str, Tensor] = delta.tensors
    if delta.spec.kind == "full":
        return tensors[f"{prefix}:delta"][rows].to("cpu", torch.float64)
    down, up = (tensors[f"{prefix}:{part}"].to("cpu", torch.float64) for part in ("down", "up"))
    return (up[:, rows].T @ down.T) * float(delta.spec.options.get("scale", 1.0))
