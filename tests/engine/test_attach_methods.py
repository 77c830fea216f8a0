"""Every method acts in the stock model's own calls as in the engine's, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastedit
from fastedit.pocket import available
from tests.engine.stock_calls import (
    METHODS,
    NEW,
    engine_logits,
    fitted,
    inputs,
    load,
    questions,
    stock_answers,
    stock_logits,
)

SHIPPED = [name for name in ("pocket-llava", "pocket-blip2", "pocket-qwen2vl") if name in available()]
RANDOM = ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"]
TRACED = ["generic:gemma3", "generic:qwen3_5", "generic:qwen3_vl_moe"]
#: By model, methods that it cannot be edited by: its feed-forward block has no linear maps of its own, no layer has all
#: of attention's, or nothing lies between tower and decoder.
WITHOUT = {
    "generic:gemma3": {"ft-vision"},
    "generic:qwen3_5": {"ft-vision", "unike", "odedit+unike"},
    "generic:qwen3_vl_moe": set(METHODS) - {"ft", "lora", "odedit+lora"},
}
#: Settings by model.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "generic:qwen3_vl_moe": {name: {"names": ("q", "o")} for name in ("ft", "lora", "odedit+lora")},
}
#: Left padding shifts positions, and rotary tables are float32; a router divides by small numbers.
NEAR = {"float64": 2e-4, "float32": 1e-3}
CASES = [
    pytest.param(name, method, id=f"{name}-{method}")
    for name in (*SHIPPED, *RANDOM, *TRACED)
    for method in METHODS
    if method not in WITHOUT.get(name, set())
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_stock_generation_is_the_engines_own(name: str, method: str) -> None:
    dtype = "float32" if name in SHIPPED else "float64"
    model = load(name, dtype)
    asked = questions(model)
    deltas = fitted(name, method, dtype, **SETTINGS.get(name, {}).get(method, {}))
    acting = deltas if "router" in deltas[0].spec.options else deltas[:1]
    asks = "template" in deltas[0].texts
    acting = deltas[:1] if method == "ike" else acting
    base, before = model.generate(asked, max_new_tokens=NEW), stock_logits(model, model.hf, asked)
    unedited = engine_logits(model, asked)
    assert stock_answers(model, model.hf, asked) == base
    with fastedit.applied(model, acting):
        expected, logits = model.generate(asked, max_new_tokens=NEW), engine_logits(model, asked)
    known = [each for each in model.artifacts.values() if each.id == deltas[0].spec.options.get("artifact")]
    given = {"artifact": known[0]} if known else {}
    whose = (model,) if name in TRACED else (model.hf, model.processor)
    with fastedit.attached(whose[0], acting, *whose[1:], **given) as hf:
        assert stock_answers(model, hf, asked) == expected
        if asks:
            with pytest.raises(ValueError, match="asks another question, which a stock call cannot but in generate"):
                stock_logits(model, hf, asked)
        together = logits if asks else stock_logits(model, hf, asked)
        assert [stock_answers(model, hf, [query])[0] for query in asked[:3]] == expected[:3]
    assert expected != base, "the case needs a delta that is felt"
    torch.testing.assert_close(together, logits, rtol=0, atol=NEAR[dtype])
    if asks:
        return
    # What the engine leaves alone to the bit is left alone here too
    alone = [torch.equal(a, b) for a, b in zip(logits, unedited, strict=True)]
    assert [torch.equal(a, b) for a, b in zip(together, before, strict=True)] == alone
    assert stock_answers(model, model.hf, asked) == base


#: Where deltas act, and what routers look at, beside the usual ones.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("random:llava-tiny", "ft", {"positions": "after_image"}),
    ("random:qwen2vl-tiny", "lora", {"positions": "after_image"}),
    ("random:blip2-tiny", "lora", {"positions": "after_image"}),
    ("generic:qwen3_5", "lora", {"positions": "after_image"}),
    ("random:llava-tiny", "tpatcher", {"positions": "answer"}),
    ("random:qwen2vl-tiny", "tpatcher", {"positions": "after_image"}),
    ("random:llava-tiny", "wise", {"tokens": "all"}),
    ("random:blip2-tiny", "wise", {"tokens": "after_image"}),
    ("random:llava-tiny", "wise", {"layer": -1, "tokens": "all"}),
    ("generic:qwen3_5", "wise", {"layer": -1, "tokens": "all"}),
    ("random:qwen2vl-tiny", "grace", {"layer": -1}),
    ("generic:qwen3_5", "grace", {"layer": -1, "replace": False}),
]


@pytest.mark.parametrize(("name", "method", "settings"), VARIANTS, ids=lambda value: str(value))
def test_positions_and_what_routers_read_are_the_engines_own(name: str, method: str, settings: dict[str, Any]) -> None:
    model = load(name)
    asked = questions(model)
    deltas = fitted(name, method, "float64", **settings)
    acting = deltas if "router" in deltas[0].spec.options else deltas[:1]
    base = model.generate(asked, max_new_tokens=NEW)
    with fastedit.applied(model, acting):
        expected, logits = model.generate(asked, max_new_tokens=NEW), engine_logits(model, asked)
    with fastedit.attached(model, acting) as hf:
        assert stock_answers(model, hf, asked) == expected
        torch.testing.assert_close(stock_logits(model, hf, asked), logits, rtol=0, atol=NEAR["float64"])
    assert expected != base, "the case needs a delta that is felt"


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("serac", "ike")])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny", "generic:qwen3_5"])
def test_rows_that_no_edit_acts_on_are_the_base_models_to_the_bit(name: str, method: str) -> None:
    if method in WITHOUT.get(name, ()):
        pytest.skip("not a method for this model")
    model, delta = load(name), fitted(name, method)[0]
    asked = questions(model)
    ids = [0, -1, 0, *[-1] * (len(asked) - 3)]
    before = stock_logits(model, model.hf, asked)
    options = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": NEW, "do_sample": False}
    given = inputs(model, asked, left=True) | {"eos_token_id": None, "pad_token_id": 0}
    plain = model.hf.generate(**given, **options)
    with fastedit.attached(model, delta) as hf:
        after = stock_logits(model, hf, asked, edit_ids=ids)
        generated = hf.generate(**given, **options, edit_ids=ids)
    assert not torch.equal(after[0], before[0])
    for row, edit in enumerate(ids):
        if edit < 0:
            assert torch.equal(after[row], before[row])
            assert torch.equal(generated.sequences[row], plain.sequences[row])
            for ours, theirs in zip(generated.scores, plain.scores, strict=True):
                assert torch.equal(ours[row], theirs[row])
