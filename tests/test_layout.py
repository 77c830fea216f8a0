"""The tree keeps its shape: imports point down, tests mirror modules, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastedit"

# A package may import packages with a smaller rank, and itself. Peers of equal rank do not import each other,
# save where PEERS says so.
RANK = {
    "reference": 0, "kernels": 0, "_native": 0, "progress": 0, "settings": 0, "files": 0, "visuals": 0,
    "ops": 1,
    "requests": 2,
    "testing": 3, "data": 3, "evaluation": 3,
    "pocket": 4, "backbone": 4,
    "routers": 5, "training": 5,
    "deltas": 6, "objectives": 6,
    "fitting": 7,
    "methods": 8,
    "engine": 9,
    "cli": 10, "__main__": 11, "__init__": 11,
}  # fmt: skip
# (importer, imported) -> why it is allowed
PEERS = {
    ("data", "pocket"): "read_edits names the embedded sets, imported when asked for",
    ("backbone", "pocket"): "load names the embedded models, imported when asked for",
    ("pocket", "backbone"): "an edit set asks the embedded model for its own answers",
}
# Longest engine file and kernel file, in lines; exceptions name their reason.
FILE_LIMIT, KERNEL_LIMIT = 330, 430
LONG_FILES: dict[str, str] = {}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "fastedit":
            parts = (node.module or "").split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= {name for name in names if name in RANK}
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names if alias.name.startswith("fastedit.")]
            found |= {part[1] for part in parts if part[1] in RANK}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = package_of(path)
    if own == "__init__":
        return
    for other in imported_packages(path) - {own}:
        if (own, other) in PEERS:
            continue
        assert RANK[other] < RANK[own], (
            f"{path.relative_to(ROOT)} imports fastedit.{other}, which does not lie below it"
        )


def test_every_package_has_a_rank() -> None:
    for path in modules():
        assert package_of(path) in RANK, path


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LIMIT or name in LONG_FILES, f"{name} has {lines} lines"


def test_kernel_files_stay_small() -> None:
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc").rglob("*.c*")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= KERNEL_LIMIT or str(path.relative_to(ROOT)) in LONG_FILES, f"{path.name} has {lines} lines"


def test_kernels_folder_shadows_nothing() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_top_level_is_what_the_project_fixed() -> None:
    for name in ("csrc", "kernels", "fastedit", "benchmarks", "tests", "setup.py", "CMakeLists.txt"):
        assert (ROOT / name).exists(), name


def test_family_names_stand_only_in_the_backbone() -> None:
    words = ("llava", "blip", "qwen")
    for path in modules():
        if package_of(path) in ("backbone", "pocket"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        names += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        for name in names:
            assert not any(word in name.lower() for word in words), f"{path.relative_to(ROOT)}: {name}"


def test_repository_stays_small() -> None:
    skipped = {".git", ".venv", "build", "dist", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    total = sum(
        path.stat().st_size
        for path in ROOT.rglob("*")
        if path.is_file() and not path.is_symlink() and not skipped & set(path.relative_to(ROOT).parts)
        and path.suffix not in (".so", ".pyc")
    )  # fmt: skip
    # A checkout and what is built in it travel to a machine with a GPU in at most 64 MiB
    assert total < 40 * 2**20, f"{total / 2**20:.1f} MiB"
