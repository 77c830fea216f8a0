"""One attention function under every stock decoder: it acts inside of a walk, and else hands over to the stock one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionPlan, Past, VarlenFunction, attend, padded
from .context import CURRENT

#: The name in transformers' registries.
NAME = "fastedit_packed"
#: What a decoder's configuration named before, by the configuration's id.
_BEFORE: dict[int, tuple[Any, Any]] = {}


def use_packed(root: nn.Module) -> None:
    """Let the layers of a decoder, and nothing else of the model, call the packed attention function."""
    _register()
    found: list[Any] = [module.config for module in root.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found}
    for number, config in configs.items():
        if config._attn_implementation != NAME:
            _BEFORE[number] = (config, config._attn_implementation)
            config._attn_implementation = NAME


def put_back(root: nn.Module) -> None:
    """Name the attention implementation of before again."""
    for module in root.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and config._attn_implementation == NAME:
            # In this order: another thread's stock forward may be asking
            config._attn_implementation = _BEFORE[id(config)][1]
            del _BEFORE[id(config)]


def implementation_of(config: Any) -> str:
    """The attention implementation that a configuration named before `use_packed`."""
    if id(config) in _BEFORE:
        return str(_BEFORE[id(config)][1])
    return str(config._attn_implementation)


def _implementation(config: Any) -> str:
    """The implementation of a stock forward; inside of a walk one whose masks are tensors."""
    name = implementation_of(config)
    return name if CURRENT.get() is None or name in ("sdpa", "eager") else "sdpa"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)


def packed_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of a stock forward, as the implementation of before takes it; inside of a walk a tensor, or none.

    A walk over packed rows has the masks of its rows, which were caught one by one.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    walk = CURRENT.get()
    if walk is not None and not walk.makes_masks:
        return None
    name = _implementation(kwargs.get("config"))
    known = ALL_MASK_ATTENTION_FUNCTIONS
    return known[name if name in known else "eager"](*args, **kwargs)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Attention of (1, heads, T, d_head) over (1, groups, T, d_head) under transformers' conventions."""
    walk = CURRENT.get()
    mixed = None if walk is None else walk.attend(module, query, key, value, attention_mask, options)
    if mixed is not None:
        return mixed
    found: tuple[Tensor, Any] = stock_attention(module)(module, query, key, value, attention_mask, **options)
    return found


def stock_attention(module: nn.Module) -> Any:
    """The attention function that a module would have called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _implementation(module.config) if hasattr(module, "config") else "sdpa"
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name == "eager" and eager is not None:
        return eager
    return ALL_ATTENTION_FUNCTIONS[name if name in ALL_ATTENTION_FUNCTIONS else "sdpa"]


def mix(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    past: Past | None,
    varlen: VarlenFunction | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of packed queries (Tq, heads, d_head) over packed keys (T, groups, d_head): (Tq, heads * d_head).

    Args:
        softcap: bound of the scores, c tanh(score / c); None is none.
        sinks: (heads,), a score of each head that takes weight and gives nothing; None is none.
    """
    if softcap is None and sinks is None:
        return attend(layer, query, key, value, plan, scale=scale, past=past, varlen=varlen)
    if past is None:
        key, value = (padded(part, plan.key_slots, plan.rows, plan.keys) for part in (key, value))
    else:
        key, value = past.extend(layer, plan, key, value)
    spread = padded(query, plan.query_slots, plan.rows, plan.queries)
    groups = key.shape[2]
    folded = spread.view(plan.rows, plan.queries, groups, -1, spread.shape[-1])
    scores = torch.einsum("rqgsd,rkgd->rgsqk", folded, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = plan.mask
    if mask is None:
        mask = torch.ones(plan.queries, plan.keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[:, :, None]
    # Half-precision scores are normalised in float32, as stock models do
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if sinks is not None:
        column = sinks.to(wide).view(1, groups, -1, 1, 1).expand(wide.shape[0], -1, -1, plan.queries, 1)
        weights = torch.cat([wide, column], -1).softmax(-1)[..., :-1]
    else:
        weights = wide.softmax(-1)
    mixed = torch.einsum("rgsqk,rkgd->rqgsd", weights.to(value.dtype), value)
    mixed = mixed.reshape(plan.rows * plan.queries, -1)
    return mixed if plan.query_slots is None else mixed[plan.query_slots]
