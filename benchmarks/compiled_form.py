"""What the machine code of every Triton kernel shows, compiled for GPUs that need not be here.

    python benchmarks/compiled_form.py                     a table of all ops
    python benchmarks/compiled_form.py low_rank mmd2       of two of them
    python benchmarks/compiled_form.py --json              rows as JSON, one a line

An op's own launcher is called with the arguments that the engine passes, on tensors without memory; instead of being
launched, every kernel is compiled with the constants, warps, stages and divisibility of that launch. One that tunes
itself is compiled in its first setting, or where a call says so in every one. Needs Triton, whose own ptxas and
cuobjdump are used, and no GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

# Kernels are compiled, so they must not be imported as functions of an interpreter
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    import _package  # noqa: F401

import typer

from benchmarks.compiled_calls import Call, Form

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call, compiled for one target.

    ``shared`` is in bytes, ``stack`` in bytes of a thread; ``loads`` and ``stores`` count the accesses to global memory
    by their width in bytes; ``products`` the instructions that multiply matrices, ``mma`` and ``wgmma``.
    """

    op: str
    kernel: str
    call: str
    dtypes: str
    target: int
    settings: str
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    loads: dict[str, int]
    stores: dict[str, int]
    products: dict[str, int]

    def faults(self, forms: dict[str, Any]) -> list[str]:
        """Return in sentences what is not as the op's forms say."""
        given = forms.get(self.kernel, ())
        where = f"{self.op} {self.kernel} {self.call} {self.dtypes} sm_{self.target} {self.settings}".strip()
        return [
            f"{where}: {fault}"
            for form in (given if isinstance(given, tuple) else (given,))
            if form.only in f"{self.call} {self.dtypes}"
            for fault in self._faults(form)
        ]

    def _faults(self, form: Form) -> Iterator[str]:
        for name in ("shared", "stack", "registers"):
            bound, value = getattr(form, name), getattr(self, name)
            if bound is not None and value > bound:
                yield f"{name} is at most {bound} (got {value})"
        for name in ("load", "store"):
            bound, widths = getattr(form, name), getattr(self, f"{name}s")
            widest = max((int(width) for width in widths), default=0)
            if widest < bound:
                yield f"{name}s reach {bound} bytes (got {widest})"
        product = form.products.get(self.target)
        if product is not None and not self.products.get(product):
            yield f"{product} is among the instructions (got {self.products})"


def stems() -> list[str]:
    """Return the ops whose kernels are compiled."""
    return sorted(path.stem for path in (ROOT / "benchmarks" / "compiled_calls").glob("[a-z]*.py"))


def calls_of(stem: str) -> list[Call]:
    """Return an op's calls, on tensors without memory."""
    calls: list[Call] = importlib.import_module(f"benchmarks.compiled_calls.{stem}").calls()
    return calls


def forms_of(stem: str) -> dict[str, Any]:
    """Return what an op's kernels must show: kernel -> Form, or a tuple of them."""
    forms: dict[str, Any] = importlib.import_module(f"benchmarks.compiled_calls.{stem}").FORMS
    return forms


@contextmanager
def _compiling(target: int, every: bool = False) -> Iterator[list[tuple[Any, Any]]]:
    """Compile what is launched meanwhile, for a GPU of that capability; gives a list of (kernel, compiled kernel)."""
    from triton import Config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import Autotuner, driver
    from triton.runtime.jit import JITFunction, KernelInterface

    class Absent:
        """A driver of a GPU that is not here."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> int:
            # Triton keeps what it compiled by device
            return target

        def get_current_stream(self, device: int) -> int:
            return 0

    done: list[tuple[Any, Any]] = []
    run, launch, prune = JITFunction.run, KernelInterface.__getitem__, Autotuner.prune_configs

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        done.append((self, kernel))
        return kernel

    def warm_up(self: Any, grid: Any) -> Any:
        return lambda *arguments, **named: self.warmup(*arguments, grid=grid, **named)

    def pruned(self: Any, named: dict[str, Any]) -> list[Config]:
        configs: list[Config] = prune(self, named)
        return configs if every else configs[:1]

    before = driver._active
    driver.set_active(Absent())
    JITFunction.run, KernelInterface.__getitem__, Autotuner.prune_configs = compile_only, warm_up, pruned
    try:
        yield done
    finally:
        JITFunction.run, KernelInterface.__getitem__, Autotuner.prune_configs = run, launch, prune
        driver._active = before


def compile_op(stem: str, targets: Sequence[int] = (80, 90)) -> Iterator[Compiled]:
    """Compile every kernel that an op's calls launch, each form once for its dtypes."""
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("compiled_form: kernels are compiled where TRITON_INTERPRET is 0 (got TRITON_INTERPRET=1)")
    seen = set()
    for target in targets:
        for call in calls_of(stem):
            if target not in call.targets:
                continue
            with _compiling(target, call.every) as done:
                call.run()
            for function, kernel in done:
                # kernels that see no features are the same for all dtypes
                if (kernel.hash, call.dtypes) not in seen:
                    seen.add((kernel.hash, call.dtypes))
                    yield _read(stem, call, target, function, kernel)


def _read(stem: str, call: Call, target: int, function: Any, kernel: Any) -> Compiled:
    ptx, resources = kernel.asm["ptx"], _resources(kernel.asm["cubin"])
    metadata = kernel.metadata
    constants = {
        str(name): value
        for name, value in ((function.arg_names[path[0]], value) for path, value in kernel.src.constants.items())
        if isinstance(value, int) and str(name).isupper()
    }
    return Compiled(
        op=stem, kernel=function.__name__, call=call.name, dtypes=call.dtypes, target=target,
        settings=" ".join(f"{name}={int(value)}" for name, value in constants.items()),
        warps=metadata.num_warps, stages=metadata.num_stages, shared=metadata.shared,
        registers=resources["REG"], stack=resources["STACK"],
        loads=_widths(ptx, "ld"), stores=_widths(ptx, "st"), products=_products(ptx),
    )  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump tells of the only kernel: REG, STACK and others."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in told.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def _widths(ptx: str, kind: str) -> dict[str, int]:
    """Return how often global memory is accessed by width in bytes: loads with asynchronous copies, or stores."""
    pattern = rf"\b{kind}\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v(\d))?\.[busf](\d+)\b"
    widths = [int(many or 1) * int(bits) // 8 for many, bits in re.findall(pattern, ptx)]
    if kind == "ld":
        widths += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?(0x[0-9a-f]+)", ptx)]
    return {str(width): count for width, count in sorted(Counter(widths).items())}


def _products(ptx: str) -> dict[str, int]:
    counts = {"mma": ptx.count("mma.sync."), "wgmma": ptx.count("wgmma.mma_async.")}
    return {name: count for name, count in counts.items() if count}


def table(rows: Sequence[Compiled]) -> str:
    """Return the rows as a table in Markdown."""
    heads = (
        "op",
        "kernel",
        "call",
        "dtypes",
        "sm",
        "warps",
        "stages",
        "shared",
        "registers",
        "stack",
        "loads",
        "stores",
    )
    lines = [f"| {' | '.join((*heads, 'products', 'settings'))} |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        counts = (
            ", ".join(f"{count}x{name}" for name, count in each.items()) or "-"
            for each in (row.loads, row.stores, row.products)
        )
        cells = (row.op, row.kernel, row.call, row.dtypes, row.target, row.warps, row.stages, row.shared,
                 row.registers, row.stack, *counts, row.settings)  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(
    chosen: Annotated[list[str] | None, typer.Argument(help="ops; all if none is named")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="rows as JSON, one a line")] = False,
) -> None:
    """Compile the kernels and print what they show; what is not as it must be goes to standard error, with status 1."""
    rows, faults = [], []
    for stem in chosen or stems():
        of_op = list(compile_op(stem))
        rows += of_op
        faults += [fault for row in of_op for fault in row.faults(forms_of(stem))]
    print("\n".join(json.dumps(asdict(row)) for row in rows) if as_json else table(rows))
    for fault in faults:
        print(fault, file=sys.stderr)
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
