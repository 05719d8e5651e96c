"""Stage 1: the vision tower learns, at every patch, what is there, which colour it has and where it is.

Throw-away linear heads on the penultimate layer (the one that LLaVA reads) give the signal; the class token learns
which names and colours the scene holds. Taught end to end from answers alone, so small a tower stalls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from foveate.lab.scenes import COLOURS, GRID, IMAGE_SIZE, NAMES, PATCH_SIZE, PLACES, draw_scenes, sample_scene


BATCH_SIZE = 64
_SIDE = IMAGE_SIZE // PATCH_SIZE


def vision_config(num_hidden_layers: int = 12) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
        hidden_act="gelu",
    )


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures → the values that the CLIP image processor would give, float32."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pictures.float() / 255 - mean) / std


def tower_batch(step: int, split: str = "train", seed: int = 0, num_objects: tuple[int, int] = (5, 9)) -> dict:
    """Pictures and what each patch shows: name and colour (0: nothing, −100: hardly anything), class-token targets."""
    scenes = [sample_scene(split, step * BATCH_SIZE + i, seed, num_objects) for i in range(BATCH_SIZE)]
    pictures, covered = draw_scenes(scenes, augment=split == "train")
    name_of_cell = torch.zeros(BATCH_SIZE, GRID * GRID, dtype=torch.long)
    colour_of_cell = torch.zeros_like(name_of_cell)
    names, colours = torch.zeros(BATCH_SIZE, len(NAMES)), torch.zeros(BATCH_SIZE, len(COLOURS))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            name, colour = NAMES.index(item.name), list(COLOURS).index(item.colour)
            name_of_cell[row, PLACES.index(item.place)] = name + 1
            colour_of_cell[row, PLACES.index(item.place)] = colour + 1
            names[row, name] = colours[row, colour] = 1
    shown, unclear = covered > 0.08, (covered > 0.02) & (covered <= 0.08)

    def of_patch(of_cell: torch.Tensor) -> torch.Tensor:
        spread = of_cell.view(-1, GRID, GRID).repeat_interleave(_SIDE // GRID, 1).repeat_interleave(_SIDE // GRID, 2)
        return torch.where(unclear, -100, spread * shown).flatten(1)

    return {
        "pictures": pictures,
        "name": of_patch(name_of_cell),
        "colour": of_patch(colour_of_cell),
        "scene_names": names,
        "scene_colours": colours,
    }


class Tower(nn.Module):
    """The vision tower without its last layer, which the alignment stage adds and trains, and the heads.

    Eager attention: at this size its backward pass is twice as fast on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.vision = CLIPVisionModel._from_config(vision_config(num_hidden_layers=11), attn_implementation="eager")
        width = vision_config().hidden_size
        self.norm = nn.LayerNorm(width)
        self.name = nn.Linear(width, len(NAMES) + 1)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.cell = nn.Linear(width, GRID * GRID)
        self.scene = nn.Linear(width, len(NAMES) + len(COLOURS))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Hidden states of the penultimate layer, class token first, (batch, 145, 128)."""
        return self.vision(normalize(pictures)).last_hidden_state

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        hidden = self.norm(self.features(batch["pictures"]))
        patches = hidden[:, 1:]
        there = batch["name"] > 0
        names = F.cross_entropy(self.name(patches).float().transpose(1, 2), batch["name"], reduction="none")
        colours = F.cross_entropy(self.colour(patches).float().transpose(1, 2), batch["colour"], reduction="none")
        dense = (names + 0.5 * colours)[there].mean() + 0.5 * names[batch["name"] == 0].mean()
        cell = torch.arange(GRID * GRID).view(GRID, GRID)
        cell = cell.repeat_interleave(_SIDE // GRID, 0).repeat_interleave(_SIDE // GRID, 1).flatten()
        cells = F.cross_entropy(self.cell(patches).float().transpose(1, 2), cell.expand(len(patches), -1))
        targets = torch.cat([batch["scene_names"], batch["scene_colours"]], dim=1)
        scene = F.binary_cross_entropy_with_logits(self.scene(hidden[:, 0]).float(), targets)
        with torch.no_grad():
            shown = {"name": names[there].mean().item(), "colour": colours[there].mean().item(), "scene": scene.item()}
        return dense + 0.2 * cells + scene, shown

    @torch.no_grad()
    def evaluate(self, num_batches: int = 8) -> dict[str, float]:
        """Share of validation objects that their patches name, by kind, and of patches with the right colour."""
        right, total, colours = torch.zeros(3), torch.zeros(3), []
        for step in range(num_batches):
            batch = tower_batch(step, "validation")
            hidden = self.norm(self.features(batch["pictures"]))[:, 1:]
            there = batch["name"] > 0
            colours.append((self.colour(hidden).argmax(-1) == batch["colour"])[there].float().mean())
            side = _SIDE // GRID
            votes = self.name(hidden).float().log_softmax(-1)[..., 1:] * there[..., None]
            votes = votes.view(-1, GRID, side, GRID, side, len(NAMES)).sum((2, 4)).flatten(1, 2)
            truth = batch["name"].clamp(min=0).view(-1, GRID, side, GRID, side).amax((2, 4)).flatten(1)
            kind = torch.bucketize(truth, torch.tensor([10, 18]))
            for k in range(3):
                chosen = (kind == k) & (truth > 0)
                right[k] += (votes.argmax(-1) + 1 == truth)[chosen].sum()
                total[k] += chosen.sum()
        digit, shape, word = (right / total).tolist()
        return {"digit": digit, "shape": shape, "word": word, "colour": torch.stack(colours).mean().item()}
