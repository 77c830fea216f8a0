"""Runs that outgrow memory: smaller batches where it runs out, deltas in files instead of in memory."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import StoredDeltas
from fastedit.engine import Run, fitting
from fastedit.engine.memory.oom import is_out_of_memory
from tests.engine.test_editing import largest_difference, run


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of more than two edits fail; the sizes that were tried are kept."""
    tried: list[int] = []
    real = fitting._fit

    def fit(shared: Any, waiting: Any, places: int, committed: Any, take: Any) -> Any:
        tried.append(places)
        if places > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return real(shared, waiting, places, committed, take)

    monkeypatch.setattr(fitting, "_fit", fit)
    return tried


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    exact_model: EditableModel, edits: list[EditRequest], small_memory: list[int]
) -> None:
    with pytest.warns(RuntimeWarning, match="memory ran out in a batch of 5; going on with batches of 2"):
        halved = run(exact_model, edits, batch_size=8)
    assert small_memory == [5, 2]
    alone = run(exact_model, edits, batch_size=1)
    assert [d.request_id for d in halved.deltas] == [edit.id for edit in edits]
    assert largest_difference(list(halved.deltas), list(alone.deltas)) < 1e-8


def test_one_edit_that_does_not_fit_is_an_error(
    exact_model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(shared: Any, waiting: Any, places: int, committed: Any, take: Any) -> Any:
        raise torch.OutOfMemoryError(f"no room for {places}")

    monkeypatch.setattr(fitting, "_fit", fit)
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError, match="no room for 1"):
        run(exact_model, edits, batch_size=4)


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("unable to mmap 512 bytes from file: Cannot allocate memory (12)"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_deltas_of_a_ledger_are_those_in_memory(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    ledger = fastedit.open_ledger(tmp_path / "edits", exact_model)
    stored = run(exact_model, edits, batch_size=2, ledger=ledger, evaluate=True)
    kept = run(exact_model, edits, batch_size=2)
    assert largest_difference(list(stored.deltas), list(kept.deltas)) == 0
    assert stored.deltas[-1].request_id == edits[-1].id
    assert [delta.request_id for delta in stored.deltas[1:3]] == [edit.id for edit in edits[1:3]]
    with pytest.raises(IndexError):
        stored.deltas[len(edits)]

    # Saved, they are copied to files; and copied again from there
    again = Run.load(stored.save(tmp_path / "run"))
    assert isinstance(again.deltas, StoredDeltas)
    for saved in (again, Run.load(again.save(tmp_path / "run")), Run.load(again.save(tmp_path / "other"))):
        assert largest_difference(list(saved.deltas), list(kept.deltas)) == 0
        assert saved.scores.keys() == stored.scores.keys()
    assert not (tmp_path / "run" / "deltas.safetensors").exists()


def test_what_an_earlier_run_left_in_a_folder_is_not_loaded(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    kept = run(exact_model, edits[:2])
    ledger = fastedit.open_ledger(tmp_path / "edits", exact_model)
    stored = run(exact_model, edits[:2], steps=1, ledger=ledger)
    for saved in (kept, stored, kept):
        again = Run.load(saved.save(tmp_path / "run"))
        assert largest_difference(list(again.deltas), list(saved.deltas)) == 0
    assert largest_difference(list(kept.deltas), list(stored.deltas)) > 0


def test_files_of_deltas_are_numbered_without_a_gap(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    stored = StoredDeltas.create(tmp_path)
    stored.append(list(run(exact_model, edits[:2]).deltas))
    (tmp_path / "deltas-000003.safetensors").write_bytes((tmp_path / "deltas-000000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"numbered from 0 without a gap \(got deltas-000003"):
        StoredDeltas(tmp_path)


def test_memory_that_ran_out_is_given_back_before_the_next_try(
    exact_model: EditableModel, edits: list[EditRequest], small_memory: list[int]
) -> None:
    large = fastedit.ops.workspace(torch.zeros(0), (4 << 20,))
    del large
    with pytest.warns(RuntimeWarning):
        run(exact_model, edits[:3])
    assert small_memory == [3, 1]
    assert fastedit.ops.release_workspaces() == 0
