"""The disentanglement classifier: what it says of pairs, which edit acts, what happens where several claim a prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.routers.agreement import Agreement
from fastedit.routers.claims import Claims
from fastedit.routers.classifier import (
    ANSWER,
    MARGIN,
    RATIO,
    SAME_IMAGE,
    ClassifierRouter,
    ClassifierShape,
    Disentangler,
    answer_numbers,
    log_odds,
    settled,
)
from fastedit.routers.features import prompt_tokens
from fastedit.training import Artifact
from tests.engine.conftest import picture

POINT = (1, "attention")
QUERIES = [
    Query("what colour is it ?", picture(1)),
    Query("who ?", None),
    Query("where is the large one in here ?", picture(2)),
    Query("who is that ?", None),
]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny")


@pytest.fixture(scope="module")
def artifact(model: EditableModel) -> Artifact:
    made = Disentangler(ClassifierShape(model.hidden_size, size=12, queries=2, key=5), seed=4)
    made.threshold.fill_(0.25).log_()
    return Artifact("ldke", model.fingerprint, {"classifier": made.settings()}, made.tensors())


def walked(model: EditableModel, queries: list[Query]) -> Any:
    return packed_prefix(model, packed_start(model, model.encode(queries, answers=False)), *POINT)


def router(
    model: EditableModel, artifact: Artifact, texts: list[dict[str, str]] | None = None, **options: Any
) -> ClassifierRouter:
    texts = [{}] * len(QUERIES) if texts is None else texts
    model.artifacts[artifact.id] = artifact
    stacked: Any = SimpleNamespace(spec=SimpleNamespace(options={"artifact": artifact.id, **options}), texts=texts)
    return ClassifierRouter(model, stacked)


def memory(model: EditableModel, artifact: Artifact, queries: list[Query]) -> dict[str, torch.Tensor]:
    tokens = prompt_tokens(walked(model, queries))
    with torch.no_grad():
        entity, relation = Disentangler.of(artifact, model.device)(tokens)
    return {"entity": entity, "relation": relation, "image": tokens.centre()}


def test_the_probability_is_the_product_of_the_heads(artifact: Artifact, model: EditableModel) -> None:
    made = Disentangler.of(artifact, model.device)
    entity, relation = torch.linspace(-1, 1, 5), torch.linspace(1, -0.5, 5)
    expected = torch.sigmoid(10 * entity - 5) * torch.sigmoid(10 * relation - 5)
    torch.testing.assert_close(made.log_probability(entity, relation).exp(), expected)
    assert not any(p.requires_grad for p in made.parameters())


def test_what_has_no_image_has_one_entity(artifact: Artifact, model: EditableModel) -> None:
    found = memory(model, artifact, QUERIES)
    torch.testing.assert_close(found["entity"].norm(dim=1), torch.ones(4))
    assert torch.equal(found["entity"][1], found["entity"][3])
    assert not torch.allclose(found["entity"][0], found["entity"][2])
    assert not torch.allclose(found["relation"][1], found["relation"][3])


def test_a_row_is_scored_against_its_own_edit_or_all(artifact: Artifact, model: EditableModel) -> None:
    made, fixed = router(model, artifact, threshold=0.999999), memory(model, artifact, QUERIES)
    state = walked(model, QUERIES)
    own = torch.tensor([0, 0, 2, 1])
    each = made.scores(state, fixed, own)
    # Nothing reaches the threshold, so no edit is taken out
    every = made.scores(state, fixed, None)
    assert every.shape == (4, 4)
    torch.testing.assert_close(each, every.gather(1, own[:, None])[:, 0])
    assert float(each[0]) == pytest.approx(2 * float(torch.sigmoid(torch.tensor(5.0)).log()), abs=1e-5)
    assert bool((every <= 0).all())


def test_the_threshold_is_that_of_training_or_the_one_given(artifact: Artifact, model: EditableModel) -> None:
    fixed = memory(model, artifact, QUERIES[:3])
    expected = torch.full((3,), 0.25).log()
    torch.testing.assert_close(router(model, artifact).threshold(fixed), expected)
    torch.testing.assert_close(router(model, artifact, threshold=0.5).threshold(fixed), torch.full((3,), 0.5).log())


def test_a_classifier_that_is_not_there_is_named(artifact: Artifact, model: EditableModel) -> None:
    stacked: Any = SimpleNamespace(spec=SimpleNamespace(options={"artifact": "0" * 64}))
    with pytest.raises(ValueError, match=r"fastedit\.load_artifact"):
        ClassifierRouter(model, stacked)


def centres(*angles: float) -> torch.Tensor:
    turned = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([turned.cos(), turned.sin()], 1)


LEAST = -0.5
NONE = -torch.inf
DIFFERENT = answer_numbers([None] * 3)


@pytest.mark.parametrize(
    ("scores", "asked", "stored", "winner"),
    [
        ([-0.1, -0.9, -2.0], 0.0, (1.0, 0.0, 0.0), 0),  # one claim stands, however far its image is
        ([-0.9, -0.9, -2.0], 0.0, (0.0, 0.0, 0.0), None),  # no claim
        ([-0.1, -0.2, -2.0], 0.0, (0.5, 0.0, 0.0), 1),  # made on this very image, though its score is less
        ([-0.2, -0.2, -0.1], 0.0, (0.0, 1e-3, 0.5), 1),  # the newest of two such
        ([-0.1, -0.2, -0.2], 0.0, (0.0, 1e-3, 0.5), 0),  # the one that is more about the question
        ([-0.02, -0.1, -0.2], 0.0, (0.4, 0.3, 1.0), 0),  # by far the best score, though another image is nearer
        ([-0.1, -0.02, -0.03], 0.0, (0.4, 0.5, 1.0), None),  # a guess
        ([-0.1, -0.02, -0.03], 0.0, (0.01, 0.5, 1.0), 0),  # made on this very image
        ([-0.2, -0.15, -0.2], 0.0, (0.05, 0.5, 1.0), 0),  # of claims that are as good the one with by far the nearest
        ([-0.2, -0.15, -0.2], 0.0, (0.2, 0.5, 1.0), None),  # nearest, but not by far
    ],
)
def test_where_several_edits_claim_a_prompt(
    scores: list[float], asked: float, stored: tuple[float, ...], winner: int | None
) -> None:
    given = torch.tensor([scores, [-3.0, -3.0, -3.0]])
    found = settled(given.clone(), LEAST, centres(asked, asked), centres(*stored), DIFFERENT)
    claims = given >= LEAST
    for edit in range(3):
        kept = not claims[0, edit] or edit == winner
        assert float(found[0, edit]) == (float(given[0, edit]) if kept else NONE)
    assert torch.equal(found[1], given[1])


@pytest.mark.parametrize(
    ("answers", "scores", "winner"),
    [
        (["peru", "peru", "peru"], [-0.1, -0.09, -0.1], 1),  # many pictures of one thing say the same of another
        (["peru", "peru", "peru"], [-0.1, -0.1, -0.1], 2),  # the newest of equal ones
        (["peru", "chad", "peru"], [-0.1, -0.09, -0.1], -1),  # one that says otherwise makes it a guess
        (["peru", "chad", "peru"], [-0.1, -0.3, -0.1], 2),  # not if its claim is far weaker
        (["peru", None, "peru"], [-0.1, -0.1, -0.1], -1),  # what is not known agrees with nothing
    ],
)
def test_claims_that_agree_are_no_dispute(answers: list[str | None], scores: list[float], winner: int) -> None:
    found = settled(torch.tensor([scores]), LEAST, centres(0.0), centres(0.4, 0.5, 0.6), answer_numbers(answers))
    acting = (found[0] >= LEAST).nonzero()[:, 0].tolist()
    assert acting == ([] if winner < 0 else [winner])


def test_the_router_reads_what_edits_answer(artifact: Artifact, model: EditableModel) -> None:
    """The same question about one thing, made twice on pictures that are not the one that is asked about."""
    fixed = memory(model, artifact, [QUERIES[0], QUERIES[0]])
    fixed["image"] = torch.roll(fixed["image"], 1, 1)
    state = walked(model, [QUERIES[0]])
    for second, acting in (("red", 1), ("blue", 0)):
        made = router(model, artifact, [{ANSWER: "red"}, {ANSWER: second}])
        assert int((made.scores(state, fixed, None) >= made.least).sum()) == acting


@pytest.mark.parametrize("level", [None, 0.5, 0.8])
@pytest.mark.parametrize("threshold", [0.02, 0.2, 0.6])
def test_claims_are_those_of_all_scores(
    artifact: Artifact, model: EditableModel, threshold: float, level: float | None
) -> None:
    if level is not None:
        known = Agreement(level=level, rate=0.01, scale=0.0, most=1.0, false_rate=0.01)
        artifact = replace(artifact, config={**artifact.config, "agreement": known.settings()})
    stored = [*QUERIES, *QUERIES[:2]]
    fixed = memory(model, artifact, stored)
    # Near the prompts, so that some claim and some do not, and several claim one
    for number, (name, spread) in enumerate((("entity", 0.3), ("relation", 0.3), ("image", 0.01))):
        noise = torch.randn(fixed[name].shape, generator=torch.Generator().manual_seed(number))
        fixed[name] = torch.nn.functional.normalize(fixed[name] + spread * noise / noise.shape[1] ** 0.5, dim=1)
    made = router(model, artifact, [{ANSWER: str(number % 3)} for number in range(6)], threshold=threshold)
    state = walked(model, QUERIES)
    claims = made.claims(state, fixed)
    dense = Claims.reaching(made.scores(state, fixed, None), made.threshold(fixed))
    assert len(dense.row)
    assert sorted(zip(claims.row.tolist(), claims.edit.tolist(), strict=True)) == list(
        zip(dense.row.tolist(), dense.edit.tolist(), strict=True)
    )
    torch.testing.assert_close(claims.score[claims.row.argsort()], dense.score)


def test_the_more_are_stored_the_more_images_must_agree(artifact: Artifact, model: EditableModel) -> None:
    known = Agreement(level=0.0, rate=0.01, scale=0.2, most=1.0, false_rate=0.01)
    artifact = replace(artifact, config={**artifact.config, "agreement": known.settings()})
    made = router(model, artifact, [{}] * 60, threshold=1e-9)
    state, fixed = walked(model, QUERIES[:1]), memory(model, artifact, QUERIES[:1])
    entity = fixed["entity"]
    away = torch.nn.functional.normalize(torch.randn(1, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    away = torch.nn.functional.normalize(away - (away @ entity.T) * entity, dim=1)
    fixed["entity"] = 0.6 * entity + 0.8 * away
    for count, claims in ((2, True), (60, False)):
        # Others claim nothing
        others = {name: -each.repeat(count - 1, 1) for name, each in memory(model, artifact, QUERIES[:1]).items()}
        stored = {name: torch.cat([each, others[name]]) for name, each in fixed.items()}
        assert (0 in made.claims(state, stored).edit.tolist()) is claims
        assert bool(made.scores(state, stored, None)[0, 0] >= made.least) is claims


@pytest.mark.parametrize(("slope", "least"), [((10.0, 10.0), -0.7), ((30.0, 5.0), -3.0), ((-4.0, 5.0), -0.7)])
def test_no_entity_below_the_bound_reaches_the_threshold(
    artifact: Artifact, model: EditableModel, slope: tuple[float, float], least: float
) -> None:
    made = Disentangler.of(artifact, model.device)
    made.slope.copy_(torch.tensor(slope))
    bound = made.least_entity(least)
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    best = made.log_probability(cosines[:, None], torch.tensor([-1.0, 1.0], dtype=torch.float64)).amax(1)
    reaching = cosines[best >= least]
    if slope[0] > 0:
        assert len(reaching)
        assert bound <= float(reaching.min()) <= bound + 2e-3
    else:
        assert bound == -torch.inf


def test_log_odds_are_finite_where_a_probability_rounds_to_one() -> None:
    p = torch.tensor([0.5, 0.9, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.logit(p))
    assert bool(log_odds(torch.tensor([0.0, -1e-9])).isfinite().all())


def test_two_edits_of_text_are_told_apart_by_their_question() -> None:
    """They have no image, so all images are the same."""
    stored = torch.zeros(2, 3)
    given = torch.tensor([[-0.2, -0.1], [-0.1, -0.2]])
    found = settled(given, LEAST, torch.zeros(2, 3), stored, DIFFERENT[:2])
    assert found.argmax(1).tolist() == [1, 0]


def settled_by_row(
    scores: torch.Tensor, least: float, asked: torch.Tensor, stored: torch.Tensor, answers: list[int]
) -> torch.Tensor:
    """The rule as it reads, prompt by prompt."""
    found = scores.clone()
    for row in range(len(scores)):
        claims = [edit for edit in range(scores.shape[1]) if scores[row, edit] >= least]
        if len(claims) < 2:
            continue
        distance = {edit: float((asked[row] - stored[edit]).norm()) for edit in claims}
        same = [edit for edit in claims if distance[edit] <= SAME_IMAGE]
        level = same or claims
        most = max(float(scores[row, edit]) for edit in level)
        winner: int | None = max(edit for edit in level if float(scores[row, edit]) >= most - 1e-3)
        if not same:
            odds = {edit: float(torch.logit(scores[row, edit].exp())) for edit in claims}
            rivals = [edit for edit in claims if odds[edit] >= odds[winner] - MARGIN]
            if any(answers[edit] != answers[winner] for edit in rivals):
                near, after = sorted(rivals, key=lambda edit: distance[edit])[:2]
                winner = near if distance[near] <= RATIO * distance[after] else None
        for edit in claims:
            found[row, edit] = scores[row, edit] if edit == winner else NONE
    return found


@pytest.mark.parametrize("seed", range(5))
def test_many_prompts_are_settled_as_one_by_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = -1e-4 - torch.rand(40, 25, generator=generator, dtype=torch.float64).square() * (1 + seed)
    # Scores that are equal but for rounding, and images that are the same but for it
    scores[::3] = scores[::3].round(decimals=1) - 1e-4 * torch.rand(scores[::3].shape, generator=generator).double()
    stored = centres(*(6 * torch.rand(25, generator=generator)).round(decimals=1).tolist())
    asked = stored[torch.randint(25, (40,), generator=generator)] + 1e-4
    asked[1::2] = centres(*(6 * torch.rand(20, generator=generator)).tolist())
    answers = torch.randint(2, (25,), generator=generator)
    wanted = settled_by_row(scores, LEAST, asked, stored, answers.tolist())
    assert torch.equal(settled(scores.clone(), LEAST, asked, stored, answers), wanted)
    winners = (wanted >= LEAST).sum(1)
    assert 0 in winners
    assert 1 in winners
