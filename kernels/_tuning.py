"""Which settings a compute-bound kernel is launched with: tried once per kind of shape on the GPU, and kept on disk."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

#: Bytes of shared memory of a program at most: two of them share a multiprocessor of sm_80 and sm_90.
SHARED = 100 * 1024

#: 0 where the first setting serves every shape: nothing is tried, and two machines launch the same code.
SWITCH = "FASTEDIT_TUNE"


class Fixed:
    """A kernel launched with the first setting that fits, as one that tunes itself is: ``kernel[grid](...)``."""

    def __init__(
        self, kernel: Any, configs: Sequence[Any], shared: Callable[..., int], double: Any = None, config: Any = None
    ) -> None:
        self.kernel, self.configs, self.shared, self.double, self.config = kernel, configs, shared, double, config
        self.fn, self.arg_names = kernel.fn, kernel.arg_names

    def chosen(self, constants: dict[str, Any]) -> Any:
        """Return the setting of a launch with those constants: ``config`` where one is given."""
        if self.double is not None and constants.get("ACC") == tl.float64:
            return self.double
        return self.config or small_enough(self.configs, constants, self.shared)[0]

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """Return what launches the kernel on that grid."""

        def launch(*arguments: Any, **named: Any) -> Any:
            config = self.chosen({name: value for name, value in named.items() if name.isupper()})
            return self.kernel[grid](*arguments, **named, **config.all_kwargs())

        return launch


def tuned(configs: Sequence[Any], shared: Callable[..., int], double: Any = None) -> Callable[[Any], Any]:
    """Return a decorator of a kernel whose argument ``work`` says what kind of shape it gets (``work_of``).

    The configs must differ in nothing that changes the order of a sum, so that a number does not depend on which one
    was the fastest. The first one that fits serves under the interpreter and where FASTEDIT_TUNE=0.

    Args:
        configs: what is tried, few.
        shared: bytes of shared memory that a launch needs, from its constants by name and ``num_stages``; more than
            ``SHARED`` where registers would not hold what it computes.
        double: the only config where the constant ``ACC``, the dtype of sums, is float64.
    """

    def decorate(kernel: Any) -> Any:
        if triton.knobs.runtime.interpret or os.environ.get(SWITCH, "1") == "0":
            return Fixed(kernel, configs, shared, double)

        def fitting(configs: Sequence[Any], arguments: dict[str, Any], **named: Any) -> list[Any]:
            constants = {name: value for name, value in {**arguments, **named}.items() if name.isupper()}
            if double is not None and constants.get("ACC") == tl.float64:
                return [double]
            return small_enough(configs, constants, shared)

        tune = triton.autotune(
            list(configs), key=["work"], prune_configs_by={"early_config_prune": fitting}, cache_results=True
        )
        return tune(kernel)

    return decorate


def small_enough(configs: Sequence[Any], constants: dict[str, Any], shared: Callable[..., int]) -> list[Any]:
    """Return the configs whose programs fit ``SHARED``, or where none does the one that needs least."""

    def needed(config: Any) -> int:
        return shared(**{**constants, **config.kwargs, "num_stages": config.num_stages})

    fitting = [config for config in configs if needed(config) <= SHARED]
    return fitting or [min(configs, key=needed)]


def work_of(*sizes: int) -> int:
    """Return one number for sizes that are alike: each counts as the power of 2 above it, up to 2^31.

    A batch that changes by a few tokens, or a sequence of edits whose rank grows, is so not tuned for again.
    """
    work = 0
    for size in sizes:
        work = work * 32 + max(min(size, 2**31) - 1, 0).bit_length()
    return work
