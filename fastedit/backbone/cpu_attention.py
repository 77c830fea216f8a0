"""Softmax attention by torch, in the precision in which it is fastest on the device at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Return torch's attention of query (R, heads, queries, d) over key and value (R, heads, keys, d).

    On the CPU the backward pass of bfloat16 and float16 takes two to four times as long as that of float32, for one
    query as for many, whatever the instruction set: where a gradient will be asked for, all of it is computed in
    float32 from these numbers, and rounded once. A forward pass alone is faster as it is.

    Args:
        query, key, value: of one dtype.
        settings: ``attn_mask``, ``is_causal``, ``scale``, as torch takes them.
    Returns:
        (R, heads, queries, d), dtype of query.
    """
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not _is_faster_wide(query, key, value):
        return sdpa(query, key, value, **settings)
    return sdpa(query.float(), key.float(), value.float(), **settings).to(query.dtype)


def _is_faster_wide(*tensors: Tensor) -> bool:
    dtype, device = tensors[0].dtype, tensors[0].device
    short = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return short and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
