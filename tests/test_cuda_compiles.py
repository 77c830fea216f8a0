"""The CUDA sources compile for sm_80 and sm_90 as a CUDA build compiles them, which needs nvcc but no GPU."""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=str(Path(HOME, "bin")) if HOME else None)

if NVCC is None:
    pytest.skip("nvcc was not found", allow_module_level=True)
if not SOURCES:
    pytest.skip("csrc is not beside the tests", allow_module_level=True)


def tool(name):
    """One that pip installed lies beside the interpreter."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def finished(command, **settings):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def inputs():
    """Everything that the objects are made of, as a digest."""
    digest = hashlib.sha256(finished([NVCC, "--version"]).encode())
    digest.update(f"{torch.__version__} {sys.version} {os.environ.get('NVCC_PREPEND_FLAGS')}".encode())
    for path in [ROOT / "CMakeLists.txt", Path(__file__), *sorted(Path(ROOT, "csrc").rglob("*.*"))]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Compile the target of CMakeLists.txt that holds the CUDA sources, once for the same sources and compiler."""
    if tool("cmake") is None or tool("ninja") is None:
        pytest.skip("CMake and Ninja were not found")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastedit" / "tests"
    kept = cache / f"cuda-{inputs()}"
    if not kept.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob("cuda-*"):
            shutil.rmtree(old, ignore_errors=True)
        compiled = compile_objects(tmp_path_factory.mktemp("cuda"))
        whole = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
        for path in compiled:
            shutil.copy(path, whole)
        # another process may have been faster
        with contextlib.suppress(OSError):
            whole.rename(kept)
    return {path.name.split(".")[0]: path for path in sorted(kept.glob("*.cu.o"))}


def compile_objects(folder):
    """Compile in a folder; return the objects."""
    cmake, ninja = tool("cmake"), tool("ninja")
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    generated = Path("c10", "cuda", "impl", "cuda_cmake_macros.h")
    if not any(Path(include, generated).is_file() for include in includes):
        # CMake writes it when torch is built with CUDA; the other headers of c10/cuda are in every torch
        (folder / generated.parent).mkdir(parents=True)
        (folder / generated).write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n", encoding="utf-8")
        includes.append(str(folder))
    defined = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CUDA_COMPILER": NVCC,
        "FASTEDIT_OUTPUT": "unused",
        "FASTEDIT_INCLUDE": ";".join(includes),
        "FASTEDIT_CUDA_VERSION": "13.0",
        "FASTEDIT_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
    }
    settings = [f"-D{name}={value}" for name, value in defined.items()]
    finished([cmake, "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *settings])
    finished([cmake, "--build", folder / "build", "--target", "fastedit_cuda", "--parallel", "2"])
    return sorted(folder.rglob("*.cu.o"))


@pytest.fixture(scope="module")
def resources(objects):
    """Return per source, target and kernel the line of cuobjdump that tells registers and memory."""
    triton = importlib.util.find_spec("triton")
    beside = [str(Path(NVCC).resolve().parent), os.environ.get("PATH", "")]
    if triton is not None and triton.origin:
        beside.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join(beside))
    if cuobjdump is None:
        pytest.skip("cuobjdump was not found: it comes with CUDA's toolkit and with triton")
    found = {}
    for stem, path in objects.items():
        for target in ("sm_80", "sm_90"):
            text = finished([cuobjdump, "-arch", target, "-res-usage", path])
            found[stem, target] = dict(re.findall(r"Function (\w+):\s*\n\s*(.*REG.*)", text))
            machine_code = finished([cuobjdump, "-arch", target, "-sass", path])
            for function in machine_code.split("Function : ")[1:]:
                name, _, code = function.partition("\n")
                # accesses to global memory of 16 bytes
                wide = {f"{kind}128": len(re.findall(rf"\b{kind}\.E\S*\.128\b", code)) for kind in ("LDG", "STG")}
                found[stem, target][name.strip()] += "".join(f" {kind}:{count}" for kind, count in wide.items())
    return found


@pytest.mark.slow
def test_every_source_is_built(objects):
    assert sorted(objects) == [path.stem for path in SOURCES]


def test_objects_hold_every_kernel_for_both_targets(resources):
    for source in SOURCES:
        text = (source.parent / f"{source.stem}_kernels.h").read_text(encoding="utf-8")
        kernels = re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", text)
        assert len(kernels) == text.count("__global__")
        compiled = [set(resources[source.stem, target]) for target in ("sm_80", "sm_90")]
        assert compiled[0] == compiled[1]
        for kernel in kernels:
            # mangled, a name has its length before it
            assert any(f"{len(kernel)}{kernel}I" in name for name in compiled[0]), kernel


def test_threads_keep_to_their_registers(resources):
    """What waits for memory needs many threads and 16 bytes a load: spills or registers too many cost bandwidth."""
    for (stem, target), kernels in resources.items():
        # those that read rows; float64 is there for tests, its letter stands alone in a mangled name
        rows = {name: line for name, line in kernels.items() if re.search(r"_(sums|gradient|squares|pieces)I", name)}
        short = {name: line for name, line in rows.items() if not re.search(r"[IE]d+[LE]", name)}
        assert 0 < len(short) < len(rows) < len(kernels)
        for name, line in short.items():
            told = {key: int(value) for key, value in re.findall(r"([A-Z]+\d*):(\d+)", line)}
            assert told["REG"] <= 64, f"{stem} {target} {name}: {line}"
            assert told["LOCAL"] == told["STACK"] == 0, f"{stem} {target} {name}: {line}"
            assert told["LDG128"] > 0, f"{stem} {target} {name}: {line}"
            if re.search(r"_(gradient|pieces)I", name):
                assert told["STG128"] > 0, f"{stem} {target} {name}: {line}"


# Loads a library as the compiled one is, before the ops are imported. Functions of CUDA's torch are not there and are
# not called; lazy binding does not ask for them.
PROGRAM = """
import importlib.machinery, importlib.util, os, sys
import torch
sys.setdlopenflags(os.RTLD_LAZY)
loader = importlib.machinery.ExtensionFileLoader("probe", sys.argv[1])
try:
    importlib.util.module_from_spec(importlib.util.spec_from_file_location("probe", sys.argv[1], loader=loader))
except (ImportError, SystemError) as error:
    print(error, file=sys.stderr)
from fastedit import ops
print(*(f"{op}:{by['cuda']}" for op, by in ops.implementations().items()))
for name in sys.argv[2:]:
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key("fastedit::" + name, "CUDA"))
"""


def test_registrations_fit_the_schemas(objects, tmp_path):
    """torch compares a kernel's C++ signature with the schema of its op; the library then serves it."""
    # the one variable of CUDA's torch that its headers name, and what Python asks a module for
    stub = tmp_path / "stub.cpp"
    stub.write_text(
        'extern "C" {\nvoid* _ZN3c104cuda20CUDACachingAllocator9allocatorE;\n'
        '__attribute__((visibility("default"))) void* PyInit_probe() { return nullptr; }\n}\n',
        encoding="utf-8",
    )
    library = tmp_path / "probe.so"
    lazy = ["-Xlinker", "-z", "-Xlinker", "lazy"]
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    # nvcc adds the CUDA runtime
    finished([NVCC, "-shared", "-Xcompiler", "-fPIC", *lazy, *objects.values(), stub, *torch_libraries, "-o", library])
    registered = [
        name for path in SOURCES for name in re.findall(r'm\.impl\("(\w+)"', path.read_text(encoding="utf-8"))
    ]
    environment = {**os.environ, "FASTEDIT_CUDA": "csrc"}
    told = finished([sys.executable, "-c", PROGRAM, library, *registered], env=environment, cwd=ROOT).splitlines()
    assert {"risk:csrc", "adam_step_:csrc"} <= set(told[0].split())
    assert told[1:] == [f"{name} True" for name in ("adam_step_", "risk", "risk_backward")]
