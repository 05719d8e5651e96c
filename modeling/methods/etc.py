"""What ETC's models share, whatever their backbone: the passes, the eviction of visual tokens, compressed images.

With a cache, images are read in plain causal passes, after each of which the keys and values of its visual tokens are
gone (`core/cache.py`), so every attention kernel serves. Without one (training), one masked pass does the same.
Position ids go on counting the visual tokens, as in training. Inputs and outputs are in the caller's columns
(`core/cache.py`).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.utils import logging

from foveate.configuration.etc import ETCSettings
from foveate.modeling.compatibility import (
    cache_argument,
    cache_of,
    checkpoints_activations,
    fields_with_cache,
    image_fields,
    takes_cache,
    write_to_cache,
)
from foveate.modeling.core.cache import EvictingCache, LogicalCache
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.deferred import DeferredGenerationMixin, OwnPositionsModelMixin
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, Images, TokenProvenance, VisualTokens
from foveate.modeling.core.positions import lay_out_columns
from foveate.modeling.layers.decoder_attention import attention_over, watched_attention
from foveate.modeling.methods.etc_algorithm import (
    CompressedTokens,
    ImageColumns,
    Pass,
    bottleneck_mask,
    locate_columns,
    plan_passes,
    positions_by_places,
    take_entries,
)


logger = logging.get_logger(__name__)

MASK_KERNELS = ("eager", "sdpa")  # attention that takes a mask of any shape


@dataclass
class ImagePrompt:
    """The columns of one call that has images, ready for the language model.

    Args:
        inputs_embeds: (batch, columns, width), with V and Z in place; where images were compressed before, nothing
            reads their columns.
        columns: where the images lie in them.
        positions: (dimensions, batch, columns), what is cached included, on the embeddings' device.
        encoded: what the language model gets of the images.
        compressed_images: those that were compressed before, if it is they.
    """

    inputs_embeds: torch.Tensor
    columns: ImageColumns
    positions: torch.Tensor
    encoded: VisualTokens
    compressed_images: list[CompressedImage] | None


class ETCGenerationMixin(DeferredGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, use_cache=None, **kwargs):
        if use_cache is False:
            logger.warning_once("Without a cache ETC reads every image again for every token, and nothing is freed.")
        return super().prepare_inputs_for_generation(input_ids, **cache_argument(cache), use_cache=use_cache, **kwargs)


class ETCModelMixin(OwnPositionsModelMixin):
    """The compressed tokens beside the stock model, to which DeepStack adds nothing."""

    added_modules = ("compressor",)
    own_modules = (CompressedTokens,)
    image_substitutes = ("compressed_images",)
    role_names = ("compressed",)

    def add_modules(self, config):
        self.compressor = CompressedTokens(config.compression.trained_tokens, config.get_text_config().hidden_size)

    def resize_budget(self, num_visual_tokens: int) -> ETCSettings:
        """Gives the model this many compressed tokens: the first of those that it has, and new ones after them."""
        changes = {"num_visual_tokens": num_visual_tokens, "trained_tokens": num_visual_tokens}
        settings = dataclasses.replace(self.config.compression, **changes).resolve(self.config)
        self.compressor.resize(num_visual_tokens)
        self.config.compression = settings
        return settings

    def positions_of(self, columns: ImageColumns, encoded: VisualTokens) -> torch.Tensor:
        """Position ids, (dimensions, batch, columns), from 0 in each row, on the host."""
        if encoded.places is None or encoded.extents is None:
            return lay_out_columns(columns.present)[0]
        return positions_by_places(columns, encoded.places.cpu(), encoded.extents.cpu())

    def compress(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> list[CompressedImage]:
        """Reads images once, for any number of questions in any process.

        Args:
            input_ids, attention_mask: (batch, columns), the prompts up to their last image, from the processor; what
                follows is not run. The compressed image goes with the very text before it.
            inputs: what else the processor returns.

        Returns:
            One an image, row after row. `generate` and `forward` take them as `compressed_images`, the processor as
            `images`.
        """
        with torch.no_grad():
            output, prompt = self._run(
                {name: inputs.get(name) for name in self.visual_inputs},
                input_ids=input_ids,
                attention_mask=attention_mask,
                images_alone=True,
            )
        if prompt is None:
            raise ValueError("There is no image to compress: pass what the processor returns for prompts with images.")
        return self._read_compressed(cache_of(output), prompt, input_ids)  # type: ignore[arg-type]

    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        compressed_images: list[CompressedImage] | None = None,
        use_cache: bool | None = None,
        output_compression: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids, attention_mask: (batch, columns), for every image n + M placeholders; with a cache, `input_ids`
                holds the new columns and `attention_mask` all of them.
            position_ids: ignored: they follow from the columns.
            compressed_images: what `compress` returned, in place of the backbone's inputs.
            output_compression: also return what each compressed token attends to.
            kwargs: the images of all rows, row after row, as the processor returns them; and for the language model.
        """
        images = {name: kwargs.pop(name, None) for name in self.visual_inputs}
        output, _ = self._run(
            images,
            compressed_images,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            output_compression=bool(output_compression),
            **self.without_unread_inputs(kwargs),
        )
        return self._returned(output, return_dict)

    def _run(
        self,
        images: Images,
        compressed_images: list[CompressedImage] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_compression: bool = False,
        images_alone: bool = False,
        **kwargs: Any,
    ) -> tuple[CompressedModelOutputWithPast, ImagePrompt | None]:
        """The forward pass. `images_alone`: leave out what follows the last images.

        Returns:
            The output, in the caller's columns; the prompt as it ran, if it has images.
        """
        if self.training and cache is None and self._takes_masks:
            use_cache = False
        embeds, present, logical = self._open_columns(input_ids, inputs_embeds, attention_mask, cache, use_cache)
        if not self._has_images(images, compressed_images):
            self._check_text_alone(input_ids, logical)
            return self._run_columns(embeds, present, logical, **kwargs), None

        prompt = self._prepare_prompt(images, compressed_images, input_ids, embeds, present, logical)
        provenance = None
        if output_compression and compressed_images is None:
            provenance = _Provenance(self, prompt.columns)
        if logical is None and self._takes_masks:
            output = self._run_masked(prompt, provenance, **kwargs)
        else:
            output = self._run_passes(prompt, logical, provenance, images_alone, **kwargs)
        return self._add_images(output, prompt, logical, provenance), prompt

    @property
    def _takes_masks(self) -> bool:
        return self.config.get_text_config()._attn_implementation in MASK_KERNELS

    def _has_images(self, images: Images, compressed_images: list[CompressedImage] | None) -> bool:
        has_pixels = images[self.visual_inputs[0]] is not None
        if has_pixels and compressed_images is not None:
            raise ValueError("Pass pixel_values or compressed_images, not both.")
        return has_pixels or compressed_images is not None

    def _prepare_prompt(
        self,
        images: Images,
        compressed_images: list[CompressedImage] | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        present: torch.Tensor | None,
        cache: LogicalCache | None,
    ) -> ImagePrompt:
        """Encodes the images, finds their columns and fills these with V and Z."""
        num_compressed = self.config.compression.num_visual_tokens
        if compressed_images is not None:
            encoded = self._take_compressed(compressed_images, cache, num_compressed)
        else:
            encoded = self.read_images(images)
        # The one time that the host waits for the device: where the images are.
        is_placeholder = self._find_placeholders(input_ids, inputs_embeds)
        on_host = torch.stack([is_placeholder, torch.ones_like(is_placeholder) if present is None else present]).cpu()
        columns = locate_columns(on_host[0], on_host[1], encoded.lengths, num_compressed)
        if compressed_images is not None:
            self._check_prefixes(compressed_images, columns, input_ids)
        else:
            inputs_embeds = self._fill_in_images(inputs_embeds, columns, encoded)
        device = inputs_embeds.device
        positions = self.positions_of(columns, encoded).to(device)
        if cache is not None:
            positions = positions + cache.next_positions(len(inputs_embeds), device)
        return ImagePrompt(inputs_embeds, columns, positions, encoded, compressed_images)

    def _fill_in_images(
        self, inputs_embeds: torch.Tensor, columns: ImageColumns, encoded: VisualTokens
    ) -> torch.Tensor:
        """(batch, columns, width), with visual tokens at V and the learned embeddings at Z."""
        device, dtype = inputs_embeds.device, inputs_embeds.dtype
        z = self.compressor(columns.num_compressed).to(device, dtype)
        at_z, at_v = columns.compressed.to(device)[..., None], columns.visual.to(device)[..., None]
        inputs_embeds = inputs_embeds.masked_scatter(at_v, encoded.tokens.to(device, dtype))
        return inputs_embeds.masked_scatter(at_z, z.repeat(len(encoded.lengths), 1))

    def _run_masked(
        self, prompt: ImagePrompt, provenance: _Provenance | None, **kwargs: Any
    ) -> CompressedModelOutputWithPast:
        """All columns at once, V hidden from what comes after its image."""
        embeds, columns = prompt.inputs_embeds, prompt.columns
        mask = bottleneck_mask(columns, embeds.dtype, embeds.device)
        if prompt.encoded.deepstack:
            kwargs["visual_pos_masks"] = columns.visual.to(embeds.device)
            kwargs["deepstack_visual_embeds"] = prompt.encoded.deepstack
        with provenance.over(None) if provenance is not None else nullcontext():
            output = self._run_language_model(embeds, mask, prompt.positions, None, 0, **kwargs)
        return CompressedModelOutputWithPast(**output)

    def _run_passes(
        self,
        prompt: ImagePrompt,
        cache: LogicalCache | None,
        provenance: _Provenance | None,
        images_alone: bool,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        """Pass by pass: text, V and Z of each row's next image; V's keys and values go; then what follows.

        Args:
            cache: what came before; `None`: the passes have a cache of their own.
            images_alone: leave out the pass after the last images.
        """
        if self.training and checkpoints_activations(self):
            raise ValueError(
                "Gradient checkpointing needs the masked pass, which this attention kernel can't run: load the "
                "model with attn_implementation='sdpa'."
            )
        if cache is None:
            cache = LogicalCache(DynamicCache(config=self.config.text_config))
        passes = _Passes(self, prompt, cache, provenance, kwargs)
        for step in plan_passes(prompt.columns, run_images=prompt.compressed_images is None):
            if images_alone and len(step.images) == 0:
                continue
            if step.columns.shape[1]:
                passes.run(step)
            if prompt.compressed_images is not None and len(step.images):
                passes.insert(prompt.compressed_images, step.images)
        return passes.finish()

    def _add_images(
        self,
        output: CompressedModelOutputWithPast,
        prompt: ImagePrompt,
        cache: LogicalCache | None,
        provenance: _Provenance | None,
    ) -> CompressedModelOutputWithPast:
        """The output with the cache that the caller asked for, and what the images became."""
        hidden: Any = output.last_hidden_state
        rows, places = prompt.columns.rows[:, None], prompt.columns.columns_of(compressed=True)
        return CompressedModelOutputWithPast(
            **fields_with_cache(output, cache),
            **image_fields(hidden[rows.to(hidden.device), places.to(hidden.device)].unbind()),
            compression=provenance.result() if provenance is not None else None,
        )

    # Images that were compressed before

    def _read_compressed(
        self, cache: LogicalCache, prompt: ImagePrompt, input_ids: torch.Tensor
    ) -> list[CompressedImage]:
        """Takes the keys and values of Z out of the cache, one [`CompressedImage`] an image."""
        columns, extents = prompt.columns, prompt.encoded.extents
        source: Any = cache.source
        places = columns.columns_of(compressed=True).to(source.device)
        rows = columns.rows.to(places.device)
        # Where each compressed token's column lies among the entries.
        entries = (source[rows][:, None] == places[..., None]).long().argmax(-1)
        found: list[CompressedImage] = []
        before: dict[int, str] = {}  # row → digest of its image before
        for image, (row, first) in enumerate(zip(columns.rows.tolist(), columns.first.tolist())):
            keys, values = (
                torch.stack([getattr(layer, name)[row][:, entries[image]] for layer in cache.layers])
                for name in ("keys", "values")
            )
            prefix = input_ids[row, :first].cpu()
            made = CompressedImage(
                method=self.config.compression.method,
                num_placeholders=int(columns.lengths[image]) + columns.num_compressed,
                keys=keys,
                values=values,
                prefix=prefix[columns.present[row, :first]],
                before=before.get(row, ""),
                extent=None if extents is None else int(extents[image]),
            )
            before[row] = made.digest
            found.append(made)
        return found

    def _take_compressed(
        self, images: list[CompressedImage], cache: LogicalCache | None, num_compressed: int
    ) -> VisualTokens:
        """Their numbers of visual tokens and extents. Raises `ValueError` where they can't be used."""
        method = self.config.compression.method
        if cache is None:
            raise ValueError("Compressed images live in the cache: leave use_cache=False out.")
        if cache.logical_length:
            raise ValueError("A compressed image goes with the text before it: start without a cache.")
        for image in images:
            image.require(method, self._fits(image))
            if image.num_tokens != num_compressed:
                raise ValueError(
                    f"The image was compressed to {image.num_tokens} token(s), the model is set to {num_compressed}: "
                    "use set_compression, or compress it again."
                )
        lengths = [image.num_placeholders - num_compressed for image in images]
        found = VisualTokens(self.compressor.embeddings[:0], lengths)
        if self.keeps_places:
            found.places = torch.zeros(sum(lengths), self.num_position_axes, dtype=torch.int64)  # nothing reads them
            found.extents = torch.tensor([image.extent for image in images])
        return found

    def _fits(self, image: CompressedImage) -> bool:
        """Whether the image's keys are of this model's shape, and its extent is given where positions need it."""
        if image.keys is None or (image.extent is not None) != self.keeps_places:
            return False
        text = self.config.text_config
        head_width = self.language_model.layers[0].self_attn.head_dim
        layers, heads, _, width = image.keys.shape
        return (layers, heads, width) == (text.num_hidden_layers, text.num_key_value_heads, head_width)

    def _check_prefixes(
        self, images: list[CompressedImage], columns: ImageColumns, input_ids: torch.Tensor | None
    ) -> None:
        if input_ids is None:
            raise ValueError("compressed_images need input_ids: they go with the very text before them.")
        ids = input_ids.cpu()
        before: dict[int, str] = {}
        for image, row, first in zip(images, columns.rows.tolist(), columns.first.tolist()):
            prefix: Any = image.prefix
            text = ids[row, :first][columns.present[row, :first]]
            if not torch.equal(text, prefix.cpu()) or image.before != before.get(row, ""):
                raise ValueError(
                    "An image was compressed after other text, or other images, than what stands before it now: "
                    "compress it after the same, or ask with the same beginning."
                )
            before[row] = image.digest


class _Passes:
    """The plain causal passes of one prompt: what they have read so far, and the cache that grows with them.

    Args:
        model: the model without a head.
        prompt: what to read.
        cache: grows by what stays of every pass.
        provenance: watches the passes, if it is wanted.
        kwargs: for the language model.
    """

    def __init__(
        self,
        model: Any,
        prompt: ImagePrompt,
        cache: LogicalCache,
        provenance: _Provenance | None,
        kwargs: dict[str, Any],
    ):
        self.model, self.prompt, self.cache, self.provenance, self.kwargs = model, prompt, cache, provenance, kwargs
        self.columns_before = cache.logical_length
        self.largest_positions = prompt.positions.amax(0)  # (batch, columns)
        self.outputs: list[Any] = []
        self.columns: list[torch.Tensor] = []  # of every pass so far: (batch, width), −1 for padding

    def run(self, step: Pass) -> None:
        """Reads a pass; its visual tokens' keys and values are gone when it ends."""
        prompt, cache = self.prompt, self.cache
        columns = step.columns.to(prompt.inputs_embeds.device)
        index = columns.clamp(min=0)
        source = self._source_of(columns)
        has_gaps = cache.has_gaps or step.has_gaps
        past, inner, kept = cache.physical_length, cache.inner, None
        if step.kept is not None:
            kept = step.kept.to(columns.device)
            inner = EvictingCache(cache.inner, past, kept)
        with self.provenance.over(step) if self.provenance is not None else nullcontext():
            output = self.model._run_language_model(
                prompt.inputs_embeds.gather(1, index[..., None].expand(-1, -1, prompt.inputs_embeds.shape[-1])),
                self._mask(source) if has_gaps else None,
                prompt.positions.gather(2, index.expand(len(prompt.positions), -1, -1)),
                inner,
                past,
                **self.kwargs,
                **self._deepstack(step),
            )
        self.outputs.append(output)
        self.columns.append(columns)
        positions = self.largest_positions.gather(1, index)
        if kept is not None:
            source, positions = take_entries(source, kept, padding=-1), positions.gather(1, kept.clamp(min=0))
            has_gaps = has_gaps or bool((kept < 0).any())
        cache.extend(source, positions, has_gaps=has_gaps)

    def insert(self, images: list[CompressedImage], chosen: torch.Tensor) -> None:
        """Puts the keys and values of images that were compressed before at the end of the cache.

        Args:
            images: all of the prompt.
            chosen: indices of those to insert, at most one a row.
        """
        columns, positions, past = self.prompt.columns, self.largest_positions, self.cache.physical_length
        device, batch_size = positions.device, len(positions)
        rows = columns.rows[chosen]
        for layer in range(self.model.config.text_config.num_hidden_layers):
            states = []
            for name in ("keys", "values"):
                found = torch.stack([getattr(images[image], name)[layer] for image in chosen.tolist()])
                found = found.to(device, self.model.dtype)
                whole = found.new_zeros(batch_size, *found.shape[1:])
                whole[rows.to(device)] = found
                states.append(whole)
            write_to_cache(self.cache.inner, states[0], states[1], layer, past)
        places = torch.full((batch_size, columns.num_compressed), -1)
        places[rows] = columns.columns_of(compressed=True)[chosen]
        places = places.to(device)
        self.cache.extend(
            self._source_of(places), positions.gather(1, places.clamp(min=0)), has_gaps=len(chosen) < batch_size
        )

    def finish(self) -> CompressedModelOutputWithPast:
        """The output of all passes, in the caller's columns."""
        self.cache.logical_length = self.columns_before + self.prompt.inputs_embeds.shape[1]
        hidden_states: Any = None
        if self.outputs[0].hidden_states is not None:
            layers = zip(*(output.hidden_states for output in self.outputs))
            hidden_states = tuple(self._in_columns(list(layer)) for layer in layers)
        whole: Any = self._in_columns([output.last_hidden_state for output in self.outputs])
        cache: dict[str, Any] = cache_argument(self.cache)
        return CompressedModelOutputWithPast(
            last_hidden_state=whole,
            **cache,
            hidden_states=hidden_states,
            attentions=self.outputs[-1].attentions,
        )

    def _source_of(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of this call, −1 for padding → what [`LogicalCache`] calls them, in all calls so far."""
        return torch.where(columns < 0, -1, columns + self.columns_before)

    def _mask(self, source: torch.Tensor) -> torch.Tensor:
        """(batch, cached + new): 1 where there is a token."""
        known = self.cache.source
        return ((source if known is None else torch.cat([known.to(source.device), source], dim=1)) >= 0).long()

    def _deepstack(self, step: Pass) -> dict[str, Any]:
        """What DeepStack adds in a pass, as the language model takes it; nothing for models without."""
        deepstack = self.prompt.encoded.deepstack
        if not deepstack:
            return {}
        device, visual = self.prompt.inputs_embeds.device, self.prompt.columns.visual
        rank = (visual.flatten().cumsum(0) - 1).view_as(visual)  # of a visual token among those of all images
        index = step.columns.clamp(min=0)
        at_visual = visual.gather(1, index) & (step.columns >= 0)
        chosen = rank.gather(1, index)[at_visual].to(device)
        return {
            "visual_pos_masks": at_visual.to(device),
            "deepstack_visual_embeds": [layer[chosen] for layer in deepstack],
        }

    def _in_columns(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """What the passes give, (batch, width of the pass, width) each → (batch, columns, width), zeros where nothing
        ran."""
        batch_size, num_columns, width = self.prompt.inputs_embeds.shape
        spill = torch.cat([torch.where(at < 0, num_columns, at) for at in self.columns], dim=1)[..., None]
        whole = self.prompt.inputs_embeds.new_zeros(batch_size, num_columns + 1, width)
        return whole.scatter(1, spill.expand(-1, -1, width), torch.cat(pieces, dim=1))[:, :num_columns]


class _Provenance:
    """Collects what each compressed token attends to in its image: the mean over layers and heads."""

    def __init__(self, model: Any, columns: ImageColumns):
        self.layers = list(model.language_model.layers)
        self.columns = columns
        longest = int(columns.lengths.max())
        self.weights = torch.zeros(len(columns.lengths), columns.num_compressed, longest)

    def over(self, step: Pass | None):
        """Watches one call of the language model: a pass, or (`None`) all columns at once."""
        columns = self.columns
        chosen = torch.arange(len(columns.lengths)) if step is None else step.images
        rows = columns.rows[chosen]
        queries, keys = (columns.columns_of(compressed)[chosen] for compressed in (True, False))
        if step is not None:  # columns → entries of the pass
            entry = torch.full((len(columns.present), columns.present.shape[1] + 1), -1)
            width = torch.arange(step.columns.shape[1]).expand_as(step.columns)
            entry.scatter_(1, step.columns % entry.shape[1], width)  # padding goes to the extra column
            entry[:, -1] = -1
            queries, keys = (entry[rows].gather(1, places % entry.shape[1]) for places in (queries, keys))

        def watch(attention, hidden_states, position_embeddings) -> None:
            device = hidden_states.device
            found = attention_over(
                attention,
                hidden_states,
                position_embeddings,
                *(places.to(device) for places in (rows, queries, keys)),
            )
            self.weights = self.weights.to(device)
            self.weights[chosen.to(device)] += found / len(self.layers)

        return watched_attention(self.layers if len(chosen) else [], watch)

    def result(self) -> list[TokenProvenance]:
        roles = torch.zeros(self.columns.num_compressed, dtype=torch.int64, device=self.weights.device)
        lengths = self.columns.lengths.tolist()
        return [
            TokenProvenance(found[:, :n], roles, ETCModelMixin.role_names) for found, n in zip(self.weights, lengths)
        ]


METHOD = Method(
    name="etc",
    stem="ETC",
    title="Extreme Token Compression",
    paper="ETC: Extreme Token Compression via Task-aware Visual Information Distillation in VLMs",
    kind="deferred",
    mixin=ETCModelMixin,
    generation_mixin=ETCGenerationMixin,
    settings=ETCSettings,
    backbones=("llava", "qwen3_vl"),
    needs_training=True,
    equals_stock=False,
    differs_by_question_type=True,
    objective="auxiliary",
    summary=(
        "The language model reads the whole image and, right after it, a few learned tokens that take up what matters. "
        "The text that follows sees those tokens alone, and the image's own keys and values are freed, so that the "
        "cache holds little more than the text. The tokens are trained with the answers and an auxiliary loss that "
        "has them give back what the text looks at."
    ),
    limits=(
        "The whole image is read once before it is freed: the cache and later tokens get cheaper, the first token "
        "does not, unless the image was compressed before (`model.compress`).",
        "A compressed image belongs to the text before it. Videos are not supported.",
    ),
)
