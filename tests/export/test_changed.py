"""What deltas make of weights: the sum rounded once, for every architecture; and what has no weight of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastedit
from fastedit.backbone import EditableModel, Site
from fastedit.deltas import DeltaSpec, EditDelta, accumulate
from fastedit.deltas.low_rank import full_of
from fastedit.export import checkpoint
from fastedit.export.changed import changed_weights
from tests.backbone.architectures import make_editable, make_stock


def random_delta(sites: list[Site], kind: str = "full", seed: int = 0, **options: Any) -> EditDelta:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        prefix = f"{site.layer}.{site.name}"
        if kind == "full":
            shapes = {"delta": (site.d_out, site.d_in)}
        else:
            shapes = {"down": (site.d_in, options["rank"]), "up": (options["rank"], site.d_out)}
        for part, shape in shapes.items():
            tensors[f"{prefix}:{part}"] = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return EditDelta(DeltaSpec(kind, tuple(sites), options), tensors, request_id=f"edit-{seed}")


def all_sites(model: EditableModel) -> tuple[list[Site], list[Site]]:
    """Sites that are linear maps; and those that are not."""
    every = [
        site
        for layer in range(model.n_layers)
        for site in model.sites([layer], list(model.adapter.text.paths_of(layer)))
    ]
    plain = [isinstance(model.module(site), nn.Linear) for site in every]
    return [s for s, p in zip(every, plain, strict=True) if p], [s for s, p in zip(every, plain, strict=True) if not p]


# One map for several (qkv, gate_up), experts in 3-D tensors, maps with biases, a mixer that is no attention, images
@pytest.mark.parametrize("key", ["llama", "phi3", "opt", "qwen3_moe", "gemma4_text", "lfm2", "qwen3_5", "mllama"])
def test_a_written_checkpoint_computes_what_the_deltas_do(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_processor", lambda *_: None)
    hf = make_stock(key)
    model = make_editable(key, hf)
    sites, blocks = all_sites(model)
    delta = random_delta(sites)
    changed = {each.name: each.value for each in changed_weights(model, [delta], "merged")}
    assert len(changed) == len(sites)
    checkpoint.write_checkpoint(model, changed, tmp_path, max_shard_size="60KB")
    again = type(hf).from_pretrained(tmp_path, dtype=torch.float64).eval()
    again.config._experts_implementation = again.config.get_text_config()._experts_implementation = "eager"
    ids = torch.randint(20, 600, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with fastedit.applied(model, delta):
            wanted = hf(input_ids=ids).logits
        assert (again(input_ids=ids).logits - wanted).abs().max() < 1e-12
        assert (hf(input_ids=ids).logits - wanted).abs().max() > 1e-2
    assert bool(blocks) == (key == "qwen3_moe")
    if blocks:
        whole = random_delta(blocks[:1])
        with pytest.raises(ValueError, match=r"stands beside another module acts by fastedit.attach .*SparseMoeBlock"):
            list(changed_weights(model, [whole], "merged"))


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return make_editable("llama", make_stock("llama"))


def test_a_sequence_is_its_sum_rounded_once(model: EditableModel) -> None:
    sites = model.sites([1], ["up", "down"])
    deltas = [random_delta(sites, "low_rank", seed, rank=3, scale=0.5 + seed) for seed in range(3)]
    deltas.append(random_delta(sites, seed=9))
    total = accumulate([full_of(delta) if delta.spec.kind == "low_rank" else delta for delta in deltas])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        each: Any
        for each, site in zip(changed_weights(model, deltas, "merged", dtype=dtype), sites, strict=True):
            change = total.tensors[f"{site.layer}.{site.name}:delta"]
            exact = model.module(site).weight.detach() + change
            assert each.value.dtype == dtype
            torch.testing.assert_close(each.value, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
            rounding = (each.value.double() - exact).abs().max()
            assert each.largest_rounding == pytest.approx(float(rounding), rel=1e-6, abs=1e-15)
            assert each.largest_change == pytest.approx(float(change.abs().max()))
            relative = (each.value.double() - exact).norm() / change.norm()
            assert each.relative_rounding == pytest.approx(float(relative), rel=1e-6, abs=1e-14)


def test_weights_are_summed_in_parts(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.export import changed as module

    deltas = [random_delta(model.sites([0], ["up"]), "low_rank", seed, rank=2) for seed in range(2)]
    (whole,) = changed_weights(model, deltas, "merged")
    monkeypatch.setattr(module, "_PART", 200)
    (parts,) = changed_weights(model, deltas, "merged")
    torch.testing.assert_close(whole.value, parts.value, rtol=0, atol=1e-15)
    assert parts.largest_change == pytest.approx(whole.largest_change)


def test_a_weight_that_others_use_is_refused() -> None:
    hf = make_stock("llama")
    hf.model.layers[2].mlp.up_proj.weight = hf.model.layers[0].mlp.up_proj.weight
    model = make_editable("llama", hf)
    rule = r"a change would reach 'model.layers.2.mlp.up_proj.weight' too; .*layer 0, module 'model.layers.0.mlp"
    with pytest.raises(ValueError, match=rule):
        list(changed_weights(model, [random_delta(model.sites([0], ["up"]))], "merged"))


def test_a_module_that_two_layers_share_is_refused() -> None:
    hf = make_stock("llama")
    hf.model.layers[2].mlp.up_proj = hf.model.layers[0].mlp.up_proj
    model = make_editable("llama", hf)
    # One of them: the module changes wherever it runs, as the delta beside it acts
    assert len(list(changed_weights(model, [random_delta(model.sites([0], ["up"]))], "merged"))) == 1
    with pytest.raises(ValueError, match="every edited map has a weight of its own, and layer 0 has this one too"):
        list(changed_weights(model, [random_delta(model.sites([0, 2], ["up"]))], "merged"))


def test_a_map_that_is_more_than_its_weight_is_refused() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    hf = make_stock("llama")
    hf.model.layers[1].mlp.up_proj.__class__ = Clipped
    model = make_editable("llama", hf)
    with pytest.raises(ValueError, match=r"plain linear map; .* a Clipped\)"):
        list(changed_weights(model, [random_delta(model.sites([1], ["up"]))], "merged"))


def test_deltas_of_other_sites_are_refused(model: EditableModel) -> None:
    deltas = [random_delta(model.sites([0], [name])) for name in ("up", "gate")]
    with pytest.raises(ValueError, match=r"have the same sites \(got deltas\[1\] of request 'edit-0'"):
        list(changed_weights(model, deltas, "merged"))


def test_deltas_that_are_no_weights_are_refused(model: EditableModel) -> None:
    delta = random_delta(model.sites([0], ["up"]))
    some = replace(delta, spec=replace(delta.spec, options={"positions": "after_image"}))
    with pytest.raises(ValueError, match="acts on some tokens"):
        list(changed_weights(model, [some], "delta"))
