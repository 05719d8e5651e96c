"""The algorithm of LLaVA-Meteor (Li et al., "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual
Instruction Tuning").

CLIP's vision tower encodes views of different shapes. Flash Global Fusion (Section 3.2) lets every patch of a view see
the whole of it, in time linear in their number, and gathers in one instruction token what instructions ask for.
Visual-Native Selection (Section 3.3) keeps the patches that the class token and the instruction token find important
together.

V: views, n: patches of the longest, C: width of the vision tower.
"""

from __future__ import annotations

from typing import Any

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
from foveate.modeling.layers.selective_scan import SelectiveStateSpace
from foveate.modeling.layers.slices import SliceLayout


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
    vision_tower: Any, patches: torch.Tensor, layout: SliceLayout, feature_layer: int, look: bool
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
    layers: list[Any]
    last: Any
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


class FlashGlobalFusion(nn.Module):
    """Two state space blocks over the patches of a view, one from its first to its last and one back, each added to
    what it reads.

    Freshly initialised it changes nothing, and its instruction token finds all patches alike.

    Args:
        width: C.
        state_size: N of the blocks.
    """

    def __init__(self, width: int, state_size: int):
        super().__init__()
        self.instruction = nn.Parameter(torch.empty(width))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.forward_mixer = SelectiveStateSpace(width, state_size)
        self.backward_mixer = SelectiveStateSpace(width, state_size)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.instruction)
        self.norm.reset_parameters()
        for mixer in (self.forward_mixer, self.backward_mixer):
            mixer.reset_parameters()

    def forward(self, features: torch.Tensor, layout: SliceLayout, local: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuses the patches of every view.

        Args:
            features: (V, n, C), padded behind.
            layout: the shapes of the views.
            local: whether the mean of a patch's neighbourhood stands before it ("local-to-single"), or patches alone.

        Returns:
            (V, n, C), and the instruction token of every view, (V, C).
        """
        dtype, features = features.dtype, features.to(self.instruction.dtype)
        read, read_instruction = self.norm(features), self.norm(self.instruction)
        instruction = self.instruction.expand(len(features), -1)
        means = local_means(read, layout) if local else None
        for mixer, backward in ((self.forward_mixer, False), (self.backward_mixer, True)):
            places, middle = scan_places(layout, features.shape[1], local, backward)
            views = torch.arange(len(features), device=features.device)
            sequence = features.new_zeros(len(features), (1 + local) * features.shape[1] + 1, features.shape[2])
            sequence = sequence.index_put((views[:, None], places), read)
            if means is not None:  # the scan meets it right before its patch, from whichever side it comes
                sequence = sequence.index_put((views[:, None], places - 1), means)
            mixed = mixer(sequence.index_put((views, middle), read_instruction.expand(len(features), -1)))
            features = features + mixed[views[:, None], places]
            instruction = instruction + mixed[views, middle]
        return features.to(dtype), instruction


def scan_places(
    layout: SliceLayout, num_patches: int, local: bool, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the patches stand in the sequence that is scanned, and where the instruction token, in their middle, does.

    Returns:
        (V, n), with a free place before every patch if `local`, padding behind all others; and (V,).
    """
    lengths, step = layout.num_patches[:, None], 2 if local else 1
    place, middle = torch.arange(num_patches, device=layout.device).expand(layout.num_views, -1), lengths // 2
    if backward:
        place, middle = torch.where(place < lengths, lengths - 1 - place, place), lengths - middle
    return step * place + (step - 1) + (place >= middle), step * middle[:, 0]


def local_means(features: torch.Tensor, layout: SliceLayout) -> torch.Tensor:
    """(V, n, C) → the same: the mean of the 3 × 3 patches around each, at borders of those that exist.

    Rows, then columns: the patches of every view stand row after row, so that a row's neighbours are next to each other
    and a column's as far apart as the view is wide.
    """
    rows, columns = layout.rows[:, None], layout.columns[:, None]
    index = torch.arange(features.shape[1], device=features.device)[None]
    row, column = index // columns, index % columns
    left, right, above, below = column > 0, column < columns - 1, row > 0, row < rows - 1
    before = nn.functional.pad(features, (0, 0, 1, 0))[:, :-1]
    behind = nn.functional.pad(features, (0, 0, 0, 1))[:, 1:]
    total = features + before * left[..., None] + behind * right[..., None]
    views = torch.arange(len(features), device=features.device)[:, None]
    over = total[views, (index - columns).clamp(min=0)]
    under = total[views, (index + columns).clamp(max=features.shape[1] - 1)]
    total = total + over * above[..., None] + under * below[..., None]
    count = (1 + left.long() + right) * (1 + above.long() + below)
    return total / count[..., None].to(total.dtype)


def native_scores(fused: torch.Tensor, instruction: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """What the instruction token finds important: NS, (V, n) float32, each row sums to 1.

    Args:
        fused: (V, n, C).
        instruction: (V, C), the instruction token after the fusion.
        present: (V, n) bool, patches that are not padding; `None`: all.
    """
    scores = (fused.float() @ instruction.float()[..., None])[..., 0]
    if present is not None:
        scores = scores.masked_fill(~present, float("-inf"))
    return scores.softmax(-1)


def class_scores(class_row: torch.Tensor) -> torch.Tensor:
    """What the class token finds important: VS, its attention to the patches, (V, n), as shares of what it gives to
    patches at all."""
    return class_row / class_row.sum(-1, keepdim=True)
