"""What QG-VTC's models share, whatever their backbone: the question's text encoder, its MLP, and the guided encoder."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, CLIPTextModelWithProjection

from foveate.modeling.compatibility import cache_argument, checkpoints_activations, takes_cache
from foveate.modeling.core.base import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from foveate.modeling.core.exact import ExactCountGenerationMixin, ExactCountModelMixin
from foveate.modeling.methods.qgvtc_encoder import EncodedImages, encode_images


ROLE_NAMES = ("discarded", "kept by the question", "kept by the class token", "end of a row")


class QuestionProjector(nn.Module):
    """The MLP that takes the question into the vision tower's space, the only new trained module of the encoder."""

    def __init__(self, text_width: int, vision_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_width, vision_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(vision_width, vision_width)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, text width) → (B, vision width)."""
        return self.linear_2(self.act(self.linear_1(pooled)))


class QGVTCModelMixin(ExactCountModelMixin):
    """Mixed into a model without a head, before the Transformers class."""

    def _add_question_modules(self, config) -> None:
        # The whole CLIP text model, as checkpoints have it; its projection is not run.
        self.question_encoder = CLIPTextModelWithProjection._from_config(config.question_config)
        self.question_projector = QuestionProjector(
            config.question_config.hidden_size, config.vision_config.hidden_size
        )

    def embed_question(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(images, 77) → (images, vision width): the question's class token."""
        if attention_mask is not None:  # the row of an empty question: attention over no token at all would be NaN
            attention_mask = attention_mask.clone()
            attention_mask[:, 0] = 1
        output = self.question_encoder.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.question_projector(output.pooler_output)

    def _encode_images(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor | None,
        question_attention_mask: torch.Tensor | None,
        per_image: torch.Tensor | None = None,
        selectable: torch.Tensor | None = None,
        trace: bool = False,
    ) -> EncodedImages:
        """Runs the guided vision tower.

        Args:
            pixel_values: (images or tiles, 3, height, width).
            question_input_ids, question_attention_mask: (images, 77); a mask without a one says that there is no
                question, and the image's class token guides.
            per_image: (tiles,), the image of each tile, where images are cut into tiles.
            selectable: (images or tiles, patches) bool, patches that are not padding.
        """
        config, text_class, has_question = self.config, None, None  # type: ignore[attr-defined]
        if config.compression.guidance == "question" and config.compression.num_visual_tokens < config.num_patches:
            if question_input_ids is None:
                raise ValueError(
                    "QG-VTC is guided by the question: pass `question_input_ids` and `question_attention_mask`, as the "
                    "processor returns them, or set guidance to 'cls'."
                )
            text_class = self.embed_question(question_input_ids, question_attention_mask)
            if question_attention_mask is not None:
                has_question = question_attention_mask.any(-1)
            if per_image is not None:
                text_class = text_class[per_image]
                has_question = None if has_question is None else has_question[per_image]
        return encode_images(
            self.vision_tower,
            pixel_values,
            config.compression,
            config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1),
            text_class,
            has_question,
            selectable,
            trace,
            checkpoint_activations=self.training and checkpoints_activations(self),  # type: ignore[attr-defined]
        )

    def _role(self) -> int:
        return 1 if self.config.compression.guidance == "question" else 2  # type: ignore[attr-defined]

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """The compressed, projected visual tokens, one (tokens, width) tensor an image, in the form that this version
        of Transformers gives its own models' image features."""
        return self._image_features(
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
        )

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
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids: (batch, length), with as many placeholders an image as it has tokens after compression.
            pixel_values: (images, 3, height, width), the images of all rows, row after row; LLaVA-NeXT: (images, most
                tiles, 3, height, width).
            image_sizes: (images, 2), height and width in pixels, for LLaVA-NeXT.
            question_input_ids, question_attention_mask: (images, 77), the question that guides each image.
            mm_encoder_outputs: what `get_image_features` gave, under "image", in place of `pixel_values`.
            output_compression: also return where each visual token comes from.
        """
        images = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "question_input_ids": question_input_ids,
            "question_attention_mask": question_attention_mask,
        }
        output = self._forward(
            images,
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            output_compression,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if return_dict else output.to_tuple()


class QGVTCGenerationMixin(ExactCountGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    image_inputs = ("pixel_values", "image_sizes", "question_input_ids", "question_attention_mask")

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
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, length), −100 where no loss is wanted.
            logits_to_keep: the number of last columns (0: all), or their indices.
            others: as in the model without a head.
        """
        output = self.model(  # type: ignore[attr-defined]
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            output_compression=output_compression,
            return_dict=True,
            **kwargs,
        )
        return self._with_head(output, labels, logits_to_keep, return_dict, num_items_in_batch)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)  # type: ignore[attr-defined]
