"""Several processes train one part: the state is that of one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.training import processes
from fastedit.training.state import State
from tests.training import distributed

#: Of losses, relative. What is trained is float32, whatever the model is: the rounding of the networks whose gradients
#: are small is the larger part of theirs.
TOLERANCE = {"ke": 5e-6, "unike": 5e-6}
#: Of trained tensors: Adam moves by rounding what has hardly a gradient.
OF_TENSORS = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="module")
def broken_off(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training that one process with the whole batch was stopped in, after its checkpoint."""
    folder = tmp_path_factory.mktemp("processes")

    def stop(self: State) -> dict[str, float]:
        if self.step == distributed.STEPS:
            raise KeyboardInterrupt
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "told", stop)
        with pytest.raises(KeyboardInterrupt):
            distributed.trained(model, "mend", distributed.WHOLE_BATCH, folder / "mend.safetensors")
    assert [path.name for path in folder.iterdir()] == ["mend.safetensors.training"]
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastedit.__file__).parents[1])}


@pytest.fixture(scope="module")
def told(broken_off: Path) -> list[dict[str, Any]]:
    """What each of two processes says, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", distributed.__file__, str(broken_off)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((broken_off / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method", list(distributed.METHODS))
def test_two_processes_are_one_with_twice_the_batch(model: Any, told: list[dict[str, Any]], method: str) -> None:
    one, (first, second) = distributed.trained(model, method, distributed.WHOLE_BATCH), (each[method] for each in told)
    close = TOLERANCE.get(method, 1e-6)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=close)
    assert len(set(first["losses"])) == distributed.STEPS
    assert first["scores"] == second["scores"] == pytest.approx(one["scores"])
    for each in (first, second):
        assert each["sizes"] == pytest.approx(one["sizes"], rel=OF_TENSORS)


def test_two_processes_go_on_from_what_one_began(told: list[dict[str, Any]], broken_off: Path) -> None:
    first, second = (each["resumed"] for each in told)
    # The checkpoint is that of step 2: one step is left
    assert first["losses"] == second["losses"] == pytest.approx(told[0]["mend"]["losses"][2:], rel=1e-6)
    assert first["sizes"] == pytest.approx(told[0]["mend"]["sizes"], rel=OF_TENSORS)
    # The first process wrote the artifact, once, and nothing is left of the training
    assert sorted(path.name for path in broken_off.iterdir()) == [
        "0.json",
        "1.json",
        "ke.safetensors",
        "mend.safetensors",
    ]
    made = fastedit.load_artifact(broken_off / "mend.safetensors")
    assert made.metrics["trainer"]["batch_size"] == distributed.WHOLE_BATCH


def test_each_record_is_one_process_s(told: list[dict[str, Any]]) -> None:
    assert [each["own"] for each in told] == [[0, 1], [2, 3, 4]]


def test_processes_that_were_asked_for_different_work_are_refused(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["different_rates"].startswith(
            "train: processes that train together are given the same (got trainer="
        )
        assert "in process 1)" in each["different_rates"]
        assert "batch_size=4" in each["different_sizes"]
        assert "batch_size=6" in each["different_sizes"]


def test_one_process_may_train_alone(model: Any, told: list[dict[str, Any]]) -> None:
    one, alone = distributed.trained(model, "ke", distributed.WHOLE_BATCH), told[1]["alone"]
    assert told[0]["alone"] is None
    assert alone["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert alone["scores"] == pytest.approx(one["scores"])
    with processes.apart():
        assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)


def test_a_model_in_several_places_trains_inside_each_process(told: list[dict[str, Any]]) -> None:
    pytest.importorskip("accelerate")
    whole = fastedit.load("pocket-llava")
    one = distributed.trained(whole, "ke", distributed.WHOLE_BATCH)
    first, second = (each["spread"] for each in told)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(first["losses"])) == distributed.STEPS


def test_accelerate_starts_them_as_well(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "ke.safetensors"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    # A port that is free: the default may be another run's
    with socket.socket() as free:
        free.bind(("localhost", 0))
        command += [f"--main_process_port={free.getsockname()[1]}", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "-m", "fastedit", *distributed.arguments(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    assert fastedit.load_artifact(out).metrics["trainer"]["batch_size"] == 2, "two processes, one record each"


def test_a_launcher_that_tells_half_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"started by torchrun or accelerate launch.*\(got WORLD_SIZE=2 and no RANK\)"):
        distributed.trained(model, "mend", 2)


def test_a_gpu_is_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"uuid": "one"}))

    def gather(everyone: list[Any], mine: Any) -> None:
        everyone[:] = [mine, mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"a GPU of its own.*\(got processes \[0, 1\] on one\)"):
        processes.require_alike({}, torch.device("cuda"))


def test_the_command_line_speaks_once(told: list[dict[str, Any]], broken_off: Path) -> None:
    first, second = (each["command"] for each in told)
    assert first.count("saved to") == 1
    assert second == ""
    made = fastedit.load_artifact(broken_off / "ke.safetensors")
    assert (made.kind, made.metrics["trainer"]["batch_size"]) == ("ke", 2)
