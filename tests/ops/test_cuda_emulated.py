"""The CUDA kernels of risk and adam_step_ without a GPU: their threads run one after another, compiled for the CPU."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastedit.ops.risk import KINDS
from fastedit.reference import adam_step as adam_reference
from fastedit.reference import risk as reference
from fastedit.testing import adam_step_inputs, assert_close, risk_inputs

SOURCE = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
if not (SOURCE / "cuda" / "emulate.cpp").is_file():
    pytest.skip("csrc is not beside the tests", allow_module_level=True)
if COMPILER is None or not sys.platform.startswith("linux"):
    pytest.skip("no C++ compiler, or not on Linux, whose threads the emulation uses", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# tokens, vocabulary, segments; a block of the emulation takes up to 2048 logits at once
SHAPES = ((7, 33, 3), (1, 1, 1), (0, 5, 2), (3, 16, 1), (2, 1, 2), (5, 5003, 4))
LAYOUTS = ("plain", "strided", "transposed", "shifted", "apart")


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("column", ctypes.c_int64))


def matrix(x: Tensor | None) -> Matrix:
    return Matrix(0, 0, 0) if x is None else Matrix(x.data_ptr(), x.stride(0), x.stride(1))


def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Fenced:
    """A tensor between two strips that nobody may write to."""

    STRIP = 64

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = math.prod(shape)
        self._all = torch.full((size + 2 * self.STRIP,), float("nan"), dtype=dtype)
        self._all[: self.STRIP] = self._all[self.STRIP + size :] = 7.0
        self.tensor = self._all[self.STRIP : self.STRIP + size].view(shape)

    def checked(self) -> Tensor:
        size = self.tensor.numel()
        assert (self._all[: self.STRIP] == 7.0).all(), "written in front of a result"
        assert (self._all[self.STRIP + size :] == 7.0).all(), "written behind a result"
        return self.tensor


class Emulated:
    """The functions of csrc/cuda/emulate.cpp with the arguments of the ops."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.threads = self.library.emulate_threads()

    def risk(self, logits, target, segments, n_segments, kind, parts=1):
        dtype = wide(logits.dtype)
        outputs = [Fenced((n_segments,), dtype), Fenced((n_segments,), dtype), Fenced((logits.shape[0], 5), dtype)]
        self._call("emulate_risk", logits, target, segments, n_segments, kind, parts, *(o.tensor for o in outputs))
        return tuple(output.checked() for output in outputs)

    def risk_backward(self, grad_value, grad_env, logits, target, segments, stats, kind, parts=1, shift=0):
        # where the gradient starts in a vector
        out = Fenced((logits.numel() + shift,), logits.dtype)
        out.tensor[:shift] = 7.0
        grad = out.tensor[shift:].view(logits.shape)
        arguments = grad_value.contiguous(), grad_env.contiguous(), stats, grad
        self._call("emulate_risk_backward", logits, target, segments, len(grad_value), kind, parts, *arguments)
        assert (out.checked()[:shift] == 7.0).all()
        return grad

    def _call(self, name, logits, target, segments, n_segments, kind, parts, *tensors):
        r, labels = (None, target) if kind == "ce" else (target, segments)
        code = getattr(self.library, name)(
            KINDS.index(kind), DTYPES.index(logits.dtype), ctypes.byref(matrix(logits)), ctypes.byref(matrix(r)),
            pointer(labels), pointer(segments), numbers(*logits.shape, n_segments, parts), *map(pointer, tensors),
        )  # fmt: skip
        assert code == 0, "some threads of a block wait at a barrier that others do not reach"

    def adam_step_(self, params, grads, first, second, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius):
        norm = Fenced((params.shape[0],), first.dtype)
        matrices = (Matrix * 4)(*(matrix(x) for x in (params, grads, first, second)))
        none = float("inf")
        settings = (beta1, beta2, eps, weight_decay, none if clip is None else clip, none if radius is None else radius)
        sizes = numbers(*params.shape, *(x.stride(0) for x in (step, lr, active)))
        code = self.library.emulate_adam_step(
            DTYPES.index(params.dtype), int(grads.dtype != params.dtype), matrices, sizes,
            pointer(step), pointer(lr), pointer(active), (ctypes.c_double * 6)(*settings), pointer(norm.tensor),
        )  # fmt: skip
        assert code == 0, "some threads of a block wait at a barrier that others do not reach"
        return norm.checked()

    def both_ways(self, function):
        """Call it with threads and blocks in order and the other way around, which must not change a bit."""
        results = []
        for backwards in (0, 1):
            self.library.emulate_backwards(backwards)
            results.append(function())
        self.library.emulate_backwards(0)
        for there, back in zip(*results, strict=True):
            assert torch.equal(there.nan_to_num(nan=123.0), back.nan_to_num(nan=123.0)), "threads race"
        return results[0]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    out = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-DFASTEDIT_EMULATE", f"-I{SOURCE}"]
    command = [str(COMPILER), *flags, str(SOURCE / "cuda" / "emulate.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Emulated(out)


def laid_out(x: Tensor, layout: str, second: bool = False) -> Tensor:
    """The same numbers elsewhere: rows and columns with strides, row starts anywhere in a vector."""
    if x.dim() == 1 or layout == "plain":
        return x
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    # one element late; or the two rows of a token not alike
    late = 1 if layout == "shifted" or second else 0
    room = torch.full((x.numel() + 8,), float("nan"), dtype=x.dtype)
    room[late : late + x.numel()] = x.flatten()
    return room[late : late + x.numel()].view(x.shape)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_risk_equals_reference(emulated, kind, dtype, layout, parts):
    for seed, shape in enumerate(SHAPES):
        logits, target, own, n, _ = risk_inputs(*shape, kind, dtype, seed=seed)
        z, t = laid_out(logits, layout), laid_out(target, layout, second=True)
        value, env, stats = emulated.both_ways(lambda: emulated.risk(z, t, own, n, kind, parts))  # noqa: B023
        precise = target if kind == "ce" else target.double()
        goal_value, goal_env, goal_stats = reference.risk(logits.double(), precise, own, n, kind)
        size = float(logits.double().abs().max()) if logits.numel() else 0.0
        assert_close(value, goal_value, length=shape[1], scale=size, name="value")
        assert_close(env, goal_env, length=shape[1], scale=size**2, name="env_grad")
        # max, sum and mean, whatever the kind
        assert_close(stats[:, :3], goal_stats[:, :3], length=shape[1], scale=size, name="stats")
        assert (stats[own < 0] == 0).all()

        on_value, on_env = torch.linspace(-1, 2, n, dtype=value.dtype), torch.linspace(1, -0.5, n, dtype=value.dtype)
        shift = int(layout == "shifted")
        (grad,) = emulated.both_ways(
            lambda: (emulated.risk_backward(on_value, on_env, z, t, own, stats, kind, parts, shift),)  # noqa: B023
        )
        goal = reference.risk_backward(
            on_value.double(), on_env.double(), logits.double(), precise, own, goal_stats, kind
        )
        assert_close(grad, goal, length=shape[1], name="gradient")
        assert (grad[own < 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5003, 2, 40), (700, 3, 2, 1)], ids=str)
def test_more_than_is_done_at_once(emulated, kind, shape):
    """More parts than a warp merges in one go, more tokens than a block counts in one."""
    *sizes, parts = shape
    logits, target, own, n, _ = risk_inputs(*sizes, kind, torch.float32, seed=3)
    value, env, stats = emulated.both_ways(lambda: emulated.risk(logits, target, own, n, kind, parts))
    precise = target if kind == "ce" else target.double()
    goal_value, goal_env, goal_stats = reference.risk(logits.double(), precise, own, n, kind)
    assert_close(value, goal_value, length=sizes[1], scale=8.0, name="value")
    assert_close(env, goal_env, length=sizes[1], scale=64.0, name="env_grad")
    ones = torch.ones(n)
    grad = emulated.risk_backward(ones, ones, logits, target, own, stats, kind, parts)
    goal = reference.risk_backward(ones.double(), ones.double(), logits.double(), precise, own, goal_stats, kind)
    assert_close(grad, goal, length=sizes[1], name="gradient")


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("drift", [3e-1, 3e-2, 3e-3])
def test_small_drift_keeps_its_digits(emulated, kind, drift):
    logits, target, own, n, _ = risk_inputs(8, 50_272, 3, kind, torch.float32, drift=drift)
    value, env, _ = emulated.risk(logits, target + 25.0, own, n, kind, 2)
    goal, goal_env, _ = reference.risk(logits.double(), (target + 25.0).double(), own, n, kind)
    assert (value - goal).abs().max() < 3e-7 * drift
    assert (env - goal_env).abs().max() < 5e-7


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("spread", "drift"), [(20.0, 60.0), (3.0, 9.0)])
def test_far_reference(emulated, kind, spread, drift):
    logits, target, own, n, _ = risk_inputs(6, 2500, 2, kind, torch.float32, spread=spread, drift=drift)
    value, env, stats = emulated.risk(logits, target, own, n, kind, 2)
    goal_value, goal_env, goal_stats = reference.risk(logits.double(), target.double(), own, n, kind)
    assert_close(value, goal_value, length=2500, name="value")
    assert_close(env, goal_env, length=2500, scale=float(logits.abs().max()) ** 2, name="env_grad")
    ones = torch.ones(n)
    grad = emulated.risk_backward(ones, ones, logits, target, own, stats, kind)
    precise = (ones.double(), ones.double(), logits.double(), target.double(), own, goal_stats, kind)
    assert_close(grad, reference.risk_backward(*precise), length=2500, name="gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(emulated, kind, dtype):
    """Huge and -inf logits, rows of nothing else, a far reference, and garbage in ignored rows."""
    inf, nan = float("inf"), float("nan")
    rows = [[90, -90, 0, -inf], [1e4, -1e4, 5, 0], [0.5, 1, -inf, -inf], [-inf] * 4, [3, -inf, 2, 1], [nan] * 4]
    logits = torch.tensor(rows, dtype=dtype)
    rows = [[-90, 90, 0, -inf], [-1e4, 1e4, 5, 0], [1, 0.5, -inf, -inf], [-inf] * 4, [3, -inf, 2, 1], [inf] * 4]
    far = torch.tensor(rows, dtype=dtype)
    target = torch.tensor([0, 1, 1, 2, 0, 999]) if kind == "ce" else far
    own = torch.tensor([0, 1, 2, 3, 4, -7])
    value, env, stats = emulated.risk(logits, target, own, 5, kind)
    goal = reference.risk(logits.double(), target if kind == "ce" else far.double(), own, 5, kind)
    # of a row of nothing but -inf only that it is finite: the references' floors differ
    fine = [0, 1, 2, 4]
    assert torch.allclose(value[fine].double(), goal[0][fine], rtol=1e-5, atol=1e-6)
    assert torch.allclose(env[fine].double(), goal[1][fine], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(value).all()
    assert value[3] == (pytest.approx(math.log(4), rel=1e-6) if kind == "ce" else 0)
    ones = torch.ones(5, dtype=wide(dtype))
    grad = emulated.risk_backward(ones, ones, logits, target, own, stats, kind)
    assert torch.isfinite(grad[[0, 1, 2, 4, 5]]).all()
    assert (grad[5] == 0).all()
    assert grad[0, 3] == 0
    assert (grad[2, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_nothing_but_minus_infinity(emulated, kind, dtype):
    """All logits are equal then, whether a vector or a single load brought them."""
    logits = torch.full((2, 3001), -float("inf"), dtype=dtype)
    target = torch.tensor([7, 3000]) if kind == "ce" else logits
    value, env, stats = emulated.risk(logits, target, torch.arange(2), 2, kind, 3)
    assert value.tolist() == pytest.approx([math.log(3001) if kind == "ce" else 0.0] * 2, rel=1e-6)
    assert env.tolist() == [0.0, 0.0]
    assert stats[:, 1].tolist() == [3001.0, 3001.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_impossible_labels(emulated, dtype, parts):
    """A label at -inf has an infinite risk and a gradient like any other, as in cross_entropy."""
    logits = torch.linspace(-2, 3, 3001).repeat(3, 1).to(dtype)
    logits[0, 3000], logits[1, 2], logits[2, 5] = -float("inf"), -1e20, float("nan")
    labels, own = torch.tensor([3000, 2, 1]), torch.arange(3)
    value, env, stats = emulated.risk(logits, labels, own, 3, "ce", parts)
    leaf = logits.double().requires_grad_()
    goal = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    assert torch.allclose(value.double(), goal, rtol=1e-3, equal_nan=True)
    assert env.isinf().tolist() == [True, False, False]
    assert env[2].isnan()
    ones = torch.ones(3, dtype=value.dtype)
    grad = emulated.risk_backward(ones, torch.zeros_like(ones), logits, labels, own, stats, "ce", parts)
    (wanted,) = torch.autograd.grad(goal[:2].sum(), leaf)
    assert torch.allclose(grad[:2].double(), wanted[:2], atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_nan_stays_in_its_segment(emulated, kind, dtype, parts):
    logits, target, _, _, _ = risk_inputs(4, 700, 1, kind, dtype)
    target = target.clamp(min=0) if kind == "ce" else target
    own = torch.tensor([0, 1, -1, 2])
    clean = emulated.risk(logits, target, own, 3, kind, parts)
    for column in (0, 333, 699):
        spoilt = logits.clone()
        spoilt[1, column] = spoilt[2, column] = float("nan")
        value, env, stats = emulated.risk(spoilt, target, own, 3, kind, parts)
        for got, expected in ((value, clean[0]), (env, clean[1])):
            assert got[1].isnan()
            assert torch.equal(got[[0, 2]], expected[[0, 2]])
        ones = torch.ones(3, dtype=value.dtype)
        grad = emulated.risk_backward(ones, ones, spoilt, target, own, stats, kind, parts)
        assert grad[1].isnan().all()
        assert torch.isfinite(grad[[0, 2, 3]]).all()


def test_trusted_indices_touch_no_other_memory(emulated):
    """Nobody waits for the device to look at labels and segments: those out of range show, or are ignored."""
    logits, _, _, _, _ = risk_inputs(4, 40, 1, "ce", torch.float32)
    labels = torch.tensor([3, 40, -1, 2])
    value, env, stats = emulated.risk(logits, labels, torch.tensor([0, 1, 2, 0]), 3, "ce")
    assert value[1:].isnan().all()
    assert env[1:].isnan().all()
    assert torch.isfinite(value[0])
    grad = emulated.risk_backward(torch.ones(3), torch.ones(3), logits, labels, torch.tensor([0, 1, 2, 0]), stats, "ce")
    assert torch.isfinite(grad).all()
    outside = torch.tensor([0, 3, 2**40, -5])
    value, env, stats = emulated.risk(logits, torch.full((4,), 3), outside, 3, "ce")
    alone = emulated.risk(logits[:1], torch.tensor([3]), torch.tensor([0]), 3, "ce")
    assert torch.equal(value, alone[0])
    assert (stats[1:] == 0).all()
    grad = emulated.risk_backward(torch.ones(3), torch.ones(3), logits, labels, outside, stats, "ce")
    assert (grad[1:] == 0).all()


def test_parts_of_a_row(emulated):
    def parts(tokens, vocabulary, fewest=4096):
        sizes = ctypes.c_int64(tokens), ctypes.c_int64(vocabulary), 132, ctypes.c_int64(fewest)
        return emulated.library.emulate_risk_parts(*sizes)

    assert parts(4096, 151_936) == 1
    assert parts(1, 151_936) == 37
    assert parts(64, 151_936) == 37
    assert parts(500, 151_936) == 8
    assert parts(10**7, 151_936) == 1
    assert parts(0, 151_936) == parts(3, 5) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_grads", [False, True])
@pytest.mark.parametrize(("clip", "radius"), [(None, None), (0.5, None), (1e9, 0.3), (None, 0.2)])
def test_adam_equals_reference(emulated, dtype, wide_grads, clip, radius):
    settings = (0.9, 0.99, 1e-8, 0.1, clip, radius)
    # a piece is 64 elements for every thread
    for rows, size in ((5, 33), (1, 1), (0, 4), (3, 0), (4, 9001), (3, 64)):
        given = adam_step_inputs(rows, size, dtype, seed=size)
        if wide_grads:
            given = given[0], given[1].to(wide(dtype)), *given[2:]
        goal = [x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True) for x in given]
        goal_norm = adam_reference.adam_step_(*goal, *settings)
        copies = []

        def step(given=given, copies=copies):
            copies[:] = [x.clone() for x in given]
            return *copies[:5], emulated.adam_step_(*copies, *settings)

        *got, norm = emulated.both_ways(step)
        for name, x, expected in zip(("params", "grads", "exp_avg", "exp_avg_sq"), got, goal, strict=False):
            assert_close(x, expected, length=1, scale=1.0, name=f"{name} of {rows} x {size}")
        assert_close(norm, goal_norm, length=size, name="norm")
        idle = ~given[6]
        for x, before in zip(got, given, strict=False):
            assert torch.equal(x[idle], before[idle])
        assert torch.equal(got[4], goal[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("late", [(1, 1, 1, 1), (0, 1, 2, 3)])
def test_adam_with_rows_that_start_anywhere(emulated, dtype, late):
    given = adam_step_inputs(4, 5003, dtype)
    room = []
    for x, shift in zip(given[:4], late, strict=True):
        room.append(torch.full((4, 5003 + 4), 7.0, dtype=x.dtype))
        room[-1][:, shift : shift + 5003] = x
    inside = [x[:, shift : shift + 5003] for x, shift in zip(room, late, strict=True)]
    goal = [x.clone() for x in given]
    goal_norm = adam_reference.adam_step_(*goal, 0.9, 0.99, 1e-8, 0.0, 0.5, None)
    norm = emulated.adam_step_(*inside, *(x.clone() for x in given[4:]), 0.9, 0.99, 1e-8, 0.0, 0.5, None)
    for x, expected in zip(inside, goal, strict=False):
        assert_close(x, expected.double(), length=4)
    assert_close(norm, goal_norm.double(), length=5003)
    for x, shift in zip(room, late, strict=True):
        assert (x[:, :shift] == 7.0).all()
        assert (x[:, shift + 5003 :] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_adam_of_a_batch_equals_its_rows(emulated, dtype, clip):
    """To the bit, wherever a row lies: rows of odd length start anywhere in a vector, copies of them at its start."""
    given = adam_step_inputs(4, 9003, dtype)
    batch = [x.clone() for x in given]
    norm = emulated.adam_step_(*batch, 0.9, 0.99, 1e-8, 0.1, clip, None)
    for row in range(4):
        one = [x[row : row + 1].clone() for x in given]
        assert torch.equal(emulated.adam_step_(*one, 0.9, 0.99, 1e-8, 0.1, clip, None), norm[row : row + 1])
        for single, whole in zip(one, batch, strict=True):
            assert torch.equal(single[0], whole[row])


def test_adam_with_strides_between_rows(emulated):
    given = adam_step_inputs(5, 50, torch.float32)
    goal = [x.clone() for x in given]
    goal_norm = emulated.adam_step_(*goal, 0.9, 0.99, 1e-8, 0.0, 1.0, None)
    step, lr, active = (
        torch.stack([x, x + 1], 1) if x.dtype != torch.bool else torch.stack([x, ~x], 1) for x in given[4:]
    )
    got = [x.clone() for x in given[:4]]
    norm = emulated.adam_step_(*got, step[:, 0], lr[:, 0], active[:, 0], 0.9, 0.99, 1e-8, 0.0, 1.0, None)
    for one, other in zip((norm, *got, step[:, 0], step[:, 1]), (goal_norm, *goal[:5], given[4] + 1), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), 1e30])
def test_adam_leaves_rows_without_a_finite_norm(emulated, clip, spoiled):
    given = adam_step_inputs(2, 9001, torch.float32)
    given[6][:] = True
    given[1][1, 8000] = spoiled
    copies = [x.clone() for x in given]
    norm = emulated.adam_step_(*copies, 0.9, 0.99, 1e-8, 0.0, clip, 0.3)
    assert norm.isfinite().tolist() == [True, False]
    for one, before in zip((copies[0], *copies[2:5]), (given[0], *given[2:5]), strict=True):
        assert torch.equal(one[1], before[1])
        assert not torch.equal(one[0], before[0])
