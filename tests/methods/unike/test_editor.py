"""UniKE: where it stands, what a fit starts from, what acts beneath the next edit of a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import Rows, accumulate, stack
from fastedit.deltas.attention_memory import without_memory
from fastedit.deltas.key_value import part_prefix
from fastedit.deltas.kinds import new_stack
from fastedit.engine import schedule
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import TrainingView
from fastedit.methods.base import Resources
from fastedit.methods.captured import answer_inputs
from fastedit.methods.tpatcher import is_gated
from fastedit.methods.unike.config import UniKEConfig
from fastedit.methods.unike.editor import Knowledge, UniKE, entries, own_keys
from fastedit.objectives import Role
from fastedit.training import Artifact
from tests.engine.conftest import make_edits

#: The rows of the paper's ablation: settings, kind of the delta, modules that it stands beside.
ROWS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "all": ({}, "attention_memory", {"o", "down"}),
    "intrinsic only": ({"extrinsic": "none", "zeta": "none"}, "key_value", {"down"}),
    "Latent-IKE only": ({"intrinsic": False}, "attention_memory", {"o"}),
    "with prompt IKE": ({"extrinsic": "prompt", "zeta": "none"}, "key_value", {"down"}),
    "without collaboration": ({"zeta": "none", "alpha": 0.3}, "attention_memory", {"o", "down"}),
}


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(request.param, dtype="float64")


@pytest.fixture(scope="module")
def artifact(model: EditableModel) -> Artifact:
    settings = {"steps": 1, "batch_size": 8, "valid_every": 1}
    return fastedit.train(
        model, "unike", make_edits(12), trainer=settings, valid_records=3, layers=2, width=8, show_progress=False
    )


def prepared(model: EditableModel, edits: Sequence[EditRequest], config: UniKEConfig) -> list[EditRows]:
    """Rows of each edit, its own question between two others of the same length."""
    other = [TrainingView(Role.TEXT_REPHRASE, dataclasses.replace(edit.query, prompt="Or?")) for edit in edits]
    views = [[view, TrainingView(Role.EDIT, edit.query), view] for view, edit in zip(other, edits, strict=True)]
    return prepare(model, UniKE.spec(model, config), views, PhaseTimer())


@pytest.mark.parametrize(("settings", "kind", "names"), ROWS.values(), ids=ROWS.keys())
def test_every_row_of_the_ablation_has_its_parts(
    model: EditableModel, settings: dict[str, Any], kind: str, names: set[str]
) -> None:
    config = UniKEConfig(layers=2, **settings)
    spec = UniKE.spec(model, config)
    assert (spec.kind, {site.name for site in spec.sites}) == (kind, names)
    assert {site.layer for site in spec.sites} == {model.n_layers - 2, model.n_layers - 1}
    assert UniKE.artifact(config, "unike") == (None if "zeta" in settings and kind == "key_value" else "unike")
    assert ("steering" in spec.options) == ("down" in names and settings.get("zeta") != "none")


def test_entries_are_of_the_first_tokens_and_read_the_last() -> None:
    tokens = torch.arange(12.0).view(4, 3)
    for m in (2, 4, 6):
        found = entries(tokens, m, "1.o:")
        count = min(m, 4)
        assert torch.equal(found["1.o:keys"][:count], tokens[:count])
        assert not found["1.o:keys"][count:].any()
        assert found["1.o:on"].tolist() == [1.0] * count + [0.0] * (m - count)
        assert torch.equal(found["1.o:from"], tokens[3:].expand(m, 3))


def test_neurons_take_tokens_in_turn_and_stand_apart() -> None:
    tokens = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = own_keys(tokens, 7, "1.down:", gated=False, seed=0)
    entering = tokens[torch.arange(7) % 3] @ made["1.down:keys"] + made["1.down:bias"]
    # Each begins near 1 at its own token; a key is off by a tenth of a fresh one
    assert (entering.diagonal() - 1.0).abs().max() < 1.0
    assert not torch.isclose(made["1.down:keys"][:, 0], made["1.down:keys"][:, 3]).any()
    again = own_keys(tokens, 7, "1.down:", gated=False, seed=0)
    assert all(torch.equal(made[name], again[name]) for name in made)
    other = own_keys(tokens, 7, "1.down:", gated=False, seed=1)
    assert not torch.equal(made["1.down:keys"], other["1.down:keys"])
    # A gate has the token; what it is multiplied with stays as it was drawn
    gated = own_keys(tokens, 7, "1.down:", gated=True, seed=0)
    assert "1.down:gate_keys" in gated
    assert "1.down:keys" not in gated


def test_a_fit_starts_from_what_enters_at_the_answer(model: EditableModel, artifact: Artifact) -> None:
    """Keys of both memories are the states of the frozen model at the tokens that predict the target."""
    edits, config = make_edits(3), UniKEConfig(layers=2, own=3, n=4)
    shared = UniKE.setup(model, config, Resources(pool=make_edits(6)[3:], artifact=artifact))
    values = UniKE.start(model, config, shared, edits, prepared(model, edits, config))
    spec = UniKE.spec(model, config)
    reading = [site for site in spec.sites if site.name == "o"]
    readers = model.sites([site.layer for site in reading], ["q", "up"])
    for edit, own in zip(edits, values, strict=True):
        ((inputs, _),) = answer_inputs(model, [edit.query], readers)
        for site in reading:
            (states,) = (tokens for at, tokens in inputs.items() if (at.layer, at.name) == (site.layer, "q"))
            count = min(3, len(states))
            torch.testing.assert_close(own[f"{part_prefix(site)}keys"][:count], states[:count])
            torch.testing.assert_close(own[f"{part_prefix(site)}from"][0], states[-1])
        for site in (site for site in spec.sites if site.name == "down"):
            (states,) = (tokens for at, tokens in inputs.items() if (at.layer, at.name) == (site.layer, "up"))
            wanted = own_keys(states, 4, part_prefix(site), gated=is_gated(model), seed=0)
            for name, tensor in wanted.items():
                torch.testing.assert_close(own[name], tensor)
            assert torch.equal(own[f"{part_prefix(site)}direction"], shared.directions[site.layer])
    # Everything that is given has a place of its shape
    options = {**spec.options, "artifact": artifact.id}
    stacked = new_stack(dataclasses.replace(spec, options=options), 3, dtype=torch.float64)
    for number, own in enumerate(values):
        stacked.set(number, own)


def test_directions_are_the_artifacts_or_drawn(model: EditableModel, artifact: Artifact) -> None:
    last = model.n_layers - 1

    def of(zeta: str, given: Artifact | None = artifact, seed: int = 0, **settings: Any) -> dict[int, Tensor]:
        config = UniKEConfig(layers=2, zeta=zeta, seed=seed, memory_weight=0.0, **settings)
        return UniKE.setup(model, config, Resources(artifact=given)).directions

    for zeta in ("truthfulness", "semantic"):
        assert torch.equal(of(zeta)[last], artifact.tensors[f"{last}:direction.{zeta}"])
    assert torch.equal(of("random")[last], of("random", None)[last])
    assert not torch.equal(of("random")[last], of("random", seed=1)[last])
    assert not torch.equal(of("random")[last], of("random")[last - 1])
    assert of("none") == {}
    assert of("none", extrinsic="none") == {}
    tensors = {name: tensor for name, tensor in artifact.tensors.items() if not name.startswith(f"{last}:")}
    with pytest.raises(ValueError, match=rf"trained with layer {last} \(got none of it\)"):
        of("truthfulness", dataclasses.replace(artifact, tensors=tensors))


def change_of(stacked: Any) -> Tensor:
    """What the neurons at the first of their sites add to a token of ones."""
    number = next(number for number, site in enumerate(stacked.spec.sites) if site.name == "down")
    token = torch.ones(1, stacked.spec.sites[number].d_out, dtype=torch.float64)
    return stacked.delta(number, token, Rows()).detach()  # type: ignore[no-any-return]


def in_sequence(
    model: EditableModel, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Any, list[list[tuple[set[str], Tensor]]]]:
    """A run of three edits; while each was fitted, by what acted: names of its sites, and what its neurons added."""
    beneath: list[list[tuple[set[str], Tensor]]] = []
    plain = schedule.make_deltas

    def seen(work: Any, waiting: Any, places: int, acting: Any, take: Any) -> None:
        # Now: a sum takes up the next edit in place
        beneath.append([({site.name for site in each.spec.sites}, change_of(each)) for each in acting.stacks])
        plain(work, waiting, places, acting, take)

    monkeypatch.setattr(schedule, "make_deltas", seen)
    # The model's own activation adds something at any token
    settings = {"layers": 2, "n": 3, "own": 2, "steps": 3, "memory_weight": 0.0, "activation": None, **settings}
    learned = UniKEConfig(**settings).learns
    run = fastedit.edit(
        model,
        make_edits(3),
        "unike",
        mode="sequential",
        pool=make_edits(6)[3:],
        artifact=artifact if learned else None,
        show_progress=False,
        **settings,
    )
    return run, beneath


def test_in_sequence_neurons_act_beneath_the_next_and_entries_do_not(
    model: EditableModel, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a direction, which is laid into the values of neurons side by side
    run, beneath = in_sequence(model, artifact, monkeypatch, zeta="none")
    assert [len(acting) for acting in beneath] == [0, 1, 1]
    for number, ((names, change),) in enumerate(beneath[1:], start=1):
        assert names == {"down"}
        neurons = stack([without_memory(accumulate(run.deltas[:number]))])
        torch.testing.assert_close(change, change_of(neurons))
        assert bool(change.any())
    assert run.scores["strict"]["reliability"].n == 3
    # Alone they are the same up to the first, which has nothing beneath it
    settings = {"layers": 2, "n": 3, "own": 2, "steps": 3, "memory_weight": 0.0, "activation": None, "zeta": "none"}
    alone = fastedit.edit(
        model, make_edits(1), "unike", pool=make_edits(6)[3:], artifact=artifact, evaluate=False, **settings
    )
    for name, tensor in alone.deltas[0].tensors.items():
        torch.testing.assert_close(run.deltas[0].tensors[name], tensor)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"intrinsic": False}, []),
        ({"own": 0}, [{"o", "down"}, {"o", "down"}]),
        ({"extrinsic": "none", "zeta": "none"}, [{"down"}, {"down"}]),
    ],
    ids=["memory only", "no entries", "neurons only"],
)
def test_what_is_beneath_follows_what_an_edit_has(
    model: EditableModel,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    names: list[Any],
) -> None:
    _, beneath = in_sequence(model, artifact, monkeypatch, **settings)
    assert [sites for acting in beneath for sites, _ in acting] == names


def test_in_context_text_comes_with_the_delta(model: EditableModel) -> None:
    config = UniKEConfig(layers=1, extrinsic="prompt", zeta="none", demonstrations=1, memory_weight=0.0)
    pool = make_edits(6)[3:]
    shared = UniKE.setup(model, config, Resources(pool=pool))
    (edit,) = make_edits(1)
    plain = new_stack(UniKE.spec(model, config), 1, dtype=torch.float64).unstack(0)
    (made,) = UniKE.finish(model, config, shared, [edit], [plain])
    assert edit.target in next(iter(made.texts.values()))
    assert made.tensors is plain.tensors
    (kept,) = UniKE.finish(model, UniKEConfig(layers=1), Knowledge({}), [edit], [plain])
    assert not kept.texts


def test_neurons_are_silent_where_nothing_enters_them_unless_told_otherwise(model: EditableModel) -> None:
    """What adds up over a sequence is what neurons let through at tokens of others: with relu nothing."""
    token = -torch.ones(1, model.hidden_size, dtype=torch.float64)
    for activation, silent in (("relu", True), ("silu", False), ("gelu", False)):
        config = UniKEConfig(extrinsic="none", zeta="none", memory_weight=0.0, keys="random", activation=activation)
        stacked = new_stack(UniKE.spec(model, config), 1, dtype=torch.float64)
        assert stacked.spec.options["activation"] == activation
        parts = stacked.unstack(0).tensors
        ones = {
            name: torch.full_like(part, 0.1 if name.endswith("keys") else 1.0)
            for name, part in parts.items()
            if name.endswith(("keys", "values"))
        }
        stacked.set(0, {**parts, **ones})
        assert bool((stacked.delta(0, token, Rows()) == 0).all()) == silent
    assert UniKEConfig().activation == "relu"
    own = UniKE.spec(model, UniKEConfig(extrinsic="none", zeta="none", activation=None))
    assert own.options["activation"] == ("silu" if is_gated(model) else "relu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "tanh"}, r"activation is one of .* or None \(got activation='tanh'\)"),
        ({"extrinsic": "both"}, r"extrinsic is one of .* \(got extrinsic='both'\)"),
        ({"zeta": "true"}, r"zeta is one of .* \(got zeta='true'\)"),
        ({"keys": "own"}, r"keys is one of .* \(got keys='own'\)"),
        ({"truth": "both"}, r"truth is one of .* \(got truth='both'\)"),
        ({"n": 0}, r"n is at least 1 \(got n=0\)"),
        ({"own": -1}, r"own is at least 0 \(got own=-1\)"),
        ({"triplets": 1}, r"triplets is at least 2 \(got triplets=1\)"),
        ({"alpha": "fixed"}, r"alpha is 'dynamic' or a number \(got alpha='fixed'\)"),
        ({"temperature": 0.0}, r"temperature is positive \(got temperature=0.0\)"),
        ({"intrinsic": False, "extrinsic": "none"}, r"without neurons extrinsic is 'latent' \(got extrinsic='none'\)"),
        ({"positions": "image"}, r"positions"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"unike: .*{message}"):
        UniKEConfig(**settings)
