"""Per-row scores of logits and token ids, written apart from the engine's (``fastedit.evaluation.metrics``).

Pure functions: no model is called, nothing is averaged over rows.

Rows are questions, right-padded; `mask` says at which positions a score looks. Every function returns one float64 a
row, NaN where the row has no such position. Definitions as in the multimodal editing literature: teacher-forced token
accuracy, and locality by agreement with the unedited model (top-1 for text, rank-ordered top-10 for images in MMEdit,
arXiv 2310.08475).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Stands for "no token" where a position's logits are not numbers. Equal to no token, not even to itself.
NO_TOKEN = -1
#: Logits turned into distributions at a time: 16 MiB in float32, whatever the number of positions.
_CHUNK = 2**22


def top_ids(logits: Tensor, k: int = 1) -> Tensor:
    """Return the ids of the k largest logits, best first; equal logits in order of their ids.

    The order of ties is fixed because bfloat16 logits tie often, and an order that depends on the device would count
    as a change of the model.

    Args:
        logits: (..., V), any floating dtype.
        k: 1 to V.
    Returns:
        (..., k) int64; `NO_TOKEN` in all k places where a logit is NaN (a diverged model is never right).
    Raises:
        ValueError: k outside of 1 to V. Message: "top_ids: rule (got ...)".
    """
    vocabulary = logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_ids: k must be 1 to V (got k={k}, logits of shape {tuple(logits.shape)})")
    flat = logits.detach().reshape(-1, vocabulary)
    broken = flat.isnan().any(-1)
    values, ids = flat.topk(k, dim=-1)
    # Which of the ids that equal the k-th value topk takes is not defined: such rows are chosen by hand.
    last = values[:, -1:]
    unsure = ((flat == last).sum(-1) > (values == last).sum(-1)) & ~broken
    if bool(unsure.any()):
        ids[unsure] = _first_ids(flat[unsure], last[unsure], k)
    ids = ids.sort(dim=-1).values
    order = flat.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(-1, order).masked_fill(broken[:, None], NO_TOKEN)
    return ids.reshape(*logits.shape[:-1], k)


def _first_ids(flat: Tensor, last: Tensor, k: int) -> Tensor:
    """Return (T, k): the ids of all values above `last` (T, 1), filled up with the first ids that equal it."""
    above, equal = flat > last, flat == last
    wanted = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= wanted))
    return chosen.nonzero()[:, 1].reshape(-1, k)


def token_accuracy(predicted: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the share of masked positions whose predicted token is the gold one (teacher-forced accuracy).

    Args:
        predicted: (R, M), int64. Argmax ids given the gold prefix.
        labels: (R, M), int64. Gold next tokens; looked at under the mask only.
        mask: (R, M), bool. Positions that count.
    Returns:
        (R,) float64 in 0..1, NaN where the mask is empty.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check("token_accuracy", mask, predicted=predicted, labels=labels)
    return _mean((predicted == labels) & (predicted != NO_TOKEN), mask)


def all_right(predicted: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return 1 where every masked position is right, else 0; arguments and errors as `token_accuracy`."""
    accuracy = token_accuracy(predicted, labels, mask)
    return torch.where(accuracy.isnan(), accuracy, (accuracy == 1.0).double())


def ranked_agreement(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Return the share of (position, rank) pairs whose token is the same before and after an edit.

    A swap of two ranks costs both. With k = 1 this is the agreement of the argmax.

    Args:
        before, after: (R, M, k), int64, from `top_ids`.
        mask: (R, M), bool.
    Returns:
        (R,) float64 in 0..1, NaN where the mask is empty.
    """
    _check("ranked_agreement", mask, before=before[..., 0], after=after[..., 0])
    _same_shape("ranked_agreement", before, after)
    same = (before == after) & (before != NO_TOKEN)
    return _mean(same.double().mean(-1), mask)


def kl_divergence(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over positions of KL(before || after) between the two next-token distributions, in nats.

    Computed in float32 (float64 for float64 logits) from log-probabilities; a token that `before` rules out counts
    nothing, one that only `after` rules out makes it infinite.

    Args:
        before, after: (R, M, V) logits, any floating dtype.
        mask: (R, M), bool.
    Returns:
        (R,) float64, at least 0; inf where logits are NaN or inf, NaN where the mask is empty.
    """
    _check("kl_divergence", mask, before=before[..., 0], after=after[..., 0])
    _same_shape("kl_divergence", before, after)
    # Only masked positions are turned into distributions, a few at a time: V is large and masks are mostly empty.
    rows = max(1, _CHUNK // before.shape[-1])
    parts = zip(torch.split(before.detach()[mask], rows), torch.split(after.detach()[mask], rows), strict=True)
    values = mask.new_zeros(mask.shape, dtype=torch.float64)
    values[mask] = torch.cat([_kl(p, q) for p, q in parts])
    return _mean(values, mask)


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) of logits (T, V): (T,) float64, inf where they are NaN."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    p, q = before.to(dtype).log_softmax(-1), after.to(dtype).log_softmax(-1)
    terms = torch.where(p > float("-inf"), p.exp() * (p - q), 0.0)
    # Rounding may leave a sum a little below 0.
    divergence = terms.sum(-1).double().clamp_min(0.0)
    return divergence.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values (R, M) under the mask, per row; 0 / 0 is NaN."""
    return torch.where(mask, values.double(), 0.0).sum(-1) / mask.sum(-1)


def _check(owner: str, mask: Tensor, **named: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"{owner}: mask must be (R, M) bool (got mask={tuple(mask.shape)} {mask.dtype})")
    for name, value in named.items():
        if value.shape != mask.shape:
            raise ValueError(
                f"{owner}: {name} must agree with the mask on (R, M) (got {name}={tuple(value.shape)}, "
                f"mask={tuple(mask.shape)})"
            )


def _same_shape(owner: str, before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise ValueError(
            f"{owner}: before and after must agree on their shape (got before={tuple(before.shape)}, "
            f"after={tuple(after.shape)})"
        )
