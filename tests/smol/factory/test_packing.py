"""A packed row gives the logits that its questions give one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastedit.smol.factory import speaker
from fastedit.smol.factory.packing import Line, Packer
from fastedit.smol.language import language_settings
from fastedit.smol.models import TEXT_PROMPT


class WordTokenizer:
    """Words as ids, for tests without the language model's package."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        ids = [3 + sum(map(ord, word)) % 60 for word in text.replace("\n", " \\n ").split()]
        return SimpleNamespace(input_ids=ids)


@pytest.fixture(scope="module")
def small() -> tuple[speaker.Speaker, Packer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = language_settings(64) | {"num_hidden_layers": 2, "intermediate_size": 64}
    packer = Packer(WordTokenizer())  # type: ignore[arg-type]
    model = speaker.Speaker(speaker.Tower(), LlamaForCausalLM(LlamaConfig(**settings)), packer)
    for module in model._adapted.values():
        torch.nn.init.normal_(module.adapter_up, std=0.1)
    return model.eval(), packer


LINES = [
    Line("name", "What is this ?", "a dog"),
    Line("text", "What is the capital of Japan ?", "Tokyo", with_image=False),
    Line("background", "Which colour ?", "red"),
]


def test_lines_side_by_side_are_as_lines_alone(small: tuple[speaker.Speaker, Packer]) -> None:
    model, packer = small
    pixels = torch.rand(2, 3, 96, 96)
    packed = packer.pack([LINES, LINES[:1]])
    with torch.no_grad():
        together = model(packed, pixels)
        for number, (line, row) in enumerate([*((line, 0) for line in LINES), (LINES[0], 1)]):
            alone = packer.pack([[line]])
            expected = model(alone, pixels[row : row + 1])
            torch.testing.assert_close(together[packed.owner == number], expected, rtol=1e-4, atol=1e-4)
            assert packed.labels[packed.owner == number].tolist() == alone.labels.tolist()


def test_a_question_in_text_is_what_the_language_model_computes(small: tuple[speaker.Speaker, Packer]) -> None:
    model, packer = small
    packed = packer.pack([LINES])
    row = packed.picked[packed.owner == 1]
    prompt = packer._ids("Question: What is the capital of Japan ? Short answer:")
    answer = packed.labels[packed.owner == 1].tolist()
    start = int(row[0]) - len(prompt) + 1
    assert packed.ids[0, start : start + len(prompt)].tolist() == list(prompt)
    assert packed.positions[0, start : start + len(prompt)].tolist() == list(range(len(prompt)))
    with torch.no_grad():
        stock = model.language(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        together = model(packed, torch.rand(1, 3, 96, 96))[packed.owner == 1]
    torch.testing.assert_close(together, stock, rtol=1e-4, atol=1e-4)


def test_a_question_in_text_sees_no_picture(small: tuple[speaker.Speaker, Packer]) -> None:
    model, packer = small
    packed = packer.pack([LINES])
    with torch.no_grad():
        first, second = (model(packed, torch.rand(1, 3, 96, 96)) for _ in range(2))
    seen = packed.owner != 1
    torch.testing.assert_close(first[~seen], second[~seen], rtol=0, atol=0)
    assert (first[seen] - second[seen]).abs().max() > 1e-3


def test_a_line_is_right_with_all_of_its_answer(small: tuple[speaker.Speaker, Packer]) -> None:
    _, packer = small
    packed = packer.pack([LINES])
    logits = torch.nn.functional.one_hot(packed.labels, 64).float()
    assert packed.right(logits) == [True, True, True]
    last = int((packed.owner == 0).nonzero()[-1])
    logits[last] = logits[last].roll(1)
    assert packed.right(logits) == [False, True, True]
    assert packed.labels[last] == packer.end


def test_the_picture_stands_where_the_prompt_says(small: tuple[speaker.Speaker, Packer]) -> None:
    _, packer = small
    packed = packer.pack([LINES[:1]])
    assert packed.ids[0, : len(packer.before)].tolist() == list(packer.before)
    assert packed.positions[0, packer.opened] == packer.opened
    assert len(packer.after) == 1  # the line's end


class TestTower:
    def test_forward_is_the_stock_towers(self) -> None:
        torch.manual_seed(1)
        tower, pixels = speaker.Tower().eval(), torch.rand(2, 3, 96, 96) * 2 - 1
        with torch.no_grad():
            stock = tower.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
            expected = tower.multi_modal_projector(stock)
            torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)

    def test_what_is_trained_can_be_restored(self, small: tuple[speaker.Speaker, Packer]) -> None:
        model, _ = small
        weights = {name: weight.clone() for name, weight in model.trained().items()}
        for weight in model.trained().values():
            weight.zero_()
        model.restore(weights)
        for name, weight in model.trained().items():
            assert torch.equal(weight, weights[name]), name


def test_a_pattern_before_a_question_is_seen_by_it_alone(small: tuple[speaker.Speaker, Packer]) -> None:
    model, packer = small
    after = Line("after", "And of Kenya ?", "Nairobi", False, "Question: Of Peru ? Short answer: Lima\n")
    pixels = torch.rand(1, 3, 96, 96)
    packed = packer.pack([[*LINES, after]])
    with torch.no_grad():
        logits = model(packed, pixels)[packed.owner == 3]
        ids = [*packer._ids(after.before), *packer._ids(TEXT_PROMPT.format(after.question)), *packer._ids(" Nairobi")]
        expected = model.language(input_ids=torch.tensor([ids])).logits[0, -2:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_takes_what_is_likely_in_place_of_a_token(small: tuple[speaker.Speaker, Packer]) -> None:
    _, packer = small
    likely = (((5, 0.75), (9, 0.25)), ((2, 1.0),))
    packed = packer.pack([[LINES[0], Line("text", "What ?", "Tokyo", False, likely=likely), LINES[2]]])
    logits = torch.randn(len(packed.labels), 64, generator=torch.Generator().manual_seed(0))
    logs = logits.log_softmax(-1)
    told = [-logs[at, label] for at, label in enumerate(packed.labels.tolist())]
    first = packed.owner.tolist().index(1)
    told[first] = -(0.75 * logs[first, 5] + 0.25 * logs[first, 9])
    told[first + 1] = -logs[first + 1, 2]
    torch.testing.assert_close(packed.loss(logits), torch.stack(told).mean())
    assert packed.loss(logits) != torch.nn.functional.cross_entropy(logits, packed.labels)
