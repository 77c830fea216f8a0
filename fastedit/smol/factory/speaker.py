"""The model in training: vision tower and projector before the frozen language model, low-rank changes in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from fastedit.smol.models import IMAGE_TOKENS, PATCH, llava_config, vision_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import LlamaForCausalLM

    from fastedit.smol.factory.packing import Packed, Packer

RANK = 8
ADAPTED = ("q_proj", "v_proj")


class Tower(nn.Module):
    """Vision tower and projector, with fresh weights (torch's global generator), float32."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self.vision_tower = CLIPVisionModel(vision_config())
        self.vision_tower.set_attn_implementation("sdpa")
        self.multi_modal_projector = LlavaMultiModalProjector(llava_config())

    def forward(self, pixels: Tensor) -> Tensor:
        """Return image tokens (R, 36, d) of pixels (R, 3, 96, 96) in [-1, 1]."""
        parts = self.vision_tower.embeddings
        kernel = parts.patch_embedding.weight
        # The convolution as a product: its backward is several times as fast
        grid = pixels.shape[-1] // PATCH
        patches = pixels.reshape(len(pixels), 3, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5)
        hidden = linear(patches.reshape(len(pixels), IMAGE_TOKENS, -1), kernel.flatten(1))
        first = parts.class_embedding.expand(len(pixels), 1, -1).to(hidden.dtype)
        hidden = torch.cat([first, hidden], 1) + parts.position_embedding.weight[None]
        seen = self.vision_tower.encoder(inputs_embeds=self.vision_tower.pre_layrnorm(hidden)).last_hidden_state
        tokens: Tensor = self.multi_modal_projector(seen[:, 1:])
        return tokens

    def trained(self) -> dict[str, Tensor]:
        """Return the weights by their names in the whole model."""
        return {f"model.{name}": weight.detach() for name, weight in self.state_dict().items()}


def tower_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tower's weights by their names in it, of weights by their names in the whole model."""
    return {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}


class LowRank(nn.Module):
    """A frozen linear map with a low-rank change beside it, zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.adapter_up = nn.Parameter(torch.zeros(frozen.out_features, rank))
        self.adapter_down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d_out)."""
        changed: Tensor = self.frozen(x) + linear(linear(x, self.adapter_down), self.adapter_up)
        return changed


class Speaker(nn.Module):
    """A tower before the language model, which is frozen but for low-rank changes of its queries and values."""

    def __init__(self, tower: Tower, language: LlamaForCausalLM, packer: Packer, rank: int = RANK) -> None:
        super().__init__()
        self.tower, self._packer = tower, packer
        self.language = language.requires_grad_(False)
        self.language.set_attn_implementation("eager")
        self._adapted: dict[str, LowRank] = {}
        for number, layer in enumerate(language.model.layers):
            for name in ADAPTED:
                wrapped = LowRank(getattr(layer.self_attn, name), rank)
                setattr(layer.self_attn, name, wrapped)
                self._adapted[f"layers.{number}.self_attn.{name}"] = wrapped

    def forward(self, packed: Packed, pixels: Tensor) -> Tensor:
        """Return the logits (T, V) where an answer's token is predicted."""
        embeds = self.language.model.embed_tokens(packed.ids)
        images = self.tower(pixels).to(embeds.dtype)
        start = len(self._packer.before)
        embeds = torch.cat([embeds[:, :start], images, embeds[:, start + IMAGE_TOKENS :]], 1)
        mask = torch.zeros(packed.mask.shape, dtype=embeds.dtype).masked_fill_(~packed.mask, -1e9)
        hidden = self.language.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
        return linear(hidden.flatten(0, 1)[packed.picked], self.language.lm_head.weight)

    def trained(self) -> dict[str, Tensor]:
        """Return what ships: the tower's weights, and the changes of the language model."""
        weights = self.tower.trained()
        for name, module in self._adapted.items():
            weights[f"adapter.{name}.up"] = module.adapter_up.detach()
            weights[f"adapter.{name}.down"] = module.adapter_down.detach()
        return weights

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take weights that `trained` gave; the tower's, or changes of the language model, may be absent."""
        tower = tower_of(weights)
        if tower:
            self.tower.load_state_dict(tower)
        for name, module in self._adapted.items():
            if f"adapter.{name}.up" in weights:
                module.adapter_up.data.copy_(weights[f"adapter.{name}.up"])
                module.adapter_down.data.copy_(weights[f"adapter.{name}.down"])
