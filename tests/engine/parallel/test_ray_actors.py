"""Edits made on a Ray cluster are those of one process, also where a node goes and another one comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine import Run
from fastedit.engine.parallel.workers import RunWorkers
from tests.engine.parallel.conftest import FEW, assert_same

ray = pytest.importorskip("ray", reason="Ray is not installed")

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
#: A node that is gone is missed soon.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """The head, where nothing is made, and two nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "num_cpus": 0, "_system_config": HEALTH, "include_dashboard": False},
    )
    made.nodes = [made.add_node(**NODE) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_resources_that_no_node_has(cluster: Any, model: EditableModel, edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match="resources are what a node of the cluster has"):
        fastedit.edit(model, edits, engine="ray", resources={"GPU": 1}, **FEW)


def test_a_node_goes_and_another_comes(
    cluster: Any,
    model: EditableModel,
    edits: list[EditRequest],
    here: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    stock = RunWorkers._take

    def take(self: RunWorkers, run: Any, line: Any, result: Any) -> None:
        if not taken:
            cluster.remove_node(cluster.nodes[0], allow_graceful=False)
            cluster.add_node(**NODE)
        taken.extend(result.made)
        stock(self, run, line, result)

    monkeypatch.setattr(RunWorkers, "_take", take)
    with fastedit.open_ledger(tmp_path / "edits", model) as ledger:
        run = fastedit.edit(
            model, edits, engine="ray", workers=2, mode="single", ledger=ledger, **{**FEW, "batch_size": 1}
        )
        assert ledger.verify().sound
        assert len(ledger.contents.acting()) == len(edits)
    assert_same(run, here)
    assert sorted(taken) == list(range(len(edits)))
    assert run.provenance["workers"]["engine"] == "ray"
    assert run.provenance["workers"]["lost"] >= 1
