"""The algorithm of LLaVA-Meteor (Li et al., "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual
Instruction Tuning").

Flash Global Fusion (Section 3.2) lets every patch of a view see the whole of it, in time linear in their number, and
gathers in one instruction token what instructions ask for. Visual-Native Selection (Section 3.3) keeps the patches that
the class token and the instruction token find important together.

V: views, n: patches of the longest, C: width of the vision tower.
"""

from __future__ import annotations

import torch
from torch import nn

from foveate.modeling.layers.selective_scan import SelectiveStateSpace
from foveate.modeling.layers.slice_layout import SliceLayout


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


def visual_scores(class_row: torch.Tensor) -> torch.Tensor:
    """What the class token finds important: VS, its attention to the patches, (V, n), as shares of what it gives to
    patches at all."""
    return class_row / class_row.sum(-1, keepdim=True)
