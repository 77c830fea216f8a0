"""The compiled library, which no other module touches. Importing this one loads it, and that registers its kernels."""

import importlib.util
import os
import sysconfig
import warnings
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

REQUIRE = "FASTEDIT_REQUIRE_NATIVE"
# A folder to look for the library in instead of the package's, for a library built for tests.
FOLDER = "FASTEDIT_LIBRARY"


def library_name() -> str:
    """Return the file name that fits the running Python, torch and CUDA; setup.py writes the same."""
    cuda = f"cuda{torch.version.cuda}" if torch.version.cuda else "cpu"
    return f"_C-torch{torch.__version__.split('+')[0]}-{cuda}{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(folder: Path, *, require: bool) -> ModuleType | None:
    """Return the library in ``folder`` that fits, or None when there is none.

    Args:
        folder: where the libraries lie.
        require: raise where there is none that fits.
    Raises:
        ImportError: ``require`` and no library fits, or the library cannot be loaded.
    """
    path = folder / library_name()
    if path.is_file():
        return _import(path)
    others = sorted(found.name for found in folder.glob("_C-torch*"))
    if others:
        problem = (
            f"fastedit: the compiled kernels do not fit this torch (got built={', '.join(others)}, "
            f"needed={path.name}); install fastedit again, or the plain torch kernels are used"
        )
    else:
        problem = "fastedit: built without compiled kernels (FASTEDIT_BUILD=python, or no compiler at the build)"
    if require:
        raise ImportError(f"{problem}, but {REQUIRE} is set")
    if others:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return None


def _import(path: Path) -> ModuleType:
    # the name ends in _C because the file exports PyInit__C, whatever it is called
    loader = ExtensionFileLoader("fastedit._C", str(path))
    spec = importlib.util.spec_from_file_location("fastedit._C", path, loader=loader)
    if spec is None:
        raise ImportError(f"fastedit: the compiled kernels cannot be loaded (got path={path})")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


LIBRARY = load(
    Path(os.environ.get(FOLDER) or Path(__file__).parent), require=os.environ.get(REQUIRE, "0") not in ("", "0")
)


def build_info() -> dict[str, str]:
    """Return the versions the library was built with and the instruction set in use; empty without a library."""
    if LIBRARY is None:
        return {}
    return {**LIBRARY.build_info(), "isa": LIBRARY.current_isa()}


def instruction_sets() -> list[str]:
    """Return the instruction sets the compiled kernels can run with here, the best first."""
    if LIBRARY is None:
        return []
    return {"avx512": ["avx512", "avx2"], "avx2": ["avx2"]}.get(LIBRARY.best_isa(), [])


def processor_vendor() -> str:
    """Return who made this processor, "intel", "amd" or "other"; "" without a library."""
    return "" if LIBRARY is None else str(LIBRARY.processor_vendor())


def release_kept_memory() -> int:
    """Give the memory kept for large results back to the system; return its bytes, 0 without a library."""
    return 0 if LIBRARY is None else int(LIBRARY.release_kept_memory())


def keep_freed_memory(limit_bytes: int) -> bool:
    """Let torch take large blocks from those freed before, so many bytes of which are kept; False without a library."""
    if LIBRARY is None:
        return False
    LIBRARY.keep_freed_memory(limit_bytes)
    return True


def use_instruction_set(name: str) -> None:
    """Choose the instruction set of the compiled kernels; for tests and benchmarks.

    Raises:
        ValueError: there is no library, or this processor lacks the set.
    """
    if LIBRARY is None:
        raise ValueError(f"use_instruction_set: there is no compiled library (got name={name})")
    LIBRARY.use_isa(name)
