"""LLaVA-1.5 with Recoverable Compression (Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery
Mechanism Guided by Text Information").

The processor writes a placeholder for every patch; how many tokens an image really has is known only after the vision
tower, so the language model runs on fewer (`physical_sequence.py`, `logical_cache.py`). Position ids count physical
tokens, as the authors' code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, CLIPTextModelWithProjection, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.attention import SLIDING, attention_kinds
from foveate.configuration.configuration_llava_recoverable import LlavaRecoverableConfig
from foveate.modeling.compatibility import (
    cache_argument,
    cache_positions,
    clip_embeddings,
    clip_layers,
    fields_with_cache,
    image_features_output,
    image_fields,
    register_key_mapping,
    run_clip_layer,
    takes_cache,
    without_cache_positions,
)
from foveate.modeling.core.base import (
    CompressedCausalLMOutputWithPast,
    CompressedModelMixin,
    CompressedModelOutputWithPast,
    TokenProvenance,
    keep_logits,
    with_logits,
)
from foveate.modeling.core.deferred import LogicalGenerationMixin, LogicalModelMixin
from foveate.modeling.core.image_inputs import ImageInputsMixin
from foveate.modeling.core.physical_sequence import PhysicalSequence, build_physical_sequence
from foveate.modeling.methods.recoverable_algorithm import (
    TokenAssignment,
    assign_tokens,
    text_similarity,
    visual_scores,
)


ROLE_NAMES = ("dropped", "kept by the visual filter", "recovered by the question", "merged")


@dataclass
class CompressedImages:
    """Visual tokens of a batch of images.

    Args:
        tokens: (tokens of all images, width of the language model), image after image.
        assignment: what became of every patch.
    """

    tokens: torch.Tensor
    assignment: TokenAssignment

    @property
    def counts(self) -> torch.Tensor:
        return self.assignment.counts

    def provenance(self) -> list[TokenProvenance]:
        return [TokenProvenance(weights, roles, ROLE_NAMES) for weights, roles in self.assignment.provenance()]


class LlavaRecoverableModel(LogicalModelMixin, LlavaModel):
    """The vision tower, the question's text encoder, the compressor, the projector and the language model."""

    config_class = LlavaRecoverableConfig

    def __init__(self, config: LlavaRecoverableConfig):
        super().__init__(config)
        self.question_encoder = CLIPTextModelWithProjection._from_config(config.question_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.question_config.projection_dim, bias=False
        )
        self.post_init()

    def compress_images(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
    ) -> CompressedImages:
        """Encodes images and compresses each by its question.

        Args:
            pixel_values: (images, 3, height, width).
            question_input_ids, question_attention_mask: (images, 77), from the processor.
        """
        settings = self.config.compression
        embeddings = clip_embeddings(self.vision_tower, pixel_values)
        layers = clip_layers(self.vision_tower)
        feature_layer = self.config.vision_feature_layer % (len(layers) + 1)
        hidden, features = embeddings, embeddings
        for index, layer in enumerate(layers[:-1], start=1):
            hidden = run_clip_layer(layer, hidden)
            if index == feature_layer:
                features = hidden
        # Step 1 reads the last layer's query of the class token and its keys: no attention matrix is needed for that.
        last = layers[-1]
        normed = last.layer_norm1(hidden)
        keys = last.self_attn.k_proj(normed)  # (images, patches + 1, width)
        scores = visual_scores(last.self_attn.q_proj(normed[:, 0]), keys)

        uses_text = settings.text_recovery or (settings.secondary_recovery and settings.variant == "official")
        if uses_text or feature_layer == len(layers):
            final = run_clip_layer(last, hidden)
            features = final if feature_layer == len(layers) else features
        if uses_text:
            question = self.embed_question(question_input_ids, question_attention_mask)
            similarity = text_similarity(question, self.visual_projection(final[:, 1:]))
        else:
            similarity = torch.zeros_like(scores)

        assignment = assign_tokens(
            scores,
            similarity,
            keys[:, 1:],
            variant=settings.variant,
            lof_neighbors=settings.lof_neighbors,
            secondary_lof_neighbors=settings.secondary_lof_neighbors,
            text_recovery=settings.text_recovery,
            secondary_recovery=settings.secondary_recovery,
            num_visual_tokens=settings.num_visual_tokens,
        )
        return CompressedImages(self.multi_modal_projector(assignment.tokens(features[:, 1:])), assignment)

    def embed_question(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(images, 77) → (images, projection width): at the end of the question (variant "paper"), or at the last of
        the padded positions (variant "official", as the authors' code reads it)."""
        if input_ids is None:
            raise ValueError(
                "Recoverable Compression is guided by the question: pass `question_input_ids` and "
                "`question_attention_mask`, as the processor returns them."
            )
        if self.config.compression.variant == "paper":
            return self.question_encoder(input_ids=input_ids, attention_mask=attention_mask).text_embeds
        hidden = self.question_encoder.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.question_encoder.text_projection(hidden.last_hidden_state[:, -1])

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """The compressed, projected visual tokens, one (tokens, width) tensor an image, in the form that this version
        of Transformers gives its own models' image features."""
        images = self.compress_images(pixel_values, question_input_ids, question_attention_mask)
        return image_features_output(list(images.tokens.split(images.counts.tolist())))

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids, attention_mask: (batch, logical length), a placeholder for every patch of every image; with a
                cache, `input_ids` holds the new columns and `attention_mask` all of them.
            pixel_values: (images, 3, height, width), the images of all rows, row after row.
            position_ids: ignored: positions count the tokens that are there.
            question_input_ids, question_attention_mask: (images, 77), the question that guides each image.
            output_compression: also return where each visual token comes from.
        """
        output, sequence = self._run(
            input_ids,
            pixel_values,
            attention_mask,
            cache,
            inputs_embeds,
            question_input_ids,
            question_attention_mask,
            use_cache,
            output_compression,
            **kwargs,
        )
        output.last_hidden_state = sequence.to_logical(output.last_hidden_state)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        input_ids: torch.LongTensor | None,
        pixel_values: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        inputs_embeds: torch.FloatTensor | None,
        question_input_ids: torch.LongTensor | None,
        question_attention_mask: torch.Tensor | None,
        use_cache: bool | None,
        output_compression: bool,
        **kwargs: Any,
    ) -> tuple[CompressedModelOutputWithPast, PhysicalSequence]:
        """The forward pass, with `last_hidden_state` still on the physical sequence, which comes with it."""
        inputs_embeds, present, logical = self._open_columns(input_ids, inputs_embeds, attention_mask, cache, use_cache)
        num_columns = inputs_embeds.shape[1]

        images, lengths = None, None
        if pixel_values is not None:
            images = self.compress_images(pixel_values, question_input_ids, question_attention_mask)
            placeholders = self._find_placeholders(input_ids, inputs_embeds)
            taken = self._taken_placeholders(placeholders, images.counts)
            present = (taken | ~placeholders) if present is None else (taken | ~placeholders) & present
            row_lengths = present.sum(1)
            # The one time that the host waits for the device: lengths of the sequence, check of the placeholders.
            shortest, longest, found = torch.stack([row_lengths.min(), row_lengths.max(), placeholders.sum()]).tolist()
            lengths = (shortest, longest)
            self._check_placeholders(found, len(pixel_values))
            tokens = images.tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(taken[..., None], tokens)

        sequence = build_physical_sequence(inputs_embeds, present, logical, lengths)
        if sequence.has_gaps and SLIDING in attention_kinds(self.config.text_config):
            sequence.require_no_padding_between_tokens()
        past, length = 0 if logical is None else logical.physical_length, sequence.inputs_embeds.shape[1]
        output = self.language_model(
            inputs_embeds=sequence.inputs_embeds,
            attention_mask=sequence.attention_mask,
            position_ids=sequence.position_ids,
            **cache_argument(None if logical is None else logical.inner),
            use_cache=logical is not None,
            **cache_positions(past, length, inputs_embeds.device),
            **without_cache_positions(kwargs),
        )
        if logical is not None:
            logical.append(sequence.source, num_columns, sequence.has_gaps)
        output = CompressedModelOutputWithPast(
            **fields_with_cache(output, logical),
            **image_fields(None if images is None else images.tokens.split(images.counts.tolist())),
            compression=images.provenance() if images is not None and output_compression else None,
        )
        return output, sequence

    def _taken_placeholders(self, placeholders: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The first placeholders of every image, as many as it has tokens; (batch, columns) bool."""
        num_patches = self.config.num_patches
        rank = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders)
        image = (rank // num_patches).clamp(0, len(counts) - 1)
        return placeholders & (rank % num_patches < counts[image])

    def _check_placeholders(self, found: int, num_images: int) -> None:
        expected = num_images * self.config.num_patches
        if found != expected:
            raise ValueError(
                f"{num_images} image(s) need {expected} placeholder tokens ({self.config.num_patches} each), but "
                f"input_ids has {found}: let the processor write them, and pass exactly the images that they stand for."
            )


class LlavaRecoverableForConditionalGeneration(
    LogicalGenerationMixin, ImageInputsMixin, CompressedModelMixin, LlavaForConditionalGeneration
):
    """[`LlavaRecoverableModel`] with a language modeling head."""

    config_class = LlavaRecoverableConfig
    image_inputs = ("pixel_values", "question_input_ids", "question_attention_mask")

    def __init__(self, config: LlavaRecoverableConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaRecoverableModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, logical length), −100 where no loss is wanted.
            logits_to_keep: the number of last logical columns (0: all), or their indices.
            others: as in [`LlavaRecoverableModel`].
        """
        loss_kwargs = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        output, sequence = self.model._run(
            input_ids,
            pixel_values,
            attention_mask,
            cache,
            inputs_embeds,
            question_input_ids,
            question_attention_mask,
            use_cache,
            output_compression,
            **kwargs,
        )
        loss = None
        if labels is not None or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            physical_logits = self.lm_head(output.last_hidden_state)  # no logits for tokens that are not there
            if labels is not None:
                loss = self.loss_function(
                    logits=physical_logits,
                    labels=sequence.to_physical(labels, padding=-100),
                    vocab_size=self.config.text_config.vocab_size,
                    **loss_kwargs,
                )
            logits = keep_logits(sequence.to_logical(physical_logits), logits_to_keep)
        else:
            logits = self.lm_head(keep_logits(sequence.to_logical(output.last_hidden_state), logits_to_keep))
        causal = with_logits(output, loss, logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return causal if return_dict else causal.to_tuple()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        pixel_values = images["pixel_values"]
        return torch.full((len(pixel_values),), self.config.num_patches, device=pixel_values.device)


register_key_mapping(
    LlavaRecoverableModel,
    LlavaRecoverableForConditionalGeneration,
    base_model_type="llava",
    own_keys=("question_encoder", "visual_projection"),
)

__all__ = ["LlavaRecoverableForConditionalGeneration", "LlavaRecoverableModel"]
