"""What ETC's models share, whatever their backbone: the passes, the eviction of visual tokens, compressed images.

With a cache, images are read in plain causal passes, after each of which the keys and values of its visual tokens are
gone (`evicting_cache.py`), so every attention kernel serves. Without one (training), one masked pass does the same.
Position ids go on counting the visual tokens, as in training. Inputs and outputs are in the caller's columns
(`logical_cache.py`).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
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
from foveate.modeling.core.cache import LogicalCache
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.deferred import DeferredGenerationMixin
from foveate.modeling.core.evicting_cache import EvictingCache
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, TokenProvenance, VisualTokens
from foveate.modeling.core.placed import PlacedModelMixin
from foveate.modeling.core.positions import line_positions
from foveate.modeling.layers.decoder_attention import attention_over, watched_attention
from foveate.modeling.methods.etc_algorithm import (
    CompressedTokens,
    ImageColumns,
    Pass,
    bottleneck_mask,
    locate_columns,
    plan_passes,
    positions_on_grids,
)


logger = logging.get_logger(__name__)

ROLE_NAMES = ("compressed",)
MASK_KERNELS = ("eager", "sdpa")  # attention that takes a mask of any shape


class ETCGenerationMixin(DeferredGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, use_cache=None, **kwargs):
        if use_cache is False:
            logger.warning_once("Without a cache ETC reads every image again for every token, and nothing is freed.")
        return super().prepare_inputs_for_generation(input_ids, **cache_argument(cache), use_cache=use_cache, **kwargs)


class ETCModelMixin(PlacedModelMixin):
    """The compressed tokens beside the stock model, to which DeepStack adds nothing."""

    added_modules = ("compressor",)
    own_modules = (CompressedTokens,)
    image_substitutes = ("compressed_images",)

    def add_modules(self, config):
        self.compressor = CompressedTokens(config.compression.trained_tokens, config.get_text_config().hidden_size)

    def resize_budget(self, num_visual_tokens: int) -> ETCSettings:
        """Gives the model this many compressed tokens: the first of those that it has, and new ones after them."""
        changes = {"num_visual_tokens": num_visual_tokens, "trained_tokens": num_visual_tokens}
        settings = dataclasses.replace(self.config.compression, **changes).resolve(self.config)
        self.compressor.resize(num_visual_tokens)
        self.config.compression = settings
        return settings

    def positions_of(self, columns: ImageColumns, grids: torch.Tensor | None) -> torch.Tensor:
        """Position ids, (dimensions, batch, columns), from 0 in each row, on the host."""
        return line_positions(columns.present) if grids is None else positions_on_grids(columns, grids)

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
            output, columns, encoded = self._run(
                {name: inputs.get(name) for name in self.visual_inputs},
                input_ids=input_ids,
                attention_mask=attention_mask,
                images_alone=True,
            )
        if columns is None:
            raise ValueError("There is no image to compress: pass what the processor returns for prompts with images.")
        cache: LogicalCache = cache_of(output)
        places = columns.columns_of(compressed=True).to(cache.source.device)
        rows = columns.rows.to(places.device)
        # Where each compressed token's column lies among the entries.
        entries = (cache.source[rows][:, None] == places[..., None]).long().argmax(-1)
        found, before = [], {}
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
                grid=None if encoded.grids is None else tuple(encoded.grids[image].tolist()),
            )
            before[row] = made.digest
            found.append(made)
        return found

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
        output, _, _ = self._run(
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
        images: dict[str, torch.Tensor | None],
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
    ) -> tuple[CompressedModelOutputWithPast, ImageColumns | None, VisualTokens | None]:
        """The forward pass. `images_alone`: leave out what follows the last images.

        Returns:
            The output, in the caller's columns; where the images lie in them and what was made of them, if there are.
        """
        masked = self.training and cache is None and self._takes_masks
        inputs_embeds, present, logical = self._open_columns(
            input_ids, inputs_embeds, attention_mask, cache, False if masked else use_cache
        )
        has_images = images[self.visual_inputs[0]] is not None
        if has_images and compressed_images is not None:
            raise ValueError("Pass pixel_values or compressed_images, not both.")
        if not has_images and compressed_images is None:
            self._check_text_alone(input_ids, logical)
            return self._run_columns(inputs_embeds, present, logical, **kwargs), None, None

        num_compressed = self.config.compression.num_visual_tokens
        if compressed_images is not None:
            encoded = self._take_compressed(compressed_images, logical, num_compressed)
        else:
            encoded = self.read_images(images)
        # The one time that the host waits for the device: where the images are.
        is_placeholder = self._find_placeholders(input_ids, inputs_embeds)
        on_host = torch.stack([is_placeholder, torch.ones_like(is_placeholder) if present is None else present]).cpu()
        columns = locate_columns(on_host[0], on_host[1], encoded.lengths, num_compressed)
        positions = self.positions_of(columns, None if encoded.grids is None else encoded.grids.cpu())
        device = inputs_embeds.device
        positions = positions.to(device)
        if logical is not None:
            positions = positions + logical.next_positions(len(inputs_embeds), device)

        if compressed_images is not None:
            self._check_prefixes(compressed_images, columns, input_ids)
        else:
            z = self.compressor(num_compressed).to(device, inputs_embeds.dtype)
            at_z, at_v = columns.compressed.to(device)[..., None], columns.visual.to(device)[..., None]
            inputs_embeds = inputs_embeds.masked_scatter(at_v, encoded.tokens.to(device, inputs_embeds.dtype))
            inputs_embeds = inputs_embeds.masked_scatter(at_z, z.repeat(len(encoded.lengths), 1))

        watch = _Provenance(self, columns) if output_compression and compressed_images is None else None
        if logical is None and self._takes_masks:
            output = self._run_masked(inputs_embeds, columns, positions, encoded, watch, **kwargs)
        else:
            if self.training and checkpoints_activations(self):
                raise ValueError(
                    "Gradient checkpointing needs the masked pass, which this attention kernel can't run: load the "
                    "model with attn_implementation='sdpa'."
                )
            for_now = logical
            if for_now is None:
                for_now = LogicalCache(DynamicCache(config=self.config.text_config))
            output = self._run_passes(
                inputs_embeds, columns, positions, encoded, for_now, compressed_images, watch, images_alone, **kwargs
            )
        at_compressed = columns.rows[:, None].to(device), columns.columns_of(compressed=True).to(device)
        output = CompressedModelOutputWithPast(
            **fields_with_cache(output, logical),
            **image_fields(output.last_hidden_state[at_compressed].unbind()),
            compression=watch.result() if watch is not None else None,
        )
        return output, columns, encoded

    @property
    def _takes_masks(self) -> bool:
        return self.config.get_text_config()._attn_implementation in MASK_KERNELS

    def _run_masked(
        self,
        inputs_embeds: torch.Tensor,
        columns: ImageColumns,
        positions: torch.Tensor,
        encoded: VisualTokens,
        watch: _Provenance | None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        mask = bottleneck_mask(columns, inputs_embeds.dtype, inputs_embeds.device)
        if encoded.deepstack:
            kwargs["visual_pos_masks"] = columns.visual.to(inputs_embeds.device)
            kwargs["deepstack_visual_embeds"] = encoded.deepstack
        with watch.over(None) if watch is not None else nullcontext():
            output = self._run_language_model(inputs_embeds, mask, positions, None, 0, **kwargs)
        return CompressedModelOutputWithPast(**output)

    def _run_passes(
        self,
        inputs_embeds: torch.Tensor,
        columns: ImageColumns,
        positions: torch.Tensor,
        encoded: VisualTokens,
        cache: LogicalCache,
        compressed_images: list[CompressedImage] | None,
        watch: _Provenance | None,
        images_alone: bool,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        device, before = inputs_embeds.device, cache.logical_length
        batch_size, num_columns = inputs_embeds.shape[:2]
        largest = positions.amax(0)
        visual = columns.visual
        rank = (visual.flatten().cumsum(0) - 1).view_as(visual)  # of a visual token among those of all images
        outputs, ran = [], []
        for step in plan_passes(columns, run_images=compressed_images is None):
            if images_alone and len(step.images) == 0:
                continue
            if step.columns.shape[1]:
                there = step.columns.to(device)
                index = there.clamp(min=0)
                source = torch.where(there < 0, -1, there + before)
                has_gaps = cache.has_gaps or step.has_gaps
                mask = None
                if has_gaps:
                    known = source if cache.source is None else torch.cat([cache.source.to(device), source], dim=1)
                    mask = (known >= 0).long()
                inner, kept = cache.inner, torch.arange(there.shape[1], device=device).expand(batch_size, -1)
                past = cache.physical_length
                if step.kept is not None:
                    kept = step.kept.to(device)
                    inner = EvictingCache(cache.inner, past, kept)
                if encoded.deepstack:
                    at_visual = visual.gather(1, step.columns.clamp(min=0)) & (step.columns >= 0)
                    chosen = rank.gather(1, step.columns.clamp(min=0))[at_visual].to(device)
                    kwargs["visual_pos_masks"] = at_visual.to(device)
                    kwargs["deepstack_visual_embeds"] = [layer[chosen] for layer in encoded.deepstack]
                with watch.over(step) if watch is not None else nullcontext():
                    outputs.append(
                        self._run_language_model(
                            inputs_embeds.gather(1, index[..., None].expand(-1, -1, inputs_embeds.shape[-1])),
                            mask,
                            positions.gather(2, index.expand(len(positions), -1, -1)),
                            inner,
                            past,
                            **kwargs,
                        )
                    )
                ran.append(there)
                stays = kept.clamp(min=0)
                cache.extend(
                    torch.where(kept < 0, -1, source.gather(1, stays)),
                    largest.gather(1, index).gather(1, stays),
                    has_gaps=has_gaps or bool(step.kept is not None and (step.kept < 0).any()),
                )
            if compressed_images is not None and len(step.images):
                self._insert(compressed_images, step.images, columns, positions, cache, before)
        cache.logical_length = before + num_columns

        width = inputs_embeds.shape[-1]
        spill = torch.cat([torch.where(there < 0, num_columns, there) for there in ran], dim=1)[..., None]

        def in_columns(pieces: list[torch.Tensor]) -> torch.Tensor:
            """(batch, columns, width), zeros where nothing ran."""
            whole = inputs_embeds.new_zeros(batch_size, num_columns + 1, width)
            return whole.scatter(1, spill.expand(-1, -1, width), torch.cat(pieces, dim=1))[:, :num_columns]

        hidden_states = None
        if outputs[0].hidden_states is not None:
            hidden_states = tuple(in_columns(list(layer)) for layer in zip(*(o.hidden_states for o in outputs)))
        return CompressedModelOutputWithPast(
            last_hidden_state=in_columns([output.last_hidden_state for output in outputs]),
            **cache_argument(cache),
            hidden_states=hidden_states,
            attentions=outputs[-1].attentions,
        )

    # Images that were compressed before

    def _take_compressed(
        self, images: list[CompressedImage], cache: LogicalCache | None, num_compressed: int
    ) -> VisualTokens:
        """Their numbers of visual tokens and grids. Raises `ValueError` where they can't be used."""
        method = self.config.compression.method
        if cache is None:
            raise ValueError("Compressed images live in the cache: leave use_cache=False out.")
        if cache.logical_length:
            raise ValueError("A compressed image goes with the text before it: start without a cache.")
        text = self.config.text_config
        for image in images:
            fits = image.keys is not None and (image.grid is not None) == ("image_grid_thw" in self.visual_inputs)
            if fits:
                layers, heads, _, width = image.keys.shape
                attention = self.language_model.layers[0].self_attn
                fits = (layers, heads, width) == (text.num_hidden_layers, text.num_key_value_heads, attention.head_dim)
            image.require(method, fits)
            if image.num_tokens != num_compressed:
                raise ValueError(
                    f"The image was compressed to {image.num_tokens} token(s), the model is set to {num_compressed}: "
                    "use set_compression, or compress it again."
                )
        grids = None if any(image.grid is None for image in images) else torch.tensor([image.grid for image in images])
        lengths = [image.num_placeholders - num_compressed for image in images]
        return VisualTokens(self.compressor.embeddings[:0], lengths, grids=grids)

    def _check_prefixes(
        self, images: list[CompressedImage], columns: ImageColumns, input_ids: torch.Tensor | None
    ) -> None:
        if input_ids is None:
            raise ValueError("compressed_images need input_ids: they go with the very text before them.")
        ids, before = input_ids.cpu(), {}
        for image, row, first in zip(images, columns.rows.tolist(), columns.first.tolist()):
            text = ids[row, :first][columns.present[row, :first]]
            if not torch.equal(text, image.prefix.cpu()) or image.before != before.get(row, ""):
                raise ValueError(
                    "An image was compressed after other text, or other images, than what stands before it now: "
                    "compress it after the same, or ask with the same beginning."
                )
            before[row] = image.digest

    def _insert(
        self,
        images: list[CompressedImage],
        chosen: torch.Tensor,
        columns: ImageColumns,
        positions: torch.Tensor,
        cache: LogicalCache,
        before: int,
    ) -> None:
        """Puts the keys and values of compressed images, at most one a row, at the end of the cache."""
        device, rows = positions.device, columns.rows[chosen]
        batch_size, num_compressed, past = positions.shape[1], columns.num_compressed, cache.physical_length
        for layer in range(self.config.text_config.num_hidden_layers):
            states = []
            for name in ("keys", "values"):
                found = torch.stack([getattr(images[image], name)[layer] for image in chosen.tolist()])
                found = found.to(device, self.dtype)
                whole = found.new_zeros(batch_size, *found.shape[1:])
                whole[rows.to(device)] = found
                states.append(whole)
            write_to_cache(cache.inner, *states, layer, past)
        places = torch.full((batch_size, num_compressed), -1)
        places[rows] = columns.columns_of(compressed=True)[chosen]
        places = places.to(device)
        at = positions.amax(0).gather(1, places.clamp(min=0))
        cache.extend(torch.where(places < 0, -1, places + before), at, has_gaps=len(chosen) < batch_size)


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
        return [TokenProvenance(found[:, :n], roles, ROLE_NAMES) for found, n in zip(self.weights, lengths)]


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
