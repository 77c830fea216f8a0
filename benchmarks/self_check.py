"""Seconds of a processor that loading takes to trace a model without a family and to compare it with rows alone.

A text model of a 7B shape is made on the meta device. One decoder layer, the embeddings (which are the head too) and
the final norm get weights, and all layers share those of the one: what is looked at has its size.

    python -m benchmarks.self_check [--dtype bfloat16] [--runs 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from fastedit.backbone.generic.adapter import GenericAdapter
from fastedit.backbone.synthetic.processors import made_up_tokenizer

#: Qwen2-7B.
SHAPE = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 152064}
#: What it may take, in seconds.
BOUND = 2.0


class TextProcessor:
    """Has a tokenizer, as a model of text alone needs."""

    def __init__(self) -> None:
        self.tokenizer = made_up_tokenizer(640, end="</s>", opens=True)


def shaped_model(dtype: torch.dtype, shape: dict[str, int] | None = None) -> Any:
    """Return a stock text model of a shape, all of whose layers have the weights of the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen2", tie_word_embeddings=True, **(SHAPE if shape is None else shape))
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    root = hf.model
    first = root.layers[0].to_empty(device="cpu")
    for part in (first, root.embed_tokens.to_empty(device="cpu"), root.norm.to_empty(device="cpu")):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    for layer in root.layers[1:]:
        for path, module in layer.named_modules():
            module._parameters.update(first.get_submodule(path)._parameters)
    hf.tie_weights()
    root.rotary_emb = type(root.rotary_emb)(config)
    return hf.eval()


def self_check_seconds(hf: Any) -> float:
    """Seconds of the processor to make the adapter of a model that is in memory."""
    processor = TextProcessor()
    start = time.process_time()
    adapter = GenericAdapter(hf, processor)
    seconds = time.process_time() - start
    remove = getattr(adapter, "remove", None)
    if remove is not None:
        remove()
    return seconds


def main() -> None:
    """Print the median over some runs, after one that warms up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    hf = shaped_model(getattr(torch, chosen.dtype))
    self_check_seconds(hf)
    seconds = [self_check_seconds(hf) for _ in range(chosen.runs)]
    median = statistics.median(seconds)
    print(f"self-check of a 7B shape in {chosen.dtype}: {median:.2f} s of at most {BOUND:.0f} s, {seconds}")


if __name__ == "__main__":
    main()
