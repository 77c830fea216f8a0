"""Every op below its public function: each argument wrong in every way is refused in words, or gives what the reference
gives. On a library built with AddressSanitizer (make sanitize) a read or write beyond a tensor ends the process."""

import functools
import importlib

import pytest
import torch

from fastedit.ops import implementations
from fastedit.testing import (
    adam_step_inputs,
    adam_step_outer_inputs,
    key_value_inputs,
    low_rank_inputs,
    mmd2_inputs,
    nearest_keys_inputs,
    providers,
    risk_inputs,
    topk_agreement_inputs,
)

HUGE = 2**62
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
# What may be raised; anything else is a crash or another's words.
CLEAN = (ValueError, RuntimeError, MemoryError)
# What a kernel says only after a look at the values, which the fakes have not.
OF_VALUES = ("rise from 0", "lie in [0, V)", "are below n_segments", "do not share memory")


def _reference(name):
    stem = name.removesuffix("_backward").rstrip("_")
    return getattr(importlib.import_module(f"fastedit.reference.{stem}"), name)


def _with_backward(name, inputs, upstream):
    """Yield the case of an op, and that of its backward with what the forward leaves; upstream says in which places."""
    yield name, inputs
    outputs = _reference(name)(*inputs)
    yield f"{name}_backward", upstream(inputs, outputs if isinstance(outputs, tuple) else (outputs,))


def _risk_cases(tokens, vocabulary, segments, kind, dtype):
    def upstream(inputs, outputs):
        return [torch.ones_like(outputs[0]), torch.ones_like(outputs[1]), *inputs[:3], outputs[2], kind]

    return _with_backward("risk", list(risk_inputs(tokens, vocabulary, segments, kind, dtype)), upstream)


def _low_rank_cases(lengths, d, r, o, dtype, weight_dtype=None):
    def upstream(inputs, outputs):
        return [torch.ones_like(outputs[0]), *inputs, [True, True, True]]

    inputs = list(low_rank_inputs(lengths, d, r, o, dtype, weight_dtype=weight_dtype))
    return _with_backward("low_rank", inputs, upstream)


def _key_value_cases(lengths, d, n, o, activation, dtype, *, gated):
    x, keys, bias, values, offsets, gate_keys, gate_bias = key_value_inputs(lengths, d, n, o, dtype, gated=gated)
    inputs = [x, keys, bias, values, offsets, activation, gate_keys, gate_bias]

    def upstream(inputs, outputs):
        x, keys, _, values, offsets, _, gate_keys, _ = inputs
        needs = [True] * 4 + [gated] * 2
        return [torch.ones_like(outputs[0]), x, keys, values, offsets, outputs[1], activation, gate_keys, needs]

    return _with_backward("key_value", inputs, upstream)


def _mmd2_cases(x_lengths, y_lengths, d, scales, dtype):
    def upstream(inputs, outputs):
        return [torch.ones_like(outputs[0]), torch.ones_like(outputs[1]), *inputs]

    return _with_backward("mmd2", [*mmd2_inputs(x_lengths, y_lengths, d, dtype, scales=scales), False], upstream)


def _mmd2_kept_cases(rows_x, rows_y, d, scales, dtype):
    def upstream(inputs, outputs):
        return [torch.ones_like(outputs[0]), torch.ones_like(outputs[1]), *inputs[:5], outputs[2], inputs[5]]

    inputs = [*mmd2_inputs((rows_x,), (rows_y,), d, dtype, scales=scales), False]
    return _with_backward("mmd2_kept", inputs, upstream)


def _adam_cases(rows, size, dtype, clip):
    settings = [0.9, 0.999, 1e-8, 0.01, clip, None]
    yield "adam_step_", [*adam_step_inputs(rows, size, dtype), *settings]


def _adam_outer_cases(lengths, shapes, dtype, clip):
    settings = [0.9, 0.999, 1e-8, 0.01, clip, None]
    yield "adam_step_outer_", [*adam_step_outer_inputs(lengths, shapes, dtype), *settings]


@functools.cache
def _cases():
    """Return (id, op, arguments) of everything that is right; odd, empty and size-one shapes among them."""
    torch.manual_seed(0)
    single, short = torch.float32, torch.bfloat16
    sources = (
        _risk_cases(5, 33, 3, "ce", single), _risk_cases(4, 17, 2, "forward_kl", short),
        _risk_cases(3, 40, 2, "reverse_kl", torch.float64), _risk_cases(0, 5, 2, "ce", single),
        _low_rank_cases((3, 0, 2), 9, 2, 5, single), _low_rank_cases((2, 1), 4, 3, 2, short, single),
        _low_rank_cases((0,), 4, 1, 2, single), _low_rank_cases((), 4, 1, 2, single),
        _key_value_cases((3, 0, 2), 9, 2, 5, "gelu", single, gated=True),
        _key_value_cases((2, 1), 4, 3, 2, "relu", short, gated=False),
        _mmd2_cases((3, 1), (2, 2), 5, 2, single), _mmd2_cases((2, 0), (0, 2), 3, 1, short),
        _adam_cases(3, 37, single, 1.0), _adam_cases(2, 5, short, None), _adam_cases(0, 5, single, 1.0),
        _adam_outer_cases(((2, 0, 3), (1, 4, 2)), ((5, 4), (3, 7)), single, 1.0),
        _adam_outer_cases(((3, 1),), ((1, 6),), torch.float64, None),
        [("nearest_keys", [*nearest_keys_inputs(3, 20, 7, single), 4, "cosine"])],
        [("nearest_keys", [*nearest_keys_inputs(10, 9, 5, short), 9, "l2"])],
        [("nearest_keys", [*nearest_keys_inputs(0, 9, 5, single), 2, "dot"])],
        [("topk_agreement", [*topk_agreement_inputs(4, 30, single), 5])],
        [("workspace", [torch.ones(2, dtype=short), [3, 0, 4]]), ("workspace", [torch.ones(2), [700, 400]])],
        _mmd2_kept_cases(3, 2, 5, 2, single), _mmd2_kept_cases(1, 3, 3, 1, short), _mmd2_kept_cases(0, 2, 3, 1, single),
    )  # fmt: skip
    found = [(name, inputs) for source in sources for name, inputs in source]
    return [(f"{name}-{place}", name, inputs) for place, (name, inputs) in enumerate(found)]


# Where a backward takes the stats that its own forward left; what they mean is the kernel's business.
STATS = {"risk_backward": 5}


def _with_own_stats(name, inputs, forward):
    """Return the arguments with the stats of that forward in place of the reference's."""
    if name not in STATS or forward is None:
        return inputs
    place = STATS[name]
    kept, settings = inputs[2:place], inputs[place + 1 :]
    stats = forward(*kept, inputs[0].shape[0], *settings)[2]
    return [*inputs[:place], stats, *inputs[place + 1 :]]


def _schema(name):
    return getattr(torch.ops.fastedit, name).default._schema


def _wrong_tensors(tensor):
    """Yield (what, tensor) for a tensor that is right."""
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    for dim in range(tensor.dim()):
        size = tensor.shape[dim]
        yield f"twice in dim {dim}", torch.cat([tensor, tensor], dim)
        if size:
            yield f"one more in dim {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
            yield f"one less in dim {dim}", tensor.narrow(dim, 0, size - 1)
            yield f"one of dim {dim}", tensor.narrow(dim, 0, 1)
            yield f"none of dim {dim}", tensor.narrow(dim, 0, 0)
            yield f"alike in dim {dim}", tensor.narrow(dim, 0, 1).expand_as(tensor)
        yield (
            f"every second in dim {dim}",
            torch.repeat_interleave(tensor, 2, dim)[(slice(None),) * dim + (slice(None, None, 2),)],
        )
    yield "a dim more", tensor[None]
    yield "a dim more behind", tensor[..., None]
    yield "flat", tensor.reshape(-1)
    yield "a number", torch.ones((), dtype=tensor.dtype)
    if tensor.dim() and tensor.shape[0]:
        yield "a dim less", tensor[0]
    if tensor.dim() > 1:
        yield "turned", tensor.transpose(0, 1).contiguous().transpose(0, 1)
        yield "turned around", tensor.transpose(0, 1)
    yield "elsewhere", tensor.to("meta")
    if not tensor.is_complex() and tensor.dim() == 2 and tensor.is_floating_point():
        yield "sparse", tensor.float().to_sparse()
    if tensor.dtype == torch.int64 and tensor.numel():
        for value in (-1, -HUGE, HUGE, 2**31, tensor.numel() + 1):
            for place in (0, -1):
                changed = tensor.clone()
                changed[place] = value
                yield f"{value} at {place}", changed
        yield "falling", tensor.flip(0)
        yield "all one", torch.ones_like(tensor)


WRONG_SCALARS = {
    "int": (-1, 0, 1, 3, 65, HUGE, -HUGE),
    "SymInt": (-1, 0, 1, HUGE, -HUGE),
    "float": (-1.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e308),
    "Optional[float]": (None, -1.0, 0.0, float("nan"), float("inf")),
    "str": ("", "ce", "reverse_kl", "silu", "l2", "x" * 1000),
    "bool": (True, False),
    # of their length, which the dispatcher sees to
    "List[bool]": ([True] * 3, [False] * 3, [False, True, False], [True] * 6, [False] * 6, [False] * 5 + [True]),
    "List[int]": ([], [-1], [-1, -1], [HUGE], [HUGE, HUGE], [2**33, 2**31], [0, HUGE]),
}


def _wrong_arguments(name, inputs):
    """Yield (what, arguments), one argument of them changed at a time."""
    for place, argument in enumerate(_schema(name).arguments):
        kind, value = (
            str(argument.type).replace("SymInt", "int") if "List" in str(argument.type) else str(argument.type),
            inputs[place],
        )
        if kind == "List[Tensor]":
            each = [(k, wrong) for k, one in enumerate(value) for wrong in _wrong_tensors(one)]
            changes = [(f"{k}: {what}", [*value[:k], one, *value[k + 1 :]]) for k, (what, one) in each]
            changes += [("none", []), ("one less", value[1:]), ("one more", [*value, value[0]])]
        elif isinstance(value, torch.Tensor):
            changes = list(_wrong_tensors(value))
            if kind.startswith("Optional"):
                changes.append(("None", None))
        elif kind == "Optional[Tensor]":
            first = inputs[0]
            changes = [("first", first), ("its row", first[:1]), ("a vector", first.new_ones(3)), ("empty", first[:0])]
        else:
            changes = [
                (repr(one)[:40], one) for one in WRONG_SCALARS[kind] if kind != "List[bool]" or len(one) == len(value)
            ]
        for what, changed in changes:
            yield f"{argument.name}: {what}", [*inputs[:place], changed, *inputs[place + 1 :]]


def _fresh(inputs, device=None):
    """Return arguments that a call may write to, strides kept."""

    def copied(one):
        if isinstance(one, list):
            return [copied(each) for each in one]
        if not isinstance(one, torch.Tensor) or one.layout != torch.strided:
            return one
        if device is not None:
            return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)
        if one.device.type == "meta" or any(stride == 0 for stride in one.stride()):
            return one
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype).copy_(one)

    return [copied(one) for one in inputs]


def _tensors(inputs):
    """Return the tensors among arguments, those in lists too."""
    lists = [one if isinstance(one, (list, tuple)) else [one] for one in inputs]
    return [one for each in lists for one in each if isinstance(one, torch.Tensor)]


def _outcome(function, inputs):
    """Return (the error's class and words, None), or (None, all tensors that come out or are written)."""
    try:
        results = function(*inputs)
    except CLEAN as error:
        return f"{type(error).__name__}: {error}", None
    return None, [
        *(results if isinstance(results, tuple) else (results,)),
        *_tensors(inputs),
    ]


def _same(one, other, loose):
    if one.device.type == "meta" or other.device.type == "meta" or one.layout != torch.strided:
        return one.shape == other.shape and one.dtype == other.dtype
    bound = 0.05 if loose else 2e-3
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.allclose(one.double(), other.double(), rtol=bound, atol=bound, equal_nan=True)
    )


def _differences(name, function, what, inputs, goal_inputs, meta):
    """Return what a kernel makes of arguments where that is not what the reference makes of them, as text."""
    expected, goal = _outcome(_reference(name), _fresh(goal_inputs))
    error, results = _outcome(function, _fresh(inputs, "meta" if meta else None))
    if meta and expected is not None and any(words in expected for words in OF_VALUES):
        return ""
    if meta and error is not None:
        error = error.replace("meta", "cpu")
    if (error is None) != (expected is None):
        return f"{what}: {error} where the reference says {expected}"
    if error is not None:
        # memory that is not there is told in other words
        both = error.startswith("ValueError") and expected.startswith("ValueError")
        return f"{what}: {error} where the reference says {expected}" if both and error != expected else ""
    if name == "workspace":
        results, goal = [t.new_zeros(t.shape) for t in results], [t.new_zeros(t.shape) for t in goal]
    loose = any(t.dtype in (torch.bfloat16, torch.float16) for t in _tensors(inputs))
    pairs = list(zip(results, goal, strict=True))
    if f"{name}_backward" in STATS:
        del pairs[2]
    elif name in STATS:
        # stats that no forward left, and what was handed in
        del pairs[0 if what.startswith(("stats: alike in dim 1", "stats: turned around", "kind")) else 1 :]
    elif name == "nearest_keys" and "alike" in what:
        # of scores that differ by their rounding either may win
        del pairs[1]
    same = [_same(one, other, loose) for one, other in pairs]
    return "" if all(same) else f"{what}: other values than the reference's in {same}"


def _kernel(provider, name):
    for one in providers(name.removesuffix("_backward")):
        if one.id == provider and not one.missing:
            return one.function(name)
    return None


def test_every_schema_has_a_case():
    names = {
        s.name.removeprefix("fastedit::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastedit::")
    }
    # ops of other tests
    names = {name for name in names if not name.startswith("served_")}
    assert names == {name for _, name, _ in _cases()}
    public = {name for name in names if not name.endswith("_backward")}
    assert public == set(implementations())


@pytest.mark.parametrize("provider", ["cpu:csrc", "cpu:csrc-avx2", "cpu:reference", "triton:interpreted", "meta"])
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case[0])
def test_wrong_arguments(provider, case):
    _, name, goal_inputs = case
    meta = provider == "meta"
    function = getattr(torch.ops.fastedit, name).default if meta else _kernel(provider, name)
    if function is None:
        pytest.skip(f"{name}: there is no {provider} here")
    forward = None if meta else _kernel(provider, name.removesuffix("_backward"))
    inputs = _with_own_stats(name, goal_inputs, forward)
    wrong = [_differences(name, function, "as it is", inputs, goal_inputs, meta)]
    changes = zip(_wrong_arguments(name, inputs), _wrong_arguments(name, goal_inputs), strict=True)
    for (what, changed), (_, goal_changed) in changes:
        # an interpreter is slow: of what is right it gets the other layouts
        right = provider.startswith("triton") and _outcome(_reference(name), _fresh(goal_changed))[0] is None
        if right and not any(word in what for word in ("turned", "alike in dim 0")):
            continue
        if not (meta and what.endswith(("elsewhere", "sparse"))):
            wrong.append(_differences(name, function, what, changed, goal_changed, meta))
    wrong = [one for one in wrong if one]
    assert not wrong, "\n".join(wrong)
