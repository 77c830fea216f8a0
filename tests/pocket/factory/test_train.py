from __future__ import annotations

import dataclasses

import pytest
import torch

from fastedit.pocket import model_path
from fastedit.pocket.factory.mixture import CLAIM_KINDS, KINDS, Mix, held_out
from fastedit.pocket.factory.optimiser import Optimiser
from fastedit.pocket.factory.packing import Packer
from fastedit.pocket.factory.recipe import RECIPES
from fastedit.pocket.factory.release import load
from fastedit.pocket.factory.train import Trainer, commands, continue_from, measure, weights

pytest.importorskip("easy_vqa", reason="easy-vqa is not installed (training reads its images)")


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer("pocket-llava", 0, dataclasses.replace(RECIPES["pocket-llava"], align_steps=12, align_rows=16))


def test_alignment_learns(trainer: Trainer) -> None:
    reached = trainer.align()
    assert reached["background"] > 0.35  # chance is 0.25


def test_a_few_steps_lower_the_loss(trainer: Trainer) -> None:
    mix = Mix(questions=False, budget=80, rows=8)
    optimiser = Optimiser(trainer.model, trainer.recipe, 24)
    losses = []
    for _ in range(24):
        rows, images = trainer.mixer.batch(mix)
        loss, right = trainer.losses(rows, torch.stack([image_tensor(image) for image in images]), mix)
        assert len(right) == sum(len(row) for row in rows)
        optimiser.step(loss)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def image_tensor(image: object) -> torch.Tensor:
    from fastedit.pocket.models import to_pixels

    return to_pixels([image])[0]  # type: ignore[list-item]


def test_failing_kinds_are_asked_and_weighed_more() -> None:
    mix = Trainer.reweighted(Mix(), {"colour": 1.0, "relation": 0.5, "fact": 0.9})
    assert mix.kinds["relation"] > 3 * mix.kinds["colour"]
    assert mix.loss["relation"] > mix.loss["fact"] > mix.loss["colour"] == 1.0


def test_rows_have_every_kind(trainer: Trainer) -> None:
    seen = set()
    for _ in range(12):
        rows, images = trainer.mixer.batch(Mix())
        assert len(rows) == len(images) == 32
        seen |= {line.kind for row in rows for line in row}
        assert all(sum(trainer.packer.cost(line) for line in row) <= 176 for row in rows)
    assert seen == {*KINDS, *CLAIM_KINDS, "caption", "fact", "easy"}


@pytest.mark.parametrize(
    "kind",
    [
        "colour",
        "caption",
        "easy",
        "fact_untrained",
        "unseen:shape",
        "sides",
        "flag_continent",
        "reworded:colour",
        "reworded:caption",
        "reworded:fact",
        "flag_denied",
    ],
)
def test_held_out_samples_are_fixed(kind: str) -> None:
    first, second = held_out(kind, 12), held_out(kind, 12)
    assert [line for line, _ in first] == [line for line, _ in second]
    assert len(first) == 12
    assert all(line.answer for line, _ in first)


def test_a_release_goes_on_with_another_vocabulary(trainer: Trainer) -> None:
    fresh = Trainer("pocket-llava", 3, trainer.recipe)
    before = load(model_path("pocket-llava"))[1].tokenizer.get_vocab()
    # Words in another order, as many as before
    assert before != fresh.tokenizer.get_vocab()
    continue_from(fresh.model, fresh.tokenizer, model_path("pocket-llava"))
    kinds = ("colour", "where", "count", "flag_colours")
    assert min(measure(fresh.model, Packer(fresh.tokenizer, fresh.wiring), kinds, 30).values()) > 0.9


def test_training_is_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        small = dataclasses.replace(RECIPES["pocket-llava"], align_steps=2, align_rows=4)
        trainer = Trainer("pocket-llava", seed, small)
        trainer.align()
        trainer.cycle(Mix(questions=False, budget=80, rows=2), 2, "test")
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_last_cycle_can_be_told_what_to_ask_more() -> None:
    told = weights(["check=4", "denied=1.5"])
    assert told == {"check": 4.0, "denied": 1.5}
    line = commands("pocket-llava", 0, RECIPES["pocket-llava"], 24, {"kinds": told, "loss": {"caption": 2.0}})
    assert "--rows 24 --last-kinds check=4 denied=1.5 --last-loss caption=2 --out DIR && " in line
    for pair in ("chekc=4", "check=0"):
        with pytest.raises(ValueError, match=r"a weight is KIND=NUMBER, of one of .* and above 0 \(got che"):
            weights([pair])
