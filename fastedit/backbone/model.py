"""An editable model: a frozen multimodal language model with a seam at any decoder layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .active import Holder, active_key, fingerprint_with, holding, installed_on, uninstalled
from .adapters import Adapter, make_adapter
from .caches import Caches, Recent, SpillCache, feature_cache, tensor_cache
from .context import Frozen, autocast_key, on_frozen_model, outside_inference_mode
from .encoding import encode_queries
from .fingerprint import architecture_fingerprint, model_fingerprint, weights_version
from .generation import answers
from .generic.adapter import generic, walkable
from .images import ImageReader
from .placement import device_of, layer_devices
from .prompts import PromptBuilder
from .several import Several
from .states import Encoded, ImageFeatures, Site
from .token_layout import Running, running_now
from .vision import VISION

if TYPE_CHECKING:
    from fastedit.requests import Query, VisualSource

#: Images per call of the vision side. On a CPU few: what a layer makes of more does not stay in the caches.
VISION_BATCH, VISION_BATCH_CPU = 32, 4
#: Sequences of deltas in storage that stay stacked between calls that take them.
STACKS = 4


class EditableModel:
    """A Hugging Face multimodal model in eval mode, all parameters frozen, split at will into prefix and tail.

    Made by `fastedit.backbone.load`. Forward hooks on any submodule stay active in `prefix`, `tail`, `head` and
    `generate`, which call the real submodules and keep rows in order. `generate` and edits run on packed rows: linear
    maps see (1, T, d), the tokens of all rows one after another, and `running` says whose they are.

    What one thread installs (`fastedit.applied`, a fit) acts in its context only: threads may share a model.

    Args:
        hf: the model. processor: its processor. adapter: its family. name: what it was loaded as.
        owned: whether it is in eval mode and frozen for good; else inside of calls only (`fastedit.wrap`).
        quantize: "none", "nf4" or "int8". dtype: of the unquantized floating-point parameters.
        template: prompt template, or None for the processor's own.
        end_token_ids: tokens that end an answer; the first is the one that encoded answers end with.
        image_cache_mib: memory for image features on the model's device, and as much for pixels.
        state_cache_mib: memory on the device for prefix states of locality questions, and as much for reference
            logits; what is moved out of it goes to as much host memory.
        linear: who multiplies frozen weights, "torch" or "onednn".
    """

    def __init__(
        self,
        hf: Any,
        processor: Any,
        adapter: Adapter,
        *,
        name: str,
        quantize: str,
        dtype: torch.dtype,
        template: str | None,
        end_token_ids: Sequence[int],
        image_cache_mib: int,
        state_cache_mib: int = 256,
        linear: str = "torch",
        owned: bool = True,
    ) -> None:
        self.hf = hf.eval().requires_grad_(False) if owned else hf
        self._frozen = Frozen(hf)
        self._versions = weights_version(self.hf)
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.adapter = adapter
        self.name = name
        self.quantize = quantize
        self.dtype = dtype
        self.linear = linear
        self.template = template
        self.end_token_ids = tuple(end_token_ids)
        texts = adapter.image_text, template, self.end_token_ids[0], adapter.video_text, adapter.listed_text
        self.prompts = PromptBuilder(processor, self.tokenizer, *texts, apart=self.reads_prompts_by_encoder)
        self.images = ImageReader(adapter.image_inputs, image_cache_mib << 20, Several(name, adapter))
        self.image_features = feature_cache(image_cache_mib << 20)
        #: Of the model as it acts: keys say under which deltas.
        self.caches = Caches(state_cache_mib << 20)
        #: Answers to (what acts, prompt, image, most new tokens), each asked once.
        self.reference_answers: dict[tuple[Hashable, str, str, int], str] = {}
        #: What the vision tower makes of images, for edits behind it.
        self.tower_outputs: SpillCache[Tensor] = tensor_cache(image_cache_mib << 20)
        #: Trained parts by id, of deltas that do not act without.
        self.artifacts: dict[str, Any] = {}
        #: What was stacked of deltas that stay in storage, or are live.
        self.stacks = Recent(STACKS)
        #: What routers keep to search stored edits (``fastedit.routers.tables.Tables``).
        self.tables: Any = None
        #: Stored edits from which on an index names candidates, which may miss some; None compares with all.
        self.index_from: int | None = None
        #: Arguments of ``load`` that give this model again; None for one that was in memory already.
        self.loaded_with: dict[str, Any] | None = None
        self._cache_mib = image_cache_mib, state_cache_mib
        self._fingerprint: str | None = None
        self._lock = threading.RLock()
        paths = {id(module): path for path, module in self.hf.named_modules()}
        self._layer_paths = [paths[id(layer)] for layer in adapter.text.layers]
        self.layer_devices = layer_devices(adapter.text.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> EditableModel:
        """A model with weights of its own and empty caches."""
        hf = copy.deepcopy(self.hf, memo)
        made = EditableModel(
            hf, self.processor, make_adapter(hf, self.processor), name=self.name, quantize=self.quantize,
            dtype=self.dtype, template=self.template, end_token_ids=self.end_token_ids, linear=self.linear,
            image_cache_mib=self._cache_mib[0], state_cache_mib=self._cache_mib[1],
        )  # fmt: skip
        made.artifacts.update(self.artifacts)
        return made

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block the model is in eval mode and computes no gradients of its parameters.

        Deltas that change while the model serves stay what they were at the beginning of the outermost block. What is
        kept of a model whose weights were written since the last call, by a trainer or by hand, is dropped.
        """
        with self._lock:
            version = weights_version(self.hf)
            if version != self._versions:
                self._versions, self._fingerprint = version, None
                self.forget()
        with holding(self), self._frozen.block(), walkable(self.adapter):
            yield

    @property
    def running(self) -> Running | None:
        """Whose tokens the linear maps see now, for hooks; None outside of walks over packed rows."""
        return running_now()

    @property
    def holders(self) -> list[Holder]:
        """Deltas installed in this context that act on some prompts only, or ask another question."""
        return [holder for holder in installed_on(self) if holder.routed]

    @property
    def watching(self) -> int:
        """How many deltas that are installed in this context stand behind the vision tower."""
        return sum(holder.point[1] == VISION for holder in installed_on(self))

    @property
    def active_key(self) -> Hashable:
        """What distinguishes the model as it acts in this context: whatever is kept of it is kept under this key."""
        return active_key(self), autocast_key(self.device)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.n_layers} layers of width {self.hidden_size}"
        family = self.hf.config.model_type
        return f"<EditableModel: {self.name} ({family}), {size}, {dtype}, quantize {self.quantize}, on {self.device}>"

    @property
    def device(self) -> torch.device:
        """Where the decoder ends: what is handed around is there, and layers elsewhere get it brought."""
        return device_of(self.adapter.text.layers[-1])

    @property
    def stored_per_token(self) -> int:
        """Numbers that attention keeps of a token in all layers."""
        text = self.adapter.text
        return text.stored if text.stored is not None else 2 * self.sites([0], ["k"])[0].d_out * self.n_layers

    @property
    def reads_prompts_by_encoder(self) -> bool:
        """Whether prompts and images are what an encoder reads, and the decoder's tokens are those of answers alone."""
        traced = generic(self.adapter)
        return traced is not None and traced.start_token_id is not None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.adapter.text.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.adapter.text.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.adapter.head.out_features)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Drop everything remembered: pixels, image features, prefix states, reference logits, answers."""
        self.images.clear()
        self.image_features.clear()
        self.tower_outputs.clear()
        traced = generic(self.adapter)
        if traced is not None:
            traced.features.kept.clear()
        self.caches.clear()
        self.reference_answers.clear()

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of configuration and weights, computed at the first use."""
        with self.frozen(), self._lock:
            if self._fingerprint is None:
                self._fingerprint = model_fingerprint(self.hf)
            return self._fingerprint

    @property
    def architecture(self) -> str:
        """SHA-256 of names and shapes of the weights, "architecture:..."; the same in any dtype and quantization."""
        return architecture_fingerprint(self.hf)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights, and of the deltas that act in this context where any do."""
        return fingerprint_with(self.base_fingerprint, active_key(self))

    def encode(self, queries: Sequence[Query], *, answers: bool) -> Encoded:
        """Return right-padded rows on the model's device.

        Args:
            queries: R questions; with `answers=True` each with an answer.
            answers: append the answers and mark their positions. Else no position carries a label.
        Raises:
            ValueError, FileNotFoundError: no queries, an empty answer, a row over the model's positions, an image
                placeholder typed into a prompt, a missing image. Names the row.
        """
        return encode_queries(self, queries, answers=answers)

    @property
    def vision_batch(self) -> int:
        """Images per call of the vision side."""
        return VISION_BATCH_CPU if self.device.type == "cpu" else VISION_BATCH

    @on_frozen_model
    @outside_inference_mode
    @torch.no_grad()
    def features(self, encoded: Encoded) -> dict[str, ImageFeatures]:
        """Return the features of every distinct image of the rows by content hash, running the tower on new ones.

        They are those of the base model: what a delta behind the tower changes is computed anew by whoever walks on.
        """
        wanted = encoded.distinct_images
        cast = autocast_key(self.device)
        found = {key: self.image_features.get((key, cast)) for key in wanted}
        missing = [wanted[key] for key, features in found.items() if features is None]
        size = self.vision_batch
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            with uninstalled():
                computed = self.adapter.image_features(chunk)
            for image, features in zip(chunk, computed, strict=True):
                if features.tokens.shape[0] != image.tokens:
                    got = f"features={features.tokens.shape[0]}, tokens={image.tokens}"
                    raise ValueError(f"{self.name}: an image has as many features as tokens (got {got})")
                # A copy: the tower's output may be a view of a whole batch, which would then stay in memory.
                copied = ImageFeatures(features.tokens.clone(), tuple(part.clone() for part in features.deep))
                found[image.key] = copied
                self.image_features.put((image.key, cast), copied)
        return {key: features for key, features in found.items() if features is not None}

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of final hidden states (..., d)."""
        logits: Tensor = self.adapter.head(hidden)
        return logits.to(hidden.device)

    @on_frozen_model
    @outside_inference_mode
    def generate(
        self, queries: Sequence[Query], *, max_new_tokens: int = 64, batch_size: int = 64, edits: Any = None
    ) -> list[str]:
        """Return greedy answers without surrounding white space. Rows of a batch stay in order until all have ended.

        Plain argmax: sampling settings and penalties of the model's generation configuration are not applied.

        Args:
            edits: deltas that act in this call, beside those that are installed around it: what ``fastedit.applied``
                takes, live ones as they are at the call's beginning.
        """
        return answers(self, queries, max_new_tokens, batch_size, edits)

    def answer(self, image: VisualSource | None, prompt: str, *, max_new_tokens: int = 64, edits: Any = None) -> str:
        """Return the greedy answer to one question about an image, a list of images, a video, or none.

        ``edits`` as for ``generate``.
        """
        from fastedit.requests import Query

        return self.generate([Query(prompt, image)], max_new_tokens=max_new_tokens, edits=edits)[0]

    def sites(self, layers: Sequence[int], names: Sequence[str]) -> list[Site]:
        """Return the linear maps of these layers by name ("up", "gate", "down", "q", "k", "v", "o"), layer by layer.

        Raises:
            ValueError: no such layer, or a name that the model's layers do not have.
        """
        found = []
        for layer in layers:
            self.check_layer(layer)
            paths = self.adapter.text.paths_of(layer)
            for name in names:
                if name not in paths:
                    got = f"name={name!r}"
                    raise ValueError(f"sites: names must be among {', '.join(paths)} (got {got})")
                module: Any = self.adapter.text.layers[layer].get_submodule(paths[name])
                path = self._layer_paths[layer] + "." + paths[name]
                # A block that is edited as one map goes from the residual stream to it
                sizes = [getattr(module, side, self.hidden_size) for side in ("in_features", "out_features")]
                found.append(Site(layer, name, path, int(sizes[0]), int(sizes[1])))
        return found

    def module(self, site: Site) -> nn.Module:
        """Return the module of a site."""
        module: nn.Module = self.hf.get_submodule(site.module_path)
        return module

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that the decoder does not have."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"{self.name}: layer must be in 0..{self.n_layers - 1} (got layer={layer})")
