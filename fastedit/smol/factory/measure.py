"""What smol-llava answers rightly, on its folder as it ships, on pictures never seen, in both sets of wordings.

An answer counts if every token of it, the end included, is the likeliest one: what greedy generation gives.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from fastedit.pocket.models import to_pixels
from fastedit.smol.concepts import FLAG, concepts
from fastedit.smol.factory.optimiser import FAST_BF16
from fastedit.smol.factory.packing import Line, Packed, Packer
from fastedit.smol.factory.teacher import Taught, kept_for_measuring, told_rightly
from fastedit.smol.facts import Fact, facts, known
from fastedit.smol.grammar import SCENE_KINDS, Question, answer_to, ask
from fastedit.smol.models import IMAGE_TOKENS
from fastedit.smol.scenes import BACKGROUNDS, Scene, Shown, draw_scene, render
from fastedit.smol.split import concepts_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration

Ask = tuple[Scene, list[Line]]
_ROWS = 16


def logits(model: LlavaForConditionalGeneration, packer: Packer, packed: Packed, pixels: Tensor) -> Tensor:
    """Return the logits (T, V) of the assembled model where an answer's token is predicted."""
    inner = model.model
    embeds = inner.get_input_embeddings()(packed.ids)
    features: Any = inner.get_image_features(pixel_values=pixels.to(embeds.dtype)).pooler_output
    images = torch.stack(list(features)) if isinstance(features, (list, tuple)) else features
    start = len(packer.before)
    embeds = torch.cat([embeds[:, :start], images, embeds[:, start + IMAGE_TOKENS :]], 1)
    mask = torch.zeros(packed.mask.shape, dtype=embeds.dtype).masked_fill_(~packed.mask, -1e9)
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return linear(hidden.flatten(0, 1)[packed.picked], model.lm_head.weight)


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, Packer]:
    """Return the model of a folder, eval mode, and its packer: bfloat16 as it ships, float32 where that is faster."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    dtype = torch.bfloat16 if FAST_BF16 else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return model, Packer(AutoTokenizer.from_pretrained(folder))


def shares(
    model: LlavaForConditionalGeneration, packer: Packer, asked: Sequence[Ask], note: Callable[[Scene, Line], None]
) -> dict[str, float]:
    """Return the share of right answers by kind; `note` is told of each wrong one."""
    right: dict[str, list[bool]] = defaultdict(list)
    order = sorted(asked, key=lambda pair: sum(len(line.question) for line in pair[1]))
    for at in range(0, len(order), _ROWS):
        part = order[at : at + _ROWS]
        packed = packer.pack([lines for _, lines in part])
        pixels = to_pixels([render(scene) for scene, _ in part])
        with torch.no_grad():
            answered = iter(packed.right(logits(model, packer, packed, pixels)))
        for scene, lines in part:
            for line, is_right in zip(lines, answered, strict=False):
                right[line.kind].append(is_right)
                if not is_right:
                    note(scene, line)
    return {kind: round(sum(each) / len(each), 4) for kind, each in sorted(right.items())}


def _both(kind: str, question: Question, rng: random.Random) -> list[Line]:
    return [
        Line(kind, rng.choice(question.prompts), question.answer),
        Line(f"{kind}/unseen", rng.choice(question.unseen), question.answer),
    ]


def names(renderings: int, seed: int = 1) -> Iterator[Ask]:
    """Yield each concept alone, so many times, and the question what it is, in both sets of wordings."""
    rng = random.Random(f"names:{seed}")
    for concept in concepts():
        kind = "flag" if concept.kind == FLAG else "name"
        for _ in range(renderings):
            scene = Scene((Shown(concept.name, "centre"),), rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32))
            answer = answer_to(kind, (), scene)
            yield scene, _both(kind, Question(kind, (), str(answer)), rng)


def others(samples: int, seed: int = 1) -> Iterator[Ask]:
    """Yield scenes and, so many times each, the other kinds of questions, in both sets of wordings."""
    rng = random.Random(f"others:{seed}")
    every = tuple(concept.name for concept in concepts())
    left = dict.fromkeys([kind for kind in SCENE_KINDS if kind not in ("name", "flag")], samples)
    while any(count > 0 for count in left.values()):
        scene = draw_scene(rng, every, layout=rng.choice(("one", "pair", "pair", "copies")))
        lines: list[Line] = []
        for kind in left:
            question = ask(scene, kind, rng) if left[kind] > 0 else None
            if question is not None:
                left[kind] -= 1
                lines += _both(kind, question, rng)
        if lines:
            yield scene, lines


#: Says of each (relation, question) what the unchanged language model answers, "" where it does not end.
Unchanged = Callable[[Sequence[tuple[str, str]]], list[str]]


def texts(taught: Sequence[Taught], unchanged: Unchanged | None = None, limit: int = 300) -> Iterator[Ask]:
    """Yield text questions on facts that training never asked for.

    "known": what the unchanged language model answers rightly in two wordings, here in any wording, and right is the
    truth. "as unchanged": the same questions, right is what the unchanged model says to them behind a pattern.
    "guesses": its wrong answers.
    """
    rng = random.Random("texts")
    facts_kept = [fact for fact in known() if kept_for_measuring(fact.relation, fact.subject)]
    lines, asked = [], []
    for fact in rng.choices(facts_kept, k=limit):
        for kind, prompts in (("", fact.prompts()), ("/unseen", fact.prompts(unseen=True))):
            prompt = rng.choice(prompts)
            lines.append(Line(f"known{kind}", prompt, fact.answer, with_image=False))
            asked.append((fact.relation, prompt))
    for line, answer in zip(tuple(lines), unchanged(asked) if unchanged else (), strict=False):
        if answer:
            lines.append(dataclasses.replace(line, kind=line.kind.replace("known", "as unchanged"), answer=answer))
    wrong = [one for one in taught if one.measured and one.truth and one.answer != one.truth]
    lines += [
        Line("guesses", one.prompt, one.answer, with_image=False)
        for one in rng.sample(wrong, min(limit // 3, len(wrong)))
    ]
    scene = Scene((Shown(concepts()[0].name, "centre"),), next(iter(BACKGROUNDS)), 0)
    for at in range(0, len(lines), 8):
        yield scene, lines[at : at + 8]


def knowledge(taught: Sequence[Taught], seed: int = 1) -> Iterator[Ask]:
    """Yield pictures and what their subject is known for, where the unchanged model's answers in text are right."""
    rng = random.Random(f"knowledge:{seed}")
    right = told_rightly(taught)
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts():
        if right.get((fact.relation, fact.subject)):
            by_subject[fact.subject].append(fact)
    train = frozenset(concepts_of("train"))
    for subject, its_facts in by_subject.items():
        lines = []
        for fact in its_facts:
            trained = subject in train and not kept_for_measuring(fact.relation, subject)
            where = "trained" if trained else "never_asked"
            lines.append(Line(f"{fact.relation}/{where}", rng.choice(fact.seen_prompts()), fact.answer))
            lines.append(Line(f"{fact.relation}/text", rng.choice(fact.prompts()), fact.answer, with_image=False))
        yield Scene((Shown(subject, "centre"),), rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32)), lines
