"""Recoverable Compression (Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided
by Text Information", https://arxiv.org/abs/2409.01179); its algorithm is in `recoverable_algorithm.py`.

The processor writes a placeholder for every patch; how many tokens an image really has is known only after the vision
tower, so the language model runs on fewer (`core/deferred.py`, `core/cache.py`). Position ids count physical
tokens, as the authors' code does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, CLIPTextModelWithProjection

from foveate.configuration.attention import SLIDING, attention_kinds
from foveate.configuration.recoverable import RecoverableSettings
from foveate.modeling.compatibility import (
    cache_argument,
    cache_positions,
    clip_embeddings,
    clip_layers,
    fields_with_cache,
    image_features_output,
    image_fields,
    run_clip_layer,
    slice_logits_to_keep,
    takes_cache,
    without_cache_positions,
)
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.deferred import DeferredGenerationMixin, DeferredModelMixin, build_physical_sequence
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, Images, TokenProvenance, VisualTokens
from foveate.modeling.methods.recoverable_algorithm import (
    TokenAssignment,
    assign_tokens,
    class_token_scores,
    text_similarity,
)


class RecoverableGenerationMixin(DeferredGenerationMixin):
    """The loss, and all logits where they are wanted, are computed of the tokens that are there alone."""

    def forward(self, labels=None, logits_to_keep=0, return_dict=None, num_items_in_batch=None, **kwargs):
        wants_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None and not wants_all:
            return super().forward(logits_to_keep=logits_to_keep, return_dict=return_dict, **kwargs)
        output = self.model(return_dict=True, return_physical=True, **kwargs)
        sequence, logits = output.physical_sequence, self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self._loss(logits, sequence.to_physical(labels, padding=-100), num_items_in_batch)
        logits = slice_logits_to_keep(sequence.to_logical(logits), logits_to_keep)
        return self._with_logits(output, loss, logits, return_dict)


class RecoverableModelMixin(DeferredModelMixin):
    """The question's text encoder and CLIP's visual projection beside the stock model."""

    role_names = ("dropped", "kept by the visual filter", "recovered by the question", "merged")
    added_modules = ("question_encoder", "visual_projection")
    guiding_inputs = ("question_input_ids", "question_attention_mask")

    def add_modules(self, config):
        self.question_encoder = CLIPTextModelWithProjection._from_config(config.question_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.question_config.projection_dim, bias=False
        )

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes images and compresses each by its question.

        Args:
            images: `pixel_values`, (images, 3, height, width); `question_input_ids` and `question_attention_mask`,
                (images, 77).
            trace: whether to say what the tokens are made of.
        """
        features, assignment = self.assign_tokens(images)
        tokens = self.multi_modal_projector(assignment.tokens(features))
        provenance = None
        if trace:
            provenance = [
                TokenProvenance(weights, roles, self.role_names) for weights, roles in assignment.provenance()
            ]
        return VisualTokens(tokens, assignment.counts.tolist(), provenance=provenance)

    def assign_tokens(self, images: Images) -> tuple[torch.Tensor, TokenAssignment]:
        """The patches' features, (images, patches, width of the vision tower), and what becomes of each patch."""
        settings = self.config.compression
        embeddings = clip_embeddings(self.vision_tower, images["pixel_values"])
        layers = clip_layers(self.vision_tower)
        feature_layer = self.config.vision_feature_layer % (len(layers) + 1)
        hidden, features = embeddings, embeddings
        for index, layer in enumerate(layers[:-1], start=1):
            hidden = run_clip_layer(layer, hidden)
            if index == feature_layer:
                features = hidden
        # Step 1 reads the last layer's query of the class token and its keys: no attention matrix is needed for that.
        last: Any = layers[-1]
        normed = last.layer_norm1(hidden)
        keys = last.self_attn.k_proj(normed)  # (images, patches + 1, width)
        scores = class_token_scores(last.self_attn.q_proj(normed[:, 0]), keys)

        uses_text = settings.text_recovery or (settings.secondary_recovery and settings.variant == "official")
        if uses_text or feature_layer == len(layers):
            final = run_clip_layer(last, hidden)
            features = final if feature_layer == len(layers) else features
        if uses_text:
            question = self.embed_question(*(images.get(name) for name in self.guiding_inputs))
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
        return features[:, 1:], assignment

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

    def get_image_features(self, **images):
        """The compressed visual tokens, one (tokens, width) tensor an image, in the form that this version of
        Transformers gives its own models' image features."""
        compressed = self.compress_images(images)
        return image_features_output(list(compressed.tokens.split(compressed.lengths)))

    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_compression: bool | None = None,
        return_physical: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids, attention_mask: (batch, logical length), a placeholder for every patch of every image; with a
                cache, `input_ids` holds the new columns and `attention_mask` all of them.
            position_ids: ignored: positions count the tokens that are there.
            output_compression: also return where each visual token comes from.
            return_physical: leave `last_hidden_state` on the columns that the language model ran on.
            kwargs: the images of all rows, row after row, as the processor returns them; and for the language model.
        """
        images = {name: kwargs.pop(name, None) for name in (*self.visual_inputs, *self.guiding_inputs)}
        embeds, present, logical = self._open_columns(input_ids, inputs_embeds, attention_mask, cache, use_cache)
        num_columns, compressed, lengths = embeds.shape[1], None, None
        if images["pixel_values"] is not None:
            compressed = self.compress_images(images, bool(output_compression))
            placeholders = self._find_placeholders(input_ids, embeds)
            taken = self._taken_placeholders(placeholders, compressed.lengths)
            present = (taken | ~placeholders) if present is None else (taken | ~placeholders) & present
            row_lengths = present.sum(1)
            # Lengths of the sequence and the check of the placeholders come to the host together.
            shortest, longest, found = torch.stack([row_lengths.min(), row_lengths.max(), placeholders.sum()]).tolist()
            lengths = (shortest, longest)
            self._check_placeholders(found, len(compressed.lengths))
            tokens = compressed.tokens.to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(taken[..., None], tokens)

        sequence = build_physical_sequence(embeds, present, logical, lengths)
        if sequence.has_gaps and SLIDING in attention_kinds(self.config.get_text_config()):
            sequence.require_no_padding_between_tokens()
        past, length = 0 if logical is None else logical.physical_length, sequence.inputs_embeds.shape[1]
        output: Any = self.language_model(
            inputs_embeds=sequence.inputs_embeds,
            attention_mask=sequence.attention_mask,
            position_ids=sequence.position_ids,
            **cache_argument(None if logical is None else logical.inner),
            use_cache=logical is not None,
            **cache_positions(past, length, embeds.device),
            **without_cache_positions(kwargs),
        )
        if logical is not None:
            logical.append(sequence.source, num_columns, sequence.has_gaps)
        output = CompressedModelOutputWithPast(
            **fields_with_cache(output, logical),
            **image_fields(None if compressed is None else compressed.tokens.split(compressed.lengths)),
            compression=None if compressed is None else compressed.provenance,
            physical_sequence=sequence if return_physical else None,
        )
        if not return_physical:
            output.last_hidden_state = sequence.to_logical(output.last_hidden_state)
        return self._returned(output, return_dict)

    def _taken_placeholders(self, placeholders: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The first placeholders of every image, as many as it has tokens; (batch, columns) bool."""
        counts = torch.tensor(lengths).to(placeholders.device, non_blocking=True)
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


METHOD = Method(
    name="recoverable",
    stem="Recoverable",
    title="Recoverable Compression",
    paper="https://arxiv.org/abs/2409.01179",
    kind="deferred",
    mixin=RecoverableModelMixin,
    generation_mixin=RecoverableGenerationMixin,
    settings=RecoverableSettings,
    backbones=("llava",),
    reads_question=True,
    summary=(
        "A visual filter keeps the patches that the vision tower's class token attends to most. Of the others, those "
        "that are most similar to the question are recovered, and what is left is clustered and merged, one token a "
        "cluster. Nothing is trained."
    ),
    limits=(
        "How many tokens an image needs is known only when it has been seen (unless `num_visual_tokens` is set), and "
        "prompts hold a placeholder for every patch: serving engines that count placeholders beforehand gain nothing.",
        "An image is compressed for the question that stands beside it; later turns see what that question left.",
    ),
)
