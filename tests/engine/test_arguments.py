"""What ``edit`` and ``train`` are called with is looked at first, and refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from tests.engine.conftest import make_edits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "pocket-llava"}, r"model is an EditableModel, from fastedit.load \(got model='pocket-llava'\)"),
        (
            {"edits": EditRequest("What?", "red")},
            r"edits is a list of requests, \[request\] for a single one \(got edits=",
        ),
        ({"edits": "pocket-vqa"}, r"edits is a list of requests, from fastedit.read_edits \(got edits='pocket-vqa'\)"),
        ({"edits": iter([])}, r"edits is a list of requests \(got edits of type list_iterator\)"),
        ({"edits": []}, r"at least one edit \(got edits=\[\]\)"),
        ({"edits": [{"prompt": "What?"}]}, r"edits are EditRequests \(got edits\[0\]=\{'prompt': 'What\?'\}\)"),
        ({"pool": "pocket-vqa"}, r"pool is a list of requests, from fastedit.read_edits \(got pool='pocket-vqa'\)"),
        ({"pool": []}, r"at least one record \(got pool=\[\]\)"),
        ({"pool": [None]}, r"pool are EditRequests \(got pool\[0\]=None\)"),
        ({"method": None}, r"method must be text \(got method=None\)"),
        ({"batch_size": True}, r"batch_size is at least 1, or 'auto' \(got batch_size=True\)"),
        ({"batch_size": 1.5}, r"batch_size is at least 1, or 'auto' \(got batch_size=1.5\)"),
        ({"mode": "both"}, r"mode is one of \['single', 'sequential'\] \(got mode='both'\)"),
        ({"conflicts": "first"}, r"conflicts is one of \['error', 'last'\] \(got conflicts='first'\)"),
        ({"views": 3}, r"views must be text \(got views=3\)"),
        ({"near": "no"}, r"near must be True or False \(got near='no'\)"),
        ({"evaluate": 1}, r"evaluate must be True or False \(got evaluate=1\)"),
        ({"show_progress": "no"}, r"show_progress must be True or False or None \(got show_progress='no'\)"),
        ({"seed": "one"}, r"seed must be a whole number \(got seed='one'\)"),
        ({"seed": -1}, r"seed is not negative \(got seed=-1\)"),
        ({"score_at": 3}, r"score_at must be a list of whole numbers \(got score_at=3\)"),
        ({"ledger": "edits"}, r"ledger is a Ledger, from fastedit.open_ledger, or None \(got ledger='edits'\)"),
        ({"artifact": {}}, r"artifact is an Artifact, a file of one or None \(got artifact=\{\}\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_edit_does_not_take_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": fastedit.load("random:llava-tiny"), "edits": make_edits(2), **arguments}
    with pytest.raises(ValueError, match=f"^edit: {message}"):
        fastedit.edit(given.pop("model"), given.pop("edits"), **{"method": "lora", **given})


def test_views_are_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"views: source is one of .* \(got views='mine'\)"):
        fastedit.edit(fastedit.load("random:llava-tiny"), make_edits(2), views="mine")


def test_training_takes_a_list_of_records() -> None:
    model = fastedit.load("random:llava-tiny")
    records: Any = make_edits(1)[0]
    with pytest.raises(ValueError, match=r"train: records is a list of requests, \[request\] for a single one"):
        fastedit.train(model, "mend", records)
