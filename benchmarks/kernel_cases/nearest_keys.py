"""nearest_keys: against all scores at once, and faiss's flat index where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.testing import nearest_keys_inputs


def make_case(
    name: str, count: int, stored: int, d: int, k: int, chunk: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Return the case of ``count`` queries, the largest inner products first; ``chunk`` queries at once, 0 is all."""

    @cache
    def inputs() -> tuple[Tensor, Tensor]:
        return nearest_keys_inputs(count, stored, d, torch.float32, device=device)

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
        if not chunk:
            values, indices = (queries @ keys.T).topk(k, dim=1)
            return values, indices
        found = [(part @ keys.T).topk(k, dim=1) for part in queries.split(chunk)]
        return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])

    def faiss_flat() -> tuple[Tensor, ...]:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        values, indices = index().search(inputs()[0].numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    baselines: dict[str, Callable[[], tuple[Tensor, ...]]] = {"product_and_topk": product_and_topk}
    if device == "cpu" and importlib.util.find_spec("faiss") is not None:
        baselines["faiss_flat"] = faiss_flat
    return {
        "name": name,
        "shapes": {"queries": count, "keys": stored, "d": d, "k": k},
        "dtype": "float32",
        "bytes": 4 * (count + stored) * d,
        "flops": 2 * count * stored * d,
        # candidates take three products of bfloat16 for one of float32
        "slower": 3,
        "run": run,
        "baselines": baselines,
        # values only: keys whose products differ by rounding may change places
        "check": lambda: assert_equal(run()[:1], product_and_topk()[:1]),
    }


CASES = [
    make_case("nearest_keys", 1024, 100_000, 256, 8),
    make_case("nearest_keys_one_query", 1, 100_000, 256, 8),
]
# All scores at once are 16 GiB: the baseline goes through 512 queries at a time.
CUDA_CASES = [
    Sized(make_case, "nearest_keys", {"count": 4096, "stored": 1_000_000}, {"d": 256, "k": 8, "chunk": 512}),
    Sized(make_case, "nearest_keys_one_query", {"stored": 1_000_000}, {"count": 1, "d": 256, "k": 8}),
]
