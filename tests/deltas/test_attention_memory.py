"""The memory that attention reads: what is found, who decides, how much is mixed in, what a sequence makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta, Rows, accumulate, installed, stack
from fastedit.deltas.attention_memory import without_memory
from fastedit.deltas.kinds import new_stack
from fastedit.training import Artifact

M, OWN, K = 9, 2, 4
READING = {"top_k": K, "reading": "attn", "search": "states", "alpha": "dynamic", "rescale": True}
WAYS: dict[str, dict[str, Any]] = {
    "attn": READING,
    "raw": {**READING, "reading": "raw"},
    "codes": {**READING, "search": "codes", "rescale": False},
    "fixed": {**READING, "alpha": 0.4},
}


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    """Rotary with a head for each key, learned positions, and keys that heads share."""
    made = fastedit.load(request.param, dtype="float64")
    artifact = memory_of(made)
    made.artifacts[artifact.id] = artifact
    return made


def memory_of(model: EditableModel) -> Artifact:
    generator = torch.Generator().manual_seed(1)
    d = model.hidden_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"1:semantic": draw(M, d), "1:positive": draw(M, d)}
    shapes = ((d, d), (d,), (d, 6), (6,))
    tensors |= {f"1:enc_sem.{n}": draw(*shape) * d**-0.5 for n, shape in enumerate(shapes)}
    return Artifact("unike", model.fingerprint, {}, tensors)


def spec_of(model: EditableModel, own: int = OWN, **options: Any) -> DeltaSpec:
    artifact = next(iter(model.artifacts))
    given = {**READING, "gain": 2.0, "own": own, "artifact": artifact, **options}
    return DeltaSpec("attention_memory", tuple(model.sites([1], ["o"])), given)


def filled(model: EditableModel, spec: DeltaSpec, size: int = 2) -> Any:
    """Deltas whose first entry of each edit is what the memory's entry of the edit's number is like."""
    generator = torch.Generator().manual_seed(2)
    stacked = new_stack(spec, size, dtype=torch.float64)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=generator, dtype=torch.float64))
    for name, tensor in stacked.fixed.items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        if name.endswith(":on"):
            tensor.fill_(1.0)
    stacked.bind(model)
    return stacked


def queries(model: EditableModel, stacked: Any, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens of two edits, the first of each near to an entry of its own; and attention outputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, model.hidden_size, generator=generator, dtype=torch.float64)
    if "1.o:keys" in stacked.fixed:
        x[0] = stacked.fixed["1.o:keys"][0, 0] + 0.1 * x[0]
        x[3] = stacked.fixed["1.o:keys"][1, 1] + 0.1 * x[3]
    return x, torch.randn(tokens, model.hidden_size, generator=generator, dtype=torch.float64)


def encoded(tensors: Any, states: Tensor) -> Tensor:
    w = [tensors[f"1:enc_sem.{n}"] for n in range(4)]
    return functional.gelu(states @ w[0] + w[1]) @ w[2] + w[3]


def change_of(model: EditableModel, stacked: Any, b: int, x: Tensor, h: Tensor) -> Tensor:
    """The change of one token, written out head by head."""
    options, tensors = stacked.spec.options, model.artifacts[stacked.spec.options["artifact"]].tensors
    semantic, states = tensors["1:semantic"], tensors["1:positive"]
    share = options["gain"] * stacked.parts["1.o:share"][b]

    def compare(a: Tensor) -> Tensor:
        return encoded(tensors, a) if options["search"] == "codes" else a

    near = functional.cosine_similarity(compare(x)[None], compare(semantic), dim=1)
    chosen = near.sort(descending=True).indices[:K]
    rows = [states[i] for i in chosen]
    total = share[0] if options["own"] == 0 else torch.zeros((), dtype=x.dtype)
    for i in range(options["own"]):
        key = compare(stacked.fixed["1.o:keys"][b, i])
        cosine = functional.cosine_similarity(compare(x), key, dim=0)
        if stacked.fixed["1.o:on"][b, i] == 1 and cosine >= near[chosen[-1]]:
            rows.append(stacked.fixed["1.o:from"][b, i] + options["gain"] * stacked.parts["1.o:states"][b, i])
            total = total + share[i]
    found = torch.stack(rows)
    if options["reading"] == "raw":
        mixed = torch.softmax(found @ x / len(x) ** 0.5, 0) @ found
        know = mixed
    else:
        q, k, v, o = (model.module(site) for site in model.sites([1], ["q", "k", "v", "o"]))
        attention: Any = model.adapter.text.layers[1].self_attn
        width = attention.head_dim
        heads = q(x).view(-1, width)
        keys, values = k(found).view(len(found), -1, width), v(found).view(len(found), -1, width)
        per = len(heads) // keys.shape[1]
        weights = [torch.softmax(keys[:, n // per] @ head * attention.scaling, 0) for n, head in enumerate(heads)]
        know = o(torch.cat([w @ values[:, n // per] for n, w in enumerate(weights)]))
        mixed = torch.stack(weights).mean(0) @ found
    if options["rescale"]:
        know = know * h.norm() / know.norm()
    alpha = options["alpha"]
    if alpha == "dynamic":
        alpha = functional.cosine_similarity(encoded(tensors, mixed), encoded(tensors, x), dim=0).clamp(0, 1)
    return total * alpha * (know - h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("own", [OWN, 0])
def test_the_change_is_what_the_paper_mixes(model: EditableModel, options: dict[str, Any], own: int) -> None:
    stacked = filled(model, spec_of(model, own, **options))
    x, h = queries(model, stacked)
    with torch.no_grad():
        found = stacked.delta(0, x, Rows((3, 3)), h)
        wanted = torch.stack([change_of(model, stacked, t // 3, x[t], h[t]) for t in range(6)])
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().sum(1)[0] > 0


def test_only_what_finds_an_entry_of_its_edit_is_changed(model: EditableModel) -> None:
    stacked = filled(model, spec_of(model, alpha=1.0, top_k=1))
    x, h = queries(model, stacked)
    changed = stacked.delta(0, x, Rows((3, 3)), h).abs().sum(1) > 0
    assert changed[[0, 3]].all()
    # The same tokens, asked of the other edit
    swapped = stacked.delta(0, x.roll(3, 0), Rows((3, 3)), h).abs().sum(1) > 0
    assert not swapped[[0, 3]].any()
    stacked.fixed["1.o:on"].zero_()
    assert not stacked.delta(0, x, Rows((3, 3)), h).any()


def test_gradients_equal_finite_differences(model: EditableModel) -> None:
    stacked = filled(model, spec_of(model))
    x, h = queries(model, stacked)
    weight = torch.randn(6, model.hidden_size, dtype=torch.float64)
    stacked.begin_step()
    (stacked.delta(0, x, Rows((3, 3)), h) * weight).sum().backward()
    stacked.end_step()
    for name, place in (("1.o:share", (0, 0)), ("1.o:states", (0, 0, 3)), ("1.o:states", (1, 1, 0))):
        values = []
        for step in (1e-6, -2e-6):
            stacked.parts[name][place] += step
            with torch.no_grad():
                values.append(float((stacked.delta(0, x, Rows((3, 3)), h) * weight).sum()))
        stacked.parts[name][place] += 1e-6
        slope = (values[0] - values[1]) / 2e-6
        assert float(stacked.part_grads[name][place]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("own", [OWN, 0])
def test_an_edit_alone_is_an_edit_of_many(model: EditableModel, options: dict[str, Any], own: int) -> None:
    """The tokens of a single edit share its entries in place of having copies; changes and gradients are the same."""
    both = filled(model, spec_of(model, own, **options))
    x, h = queries(model, both)
    weight = torch.randn(3, model.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for b, rows in ((0, slice(0, 3)), (1, slice(3, 6))):
        alone = new_stack(both.spec, 1, dtype=torch.float64)
        for kept, given in ((alone.parts, both.parts), (alone.fixed, both.fixed)):
            for name, tensor in kept.items():
                tensor.copy_(given[name][b : b + 1])
        alone.bind(model)
        changes, grads = [], []
        for stacked, mine, asked, outputs, spans in (
            (both, b, x, h, (3, 3)),
            (alone, 0, x[rows], h[rows], (3,)),
        ):
            stacked.begin_step()
            asked = asked.clone().requires_grad_()
            change = stacked.delta(0, asked, Rows(spans), outputs)
            change = change[rows] if len(spans) == 2 else change
            (change * weight).sum().backward()
            stacked.end_step()
            changes.append(change.detach())
            found = [grad[mine].clone() for grad in stacked.part_grads.values()]
            grads.append([*found, asked.grad[rows] if len(spans) == 2 else asked.grad])
            assert all(grad.any() for grad in grads[-1])
        torch.testing.assert_close(changes[0], changes[1])
        torch.testing.assert_close(grads[0], grads[1])


def test_a_fresh_delta_changes_nothing_whatever_it_finds(model: EditableModel) -> None:
    for own in (OWN, 0):
        stacked = filled(model, spec_of(model, own))
        stacked.flat.zero_()
        x, h = queries(model, stacked)
        change = stacked.delta(0, x, Rows((3, 3)), h)
        assert torch.equal(h + change, h)
        stacked.begin_step()
        (change * torch.randn_like(change)).sum().backward()
        stacked.end_step()
        assert stacked.part_grads["1.o:share"].abs().max() > 0


def test_it_reads_what_the_block_is_given(model: EditableModel) -> None:
    """Installed on the model it gets the queries' input, and its own reads of the maps call no hooks."""
    stacked = stack([filled(model, spec_of(model)).unstack(0)])
    got: list[Tensor] = []
    plain = stacked.delta

    def seen(site: int, x: Tensor, rows: Any, output: Tensor) -> Any:
        got.append(x)
        return plain(site, x, rows, output)

    stacked.delta = seen
    calls: list[Tensor] = []
    module = model.module(model.sites([1], ["q"])[0])
    handle = module.register_forward_pre_hook(lambda _m, args: calls.append(args[0]))
    try:
        with installed(model, stacked, Rows()):
            model.generate([fastedit.Query("what is it ?")], max_new_tokens=2)
    finally:
        handle.remove()
    assert len(calls) == len(got)
    for call, x in zip(calls, got, strict=True):
        assert torch.equal(call.reshape(x.shape), x)


def test_edits_in_sequence_keep_their_entries_and_shares(model: EditableModel) -> None:
    stacked = filled(model, spec_of(model, top_k=1))
    together = accumulate([stacked.unstack(b) for b in range(2)])
    assert (together.spec.options["own"], together.spec.options["gain"]) == (2 * OWN, 1.0)
    one = stack([together])
    one.bind(model)
    x, h = queries(model, stacked)
    for t, b in ((0, 0), (3, 1)):
        # No entry of the other edit is found: as if its own edit were alone
        assert not stacked.delta(0, x[[t, t]], Rows((1, 1)), h[[t, t]])[1 - b].any()
        own = stacked.delta(0, x[[t, t]], Rows((1, 1)), h[[t, t]])[b]
        assert own.any()
        torch.testing.assert_close(one.delta(0, x[[t]], Rows(), h[[t]])[0], own)


def test_of_a_sequence_a_query_finds_the_nearest_edit(model: EditableModel) -> None:
    """Where entries of several edits are near enough, those of the nearest decide, as if it were alone."""
    # A dynamic alpha may be 0 of what is found
    stacked = filled(model, spec_of(model, alpha=1.0))
    # The second edit's entries are near to the first's, at cosines of 0.99
    keys = stacked.fixed["1.o:keys"]
    noise = torch.randn(keys[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    keys[1] = keys[0] + 0.15 * noise
    x, h = queries(model, stacked)
    x[0], x[3] = stacked.fixed["1.o:keys"][0, 0], stacked.fixed["1.o:keys"][1, 1]
    alone = stacked.delta(0, torch.cat([x, x]), Rows((6, 6)), torch.cat([h, h])).view(2, 6, -1)
    # Each is found by both edits when they are apart
    assert alone[:, 0].abs().sum(1).all()
    assert alone[:, 3].abs().sum(1).all()
    parts = [stacked.unstack(b) for b in range(2)]
    for order in ((0, 1), (1, 0)):
        one = stack([accumulate([parts[b] for b in order])])
        one.bind(model)
        found = one.delta(0, x, Rows(), h)
        torch.testing.assert_close(found[0], alone[0, 0])
        torch.testing.assert_close(found[3], alone[1, 3])
    longer = accumulate([accumulate(parts), parts[0]])
    assert (longer.spec.options["own"], longer.spec.options["each"]) == (3 * OWN, OWN)


def test_without_its_memory_a_delta_is_its_neurons(model: EditableModel) -> None:
    sites = tuple(model.sites([1], ["o", "down"]))
    options = {"n": 3, "activation": "silu", "gate": False, **spec_of(model).options}
    stacked = new_stack(DeltaSpec("attention_memory", sites, options), 2, dtype=torch.float64)
    for part in stacked.parts.values():
        part.normal_()
    left = without_memory(accumulate([stacked.unstack(b) for b in range(2)]))
    assert left.spec.sites == sites[1:]
    assert {name.split(":")[0] for name in left.tensors} == {"1.down"}
    one = stack([left])
    one.bind(model)
    x = torch.randn(4, model.hidden_size, dtype=torch.float64)
    apart = stacked.delta(1, torch.cat([x, x]), Rows((4, 4)), torch.cat([x, x])).view(2, 4, -1)
    torch.testing.assert_close(one.delta(0, x, Rows(), x), apart.sum(0))


def test_shares_without_entries_are_added(model: EditableModel) -> None:
    stacked = filled(model, spec_of(model, 0, alpha=0.5))
    one = stack([accumulate([stacked.unstack(b) for b in range(2)])])
    one.bind(model)
    x, h = queries(model, stacked)
    with torch.no_grad():
        apart = [
            stacked.delta(0, torch.cat([x, x]), Rows((6, 6)), torch.cat([h, h]))[6 * b : 6 * b + 6] for b in (0, 1)
        ]
        torch.testing.assert_close(one.delta(0, x, Rows(), h), apart[0] + apart[1])


def test_neurons_stand_beside_it(model: EditableModel) -> None:
    sites = tuple(model.sites([1], ["o", "down"]))
    alone = {"n": 3, "activation": "silu", "gate": False}
    options = {**alone, **spec_of(model).options}
    stacked = new_stack(DeltaSpec("attention_memory", sites, options), 2, dtype=torch.float64)
    neurons = new_stack(DeltaSpec("key_value", sites[1:], alone), 2, dtype=torch.float64)
    assert [stacked.reader(0), stacked.reader(1)] == ["q", "up"]
    assert set(neurons.parts) <= set(stacked.parts)
    for name, part in neurons.parts.items():
        assert torch.equal(part, stacked.parts[name])
        stacked.parts[name].copy_(part.normal_())
    x = torch.randn(4, model.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(stacked.delta(1, x, Rows((1, 3)), x), neurons.delta(0, x, Rows((1, 3)), x))
    together = accumulate([stacked.unstack(b) for b in range(2)])
    assert (together.spec.options["n"], together.spec.options["own"]) == (6, 2 * OWN)


def test_what_does_not_fit_is_named(model: EditableModel) -> None:
    spec = spec_of(model)

    def changed(**options: Any) -> DeltaSpec:
        return replace(spec, options={**spec.options, **options})

    with pytest.raises(ValueError, match=r"load_artifact .* \(got artifact='0000'"):
        new_stack(changed(artifact="0000"), 1).bind(model)
    with pytest.raises(ValueError, match="memory of layer 0"):
        new_stack(replace(spec, sites=tuple(model.sites([0], ["o"]))), 1).bind(model)
    unnamed = new_stack(changed(artifact=""), 1)
    unnamed.bind(model)
    with pytest.raises(ValueError, match="names its artifact"):
        unnamed.delta(0, torch.zeros(1, model.hidden_size), Rows(), torch.zeros(1, model.hidden_size))
    for options, message in (
        ({"reading": "aloud"}, r"reading is one of .* \(got reading='aloud'\)"),
        ({"search": "far"}, r"search is one of .* \(got search='far'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            new_stack(changed(**options), 1)
    with pytest.raises(ValueError, match=r"beside 'o' \(got site 1.up\)"):
        new_stack(replace(spec, sites=tuple(model.sites([1], ["up"]))), 1)
    one = new_stack(spec, 1).unstack(0)
    for options in ({"alpha": 0.3}, {"own": 0}, {"own": OWN + 1}):
        other: EditDelta = new_stack(changed(**options), 1).unstack(0)
        with pytest.raises(ValueError, match="read one memory in one way"):
            accumulate([one, other])
