"""What a notebook or a debugger shows of a run, a delta, a model: one line that helps."""

from __future__ import annotations

from pathlib import Path

import fastedit
from fastedit.backbone import Site
from fastedit.data import read_edits
from fastedit.deltas import DeltaSpec
from fastedit.training import Artifact
from tests.engine.conftest import make_edits


def test_a_model_says_what_it_is() -> None:
    model = fastedit.load("random:llava-tiny")
    assert repr(model) == (
        "<EditableModel: random:llava-tiny (llava), 4 layers of width 64, float32, quantize none, on cpu>"
    )


def test_a_run_and_its_deltas_say_how_it_went(tmp_path: Path) -> None:
    model = fastedit.load("random:llava-tiny")
    ledger = fastedit.open_ledger(tmp_path / "edits", model)
    run = fastedit.edit(model, make_edits(2), "lora", steps=1, rank=2, ledger=ledger)
    text = repr(run)
    assert text.startswith("<Run: lora on random:llava-tiny, 2 edits (2 max_steps); strict reliability ")
    assert "text locality" in text
    assert "\n" not in text
    assert repr(run.deltas) == f"<LedgerDeltas: 2 deltas in {tmp_path / 'edits'}>"
    first = run.deltas[0]
    assert repr(first) == (
        f"<EditDelta: low_rank at 2.up, 2.down, 3.up, 3.down, {first.n_parameters:,} parameters, edit "
        f"{first.request_id!r}>"
    )
    unscored = fastedit.edit(model, make_edits(1), "ft", steps=1, evaluate=False)
    assert repr(unscored) == "<Run: ft on random:llava-tiny, 1 edit (1 max_steps); not scored>"


def test_a_delta_of_many_sites_names_a_few() -> None:
    sites = tuple(Site(layer, "up", "", 4, 4) for layer in range(9))
    assert repr(fastedit.EditDelta(DeltaSpec("full", sites), {})) == (
        "<EditDelta: full at 0.up, 1.up, 2.up, 3.up and 5 more, 0 parameters, edit ''>"
    )
    assert (
        repr(fastedit.EditDelta(DeltaSpec("context", ()), {}))
        == "<EditDelta: context at no site, 0 parameters, edit ''>"
    )


def test_trained_parts_a_plan_and_records() -> None:
    artifact = Artifact("mend", "0123456789abcdef", {}, {}, {"best": {"score": 0.5, "step": 20}})
    assert repr(artifact) == "<Artifact: mend for model 0123456789ab, 0 parameters, score 50.0 % at step 20>"
    assert repr(Artifact("ke", "0123", {}, {})) == "<Artifact: ke for model 0123, 0 parameters>"
    plan = repr(fastedit.plan_memory("random:llava-tiny", batch_size=2))
    assert plan.startswith("<MemoryPlan: batch size 2 on cpu, needs ")
    assert repr(read_edits("pocket-vqa", limit=3)) == "<EditList: 3 edits of 'pocket-vqa'>"
