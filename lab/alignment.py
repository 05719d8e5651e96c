"""Stage 2: a CLIP text tower is aligned with the vision tower by contrastive training.

Only the vision tower's last layer and what follows it are trained, so the penultimate layer, which LLaVA reads, stays
what stage 1 made it. Two contrasts: scenes with their captions (class token, as CLIP), and objects with phrases and
questions about them (mean of the object's patches; CLIP gets that from 400 million pairs, the lab from being told).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from foveate.lab.scenes import GRID, IMAGE_SIZE, PATCH_SIZE, PLACES, ask_questions, draw_scenes, sample_scene
from foveate.lab.tower import Tower, normalize, vision_config
from foveate.lab.vocabulary import make_clip_tokenizer
from foveate.modeling.compatibility import clip_embeddings, clip_layers, run_clip_layer


BATCH_SIZE = 96
_PHRASES_PER_SCENE = 3
_SIDE = IMAGE_SIZE // PATCH_SIZE


@functools.lru_cache(maxsize=1)
def clip_tokenizer():
    return make_clip_tokenizer()


def clip_config() -> CLIPConfig:
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=128,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=128)


def alignment_batch(step: int, split: str = "train", seed: int = 1) -> dict[str, torch.Tensor]:
    """Pictures, captions, and for some objects of each picture a phrase or a question and the patches that show it."""
    scenes = [sample_scene(split, step * BATCH_SIZE + i, seed) for i in range(BATCH_SIZE)]
    pictures, covered = draw_scenes(scenes, augment=split == "train")
    phrases, regions = [], []
    cells = torch.arange(GRID * GRID).view(GRID, GRID)
    cell_of_patch = cells.repeat_interleave(_SIDE // GRID, 0).repeat_interleave(_SIDE // GRID, 1)
    for row, scene in enumerate(scenes):
        random = scene.random(3)
        questions = [qa for qa in ask_questions(scene, ("what", "colour", "where", "exist", "read")) if qa.about]
        for _ in range(_PHRASES_PER_SCENE):
            item: Any = scene.objects[int(random.integers(len(scene.objects)))]
            names = (item.noun, f"{item.colour} {item.noun}", f"{item.colour} {item.noun} at the {item.place}")
            phrase = names[int(random.integers(3))]
            if questions and random.random() < 0.5:
                question = questions.pop(int(random.integers(len(questions))))
                item, phrase = question.about, question.question
            phrases.append(phrase)
            regions.append((covered[row] > 0.08) & (cell_of_patch == PLACES.index(item.place)))
    tokens = clip_tokenizer()([scene.caption for scene in scenes] + phrases, padding=True, truncation=True)
    return {
        "pictures": pictures,
        "regions": torch.stack(regions).flatten(1).float(),  # (batch * phrases, 144)
        "input_ids": torch.tensor(tokens["input_ids"]),
        "attention_mask": torch.tensor(tokens["attention_mask"]),
        # Texts that are the same are all right answers to each other's objects.
        "same": torch.tensor([[a == b for b in phrases] for a in phrases]),
    }


class Alignment(nn.Module):
    """An ordinary `CLIPModel` whose vision tower up to the last layer is frozen."""

    def __init__(self, tower: Tower):
        super().__init__()
        self.clip = CLIPModel._from_config(clip_config(), attn_implementation="eager")
        vision = getattr(self.clip.vision_model, "vision_model", self.clip.vision_model)
        own = vision.state_dict()
        trained = {key.removeprefix("vision_model."): value for key, value in tower.vision.state_dict().items()}
        trained = {key: value for key, value in trained.items() if not key.startswith("post_layernorm")}
        vision.load_state_dict({**own, **trained})
        for name, parameter in vision.named_parameters():
            parameter.requires_grad_(name.startswith(("encoder.layers.11.", "post_layernorm.")))

    def embed_pictures(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class token after post-LN and patches without it, projected and normalized: (b, 128), (b, 144, 128)."""
        vision = getattr(self.clip.vision_model, "vision_model", self.clip.vision_model)
        with torch.no_grad():
            hidden = clip_embeddings(vision, normalize(pictures))
            for layer in clip_layers(vision)[:-1]:
                hidden = run_clip_layer(layer, hidden)
        hidden = run_clip_layer(clip_layers(vision)[-1], hidden)
        scene = self.clip.visual_projection(vision.post_layernorm(hidden[:, 0]))
        patches = self.clip.visual_projection(hidden[:, 1:])
        return F.normalize(scene.float(), dim=-1), F.normalize(patches.float(), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        scene, patches = self.embed_pictures(batch["pictures"])
        texts = self.embed_texts(batch["input_ids"], batch["attention_mask"])
        captions, phrases = texts[: len(scene)], texts[len(scene) :]
        scale = self.clip.logit_scale.exp().clamp(max=100)
        logits = scale * scene @ captions.T
        target = torch.arange(len(scene))
        global_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        patches = patches.repeat_interleave(_PHRASES_PER_SCENE, dim=0)
        regions = batch["regions"]
        objects = F.normalize((regions[..., None] * patches).sum(1), dim=-1)
        target = batch["same"].float()
        target = target / target.sum(1, keepdim=True)
        logits = scale * objects @ phrases.T
        region_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        # Within the picture: the phrase is closer to its object's patches than to the others, the background too.
        inside = (scale * torch.einsum("npd,nd->np", patches, phrases)).log_softmax(-1)
        inside_loss = -(inside * regions).sum(1).div(regions.sum(1).clamp(min=1)).mean()
        shown = {"caption": global_loss.item(), "region": region_loss.item(), "inside": inside_loss.item()}
        return global_loss + 0.5 * region_loss + 0.5 * inside_loss, shown

    @torch.no_grad()
    def evaluate(self, split: str = "validation", num_scenes: int = 480) -> dict[str, float]:
        """Retrieval among `num_scenes` scenes and their captions, both ways (R@1), and how often a phrase's closest
        patch shows its object."""
        scenes, captions, pointed = [], [], []
        for step in range(num_scenes // BATCH_SIZE):
            batch = alignment_batch(step, split)
            scene, patches = self.embed_pictures(batch["pictures"])
            texts = self.embed_texts(batch["input_ids"], batch["attention_mask"])
            scenes.append(scene)
            captions.append(texts[:BATCH_SIZE])
            near = torch.einsum(
                "npd,nd->np", patches.repeat_interleave(_PHRASES_PER_SCENE, 0), texts[BATCH_SIZE:]
            ).argmax(-1)
            pointed.append(batch["regions"].gather(1, near[:, None]).mean())
        logits = torch.cat(scenes) @ torch.cat(captions).T
        target = torch.arange(len(logits))
        return {
            "image_to_caption": (logits.argmax(1) == target).float().mean().item(),
            "caption_to_image": (logits.argmax(0) == target).float().mean().item(),
            "pointing": torch.stack(pointed).mean().item(),
        }
