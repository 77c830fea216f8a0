"""The build: which one is chosen, what the wheel holds, and what happens when the library does not fit."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import fastedit
from fastedit import _native

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "setup.py").is_file():
    pytest.skip("setup.py is not beside the tests", allow_module_level=True)


@pytest.fixture(scope="module")
def setup_module_():
    spec = importlib.util.spec_from_file_location("fastedit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


FULL = {"torch": "2.13.0", "torch_cuda": "13.0", "nvcc": "13.1", "compiler": "/usr/bin/c++", "cmake": "/usr/bin/cmake"}


@pytest.mark.parametrize(
    ("request_", "without", "chosen"),
    [
        ("auto", (), "cuda"),
        ("auto", ("nvcc",), "cpu"),
        ("auto", ("torch_cuda",), "cpu"),
        ("auto", ("torch_cuda", "nvcc"), "cpu"),
        ("auto", ("compiler",), "python"),
        ("auto", ("cmake",), "python"),
        ("auto", ("torch",), "python"),
        ("cpu", (), "cpu"),
        ("cuda", (), "cuda"),
        ("python", (), "python"),
    ],
)
def test_choice(setup_module_, request_, without, chosen):
    machine = setup_module_.Machine(**{name: value for name, value in FULL.items() if name not in without})
    assert setup_module_.choose(request_, machine)[0] == chosen


@pytest.mark.parametrize(
    ("request_", "changed", "reason"),
    [
        ("cuda", {"nvcc": None}, "FASTEDIT_BUILD=cuda: nvcc was not found"),
        ("cuda", {"torch_cuda": None}, "FASTEDIT_BUILD=cuda: torch was built without CUDA"),
        ("cuda", {"nvcc": "12.8"}, r"different CUDA versions \(got nvcc=12.8, torch=13.0\)"),
        ("cpu", {"compiler": None}, r"FASTEDIT_BUILD=cpu: no C\+\+ compiler was found"),
        ("cpu", {"torch": None}, "torch is not installed where the build runs"),
        ("cpu", {"processor": "aarch64"}, r"written for x86-64 \(got aarch64\)"),
        ("gpu", {}, r"FASTEDIT_BUILD is one of auto, python, cpu, cuda \(got FASTEDIT_BUILD=gpu\)"),
    ],
)
def test_a_named_build_that_cannot_be_made_stops(setup_module_, request_, changed, reason):
    with pytest.raises(setup_module_.BuildError, match=reason):
        setup_module_.choose(request_, setup_module_.Machine(**{**FULL, **changed}))


def test_sanitizers(setup_module_):
    assert setup_module_.sanitizer({}) == ""
    assert setup_module_.sanitizer({"FASTEDIT_SANITIZE": "address"}) == "address"
    with pytest.raises(setup_module_.BuildError, match=r"is address or nothing \(got FASTEDIT_SANITIZE=thread\)"):
        setup_module_.sanitizer({"FASTEDIT_SANITIZE": "thread"})


def test_another_cuda_major_builds_for_the_cpu(setup_module_):
    chosen, reason = setup_module_.choose("auto", setup_module_.Machine(**{**FULL, "nvcc": "12.8"}))
    assert chosen == "cpu"
    assert "nvcc=12.8, torch=13.0" in reason


def test_setup_and_loader_agree_on_the_name(setup_module_):
    machine = setup_module_.this_machine(os.environ)
    assert setup_module_.library_name(machine.torch, machine.torch_cuda) == _native.library_name()
    assert torch.__version__.split("+")[0] in _native.library_name()


def test_version_is_said_once(setup_module_):
    assert f'version="{fastedit.__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_a_library_for_another_torch_warns_once_and_names_both(tmp_path):
    (tmp_path / "_C-torch2.0.0-cpu.so").touch()
    with pytest.warns(RuntimeWarning, match=r"built=_C-torch2.0.0-cpu.so, needed=_C-torch") as caught:
        assert _native.load(tmp_path, require=False) is None
    assert len(caught) == 1
    with pytest.raises(ImportError, match=r"built=_C-torch2.0.0-cpu.so.* but FASTEDIT_REQUIRE_NATIVE is set"):
        _native.load(tmp_path, require=True)


def test_no_library_is_silent_unless_required(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.load(tmp_path, require=False) is None
    with pytest.raises(ImportError, match="built without compiled kernels"):
        _native.load(tmp_path, require=True)


def test_required_library_reaches_the_import(tmp_path):
    """The variable is read by a fresh interpreter: a copy of the package without the library cannot be imported."""
    shutil.copytree(ROOT / "fastedit" / "ops", tmp_path / "fastedit" / "ops")
    shutil.copytree(ROOT / "fastedit" / "reference", tmp_path / "fastedit" / "reference")
    shutil.copy(ROOT / "fastedit" / "_native.py", tmp_path / "fastedit")
    (tmp_path / "fastedit" / "__init__.py").touch()
    code = "from fastedit import ops; print(ops.implementations()['low_rank']['cpu'])"
    for required, expected in (("0", (0, "reference\n")), ("1", (1, ""))):
        environment = {**os.environ, "FASTEDIT_REQUIRE_NATIVE": required}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == expected, done.stderr


@pytest.mark.skipif(_native.LIBRARY is None, reason="no compiled library")
def test_the_library_of_another_folder(tmp_path):
    """FASTEDIT_LIBRARY: a library built for tests, in place of the package's."""
    source = Path(_native.__file__).parent / _native.library_name()
    program = "from fastedit import _native; print(_native.LIBRARY and _native.LIBRARY.__file__)"
    for there in (True, False):
        if there:
            shutil.copy(source, tmp_path)
        else:
            (tmp_path / source.name).unlink()
        environment = {**os.environ, "FASTEDIT_LIBRARY": str(tmp_path), "FASTEDIT_REQUIRE_NATIVE": "0"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == (str(tmp_path / source.name) if there else "None"), done.stderr


@pytest.mark.skipif(_native.LIBRARY is None, reason="no compiled library")
def test_the_library_serves_and_tells_its_versions():
    told = _native.build_info()
    assert told["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["isa"] == _native.instruction_sets()[0]
    sources = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    served = {op: by["cpu"] for op, by in fastedit.implementations().items() if op.rstrip("_") in sources}
    assert {"risk", "low_rank", "adam_step_"} <= set(served)
    assert set(served.values()) == {"csrc"}
    with pytest.raises(ValueError, match=r"use_isa: .* \(got sse9, best="):
        _native.use_instruction_set("sse9")


def test_wheel_without_compiled_kernels(tmp_path):
    """kernels/ lands in the package and nowhere else, all data come along, no library does; sources hold every file."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("_C-*", "__pycache__")
    for name in ("fastedit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    beside = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")
    for name in (*beside, "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    # The link to kernels/ is for the working tree alone
    files = {
        path.relative_to(tree).as_posix()
        for folder, _, names in os.walk(tree)
        for path in (Path(folder, name) for name in names)
    }
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r}); b.build_sdist({str(tmp_path)!r})"
    environment = {**os.environ, "FASTEDIT_BUILD": "python"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = tmp_path / f"fastedit_mllm-{fastedit.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert f"fastedit/kernels/{kernel.name}" in names
    assert not [name for name in names if name.startswith("kernels") or name.endswith(".so")]
    assert sorted(file for file in files if file.startswith("fastedit/") and file not in names) == []
    assert {"fastedit/py.typed", "fastedit/published/rows.jsonl.gz"} <= set(names)
    root = f"fastedit_mllm-{fastedit.__version__}"
    with tarfile.open(tmp_path / f"{root}.tar.gz") as packed:
        sources = set(packed.getnames())
    assert {"csrc/module.cpp", "csrc/cuda/risk.cu", "kernels/risk.py", *beside} < files
    assert sorted(file for file in files if f"{root}/{file}" not in sources) == []
    assert not [name for name in sources if "fastedit/kernels/" in name]


def test_the_folder_kernels_is_not_taken_for_the_package_of_that_name():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    # Asked of the installed distributions: a test runner may itself have imported the folder under that name.
    installed = any(True for _ in importlib.metadata.distributions(name="kernels"))
    assert done.stdout.strip() == str(installed), done.stderr


def make(*arguments: str) -> str:
    """What make would do."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_run_installs_only_what_it_runs(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    told = make("run", f"VENV={venv}")
    assert '--editable "."' in told
    assert not any(word in told for word in ("requirement", "test bench", "'dev'", "[triton"))
    assert "setup import EXTRAS" in make("test", f"VENV={venv}")
    assert "triton quantize test bench" in make("test", f"VENV={venv}")
    assert "'dev'.split()" in make("check", f"VENV={venv}")
    # Nothing is installed again where nothing has changed
    venv.mkdir()
    (venv / ".fastedit-run").touch()
    assert "pip" not in make("run", f"VENV={venv}")
    told = make("test", f"VENV={venv}")
    assert "--requirement" in told
    assert "--editable" not in told
    (venv / ".fastedit-test").touch()
    assert "pip" not in make("test", f"VENV={venv}")
    (venv / ".fastedit-run").unlink()
    assert '--editable ".[quantize]"' in make("run", f"VENV={venv}", "EXTRAS=quantize")
