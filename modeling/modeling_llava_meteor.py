"""LLaVA-1.5 with LLaVA-Meteor (Li et al., "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual
Instruction Tuning")."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.configuration_llava_meteor import LlavaMeteorConfig
from foveate.modeling.compatibility import cache_argument, register_key_mapping, replace_clip_embeddings, takes_cache
from foveate.modeling.core.base import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast, TokenProvenance
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.exact import CompressedImages, ExactCountGenerationMixin, PromptAgnosticModelMixin
from foveate.modeling.layers.slice_layout import SliceLayout, slice_grid_of
from foveate.modeling.layers.token_choice import choose_tokens, straight_through_gate
from foveate.modeling.methods.meteor_algorithm import FlashGlobalFusion, native_scores, visual_scores
from foveate.modeling.methods.meteor_encoder import SliceEmbeddings, encode_views


ROLE_NAMES = ("discarded", "kept", "between slices")


class LlavaMeteorModel(PromptAgnosticModelMixin, LlavaModel):
    """The vision tower on the views of an image, the fusion, the selection, the projector and the language model.

    Attributes:
        native_warmup: share of the native expert's weight 1 − λ that it has by now, from 0 to 1; training raises it.
    """

    config_class = LlavaMeteorConfig

    def __init__(self, config: LlavaMeteorConfig):
        super().__init__(config)
        replace_clip_embeddings(self.vision_tower, SliceEmbeddings)
        self.compressor = FlashGlobalFusion(config.vision_config.hidden_size, config.compression.state_size)
        self.native_warmup = 1.0
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, FlashGlobalFusion):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def compress_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, *, trace: bool = False
    ) -> CompressedImages:
        """Encodes images and compresses every view of each.

        Args:
            pixel_values: (images, most views, most patches, values of a patch), an image's own views first.
            image_sizes: (images, 2), height and width in pixels.
            trace: whether to say what the tokens are made of.
        """
        config, settings = self.config, self.config.compression
        grids = [slice_grid_of(config, size) for size in image_sizes.tolist()]
        layout = SliceLayout(grids, pixel_values.device)
        patches = pixel_values.flatten(0, 1)[layout.rows_of_views(pixel_values.shape[1]), : layout.most_patches]
        number = min(settings.num_visual_tokens, layout.most_patches)
        chooses, present = number < max(layout.lengths), layout.present()
        warmup = self.native_warmup if settings.visual_share > 0 else 1.0  # who is alone has all the say
        native_share = warmup * (1 - settings.visual_share)
        # An expert without a say isn't asked, but for the one who wants to see it.
        look = trace or (chooses and settings.visual_share > 0)
        running = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
        features, class_row = encode_views(self.vision_tower, patches, layout, running, look)
        fused, instruction = self.compressor(features, layout, local=settings.scan == "local-to-single")

        scores = {}
        if look:
            scores["visual expert"] = visual_scores(class_row)
        if trace or (chooses and native_share > 0):
            scores["native expert"] = native_scores(fused, instruction, present)
        kept = None
        if chooses:
            shares = {"visual expert": settings.visual_share, "native expert": native_share}
            importance = sum(share * scores[name] for name, share in shares.items() if share > 0)
            kept, _ = choose_tokens(importance, number, present)
            fused = fused.gather(1, kept[..., None].expand(-1, -1, fused.shape[-1]))
            if importance.requires_grad:
                fused = straight_through_gate(fused, importance.gather(1, kept))
        tokens = self.multi_modal_projector(fused).flatten(0, 1)
        between = torch.tensor([settings.comma_token_id, settings.newline_token_id]).to(tokens.device)
        between = self.get_input_embeddings()(between).to(tokens)
        counts = [grid.num_tokens(number) for grid in grids]
        order = layout.order(number)
        provenance = self._provenance(layout, order.split(counts), kept, scores) if trace else None
        return CompressedImages(torch.cat([tokens, between])[order], counts, provenance)

    def _provenance(
        self,
        layout: SliceLayout,
        orders: tuple[torch.Tensor, ...],
        kept: torch.Tensor | None,
        scores: dict[str, torch.Tensor],
    ) -> list[TokenProvenance]:
        """Of every image; its patches are those of all its views, view after view. What the fusion brought to a token
        from other patches isn't counted, and a separator is made of none."""
        device, found, first_view = layout.device, [], 0
        if kept is None:
            kept = torch.arange(layout.most_patches, device=device).expand(layout.num_views, -1)
        for grid, order in zip(layout.grids, orders):
            views = range(first_view, first_view + grid.num_views)
            lengths = torch.tensor(layout.lengths[views.start : views.stop], device=device)
            view, place = order // kept.shape[1], order % kept.shape[1]
            is_separator = view >= layout.num_views
            view, place = view.masked_fill(is_separator, first_view), place.masked_fill(is_separator, 0)
            patch = (lengths.cumsum(0) - lengths)[view - first_view] + kept[view, place]
            weights = torch.zeros(len(order), grid.num_patches, device=device)
            weights[torch.arange(len(order), device=device), patch] = (~is_separator).to(weights)
            of_image = tuple(
                (name, torch.cat([score[index, : layout.lengths[index]] for index in views]))
                for name, score in scores.items()
            )
            found.append(TokenProvenance(weights, 1 + is_separator.long(), ROLE_NAMES, scores=of_image))
            first_view += grid.num_views
        return found

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs):
        """The compressed visual tokens and separators, one (tokens, width) tensor an image, in the form that this
        version of Transformers gives its own models' image features."""
        return self._image_features(pixel_values=pixel_values, image_sizes=image_sizes)

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        compressed_images: list[CompressedImage] | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids: (batch, length), with as many placeholders an image as it has tokens after compression.
            pixel_values, image_sizes: as in `compress_images`, the images of all rows, row after row.
            mm_encoder_outputs: what `get_image_features` gave, under "image", in place of `pixel_values`.
            compressed_images: what `compress` returned, in place of `pixel_values`.
            output_compression: also return where each visual token comes from.
        """
        output = self._forward(
            {"pixel_values": pixel_values, "image_sizes": image_sizes},
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            output_compression,
            sequences=self._sequences_of(compressed_images),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class LlavaMeteorForConditionalGeneration(ExactCountGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaMeteorModel`] with a language modeling head."""

    config_class = LlavaMeteorConfig
    _keep_in_fp32_modules = ["compressor"]  # its states are too wide for float16
    image_inputs = ("pixel_values", "image_sizes", "compressed_images")

    def __init__(self, config: LlavaMeteorConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaMeteorModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        compressed_images: list[CompressedImage] | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, length), −100 where no loss is wanted.
            logits_to_keep: the number of last columns (0: all), or their indices.
            others: as in [`LlavaMeteorModel`].
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            compressed_images=compressed_images,
            output_compression=output_compression,
            return_dict=True,
            **kwargs,
        )
        return self._with_head(output, labels, logits_to_keep, return_dict, num_items_in_batch)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    def compress(self, *args, **kwargs) -> list[CompressedImage]:
        return self.model.compress(*args, **kwargs)

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        number = self.config.compression.num_visual_tokens
        counts = [slice_grid_of(self.config, size).num_tokens(number) for size in images["image_sizes"].tolist()]
        return torch.tensor(counts, device=images["pixel_values"].device)


register_key_mapping(
    LlavaMeteorModel, LlavaMeteorForConditionalGeneration, base_model_type="llava", own_keys=("compressor",)
)

__all__ = ["LlavaMeteorForConditionalGeneration", "LlavaMeteorModel"]
