"""``key_value``: the extra feed-forward neurons of many edits, applied to tokens sorted by edit."""

from typing import Any, Literal

from torch import Tensor

from fastedit.ops._library import call, define, differentiate, serve_with_triton
from fastedit.reference import key_value as reference
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_key_value, check_key_value_needs, check_key_value_upstream

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "silu")


def _fake(
    x: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    activation: str,
    gate_keys: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_key_value(x, keys, bias, values, offsets, activation, gate_keys, gate_bias)
    width = keys.shape[2] if gate_keys is None else 2 * keys.shape[2]
    entering = x.new_empty((x.shape[0], width), dtype=accumulation_dtype(x.dtype))
    return x.new_empty((x.shape[0], values.shape[2])), entering


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    entering: Tensor,
    activation: str,
    gate_keys: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_key_value(x, keys, None, values, offsets, activation, gate_keys, None)
    check_key_value_upstream(grad, x, keys, values, entering, gate_keys is not None)
    check_key_value_needs(gate_keys is not None, needs)
    vector = (keys.shape[0], keys.shape[2])
    like = (x, keys, keys, values, keys, keys)
    shapes = (x.shape, keys.shape, vector, values.shape, keys.shape, vector)
    made = [t.new_empty(shape if need else (0,)) for t, shape, need in zip(like, shapes, needs, strict=True)]
    return made[0], made[1], made[2], made[3], made[4], made[5]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, keys, _, values, offsets, ctx.activation, gate_keys, _ = inputs
    ctx.save_for_backward(x, keys, values, offsets, output[1], gate_keys)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, keys, values, offsets, entering, gate_keys = ctx.saved_tensors
    # places of x, keys, bias, values, gate keys and gate bias among the inputs
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 2, 3, 6, 7)]
    made = call("key_value_backward", grad, x, keys, values, offsets, entering, ctx.activation, gate_keys, needs)
    on_x, on_keys, on_bias, on_values, on_gate, on_gate_bias = (
        g if need else None for g, need in zip(made, needs, strict=True)
    )
    return on_x, on_keys, on_bias, on_values, None, None, on_gate, on_gate_bias


define(
    "key_value",
    "(Tensor x, Tensor keys, Tensor? bias, Tensor values, Tensor offsets, str activation, Tensor? gate_keys, "
    "Tensor? gate_bias) -> (Tensor, Tensor)",
    reference.key_value,
    _fake,
    "lower",
)
define(
    "key_value_backward",
    "(Tensor grad, Tensor x, Tensor keys, Tensor values, Tensor offsets, Tensor entering, str activation, "
    "Tensor? gate_keys, bool[6] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.key_value_backward,
    _fake_backward,
)
serve_with_triton("key_value", "key_value")
serve_with_triton("key_value_backward", "key_value")
differentiate("key_value", _save, _backward)


def key_value(
    x: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    activation: Activation = "relu",
    gate: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Return what the extra neurons of its edit add to every token's feed-forward output.

    UniKE, arXiv 2409.19872, section 3.2: ``act(x K + b) V``. For gated feed-forward layers the neuron is
    ``act(x G + b_g) * (x K + b)``, with ``gate = (G, b_g)``. Nothing couples two edits.

    Args:
        x: (T, d), float32 | bfloat16 | float16 | float64. Tokens, those of one edit back to back.
        keys: (B, d, n), dtype of x, or float32.
        bias: (B, n), dtype of keys, or None.
        values: (B, n, o), dtype of keys.
        offsets: (B + 1,), int64. Edit b has x[offsets[b]:offsets[b + 1]]; the first entry is 0 and the last is T.
        activation: ``relu``, ``gelu`` (by the error function) or ``silu``.
        gate: None, or gate keys (B, d, n) and gate bias (B, n) or None, of the dtype of keys.
    Returns:
        y (T, o), dtype of x. Sums are kept in float32 (float64 for float64). Differentiable in x and all parameters,
        once; the slope of relu at 0 is 0.
    Raises:
        ValueError: shapes, dtypes or devices disagree, the activation is unknown; on the CPU also where offsets do not
            cover the tokens (a GPU is not asked, that would wait for it).
    """
    gate_keys, gate_bias = gate if gate is not None else (None, None)
    out: Tensor = call("key_value", x, keys, bias, values, offsets, activation, gate_keys, gate_bias)[0]
    return out
