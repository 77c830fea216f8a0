"""Which linear maps a decoder layer has, told by what they do to its data, not by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Enough, LayerTrace, hooked

#: What attention is given, in order.
_GIVEN = ("q", "k", "v")


#: Names of linear maps by the last part of their paths, for layers without weights, which cannot be traced.
_USUAL = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "qkv_proj": "qkv",
    "q_a_proj": "q_a",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_b_proj": "kv_b",
    "up_proj": "up",
    "gate_proj": "gate",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "fc1": "up",
    "fc2": "down",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
    "q": "q",
    "k": "k",
    "v": "v",
    "o": "o",
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
}


def usual_sites(layer: nn.Module) -> dict[str, str]:
    """Return what `find_sites` will most likely say of a layer whose weights are there."""
    found: dict[str, str] = {}
    for path in linear_maps(layer):
        name = _USUAL.get(path.rsplit(".", 1)[-1])
        if name is not None:
            found.setdefault(name, path)
    block = next((path for path, part in layer.named_children() if hasattr(part, "experts")), None)
    return found if block is None or "down" in found else found | {"block": block}


class LayerProbe:
    """One layer with a call of it that can be repeated.

    Args:
        layer: a decoder layer. mixer: path of its mixer. call: run it, return its hidden states. tokens: of the call.
        given: what the attention function was given in the last call, (query, key, value); empty where there was none.
    """

    def __init__(
        self, layer: nn.Module, mixer: str, call: Callable[[], Tensor], tokens: int, given: list[Tensor]
    ) -> None:
        self.layer, self.mixer, self.call, self.tokens, self.given = layer, mixer, call, tokens, given

    def mixed(self) -> list[Tensor]:
        """What attention is given; the layer is run no further than its mixer."""
        self.given.clear()
        with hooked([self.layer.get_submodule(self.mixer).register_forward_hook(_enough)]):
            self.call()
        return list(self.given)

    def calls(self) -> list[tuple[str, bool]]:
        """Linear maps that see every token once, in the order of their calls: (path, after attention).

        Some routers of experts are linear maps by class and put out two things (Llama 4): nothing can be added to them.
        """
        seen: list[tuple[str, bool]] = []

        def watch(path: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                if args and args[0].numel() == self.tokens * args[0].shape[-1] and isinstance(output, Tensor):
                    seen.append((path, bool(self.given)))

            return hook

        self.given.clear()
        with hooked([part.register_forward_hook(watch(path)) for path, part in linear_maps(self.layer).items()]):
            self.call()
        paths = [path for path, _ in seen]
        return [(path, after) for path, after in seen if paths.count(path) == 1]

    def changed(self, path: str, change: Callable[[Tensor], Tensor], watched: str | None) -> list[Tensor]:
        """What attention is given, or what a watched map reads, while a map's output is changed."""
        handles = [self.layer.get_submodule(path).register_forward_hook(lambda _m, _a, out: change(out))]
        if watched is None:
            with hooked(handles):
                return self.mixed()
        read: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read.append(args[0].clone())
            raise Enough

        handles.append(self.layer.get_submodule(watched).register_forward_pre_hook(keep))
        with hooked(handles):
            self.call()
        return read


def _enough(*_: Any) -> None:
    raise Enough


def linear_maps(module: nn.Module) -> dict[str, nn.Module]:
    """Linear maps inside of a module by path, quantized ones among them; none of lists of experts."""
    # T5's layers are nothing but a list of their parts
    skip = 2 if len(list(module.named_children())) == 1 else 0
    return {
        path: part
        for path, part in module.named_modules()
        if path and hasattr(part, "in_features") and not any(piece.isdigit() for piece in path.split(".")[skip:])
    }


def find_sites(probe: LayerProbe, trace: LayerTrace, hidden_size: int) -> dict[str, str]:
    """Return paths of a layer's linear maps by name.

    Attention's are "q", "k", "v" and "o", or "qkv" and the like where one map makes several; two in a row are "q_a" and
    "q_b". A feed-forward block's are "up", "gate" and "down", or "gate_up". Those that are none of these have the name
    that the model gives them. "block" is a whole block of experts, which adds to the residual stream as one map would.
    """
    calls = probe.calls()
    inner = trace.mixer + "."
    mixing = [(path, after) for path, after in calls if path.startswith(inner)]
    found = _of_attention(probe, mixing) if probe.given else _of_mixer([path for path, _ in mixing])
    read = f"{trace.reader}." if trace.reader else inner
    outside = [path for path, _ in calls if not path.startswith((inner, read))]
    found |= _of_feed_forward(probe, outside, hidden_size)
    block = "" if "down" in found else _block(probe, trace)
    if block:
        found["block"] = block
    return found


def _of_attention(probe: LayerProbe, calls: list[tuple[str, bool]]) -> dict[str, str]:
    before = [part.clone() for part in probe.mixed()]
    groups: dict[str, list[str]] = {}
    for path, after in calls:
        if after:
            groups.setdefault("o", []).append(path)
            continue
        given = probe.changed(path, _noisy, None)
        name = "".join(name for name, old, new in zip(_GIVEN, before, given, strict=True) if not torch.equal(old, new))
        groups.setdefault(name or path.rsplit(".", 1)[-1], []).append(path)
    found = {}
    for name, paths in groups.items():
        for number, path in enumerate(paths):
            found[name if len(paths) == 1 else f"{name}_{'abcdefgh'[number]}"] = path
    return found


def _of_mixer(paths: list[str]) -> dict[str, str]:
    named = {path.rsplit(".", 1)[-1]: path for path in paths[:-1]}
    return named | ({"o": paths[-1]} if paths else {})


def _of_feed_forward(probe: LayerProbe, paths: list[str], hidden_size: int) -> dict[str, str]:
    """A block is the maps of one module, the last of which goes back to the width of the residual stream."""
    maps = linear_maps(probe.layer)
    blocks: dict[str, list[str]] = {}
    for path in paths:
        blocks.setdefault(path.rpartition(".")[0], []).append(path)
    found: dict[str, str] = {}
    for parent, inside in blocks.items():
        down: Any = maps[inside[-1]]
        names = {path.rsplit(".", 1)[-1]: path for path in inside}
        feeding = [path for path in inside[:-1] if int(maps[path].in_features) == hidden_size]  # type: ignore[arg-type]
        if "down" in found or down.out_features != hidden_size or len(feeding) != len(inside) - 1 or not feeding:
            found |= {name if name not in found else f"{parent}.{name}": path for name, path in names.items()}
            continue
        found["down"] = inside[-1]
        if len(feeding) == 1:
            wide: Any = maps[feeding[0]]
            found["gate_up" if wide.out_features == 2 * down.in_features else "up"] = feeding[0]
        elif len(feeding) == 2:
            gate, up = _gate_and_up(probe, feeding, inside[-1])
            found |= {"gate": gate, "up": up}
        else:
            found |= {path.rsplit(".", 1)[-1]: path for path in feeding}
    return found


def _gate_and_up(probe: LayerProbe, feeding: list[str], down: str) -> tuple[str, str]:
    """The map whose output an activation sees, and the other, in which what comes out is linear."""
    (before,) = probe.changed(feeding[0], lambda out: out, down)
    linear = []
    for path in feeding:
        (after,) = probe.changed(path, lambda out: 3 * out, down)
        linear.append(bool(((after - 3 * before).abs() <= 1e-2 * before.abs().max()).all()))
    first, second = feeding
    if linear == [True, False] or (linear[0] == linear[1] and "up" in first.rsplit(".", 1)[-1]):
        return second, first
    return first, second


def _block(probe: LayerProbe, trace: LayerTrace) -> str:
    """Path of a block of experts that puts out one state a token, or ""."""
    outer = trace.mixer.split(".")[0]
    fits: list[str] = []

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Some blocks put out their router's scores beside (GPT-OSS): their experts do not
            if args and isinstance(output, Tensor) and output.numel() == args[0].numel():
                fits.append(path)

        return hook

    found = [
        path
        for path, part in probe.layer.named_modules()
        if path.split(".")[0] != outer and any(name.endswith("experts") for name, _ in part.named_modules())
    ]
    found += [path for path, _ in probe.layer.named_modules() if path.endswith(".experts")]
    paths = [path for path in found if path]
    with hooked([probe.layer.get_submodule(path).register_forward_hook(watch(path)) for path in paths]):
        probe.call()
    return next((path for path in paths if path in fits), "")


def _noisy(output: Tensor) -> Tensor:
    noise = torch.arange(output.numel(), device=output.device, dtype=torch.float32).sin().view(output.shape)
    return output + noise.to(output.dtype)
