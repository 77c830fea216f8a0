"""The training loop: it learns, goes on from a checkpoint with the same bits, and keeps the best parameters."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastedit.files import claim_file, open_tensors
from fastedit.training import Artifact, TrainerConfig, train_task
from tests.files.damage import refused_or_same


class Line:
    """Fits a line to points that are drawn anew at every step; a buffer counts the steps."""

    name = "line"
    fingerprint = "points"

    def __init__(self, *, break_at: int | None = None, scores: list[float] | None = None) -> None:
        self.slope = torch.zeros(3, 1, requires_grad=True)
        self.offset = torch.zeros(1, requires_grad=True)
        self.seen = torch.zeros(())
        self.break_at, self.scores, self.asked = break_at, scores, 0
        self.drawn: list[float] = []

    def parameters(self) -> Mapping[str, Tensor]:
        return {"slope": self.slope, "offset": self.offset}

    def groups(self) -> Mapping[str, float]:
        return {"offset": 10.0}

    def buffers(self) -> Mapping[str, Tensor]:
        return {"seen": self.seen}

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        if step == self.break_at:
            raise KeyboardInterrupt
        self.seen += 1
        x = torch.randn(8, 3)
        self.drawn.append(float(x[0, 0]))
        y = x @ torch.tensor([[1.0], [2.0], [3.0]]) + 4
        error = (x @ self.slope + self.offset - y).square().mean()
        return error, {"error": float(error.detach())}

    def validate(self) -> Mapping[str, float]:
        if self.scores is not None:
            self.asked += 1
            return {"score": self.scores[self.asked - 1]}
        true = torch.tensor([[1.0], [2.0], [3.0]])
        return {"score": -float((self.slope.detach() - true).square().sum()), "noise": float(torch.rand(()))}

    def result(self) -> Artifact:
        tensors = {"slope": self.slope.detach(), "offset": self.offset.detach(), "seen": self.seen}
        return Artifact("line", "m", {"width": 3}, tensors, {"task": 1})


CONFIG = TrainerConfig(steps=60, lr=0.05, warmup=5, valid_every=20, checkpoint_every=10, patience=None)


def test_it_learns_and_tells_how_it_went() -> None:
    made = train_task(Line(), TrainerConfig(steps=300, lr=0.05, valid_every=100))
    assert torch.allclose(made.tensors["slope"].flatten(), torch.tensor([1.0, 2.0, 3.0]), atol=0.05)
    assert made.tensors["offset"].item() == pytest.approx(4, abs=0.1)
    assert [entry["step"] for entry in made.metrics["validation"]] == [100, 200, 300]
    assert made.metrics["steps"] == 300
    assert made.metrics["task"] == 1
    assert made.metrics["best"] in made.metrics["validation"]


@pytest.mark.parametrize("break_at", [25, 40, 59])
def test_a_broken_off_run_ends_with_the_same_bits(tmp_path: Path, break_at: int) -> None:
    whole = train_task(Line(), CONFIG)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_task(Line(break_at=break_at), CONFIG, checkpoint=path)
    resumed = Line()
    again = train_task(resumed, CONFIG, checkpoint=path)
    assert len(resumed.drawn) == 60 - break_at // 10 * 10
    assert again.id == whole.id
    assert again.metrics["validation"] == whole.metrics["validation"]
    # A run that has ended is not trained again
    finished = Line(break_at=0)
    assert train_task(finished, CONFIG, checkpoint=path).id == whole.id
    assert finished.drawn == []
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_resume_can_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train_task(Line(), CONFIG, checkpoint=path)
    anew = Line()
    train_task(anew, CONFIG, checkpoint=path, resume=False)
    assert len(anew.drawn) == 60


@pytest.mark.parametrize(
    ("change", "named"),
    [({"fingerprint": "others"}, "fingerprint='points', now 'others'"), ({"name": "curve"}, "task='line'")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, str], named: str) -> None:
    path = tmp_path / "state.safetensors"
    train_task(Line(), CONFIG, checkpoint=path)
    other = Line()
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(ValueError, match=named):
        train_task(other, CONFIG, checkpoint=path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train_task(Line(), CONFIG, checkpoint=path)
    with pytest.raises(ValueError, match="resume=False"):
        train_task(Line(), TrainerConfig(steps=60, lr=0.06), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="whole safetensors file"):
        train_task(Line(), CONFIG, checkpoint=path)


def test_the_best_parameters_are_kept_and_training_stops() -> None:
    task = Line(scores=[0.1, 0.9, 0.5, 0.9, 0.99])
    config = TrainerConfig(steps=500, lr=0.05, valid_every=10, patience=2)
    made = train_task(task, config)
    assert made.metrics["steps"] == 40
    assert made.metrics["best"] == {"score": 0.9, "step": 20}
    only = Line()
    train_task(only, TrainerConfig(steps=20, lr=0.05, valid_every=None))
    assert torch.equal(made.tensors["slope"], only.slope.detach())
    # Buffers too are those of the best step
    assert made.tensors["seen"].item() == 20


def test_the_best_parameters_outlive_a_break(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_task(Line(scores=[0.9, 0.5], break_at=45), CONFIG, checkpoint=path)
    made = train_task(Line(scores=[0.4]), CONFIG, checkpoint=path)
    assert made.metrics["best"] == {"score": 0.9, "step": 20}
    assert made.id == train_task(Line(scores=[0.9, 0.5, 0.4]), CONFIG).id


def test_scores_that_are_not_numbers_are_never_the_best() -> None:
    made = train_task(Line(scores=[float("nan"), 0.2]), TrainerConfig(steps=20, valid_every=10))
    assert made.metrics["best"]["step"] == 20


def test_without_validation_the_last_parameters_are_kept() -> None:
    task = Line()
    made = train_task(task, TrainerConfig(steps=7, lr=0.05, valid_every=None))
    assert made.metrics["best"] is None
    assert torch.equal(made.tensors["slope"], task.slope.detach())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_breaks_keeps_the_last_good_checkpoint(tmp_path: Path, where: str) -> None:
    class Breaks(Line):
        def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
            error, told = super().loss(step)
            if step == 13 and where == "loss":
                return error * torch.inf, told
            # sqrt at zero: the loss is finite, its gradient is not
            return (error + (self.offset - self.offset).sqrt().sum(), told) if step == 13 else (error, told)

    path = tmp_path / "state.safetensors"
    with pytest.raises(FloatingPointError, match=rf"got step=13, .*{where}.*kept in .*state\.safetensors"):
        train_task(Breaks(), CONFIG, checkpoint=path)
    # What was kept is the state of step 10
    whole, again = train_task(Line(), CONFIG), train_task(Line(), CONFIG, checkpoint=path)
    assert again.id == whole.id
    with pytest.raises(FloatingPointError, match="no checkpoint was asked for"):
        train_task(Breaks(), CONFIG)


def test_learning_rates_warm_up_and_differ_by_group() -> None:
    # The first step of Adam has the size of its rate, whatever the gradient
    task = Line()
    train_task(task, TrainerConfig(steps=1, lr=0.01, warmup=4, valid_every=None, clip=None))
    assert task.slope.detach().abs().flatten().tolist() == pytest.approx([0.01 / 4] * 3, rel=1e-3)
    assert abs(task.offset.item()) == pytest.approx(0.1 / 4, rel=1e-3)


def test_the_cosine_ends_low() -> None:
    before = Line()
    config = {"lr": 0.01, "warmup": 0, "schedule": "cosine", "valid_every": None, "betas": (0.0, 0.0)}
    train_task(before, TrainerConfig(steps=2, **config))  # type: ignore[arg-type]
    moved = []
    for steps in (1, 2):
        task = Line()
        train_task(task, TrainerConfig(steps=steps, **config))  # type: ignore[arg-type]
        moved.append(task.slope.detach())
    # Without moments every step of Adam has the size of its rate: 1 and then 0.505 of it
    assert moved[0].abs().flatten().tolist() == pytest.approx([0.01] * 3, rel=1e-3)
    assert (moved[1] - moved[0]).abs().flatten().tolist() == pytest.approx([0.00505] * 3, rel=1e-3)


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    one, two, other = Line(), Line(), Line()
    train_task(one, CONFIG)
    second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), expected)
    train_task(two, CONFIG)
    assert one.drawn == two.drawn
    assert len(set(one.drawn)) == 60
    train_task(other, TrainerConfig(steps=60, seed=1))
    assert not set(other.drawn) & set(one.drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps is not negative"),
        ({"lr": 0.0}, "lr is positive"),
        ({"clip": 0.0}, "clip is positive or None"),
        ({"patience": 0}, "patience is at least 1"),
        ({"valid_every": 0}, "valid_every is at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is at least 1"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"weight_decay": -1.0}, "weight_decay is not negative"),
        ({"schedule": "linear"}, "schedule is one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


def test_tasks_that_cannot_be_trained_are_refused() -> None:
    task = Line()
    task.slope = task.slope * 1
    with pytest.raises(ValueError, match=r"leaves that require gradients \(got 'slope'"):
        train_task(task, CONFIG)

    class Empty(Line):
        def parameters(self) -> Mapping[str, Tensor]:
            return {}

    class Mistyped(Line):
        def groups(self) -> Mapping[str, float]:
            return {"offsets": 1.0}

    class Silent(Line):
        def validate(self) -> Mapping[str, float]:
            return {"loss": 1.0}

    with pytest.raises(ValueError, match="at least one parameter"):
        train_task(Empty(), CONFIG)
    with pytest.raises(ValueError, match=r"groups name parameters \(got 'offsets'\)"):
        train_task(Mistyped(), CONFIG)
    with pytest.raises(ValueError, match="validation gives 'score'"):
        train_task(Silent(), CONFIG)


def test_a_flipped_bit_in_a_checkpoint_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    whole = train_task(Line(), CONFIG, checkpoint=path)

    def go_on() -> Artifact:
        # It has ended: what is read is what comes out
        return train_task(Line(break_at=0), CONFIG, checkpoint=path)

    def same(made: Artifact) -> bool:
        return (made.id, made.metrics["validation"]) == (whole.id, whole.metrics["validation"])

    assert refused_or_same(path, go_on, same) >= 500
    assert same(go_on())


def test_a_checkpoint_without_a_checksum_is_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    whole = train_task(Line(), CONFIG, checkpoint=path)
    with open_tensors(path, "test") as (file, header, _):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"fastedit": json.dumps(header)})
    with pytest.warns(UserWarning, match=r"state\.safetensors was written without a checksum"):
        assert train_task(Line(break_at=0), CONFIG, checkpoint=path).id == whole.id


@pytest.mark.parametrize("field", ["step", "waited", "history", "seconds"])
def test_a_checkpoint_that_lacks_a_field_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "state.safetensors"
    train_task(Line(), CONFIG, checkpoint=path)
    with open_tensors(path, "test") as (file, header, _):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for value in ({}, {field: "x"} if field != "history" else {}):
        metadata = {"fastedit": json.dumps({**{k: v for k, v in header.items() if k != field}, **value})}
        save_file(tensors, path, metadata=metadata)
        with (
            pytest.warns(UserWarning, match="without"),
            pytest.raises(ValueError, match=r"a whole checkpoint .*state\.safetensors"),
        ):
            train_task(Line(), CONFIG, checkpoint=path)


def test_a_checkpoint_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    other = threading.Thread(target=lambda: errors.append(attempt()))
    errors: list[str] = []

    def attempt() -> str:
        with pytest.raises(ValueError, match="one process writes at a time") as caught:
            train_task(Line(), CONFIG, checkpoint=path)
        return str(caught.value)

    with claim_file(path, "test"):
        other.start()
        other.join()
    assert str(path) in errors[0]
    train_task(Line(), CONFIG, checkpoint=path)
    assert list(tmp_path.iterdir()) == [path]


def test_parameters_that_broke_are_not_written(tmp_path: Path) -> None:
    class Breaks(Line):
        def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
            error, told = super().loss(step)
            if step == 19:
                with torch.no_grad():
                    self.slope[0] = torch.nan
                # the loss of this step is that of the parameters before
            return error, told

    path = tmp_path / "state.safetensors"
    with pytest.raises(FloatingPointError, match=r"got step=20, slope with values .* kept in .*state\.safetensors"):
        train_task(Breaks(), TrainerConfig(steps=60, valid_every=None, checkpoint_every=10, clip=None), checkpoint=path)


class Short(Line):
    """A line for which there is no room at some calls of ``loss``, after the buffer was changed, or of ``validate``."""

    def __init__(self, calls: set[int], *, validations: set[int] | None = None) -> None:
        super().__init__()
        self.calls, self.validations, self.losses, self.validated = calls, validations or set(), 0, 0

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        found = super().loss(step)
        self.losses += 1
        if self.losses in self.calls:
            raise MemoryError("std::bad_alloc")
        return found

    def validate(self) -> Mapping[str, float]:
        self.validated += 1
        if self.validated in self.validations:
            raise MemoryError("std::bad_alloc")
        return super().validate()


def test_a_step_that_can_be_recovered_from_is_made_once_more() -> None:
    whole, released = train_task(Line(), CONFIG), []

    def recover(error: BaseException) -> Any:
        return (lambda: released.append(error)) if isinstance(error, MemoryError) else None

    made = train_task(Short({3, 20, 33}, validations={2}), CONFIG, recover=recover)
    assert made.id == whole.id
    assert made.metrics["validation"] == whole.metrics["validation"]
    assert len(released) == 4
    # Once only, and not without anyone to ask
    with pytest.raises(MemoryError):
        train_task(Short({3, 4}), CONFIG, recover=recover)
    with pytest.raises(MemoryError):
        train_task(Short({3}), CONFIG)


class Climbing(Line):
    """Losses that grow by the step."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        error, told = super().loss(step)
        return error * 0 + 1.0 + step, told


def test_training_that_goes_nowhere_says_so(tmp_path: Path) -> None:
    assert train_task(Line(), CONFIG).metrics["status"] == "max_steps"
    stopped = TrainerConfig(steps=500, lr=0.05, valid_every=10, patience=2)
    assert train_task(Line(scores=[0.1, 0.9, 0.5, 0.4]), stopped).metrics["status"] == "early_stop"
    message = "mean loss of 5.5 over the first 10 steps, 55.5 over the last"
    with pytest.warns(RuntimeWarning, match=message):
        made = train_task(Climbing(scores=[0.5, 0.4, 0.3]), CONFIG)
    assert made.metrics["status"] == "diverging"
    # A multiplier may let the loss grow while validation gets better
    assert train_task(Climbing(scores=[0.3, 0.4, 0.5]), CONFIG).metrics["status"] == "max_steps"
    with pytest.warns(RuntimeWarning, match=r"no validation scored above 0 \(got \d+ validations\); try more steps"):
        train_task(Line(scores=[0.0] * 3), CONFIG)
    # What was broken off knows its first losses
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_task(Climbing(scores=[0.5, 0.4], break_at=45), CONFIG, checkpoint=path)
    with pytest.warns(RuntimeWarning, match=message):
        assert train_task(Climbing(scores=[0.3]), CONFIG, checkpoint=path).metrics["status"] == "diverging"


def test_parameters_and_scores_that_are_no_numbers_make_no_artifact() -> None:
    with pytest.raises(FloatingPointError, match="no finite score in 2 validations"):
        train_task(Line(scores=[float("nan"), float("inf")]), TrainerConfig(steps=20, valid_every=10))

    class Spoiled(Line):
        def validate(self) -> Mapping[str, float]:
            with torch.no_grad():
                self.slope[0] = torch.nan
            return {"score": 1.0}

    with pytest.raises(FloatingPointError, match="slope with values that are not finite"):
        train_task(Spoiled(), TrainerConfig(steps=10, valid_every=10))
