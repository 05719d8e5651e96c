"""LLaVA-Meteor (Li et al., "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual Instruction
Tuning"): the vision tower on the views of an image, their fusion, and the selection. The algorithm is in
`meteor_algorithm.py`, the views are in `layers/slices.py`."""

from __future__ import annotations

from typing import Any

import torch

from foveate.configuration.meteor import MeteorSettings
from foveate.modeling.compatibility import replace_clip_embeddings
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.exact import ExactGenerationMixin, PromptAgnosticModelMixin
from foveate.modeling.core.outputs import Images, TokenProvenance, VisualTokens
from foveate.modeling.layers.clip import choose_tokens, straight_through_gate
from foveate.modeling.layers.slices import SliceGrid, SliceLayout, slice_grid_of
from foveate.modeling.methods.meteor_algorithm import (
    FlashGlobalFusion,
    SliceEmbeddings,
    class_scores,
    encode_views,
    native_scores,
)


class MeteorModelMixin(PromptAgnosticModelMixin):
    """Views in place of pictures, of which the important patches go to the projector.

    Attributes:
        native_warmup: share of the native expert's weight 1 − λ that it has by now, from 0 to 1; training raises it.
    """

    role_names = ("discarded", "kept", "between slices")
    added_modules = ("compressor",)
    own_modules = (FlashGlobalFusion,)
    visual_inputs = ("pixel_values", "image_sizes")
    kept_in_fp32 = ("compressor",)  # its states are too wide for float16

    def add_modules(self, config):
        replace_clip_embeddings(self.vision_tower, SliceEmbeddings)
        self.compressor = FlashGlobalFusion(config.vision_config.hidden_size, config.compression.state_size)
        self.native_warmup = 1.0

    def crop_lengths(self, images):
        return [
            ([rows * columns for rows, columns in grid.shapes], grid.num_separators)
            for grid in self._slice_grids(images)
        ]

    def _slice_grids(self, images: Images) -> list[SliceGrid]:
        return [slice_grid_of(self.config, size) for size in images["image_sizes"].tolist()]

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes images and compresses every view of each.

        Args:
            images: `pixel_values`, (images, most views, most patches, values of a patch), an image's own views first;
                `image_sizes`, (images, 2), height and width in pixels.
            trace: whether to say what the tokens are made of.
        """
        config, settings, pixel_values = self.config, self.config.compression, images["pixel_values"]
        grids = self._slice_grids(images)
        layout = SliceLayout(grids, pixel_values.device)
        patches = pixel_values.flatten(0, 1)[layout.rows_of_views(pixel_values.shape[1]), : layout.most_patches]
        number = min(settings.num_visual_tokens, layout.most_patches)
        chooses, present = number < max(layout.lengths), layout.present()
        warmup = self.native_warmup if settings.visual_share > 0 else 1.0  # who is alone has all the say
        native_share = warmup * (1 - settings.visual_share)
        # An expert without a say isn't asked, but for the one who wants to see it.
        look = trace or (chooses and settings.visual_share > 0)
        running = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
        class_row: Any
        features, class_row = encode_views(self.vision_tower, patches, layout, running, look)
        fused, instruction = self.compressor(features, layout, local=settings.scan == "local-to-single")

        scores = {}
        if look:
            scores["visual expert"] = class_scores(class_row)
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
        lengths = [grid.num_tokens(number) for grid in grids]
        order = layout.order(number)
        provenance = self._provenance(layout, order.split(lengths), kept, scores) if trace else None
        return VisualTokens(torch.cat([tokens, between])[order], lengths, provenance=provenance)

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
            found.append(TokenProvenance(weights, 1 + is_separator.long(), self.role_names, scores=of_image))
            first_view += grid.num_views
        return found


METHOD = Method(
    name="meteor",
    stem="Meteor",
    title="LLaVA-Meteor",
    paper="Top-Down Compression: Revisit Efficient Vision Token Projection for Visual Instruction Tuning",
    kind="image",
    mixin=MeteorModelMixin,
    generation_mixin=ExactGenerationMixin,
    settings=MeteorSettings,
    backbones=("llava",),
    needs_training=True,
    equals_stock=False,
    cuts_images=True,
    objective="native_warmup_steps",
    summary=(
        "An image is seen as a whole and, where it is larger than a view, in slices besides. Two state space blocks "
        "let the patches of a view know of each other in linear time. Of every view, the patches that the class token "
        "and a learned instruction token find important together are kept."
    ),
    limits=("A large image is several views, and can cost more than LLaVA-1.5, which sees every image as one.",),
)
