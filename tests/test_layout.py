"""The tree keeps its shape: imports point down, tests mirror modules, files stay small."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastedit"
TESTS = ROOT / "tests"

# A package may import packages with a smaller rank, and itself. Peers of equal rank do not import each other,
# save where PEERS says so.
RANK = {
    "reference": 0, "kernels": 0, "_native": 0, "progress": 0, "settings": 0, "files": 0, "visuals": 0,
    "ops": 1,
    "requests": 2, "losses": 2,
    "testing": 3, "data": 3, "evaluation": 3,
    "pocket": 4, "backbone": 4, "report": 4,
    "smol": 5, "routers": 5, "training": 5,
    "deltas": 6, "objectives": 6,
    "fitting": 7,
    "methods": 8,
    "engine": 9,
    "export": 10,
    "ledger": 11, "published": 11,
    "integrations": 12, "cli": 12, "__main__": 13, "__init__": 13,
}  # fmt: skip
# (importer, imported) -> why it is allowed
PEERS = {
    ("data", "pocket"): "read_edits names the embedded sets, imported when asked for",
    ("data", "smol"): "read_edits names the edit sets of icons, imported when asked for",
    ("backbone", "pocket"): "load names the embedded models, imported when asked for",
    ("backbone", "smol"): "load names the embedded models, imported when asked for",
    ("engine", "export"): "run.export hands over, imported when asked for",
    ("backbone", "engine"): "a call takes edits, which the engine lets act, imported where they are given",
    ("pocket", "backbone"): "an edit set asks the embedded model for its own answers",
}
# Where the tests of modules are that have no test file of their own; a folder stands for all in it.
TESTED_IN = {
    "backbone/active": "backbone/test_context",
    "backbone/families": "backbone/test_adapters",
    "backbone/generic": "backbone/test_architectures",
    "backbone/headers": "backbone/test_completeness",
    "backbone/json_files": "backbone/test_checkpoint",
    "backbone/opening": "backbone/test_loading",
    "backbone/opt": "backbone/test_packed_forward",
    "backbone/probe_image": "backbone/test_processors",
    "backbone/render_apart": "backbone/test_rendering",
    "backbone/rotary": "backbone/test_packed_forward",
    "backbone/settings": "backbone/test_loading",
    "backbone/stacks": "backbone/test_packed_forward",
    "backbone/stock": "engine/test_attach",
    "backbone/stock_prompts": "engine/test_attach_methods",
    "backbone/synthetic": "backbone/synthetic/test_models",
    "backbone/text": "backbone/test_architectures",
    "cli": "cli/test_main",
    "deltas/base": "deltas/test_deltas",
    "deltas/company": "engine/test_conflicts",
    "deltas/hooks": "deltas/test_install",
    "deltas/context": "methods/test_ike",
    "deltas/gate": "engine/test_apply",
    "deltas/kinds": "deltas/test_deltas",
    "deltas/low_rank": "deltas/test_deltas",
    "deltas/options": "deltas/test_deltas",
    "engine/asked": "engine/test_preflight",
    "engine/asking": "engine/test_evaluate",
    "engine/acting": "engine/test_apply",
    "engine/attached_calls": "engine/test_attach_calls",
    "engine/attached_live": "engine/test_attach_live",
    "engine/fit_problem": "engine/test_continuous",
    "engine/fitting": "engine/test_continuous",
    "engine/memory/footprint": "engine/memory/test_plan",
    "engine/memory/limits": "engine/memory/test_plan",
    "engine/memory/workload": "engine/memory/test_plan",
    "engine/parallel/worker": "engine/parallel/test_processes",
    "engine/profiling": "engine/profiling/test_flops",
    "engine/readying": "engine/test_editing",
    "engine/rewritten_prompts": "engine/test_attach_methods",
    "engine/run": "engine/test_saving",
    "engine/run_state": "engine/test_continuous",
    "engine/schedule": "engine/test_editing",
    "engine/stacking": "deltas/test_mapped",
    "evaluation/scoring": "engine/test_evaluate",
    "export/regression": "export/test_records",
    "methods/base": "methods/test_registry",
    "methods/ldke/config": "methods/ldke/test_editor",
    "methods/lora": "engine/test_editing",
    "ledger/asked": "ledger/test_ledger",
    "ledger/asking": "ledger/test_verify",
    "ledger/connections": "ledger/test_database",
    "ledger/contents": "ledger/test_ledger",
    "ledger/history": "ledger/test_ledger",
    "ledger/opening": "ledger/test_ledger",
    "ledger/refit": "ledger/test_undo",
    "ledger/schema": "ledger/test_database",
    "ledger/segments": "ledger/test_compact",
    "ledger/session": "ledger/test_ledger",
    "ledger/settings": "ledger/test_ledger",
    "ledger/stored_artifacts": "ledger/test_state",
    "methods/serac/scope": "methods/serac/test_task",
    "methods/unike/config": "methods/unike/test_editor",
    "objectives/base": "objectives/test_nll",
    "objectives/config": "objectives/test_invariant",
    "objectives/roles": "objectives/test_layout",
    "pocket/easyvqa": "pocket/factory/test_packing",
    "pocket/factory": "pocket/factory/test_train",
    "pocket/names": "pocket/test_models",
    "pocket/qwen_processor": "pocket/test_models",
    "pocket/templates": "pocket/test_grammar",
    "smol/countries": "smol/test_concepts",
    "smol/names": "smol/test_requests",
    "smol/factory": "smol/factory/test_train",
    "smol/templates": "smol/test_grammar",
    "reference": "ops/test_oracles",
    "testing": "ops/test_library",
    "training/config": "training/test_trainer",
    "training/state": "training/test_trainer",
}
# Tests of what more than one module promises together, and of what is no module.
TOPICS = {
    "backbone/test_any_method", "backbone/test_architectures", "backbone/test_cross", "backbone/test_expansion",
    "backbone/test_encoder", "backbone/test_processing",
    "backbone/test_text_only",
    "cli/test_signals", "cli/test_terminal", "deltas/test_deltas", "engine/test_attach_calls",
    "engine/test_attach_live", "engine/test_attach_methods", "engine/test_conflicts", "engine/test_continuous",
    "engine/test_growth",
    "docs/test_code", "docs/test_site",
    "engine/test_several_images", "export/test_export", "kernels/test_ahead_of_time", "kernels/test_bounds",
    "kernels/test_compiled_form", "kernels/test_grouped", "kernels/test_nearest_exact", "kernels/test_tuning",
    "ledger/test_broken_off", "ledger/test_kills",
    "ops/test_arguments", "ops/test_autocast", "ops/test_cuda_emulated", "ops/test_library", "ops/test_memory",
    "ops/test_mmd2_kept", "ops/test_oracles",
    "ledger/test_serving",
    "ops/test_threads", "ops/test_transforms", "pocket/test_shipped", "test_build", "test_conformance",
    "report/test_browser",
    "benchmarks/test_gpu_script", "test_cuda_compiles", "test_import", "test_layout", "test_native", "test_repr",
}  # fmt: skip
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


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that importing this one imports: at its top, and not for types alone."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                visit([*node.body, *(each for handler in node.handlers for each in handler.body)])
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = path.relative_to(ROOT).parts
                base = (
                    [*parts[: len(parts) - node.level], *filter(None, [node.module])] if node.level else [node.module]
                )
                name = ".".join(str(part) for part in base)
                found.update(
                    f"{name}.{alias.name}" if f"{name}.{alias.name}" in known else name for alias in node.names
                )

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found & known


def test_no_module_imports_itself_through_others() -> None:
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules()
    }
    known = set(names.values())
    graph = {name: imported_modules(path, known) - {name} for path, name in names.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert set(order) == known


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_its_tests(path: Path) -> None:
    if path.name == "__init__.py" or path.name.startswith("_"):
        return
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    places = [name, *(parent.as_posix() for parent in Path(name).parents)]
    mirrored = TESTS / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    named = next((TESTED_IN[place] for place in places if place in TESTED_IN), None)
    assert mirrored.exists() or named is not None, f"{mirrored.relative_to(ROOT)} is not there, nor named in TESTED_IN"
    if named is not None and not mirrored.exists():
        assert (TESTS / f"{named}.py").exists(), f"TESTED_IN names {named}, which is not there"


def test_every_test_file_is_of_a_module_or_a_named_topic() -> None:
    found = {path.relative_to(TESTS).with_suffix("").as_posix() for path in TESTS.rglob("test_*.py")}
    assert found >= TOPICS, f"TOPICS names {sorted(TOPICS - found)}, which are not there"
    for name in sorted(found - TOPICS):
        folder = ROOT if name.startswith("benchmarks/") else PACKAGE
        module = folder / Path(name).parent / Path(name).name.removeprefix("test_")
        baseline = ROOT / "benchmarks" / "baselines" / module.name
        assert any(
            each.with_suffix(".py").exists() or each.is_dir() or each.with_suffix(".sh").exists()
            for each in (module, baseline)
        ), f"tests/{name}.py: a module of that name, or a line in TOPICS"


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
        if package_of(path) in ("backbone", "pocket", "smol"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        names += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        for name in names:
            assert not any(word in name.lower() for word in words), f"{path.relative_to(ROOT)}: {name}"


def test_repository_stays_small() -> None:
    skipped = {".git", ".venv", "build", "dist", "site", "runs"}
    skipped |= {".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    total = sum(
        path.stat().st_size
        for path in ROOT.rglob("*")
        if path.is_file() and not path.is_symlink() and not skipped & set(path.relative_to(ROOT).parts)
        and path.suffix not in (".so", ".pyc")
    )  # fmt: skip
    # A checkout and what is built in it travel to a machine with a GPU in at most 64 MiB
    assert total < 40 * 2**20, f"{total / 2**20:.1f} MiB"
