"""CLIP's vision tower on views of different shapes, and what its class token looks at."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from foveate.modeling.compatibility import (
    clip_embeddings,
    clip_layers,
    padding_mask,
    run_attention,
    run_clip_layer,
)
from foveate.modeling.layers.clip import class_correlation, split_heads
from foveate.modeling.layers.slice_layout import SliceLayout


class SliceEmbeddings(CLIPVisionEmbeddings):
    """CLIP's embeddings of images that come as patches, in any shape: the position embeddings are interpolated."""

    def forward(self, patches: torch.Tensor, layout: SliceLayout) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            patches: (views, patches, values), the values of a patch in the order (channel, row, column).
            layout: the shapes of the views.

        Returns:
            (views, 1 + patches, width).
        """
        # One row of patches a view, for the convolution that reads each by itself.
        strips = patches.unflatten(2, (-1, self.patch_size, self.patch_size)).permute(0, 2, 3, 1, 4).flatten(3)
        found = self.patch_embedding(strips.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(found.dtype).expand(len(found), 1, -1)
        # By the module's forward, not its weight: whoever keeps weights elsewhere (accelerate) hooks into that.
        table = self.position_embedding(self.position_ids)[0]
        return torch.cat([class_token, found], dim=1) + _interpolated(table, layout)


def encode_views(
    vision_tower: nn.Module, patches: torch.Tensor, layout: SliceLayout, feature_layer: int, look: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes views; layers after `feature_layer` don't run.

    Args:
        vision_tower: a `CLIPVisionModel` with [`SliceEmbeddings`].
        patches: (views, patches, values), shorter views padded behind.
        layout: the shapes of the views.
        feature_layer: how many layers run, at least one.
        look: whether to say what the class token looks at.

    Returns:
        The features, (views, patches, width), and the attention of the class token to every patch in the last layer
        that runs, the mean over its heads, (views, patches) float32.
    """
    hidden = clip_embeddings(vision_tower, patches, layout)
    present, mask = layout.present(), None
    if present is not None:
        present = nn.functional.pad(present, (1, 0), value=True)  # the class token
        mask = padding_mask(vision_tower, present, hidden.dtype)
    *layers, last = clip_layers(vision_tower)[:feature_layer]
    for layer in layers:
        hidden = run_clip_layer(layer, hidden, mask)
    if not look:
        return run_clip_layer(last, hidden, mask)[:, 1:], None
    # The layer taken apart: the row is made of queries and keys that it computes anyway.
    attention, normed = last.self_attn, last.layer_norm1(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    queries, keys, values = (split_heads(project(normed), attention) for project in projections)
    hidden = hidden + attention.out_proj(run_attention(attention, queries, keys, values, mask))
    hidden = hidden + last.mlp(last.layer_norm2(hidden))
    with torch.no_grad():  # an expert that is frozen
        class_row = class_correlation(queries[:, :, :1], keys, present)
    return hidden[:, 1:], class_row


def _interpolated(weight: torch.Tensor, layout: SliceLayout) -> torch.Tensor:
    """(views, 1 + patches, width): the position embeddings of a square, the class token's first, interpolated to the
    shape of each view."""
    side = round((len(weight) - 1) ** 0.5)
    square = weight[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    shapes = list(dict.fromkeys(layout.shapes))
    tables = []
    for rows, columns in shapes:
        table = square
        if (rows, columns) != (side, side):
            table = nn.functional.interpolate(square.float(), (rows, columns), mode="bicubic", align_corners=False)
        table = table.to(weight.dtype).flatten(2)[0].T
        tables.append(nn.functional.pad(torch.cat([weight[:1], table]), (0, 0, 0, layout.most_patches - len(table))))
    which = torch.tensor([shapes.index(shape) for shape in layout.shapes]).to(weight.device, non_blocking=True)
    return torch.stack(tables)[which]
