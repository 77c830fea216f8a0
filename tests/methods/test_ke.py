"""KnowledgeEditor: its factors are the paper's gated masks, it reads the edit, and its deltas are those of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.methods.ke import KE, EditReader, KEConfig, KENetwork
from fastedit.methods.meta.hypernets import edit_gradients
from fastedit.training import Artifact
from tests.engine.conftest import make_edits
from tests.methods.meta.test_hypernets import rows_of

SMALL: dict[str, Any] = {"layers": 1, "hidden": 8, "condition": 16, "inner": 8, "valid_records": 2}
BRIEF = {"steps": 2, "batch_size": 2}


@pytest.fixture(scope="module", params=["llava", "blip2"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float32")


@pytest.fixture(scope="module")
def artifact(model: EditableModel) -> Artifact:
    return fastedit.train(model, "ke", make_edits(6), trainer=BRIEF, **SMALL)


def network_of(model: EditableModel) -> KENetwork:
    config = KEConfig(**SMALL)
    return KENetwork(KE.spec(model, config).sites, EditReader(model), config)


def test_factors_are_the_gated_and_masked_gradient(model: EditableModel) -> None:
    network, edits = network_of(model), make_edits(2)
    spec = KE.spec(model, KEConfig(**SMALL))
    gradients = edit_gradients(model, spec.sites, rows_of(model, spec, 2))
    network.measure([gradients])
    condition = network._read(edits)
    for index, (down, up) in enumerate(network(gradients, edits)):
        site = spec.sites[index]
        sizes = [site.d_out, site.d_out, site.d_in, site.d_in, 1]
        for edit in range(2):
            a, b, c, e, gate = network.heads[index](condition[edit]).split(sizes)
            weight_grad = gradients.grad[index][edit].T @ gradients.x[index][edit] / network.size[index]
            # Equation (6), the softmax times its length
            masks = site.d_out * torch.outer(a.softmax(0), c), site.d_out * torch.outer(b.softmax(0), e)
            expected = torch.sigmoid(gate) * (masks[0] * weight_grad + masks[1])
            torch.testing.assert_close((down[edit] @ up[edit]).T, expected, rtol=1e-4, atol=1e-6)


def test_the_size_of_gradients_is_that_of_the_weights(model: EditableModel) -> None:
    network = network_of(model)
    spec = KE.spec(model, KEConfig(**SMALL))
    gradients = edit_gradients(model, spec.sites, rows_of(model, spec, 3))
    network.measure([gradients])
    for index in range(len(spec.sites)):
        whole = gradients.grad[index].transpose(1, 2) @ gradients.x[index]
        assert network.size[index].item() == pytest.approx(whole.square().sum((1, 2)).mean().sqrt().item(), rel=1e-5)


def test_it_reads_what_was_said_what_shall_be_said_and_the_question(model: EditableModel) -> None:
    network, (first, second) = network_of(model), make_edits(2)
    same = network._read([first, replace(first, image=second.image, rephrase=second.rephrase)])
    assert torch.equal(same[0], same[1])
    for change in ({"prediction": "else"}, {"target": "else"}, {"prompt": "What else?"}):
        other = network._read([first, replace(first, **change)])
        assert not torch.allclose(other[0], other[1])
    # Order matters: the target is not the prediction
    swapped = network._read([first, replace(first, target=first.prediction or "", prediction=first.target)])
    assert not torch.allclose(swapped[0], swapped[1])
    # Texts of different lengths are read as if alone
    together, alone = network._read([first, second]), network._read([second])
    torch.testing.assert_close(together[1], alone[0])
    unknown = network._read([replace(first, prediction=None)])
    assert bool(unknown.isfinite().all())


def test_every_parameter_learns(model: EditableModel) -> None:
    network, edits = network_of(model), make_edits(2)
    spec = KE.spec(model, KEConfig(**SMALL))
    gradients = edit_gradients(model, spec.sites, rows_of(model, spec, 2))
    network.measure([gradients])
    loss = sum((down @ up).sin().sum() for down, up in network(gradients, edits))
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_networks_of_one_seed_are_equal_and_the_generator_stays(model: EditableModel) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = network_of(model), network_of(model)
    assert torch.equal(torch.rand(1), expected)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_an_edit_is_the_same_in_any_batch(model: EditableModel, artifact: Artifact) -> None:
    edits = make_edits(4)
    settings = {**SMALL, "artifact": artifact, "evaluate": False}
    runs = [fastedit.edit(model, edits, "ke", batch_size=size, **settings) for size in (4, 1)]
    for together, alone in zip(runs[0].deltas, runs[1].deltas, strict=True):
        assert together.spec == alone.spec
        assert together.norm > 0
        for name, tensor in together.tensors.items():
            torch.testing.assert_close(tensor, alone.tensors[name], rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))
    # B has one rank more than there are tokens
    spec = KE.spec(model, KEConfig(**SMALL))
    gradients = edit_gradients(model, spec.sites, rows_of(model, spec, 4))
    tokens = [max(int(mask[edit].sum()) for mask in gradients.mask) for edit in range(4)]
    assert [delta.spec.options["rank"] for delta in runs[1].deltas] == [count + 1 for count in tokens]


def test_it_edits_in_sequence_and_wants_its_own_artifact(model: EditableModel, artifact: Artifact) -> None:
    edits = make_edits(2)
    run = fastedit.edit(model, edits, "ke", artifact=artifact, mode="sequential", **SMALL)
    assert run.scores["legacy"]
    with pytest.raises(ValueError, match=r"fastedit\.train\(model, 'ke', records\)"):
        fastedit.edit(model, edits, "ke")
    with pytest.raises(ValueError, match=r"odedit\+ke: the artifact is of this kind"):
        fastedit.edit(model, edits, "odedit+ke", artifact=artifact)


def test_it_edits_a_quantized_model() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = fastedit.load("random:qwen2vl-tiny", quantize="nf4")
    artifact = fastedit.train(model, "ke", make_edits(6), trainer=BRIEF, **SMALL)
    run = fastedit.edit(model, make_edits(1), "ke", artifact=artifact, **SMALL)
    assert run.deltas[0].norm > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden is at least 1"),
        ({"condition": 0}, "condition is at least 1"),
        ({"max_scale": 0.0}, "max_scale is positive"),
        ({"positions": "before"}, "positions is one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ke: {message}"):
        KEConfig(**settings)
