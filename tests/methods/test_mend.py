"""MEND: it starts as gradient descent, learns to edit, and its deltas are those of an edit run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel, Site, weights_hash
from fastedit.methods.mend import MEND, MENDConfig, MendNetwork, set_apart
from fastedit.methods.meta.hypernets import Gradients
from fastedit.training import Artifact, save_artifact
from tests.engine.conftest import make_edits

SITES = (Site(0, "up", "up", 5, 7), Site(0, "down", "down", 7, 5), Site(1, "up", "up", 5, 7))
SMALL: dict[str, Any] = {"layers": 1, "rank": 4, "valid_records": 2}
BRIEF = {"steps": 2, "batch_size": 2}


def some_gradients(size: int = 2, tokens: int = 3) -> Gradients:
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(size, tokens, width, generator=generator)

    mask = torch.ones(size, tokens, dtype=torch.bool)
    mask[1, 2:] = False
    x = tuple(draw(site.d_in) * mask[..., None] for site in SITES)
    grad = tuple(draw(site.d_out) * mask[..., None] for site in SITES)
    return Gradients(x, grad, (mask,) * len(SITES), torch.ones(size))


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


@pytest.fixture(scope="module")
def artifact(model: EditableModel) -> Artifact:
    return fastedit.train(model, "mend", make_edits(6), trainer=BRIEF, **SMALL)


def test_it_starts_as_gradient_descent_on_normalised_factors() -> None:
    network = MendNetwork(SITES, MENDConfig(rank=3, edit_lr=0.5, directions=0, apart=False))
    gradients = some_gradients()
    network.measure([gradients])
    for site, (down, up) in enumerate(network(gradients, [])):
        x, grad, mask = gradients.x[site], gradients.grad[site], gradients.mask[site]
        x = x / x[mask].square().mean(0).sqrt()
        grad = grad / grad[mask].square().mean(0).sqrt()
        expected = -0.5 / x.shape[2] * torch.einsum("bno,bni->boi", grad, x)
        torch.testing.assert_close((down @ up).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_filled_up_tokens_stay_out() -> None:
    network = MendNetwork(SITES, MENDConfig(rank=3))
    gradients = some_gradients()
    network.measure([gradients])
    with torch.no_grad():
        for block in (block for net in network.nets.values() for block in net):  # type: ignore[attr-defined]
            block.shift.add_(1)
            block.bias.add_(1)
    for down, up in network(gradients, []):
        down, up = down.detach(), up.detach()
        assert float(down[1, :, 2:].abs().max()) == 0
        assert float(up[1, 2:].abs().max()) == 0
        assert float(up[1, :2].abs().min()) > 0


def test_every_parameter_learns_from_the_first_step_on() -> None:
    network = MendNetwork(SITES, MENDConfig(rank=3))
    gradients = some_gradients()
    network.measure([gradients])
    loss = sum((down @ up).sin().sum() for down, up in network(gradients, []))
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # Behind a factor that is zero at first
        waits = name.endswith((".v", ".scale"))
        assert bool(parameter.grad.any()) != waits, name


def test_tokens_that_are_set_apart_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    x = 3 * common + torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    read = x + 0.1 * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    x[1, 3:], read[1, 3:] = 0, 0
    before = read @ x.transpose(1, 2)
    # Without the inputs' common part hardly anything would be seen
    assert before[0, 0, 1] > 0.5 * before[0, 0, 0]
    after = set_apart(read, x, torch.tensor(1e-9, dtype=torch.float64)) @ x.transpose(1, 2)
    torch.testing.assert_close(after, torch.diag_embed(before.diagonal(dim1=1, dim2=2)), rtol=1e-5, atol=1e-5)
    # A large ridge leaves the directions as they were, up to their sizes
    damped = set_apart(read, x, torch.tensor(1e9, dtype=torch.float64))
    size = before.diagonal(dim1=1, dim2=2)
    scale = size / (size.sum(1) / (size != 0).sum(1))[:, None]
    torch.testing.assert_close(damped, read * scale[..., None], rtol=1e-5, atol=1e-6)
    orthogonal = torch.eye(4, 9, dtype=torch.float64)[None] * 2
    for ridge in (1e-3, 1.0):
        kept = set_apart(orthogonal, orthogonal, torch.tensor(ridge, dtype=torch.float64))
        torch.testing.assert_close(kept, orthogonal)
    nothing = torch.zeros(1, 4, 9, dtype=torch.float64)
    assert float(set_apart(nothing, nothing, torch.tensor(0.1)).abs().max()) == 0


def test_sites_of_one_shape_share_a_network_and_are_told_apart() -> None:
    network = MendNetwork(SITES, MENDConfig(rank=3, blocks=1))
    assert sorted(network.nets) == ["5x7", "7x5"]
    gradients = some_gradients()
    same = Gradients(
        (gradients.x[0], gradients.x[1], gradients.x[0]),
        (gradients.grad[0], gradients.grad[1], gradients.grad[0]),
        gradients.mask,
        gradients.nll,
    )
    network.measure([same])
    first, _, third = network(same, [])
    assert torch.equal(first[0], third[0])
    with torch.no_grad():
        network.nets["5x7"][0].shift[1] += 1  # type: ignore[index]
    assert torch.equal(network(same, [])[0][0], first[0])
    assert not torch.equal(network(same, [])[2][0], third[0])


@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_a_step_in_its_first_direction_lowers_the_loss(name: str) -> None:
    model, edits = fastedit.load(name), make_edits(4)
    settings = {**SMALL, "edit_lr": 1e-3, "layers": 2}
    artifact = fastedit.train(model, "mend", edits, trainer={"steps": 0, "batch_size": 2}, **settings)
    run = fastedit.edit(model, edits, "mend", artifact=artifact, **settings)
    spec = MEND.spec(model, MENDConfig(**settings))
    assert all(delta.spec.sites == spec.sites for delta in run.deltas)
    from fastedit.deltas import Rows, installed, stack

    for request, delta in zip(edits, run.deltas, strict=True):
        queries = [fastedit.Query(request.prompt, request.image, request.target)]
        losses = []
        for deltas in ([], [delta]):
            encoded = model.encode(queries, answers=True)
            with torch.no_grad():
                if deltas:
                    with installed(model, stack(deltas), Rows((1,))):
                        losses.append(target_loss(model, encoded))
                else:
                    losses.append(target_loss(model, encoded))
        assert losses[1] < losses[0]


def target_loss(model: EditableModel, encoded: Any) -> float:
    from fastedit.backbone.packed_forward import packed_start, packed_tail

    logits = model.head(packed_tail(model, packed_start(model, encoded)))
    return float(torch.nn.functional.cross_entropy(logits, encoded.labels[encoded.label_mask]))


def test_an_edit_is_the_same_in_any_batch_and_the_model_stays() -> None:
    # Its networks are float32 and its ridge regression multiplies rounding: the model adds none
    model = fastedit.load("random:llava-tiny", dtype="float64")
    artifact = fastedit.train(model, "mend", make_edits(6), trainer=BRIEF, **SMALL)
    edits, before = make_edits(5), weights_hash(model.hf)
    runs = [
        fastedit.edit(model, edits, "mend", artifact=artifact, batch_size=size, evaluate=False, **SMALL)
        for size in (5, 1)
    ]
    for together, alone in zip(runs[0].deltas, runs[1].deltas, strict=True):
        assert together.spec == alone.spec
        assert together.norm > 0
        for name, tensor in together.tensors.items():
            torch.testing.assert_close(tensor, alone.tensors[name], rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))
    assert {outcome.status for outcome in runs[0].outcomes} == {"computed"}
    assert weights_hash(model.hf) == before


def test_deltas_of_different_ranks_are_scored_stored_and_add_up(
    model: EditableModel, artifact: Artifact, tmp_path: Path
) -> None:
    edits = make_edits(3)
    run = fastedit.edit(model, edits, "mend", artifact=artifact, **SMALL)
    assert len({delta.spec.options["rank"] for delta in run.deltas}) > 1
    assert run.scores["strict"]
    run.save(tmp_path)
    from fastedit.deltas import load_deltas

    for read, made in zip(load_deltas(tmp_path / "deltas.safetensors"), run.deltas, strict=True):
        assert read.spec == made.spec
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in made.tensors.items())
    after = fastedit.edit(model, edits, "mend", artifact=artifact, mode="sequential", **SMALL)
    # The second edit sees the first one
    assert after.deltas[0].norm == pytest.approx(run.deltas[0].norm, rel=1e-5)
    assert after.deltas[1].norm != pytest.approx(run.deltas[1].norm, rel=1e-9)


def test_without_its_artifact_it_stops_before_any_work(
    model: EditableModel, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_args: Any, **_settings: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(EditableModel, "encode", no_work)
    edits = make_edits(1)
    with pytest.raises(ValueError, match=r"mend: needs a trained part.*fastedit\.train\(model, 'mend', records\)"):
        fastedit.edit(model, edits, "mend")
    with pytest.raises(ValueError, match=r"kl\+mend: the artifact is of this kind.*got kind='mend'"):
        fastedit.edit(model, edits, "kl+mend", artifact=artifact)
    other = Artifact("mend", "0" * 64, artifact.config, artifact.tensors)
    with pytest.raises(ValueError, match="trained on the model in use"):
        fastedit.edit(model, edits, "mend", artifact=save_artifact(other, tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="the artifact has the shape of these settings"):
        fastedit.edit(model, edits, "mend", artifact=artifact, **{**SMALL, "rank": 5})


def test_it_edits_a_quantized_model() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = fastedit.load("random:qwen2vl-tiny", quantize="nf4")
    edits = make_edits(6)
    artifact = fastedit.train(model, "mend", edits, trainer=BRIEF, **SMALL)
    run = fastedit.edit(model, edits[:2], "mend", artifact=artifact, **SMALL)
    assert all(delta.norm > 0 for delta in run.deltas)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is at least 1"),
        ({"blocks": 0}, "blocks is at least 1"),
        ({"valid_records": 0}, "valid_records is at least 1"),
        ({"edit_lr": 0.0}, "edit_lr is positive"),
        ({"positions": "before"}, "positions is one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"mend: {message}"):
        MENDConfig(**settings)
