"""What linear maps inside a feed-forward block read and put out, without reading a weight."""

from __future__ import annotations

import pytest
import torch

import fastedit
from fastedit.backbone.probe import feed_forward_parts
from fastedit.testing import assert_close


@pytest.mark.parametrize("family", ["llava", "blip2", "qwen2vl"])
def test_maps_see_what_they_see_in_the_block(family: str) -> None:
    model = fastedit.load(f"random:{family}-tiny", dtype="float64")
    hidden = torch.randn(5, model.hidden_size, dtype=torch.float64)
    (up,), (down,) = model.sites([1], ["up"]), model.sites([1], ["down"])
    x, y = feed_forward_parts(model, 1, hidden, "down")
    assert_close(model.module(down)(x), y, length=down.d_in)
    assert_close(hidden + y, model.adapter.text.feed_forward(1, hidden[None])[0], length=down.d_in)
    read, _ = feed_forward_parts(model, 1, hidden, "up")
    assert read.shape == (5, up.d_in)
    # what the block reads is a token's own: scaling the residual stream is undone by its norm
    if family != "blip2":
        torch.testing.assert_close(feed_forward_parts(model, 1, 2 * hidden, "up")[0], read, rtol=1e-4, atol=1e-4)


def test_no_hook_stays_and_no_token_is_fine() -> None:
    model = fastedit.load("random:llava-tiny", dtype="float32")
    (site,) = model.sites([0], ["down"])
    x, y = feed_forward_parts(model, 0, torch.empty(0, model.hidden_size), "down")
    assert x.shape == (0, site.d_in)
    assert y.shape == (0, site.d_out)
    feed_forward_parts(model, 0, torch.randn(2, model.hidden_size), "down")
    assert not model.module(site)._forward_hooks
