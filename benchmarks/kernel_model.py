"""Write docs/kernels.md: what an H200 cannot beat at the cases of benchmarks/kernels.py, and what is likely there.

    python benchmarks/kernel_model.py             write the page; compiles for sm_90, needs Triton and no GPU
    python benchmarks/kernel_model.py --check     say what in the page differs instead, with status 1

The floor is the larger of bytes over the datasheet's bandwidth and operations over the measured rate of products. What
is likely follows, launch by launch, from the machine code: how many programs share a multiprocessor, how full the last
round of them is, how many bytes are on their way at a time, which instruction multiplies. ``benchmarks/summary.py``
prints both beside what was measured.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Any

# kernels are compiled, so they must not be imported as functions of an interpreter
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    import _package  # noqa: F401

import torch
import typer

from benchmarks import compiled_form
from benchmarks.compiled_calls import empty
from benchmarks.kernel_cases.low_rank import TOKENS
from benchmarks.kernels import stems

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
#: H200. Bytes a second by the datasheet, and of copies as measured; operations a second of bfloat16 products, measured.
BANDWIDTH, COPIES, PRODUCTS = 4.8e12, 4.3e12, 790e12
#: Multiprocessors, and of each: registers, bytes of shared memory, warps, programs.
PROCESSORS, REGISTERS, SHARED, WARPS, PROGRAMS = 132, 65536, 227 * 1024, 64, 32
#: Assumed until measured: seconds until a load is there, seconds between two launches of a stream, and what share of
#: PRODUCTS code of an instruction reaches; without tensor cores half of 67 TFLOP/s.
LATENCY, LAUNCH, REACHED = 0.8e-6, 3e-6, {"wgmma": 0.7, "mma": 0.45, "": 33.5 / 790}
#: Loads of a thread taken to be on their way at once.
AHEAD = 4
#: Products of tf32 run at half the rate; three of them make one of float32.
SLOWER = {"bfloat16": 1, "float16": 1, "float32": 6}

Work = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Launch:
    """One launch: what it runs, and what its machine code takes."""

    kernel: str
    programs: int
    warps: int
    shared: int
    registers: int
    width: int
    loads: int
    product: str

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor."""
        # registers are given out by 8 a thread, shared memory with 1 KiB a program
        registers = max(8, ceil(self.registers / 8) * 8) * 32 * self.warps
        return min(PROGRAMS, WARPS // self.warps, REGISTERS // registers, SHARED // (self.shared + 1024))

    @property
    def fill(self) -> float:
        """Share of the multiprocessors' places that are taken, over all rounds."""
        places = PROCESSORS * self.resident
        return self.programs / (ceil(self.programs / places) * places)

    def seconds(self, bytes_moved: float, operations: float) -> float:
        """Return the time that is likely for so many bytes and operations (of bfloat16 products)."""
        on_their_way = max(self.shared, self.warps * 32 * self.width * min(self.loads, AHEAD))
        active = min(self.programs, PROCESSORS * self.resident)
        bandwidth = min(COPIES, active * on_their_way / LATENCY)
        # a program alone on a multiprocessor has its tensor cores to itself
        spread = self.programs / (ceil(self.programs / PROCESSORS) * PROCESSORS)
        rate = PRODUCTS * REACHED[self.product] * max(self.fill, spread)
        return LAUNCH + max(bytes_moved / bandwidth, operations / rate)


def _mmd2(groups: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.mmd2 import mmd2, mmd2_backward

    rows, each, size = 2 * n * groups, 2 * n, dtype.itemsize

    def run() -> None:
        x, y = (empty(groups * n, d, dtype=dtype) for _ in range(2))
        offsets, on = [empty(groups + 1, dtype=torch.int64) for _ in range(2)], [empty(groups) for _ in range(2)]
        mmd2(x, y, *offsets, empty(5), False)
        mmd2_backward(*on, x, y, *offsets, empty(5), False)

    plane, weights = rows * d * size, groups * each * each * size
    # pairs on and above the diagonal, then all of them
    gram, sums = groups * each * (each + min(each, 128)) * d, 2 * groups * each * each * d
    return run, {
        "_centre_kernel": (plane, 0), "_shift_kernel": (2 * plane, 0), "_sums_kernel": (plane, gram),
        "_weights_kernel": (plane + weights, gram), "_gradient_kernel": (2 * plane + weights, sums),
    }  # fmt: skip


def _risk(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.risk import risk, risk_backward

    def run() -> None:
        logits, segments = empty(tokens, vocabulary, dtype=dtype), empty(tokens, dtype=torch.int64)
        on = [empty(32) for _ in range(2)]
        for kind, target in (("ce", empty(tokens, dtype=torch.int64)), ("reverse_kl", logits)):
            stats = risk(logits, target, segments, 32, kind)[2]
            risk_backward(*on, logits, target, segments, stats, kind)

    # planes read and written on average of the two kinds
    plane = tokens * vocabulary * dtype.itemsize
    return run, {"_sums_kernel": (1.5 * plane, 0), "_gradient_kernel": (2.5 * plane, 0)}


def _topk_agreement(tokens: int, vocabulary: int, k: int, dtype: torch.dtype) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.topk_agreement import topk_agreement

    def run() -> None:
        topk_agreement(*(empty(tokens, vocabulary, dtype=dtype) for _ in range(2)), k)

    return run, {"_agreement_kernel": (2 * tokens * vocabulary * dtype.itemsize, 0)}


def _adam_step(edits: int, size: int) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.adam_step import adam_step_

    def run() -> None:
        planes = [empty(edits, size) for _ in range(4)]
        step, rate = empty(edits, dtype=torch.int64), empty(edits, dtype=torch.float64)
        adam_step_(*planes, step, rate, empty(edits, dtype=torch.bool), 0.9, 0.999, 1e-8, 0.01, 1.0, 5.0)

    return run, {"_prepare_kernel": (4 * edits * size, 0), "_update_kernel": (7 * 4 * edits * size, 0)}


def _low_rank(edits: int, d: int) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.low_rank import low_rank, low_rank_backward

    tokens, rank = edits * TOKENS, 8

    def run() -> None:
        x, grad = empty(tokens, d), empty(tokens, d)
        down, up, offsets = empty(edits, d, rank), empty(edits, rank, d), empty(edits + 1, dtype=torch.int64)
        low_rank(x, down, up, offsets)
        low_rank_backward(grad, x, down, up, offsets, [True, True, True])

    return run, _grouped(tokens, edits, d, rank)


def _key_value(edits: int, d: int, gated: bool) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.key_value import key_value, key_value_backward

    tokens, neurons = edits * TOKENS, 10

    def run() -> None:
        x, grad, offsets = empty(tokens, d), empty(tokens, d), empty(edits + 1, dtype=torch.int64)
        keys, bias, values = empty(edits, d, neurons), empty(edits, neurons), empty(edits, neurons, d)
        gates, activation = (keys if gated else None), "silu" if gated else "relu"
        entering = key_value(x, keys, bias, values, offsets, activation, gates, bias if gated else None)[1]
        needs = [True, True, True, True, gated, gated]
        key_value_backward(grad, x, keys, values, offsets, entering, activation, gates, needs)

    between = 4 * 4 * tokens * neurons
    return run, _grouped(tokens, edits, d, neurons) | {"_neuron_kernel": (between, 0), "_slope_kernel": (between, 0)}


def _grouped(tokens: int, edits: int, d: int, rank: int) -> Work:
    """Return what each of the three products moves and computes: tokens and factors as wide on both sides."""
    moved, operations = 4 * (tokens * d + edits * d * rank + tokens * rank), 2 * tokens * d * rank
    return dict.fromkeys(("_code_kernel", "_expand_kernel", "_weight_kernel"), (moved, operations))


def _nearest_keys(count: int, stored: int, d: int, k: int, **_: int) -> tuple[Callable[[], None], Work]:
    from fastedit.kernels.nearest_keys import nearest_keys, parts_of, rows_of, slots_of

    slots = slots_of(k)
    parts = parts_of(ceil(count / rows_of(count, slots, torch.float32)), stored, slots)
    work = {
        # programs that run at the same time read the same keys
        "_scan_kernel": (4 * (count + stored) * d, 2 * count * stored * d),
        # of every query's candidates the keys once more
        "_choose_kernel": (8 * count * parts * slots + 4 * count * slots * d, 0),
    }
    return lambda: nearest_keys(empty(count, d), empty(stored, d), k, "cosine"), work


#: Ops whose launches are modelled: arguments of a case -> what calls the launcher; what its kernels move and compute.
MODELLED: dict[str, Callable[..., tuple[Callable[[], None], Work]]] = {
    "adam_step": _adam_step, "key_value": _key_value, "low_rank": _low_rank, "mmd2": _mmd2,
    "nearest_keys": _nearest_keys, "risk": _risk, "topk_agreement": _topk_agreement,
}  # fmt: skip


def launches_of(run: Callable[[], None]) -> list[Launch]:
    """Return what a call on tensors without memory launches, compiled for sm_90."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    with compiled_form._compiling(90):
        compile_only = JITFunction.run

        def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
            kernel = compile_only(self, *arguments, grid=grid, warmup=warmup, **named)
            sizes = grid(named) if callable(grid) else grid
            launches.append(_launch(self.__name__, prod(sizes), kernel))
            return kernel

        JITFunction.run = record
        run()
    return launches


def _launch(name: str, programs: int, kernel: Any) -> Launch:
    ptx = kernel.asm["ptx"]
    widths = compiled_form._widths(ptx, "ld")
    width = max((int(each) for each in widths), default=4)
    products = compiled_form._products(ptx)
    return Launch(
        name, programs, kernel.metadata.num_warps, kernel.metadata.shared,
        compiled_form._resources(kernel.asm["cubin"])["REG"], width, widths.get(str(width), 1),
        next((one for one in ("wgmma", "mma") if one in products), ""),
    )  # fmt: skip


def floor_of(case: dict[str, Any]) -> float:
    """Return the seconds that no code beats: memory at the datasheet's rate, products at the measured one."""
    return max(case.get("bytes", 0) / BANDWIDTH, case.get("flops", 0) * _slower(case) / PRODUCTS)


def _slower(case: dict[str, Any]) -> float:
    """Return how many bfloat16 products take as long as one of the case: what it says itself, else by its dtype."""
    return float(case.get("slower", SLOWER[case["dtype"]]))


def cases() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Make (op, what makes the case, the case) of a GPU's cases, their inputs not drawn."""
    for stem in stems():
        for made in importlib.import_module(f"benchmarks.kernel_cases.{stem}").CUDA_CASES:
            yield stem, made, made("cuda")


def floors() -> list[str]:
    """Return the cells of every case that follow from its sizes alone."""
    return [
        f"| {case['name']} | {case['dtype']} | {case.get('bytes', 0) / 1e9:.3g} | {case.get('flops', 0) / 1e12:.3g} "
        f"| {floor_of(case) * 1e3:.3g} |"
        for _, _, case in cases()
    ]


def page() -> str:
    """Return the page; one line a case, one a kernel."""
    table, forms = [], []
    for (stem, made, case), cells in zip(cases(), floors(), strict=True):
        if stem not in MODELLED:
            table.append(f"{cells} - | - |")
            continue
        run, work = MODELLED[stem](**made.sizes, **made.fixed)
        slower, total = _slower(case), 0.0
        launches = launches_of(run)
        for launch in launches:
            moved, operations = work.get(launch.kernel, (0.0, 0.0))
            # without tensor cores a product of float32 is one operation
            seconds = launch.seconds(moved, operations * (slower if launch.product else 1))
            total += seconds
            forms.append(
                f"| {case['name']} | {launch.kernel} | {launch.programs} | {launch.warps} | {launch.shared} "
                f"| {launch.registers} | {launch.width} | {launch.product or '-'} | {launch.resident} "
                f"| {launch.fill:.2f} | {seconds * 1e3:.3g} |"
            )
        table.append(f"{cells} {len(launches)} | {total * 1e3:.3g} |")
    return HEAD.replace("VERSION", _triton()) + "\n".join(table) + "\n" + FORMS + "\n".join(forms) + "\n"


def _triton() -> str:
    """Return the version whose compiler decides about registers, without its patch."""
    return ".".join(version("triton").split(".")[:2])


def predictions(path: Path = PAGE) -> dict[str, tuple[float, float | None]]:
    """Return by case the seconds that it cannot beat and those that are likely, None where nothing is said."""
    if not path.is_file():
        return {}
    number = r"([\d.e+-]+)"
    pattern = rf"^\| (\w+) \| \w+ \| {number} \| {number} \| {number} \| [\d-]+ \| ({number}|-) \|$"
    lines = re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        name: (float(floor) / 1e3, None if likely == "-" else float(likely) / 1e3)
        for name, _, _, floor, likely, _ in lines
    }


HEAD = """# What the GPU kernels cannot beat, and what is likely

Written by `python benchmarks/kernel_model.py` with Triton VERSION, for an H200 and the cases of
`benchmarks/kernels.py --device cuda`, a forward and a backward each. Nothing here was measured with these kernels;
`benchmarks/gpu.sh table` prints it beside what was.

The floor is the larger of the bytes that must move at 4.8 TB/s (the datasheet's) and the products at 790 TFLOP/s
(bfloat16, measured; products of tf32 run at half of it, and three of them make one of float32; `nearest_keys` takes
three of bfloat16 for candidates). What is likely is the
sum over the launches, each 3 us and the larger of two times: its bytes at no more than 4.3 TB/s (measured copies), less
where programs that fit the multiprocessors at once have too few bytes on their way in 0.8 us; its products, with what
is computed twice, at 0.7 of 790 TFLOP/s by wgmma and 0.45 by mma, times how full the rounds of programs are. These
shares are assumptions.

| case | dtype | GB | TFLOP | floor, ms | launches | likely, ms |
|---|---|---|---|---|---|---|
"""
FORMS = """
Launches compiled for sm_90: programs, warps and bytes of shared memory of each, registers of a thread, bytes of its
widest load, the instruction that multiplies, programs that share a multiprocessor, and how full their rounds are.

| case | kernel | programs | warps | shared | registers | load | product | resident | fill | likely, ms |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(check: Annotated[bool, typer.Option(help="compare with the page instead of writing it")] = False) -> None:
    """Write the page, or say what in it differs."""
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return
    stored: Sequence[str] = PAGE.read_text(encoding="utf-8").splitlines()
    for line in set(text.splitlines()) ^ set(stored):
        print(line, file=sys.stderr)
    raise typer.Exit(1 if text.splitlines() != stored else 0)


if __name__ == "__main__":
    typer.run(main)
