"""What the ops ask of their arguments. Every kernel in Python asks it of what it gets, csrc/arguments.h says the same.

One function per op, for its forward and its backward: shapes, dtypes, devices, layouts and scalars, which need no look
at a tensor's values. Offsets, segments and labels are looked at where that waits for nobody: by the references, and by
kernels on the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.reference._checks import check_dense, check_floating, check_index, check_same, check_tensor, fail
from fastedit.reference._precision import accumulation_dtype

KINDS = ("ce", "forward_kl", "reverse_kl")
ACTIVATIONS = ("relu", "gelu", "silu")
METRICS = ("cosine", "dot", "l2")
# Columns of a token's ``stats``.
STATS = 5
# Most tokens or keys that are ranked; a row's candidates stay in registers.
MOST = 64


def check_risk(logits: Tensor, target: Tensor, segments: Tensor, n_segments: int | torch.SymInt, kind: str) -> None:
    """Check the arguments of ``risk``."""
    if kind not in KINDS:
        fail("risk", f"kind is one of {', '.join(KINDS)}", kind=kind)
    if logits.dim() != 2 or logits.shape[1] == 0:
        fail("risk", "logits are (T, V) with V > 0", logits=tuple(logits.shape))
    check_floating("risk", "logits", logits)
    if n_segments < 0:
        fail("risk", "n_segments is not negative", n_segments=n_segments)
    check_index("risk", "segments", segments, logits.shape[0], logits.device)
    if kind == "ce":
        check_index("risk", "target", target, logits.shape[0], logits.device)
        return
    if target.shape != logits.shape or target.dtype != logits.dtype:
        got = {"target": f"{target.dtype} {tuple(target.shape)}", "logits": f"{logits.dtype} {tuple(logits.shape)}"}
        fail("risk", f"target of {kind} has the shape and dtype of logits", **got)
    if target.device != logits.device:
        fail("risk", "target is on the device of logits", target=target.device, logits=logits.device)
    check_dense("risk", target=target)


def check_risk_upstream(op: str, grad_value: Tensor, grad_env: Tensor, stats: Tensor, features: Tensor) -> None:
    """Check what the backward of ``risk`` gets beside the arguments of the forward."""
    dtype, device = accumulation_dtype(features.dtype), features.device
    if grad_value.dim() != 1:
        fail(op, "grad_value is (S,)", grad_value=tuple(grad_value.shape))
    check_tensor(op, "grad_value", grad_value, dtype, grad_value.shape, device)
    check_tensor(op, "grad_env", grad_env, dtype, grad_value.shape, device)
    check_tensor(op, "stats", stats, dtype, (features.shape[0], STATS), device)


def check_low_rank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> None:
    """Check the arguments of ``low_rank``."""
    ranked = x.dim() == 2 and down.dim() == 3 and up.dim() == 3
    if not ranked or down.shape != (up.shape[0], x.shape[1], up.shape[1]):
        shapes = {"x": tuple(x.shape), "down": tuple(down.shape), "up": tuple(up.shape)}
        fail("low_rank", "x is (T, d), down is (B, d, r), up is (B, r, o)", **shapes)
    check_floating("low_rank", "x", x)
    if down.dtype != up.dtype or down.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        fail("low_rank", "down and up have the dtype of x or are float32", x=x.dtype, down=down.dtype, up=up.dtype)
    check_same("low_rank", "x, down and up are on one device", "device", x=x, down=down, up=up)
    check_index("low_rank", "offsets", offsets, down.shape[0] + 1, x.device)


def check_key_value(
    x: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    activation: str,
    gate_keys: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """Check the arguments of ``key_value``."""
    op = "key_value"
    parameters = {"keys": keys, "bias": bias, "values": values, "gate_keys": gate_keys, "gate_bias": gate_bias}
    given = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    if activation not in ACTIVATIONS:
        fail(op, f"activation is one of {', '.join(ACTIVATIONS)}", activation=activation)
    fits = x.dim() == 2 and keys.dim() == 3 and values.dim() == 3
    vector = (keys.shape[0], keys.shape[-1]) if fits else ()
    fits = fits and keys.shape[1] == x.shape[1] and values.shape[:2] == vector
    fits = fits and all(t is None or t.shape == vector for t in (bias, gate_bias))
    fits = fits and (gate_bias is None if gate_keys is None else gate_keys.shape == keys.shape)
    if not fits:
        shapes = {"x": tuple(x.shape)} | {name: tuple(tensor.shape) for name, tensor in given.items()}
        rule = "x is (T, d), keys and gate_keys are (B, d, n), bias and gate_bias are (B, n), values is (B, n, o)"
        fail(op, rule, **shapes)
    check_floating(op, "x", x)
    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    if len(set(dtypes.values())) > 1 or keys.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        fail(op, "the parameters have the dtype of x or are float32", x=x.dtype, **dtypes)
    check_same(op, "x and the parameters are on one device", "device", x=x, **given)
    check_index(op, "offsets", offsets, keys.shape[0] + 1, x.device)


def check_key_value_upstream(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, entering: Tensor, gated: bool
) -> None:
    """Check what the backward of ``key_value`` gets beside the arguments of the forward."""
    width = keys.shape[2] * (2 if gated else 1)
    check_tensor("key_value", "grad", grad, x.dtype, (x.shape[0], values.shape[2]), x.device)
    check_tensor("key_value", "entering", entering, accumulation_dtype(x.dtype), (x.shape[0], width), x.device)


def check_key_value_needs(gated: bool, needs: Sequence[bool]) -> None:
    """Raise where gradients of a gate are wanted that is not there."""
    if (needs[4] or needs[5]) and not gated:
        fail("key_value", "gradients of a gate need gate_keys", needs=[bool(need) for need in needs])


def check_mmd2(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor) -> None:
    """Check the arguments of ``mmd2``."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        fail("mmd2", "x is (N, d) and y is (M, d)", x=tuple(x.shape), y=tuple(y.shape))
    check_floating("mmd2", "x", x)
    if x.dtype != y.dtype or x.device != y.device:
        fail("mmd2", "x and y have the same dtype and device", x=f"{x.dtype} {x.device}", y=f"{y.dtype} {y.device}")
    check_dense("mmd2", y=y)
    if x_offsets.dim() != 1 or x_offsets.shape[0] < 1:
        fail("mmd2", "x_offsets is (G + 1,)", x_offsets=tuple(x_offsets.shape))
    check_index("mmd2", "x_offsets", x_offsets, x_offsets.shape[0], x.device)
    check_index("mmd2", "y_offsets", y_offsets, x_offsets.shape[0], x.device)
    check_floating("mmd2", "bandwidths", bandwidths)
    groups = x_offsets.shape[0] - 1
    if bandwidths.dim() not in (1, 2) or (bandwidths.dim() == 2 and bandwidths.shape[0] != groups):
        fail("mmd2", "bandwidths is (Q,) or (G, Q)", bandwidths=tuple(bandwidths.shape), G=groups)
    if bandwidths.device != x.device:
        fail("mmd2", "bandwidths is on the device of the features", bandwidths=bandwidths.device, features=x.device)


def check_mmd2_upstream(grad_value: Tensor, grad_env: Tensor, x: Tensor, x_offsets: Tensor) -> None:
    """Check what the backward of ``mmd2`` gets beside the arguments of the forward; it takes any floating dtype."""
    for name, grad in (("grad_value", grad_value), ("grad_env", grad_env)):
        check_floating("mmd2", name, grad)
        check_tensor("mmd2", name, grad, grad.dtype, (x_offsets.shape[0] - 1,), x.device)


def check_mmd2_kept(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor) -> None:
    """Check the arguments of ``mmd2_kept``."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    if x_offsets.shape[0] != 2:
        fail("mmd2", "pairs are kept of one group", G=x_offsets.shape[0] - 1)


def check_mmd2_pairs(pairs: Tensor, x: Tensor, y: Tensor) -> None:
    """Check what ``mmd2_kept`` left for its backward."""
    rows = x.shape[0] + y.shape[0]
    check_tensor("mmd2", "pairs", pairs, accumulation_dtype(x.dtype), (rows, rows), x.device)


def check_nearest_keys(queries: Tensor, keys: Tensor, k: int, metric: str) -> None:
    """Check the arguments of ``nearest_keys``."""
    op = "nearest_keys"
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        shapes = {"queries": tuple(queries.shape), "keys": tuple(keys.shape)}
        fail(op, "queries is (Q, d) and keys is (K, d)", **shapes)
    check_floating(op, "queries", queries)
    if queries.dtype != keys.dtype or queries.device != keys.device:
        got = {"queries": f"{queries.dtype} {queries.device}", "keys": f"{keys.dtype} {keys.device}"}
        fail(op, "queries and keys have the same dtype and device", **got)
    check_dense(op, keys=keys)
    if metric not in METRICS:
        fail(op, f"metric is one of {', '.join(METRICS)}", metric=metric)
    if not 1 <= k <= MOST or k > keys.shape[0]:
        fail(op, f"k is between 1 and the number of keys, at most {MOST}", k=k, K=keys.shape[0])


def check_topk_agreement(before: Tensor, after: Tensor, k: int) -> None:
    """Check the arguments of ``topk_agreement``."""
    op = "topk_agreement"
    if before.dim() != 2 or before.shape != after.shape:
        fail(op, "before and after are (T, V)", before=tuple(before.shape), after=tuple(after.shape))
    check_floating(op, "before", before)
    if before.dtype != after.dtype or before.device != after.device:
        got = {"before": f"{before.dtype} on {before.device}", "after": f"{after.dtype} on {after.device}"}
        fail(op, "before and after have one dtype and are on one device", **got)
    check_dense(op, after=after)
    if not 1 <= k <= MOST or k > before.shape[1]:
        fail(op, f"k is 1 to V, at most {MOST}", k=k, V=before.shape[1])


def check_adam_step(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> None:
    """Check the arguments of ``adam_step_``."""
    op = "adam_step_"
    check_floating(op, "params", params)
    if params.dim() != 2:
        fail(op, "params is (B, P)", params=tuple(params.shape))
    rows, size = params.shape
    state = accumulation_dtype(params.dtype)
    matrices = {"params": params, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in matrices.items():
        allowed = {"params": (params.dtype,), "grads": (params.dtype, state)}.get(name, (state,))
        if tensor.shape != params.shape:
            fail(op, f"{name} has the shape of params", **{name: tuple(tensor.shape), "params": tuple(params.shape)})
        if tensor.dtype not in allowed:
            fail(op, f"{name} is {' or '.join(str(dtype) for dtype in dict.fromkeys(allowed))}", **{name: tensor.dtype})
        if tensor.device != params.device:
            fail(op, f"{name} is on the device of params", **{name: tensor.device, "params": params.device})
        check_dense(op, **{name: tensor})
        if size > 1 and tensor.stride(1) != 1:
            fail(op, f"{name} has unit stride along P", **{name: tensor.stride()})
        # grads alone are only read
        if name != "grads" and rows > 1 and tensor.stride(0) < size:
            fail(op, f"rows of {name} do not share memory", **{name: tensor.stride()})
    check_adam_settings(op, params, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius)


def check_adam_settings(
    op: str,
    params: Tensor,
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> None:
    """Check what a step of edits (B, ...) needs besides matrices."""
    rows = params.shape[0]
    for name, tensor, dtype in (("step", step, torch.int64), ("lr", lr, torch.float64), ("active", active, torch.bool)):
        if tensor.shape != (rows,) or tensor.dtype != dtype or tensor.device != params.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"
            fail(op, f"{name} is {dtype} of shape ({rows},) beside params", **{name: got})
        check_dense(op, **{name: tensor})
    if rows > 1 and step.stride(0) == 0:
        fail(op, "rows of step do not share memory", step=step.stride())
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        fail(op, "betas lie in [0, 1)", betas=(beta1, beta2))
    for name, number in (("eps", eps), ("weight_decay", weight_decay), ("clip", clip), ("radius", radius)):
        if number is not None and not number >= 0.0:
            fail(op, f"{name} is not negative", **{name: number})


def check_workspace(size: Sequence[int | torch.SymInt]) -> None:
    """Check the arguments of ``workspace``."""
    if any(length < 0 for length in size):
        fail("workspace", "sizes are not negative", size=tuple(size))


def check_adam_step_memory(params: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Raise where two of the tensors that ``adam_step_`` writes are one."""
    # a tensor on no device has no memory to share
    if (
        params.numel()
        and params.device.type != "meta"
        and len({params.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()}) < 3
    ):
        fail("adam_step_", "params, exp_avg and exp_avg_sq do not share memory", params=tuple(params.shape))
