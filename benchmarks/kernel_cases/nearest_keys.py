"""nearest_keys: against all scores at once, and faiss's flat index where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from fastedit import ops
from fastedit.testing import nearest_keys_inputs


def make_case(name: str, count: int, stored: int, d: int, k: int) -> dict[str, Any]:
    """Return the case of ``count`` queries, the largest inner products first."""

    @cache
    def inputs() -> tuple[Tensor, Tensor]:
        return nearest_keys_inputs(count, stored, d, torch.float32)

    @cache
    def index() -> Any:
        import faiss

        made = faiss.IndexFlatIP(d)
        made.add(inputs()[1].numpy())
        return made

    def run() -> tuple[Tensor, ...]:
        return ops.nearest_keys(*inputs(), k, "dot")

    def product_and_topk() -> tuple[Tensor, ...]:
        queries, keys = inputs()
        values, indices = (queries @ keys.T).topk(k, dim=1)
        return values, indices

    def faiss_flat() -> tuple[Tensor, ...]:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        values, indices = index().search(inputs()[0].numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    baselines: dict[str, Callable[[], tuple[Tensor, ...]]] = {"product_and_topk": product_and_topk}
    if importlib.util.find_spec("faiss") is not None:
        baselines["faiss_flat"] = faiss_flat
    return {
        "name": name,
        "shapes": {"queries": count, "keys": stored, "d": d, "k": k},
        "dtype": "float32",
        "run": run,
        "baselines": baselines,
        # values only: keys whose products differ by rounding may change places
        "check": lambda: assert_equal(run()[:1], product_and_topk()[:1]),
    }


CASES = [
    make_case("nearest_keys", 1024, 100_000, 256, 8),
    make_case("nearest_keys_one_query", 1, 100_000, 256, 8),
]
