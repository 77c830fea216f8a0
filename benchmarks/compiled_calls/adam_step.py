"""adam_step_ as the solver passes it: a row of parameters an edit, moments in float32."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

ROWS, SIZE = 16, 2**20


def _step(params: torch.dtype) -> None:
    from fastedit.kernels.adam_step import adam_step_

    features = [empty(ROWS, SIZE, dtype=params) for _ in range(2)]
    moments = [empty(ROWS, SIZE) for _ in range(2)]
    step, lr = empty(ROWS, dtype=torch.int64), empty(ROWS, dtype=torch.float64)
    active = empty(ROWS, dtype=torch.bool)
    adam_step_(*features, *moments, step, lr, active, 0.9, 0.999, 1e-8, 0.0, 1.0, None)


def calls() -> list[Call]:
    """Return a call for every dtype of parameters."""
    cases = ((torch.bfloat16, (80, 90)), (torch.float32, (90,)))
    return [Call("B=16", label(dtype, torch.float32), partial(_step, dtype), targets) for dtype, targets in cases]


FORMS = {"_prepare_kernel": Form(load=16), "_update_kernel": Form(load=16, store=16, registers=80)}
