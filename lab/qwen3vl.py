"""Carries the lab's base over to Qwen3-VL: `python -m foveate.lab.qwen3vl`.

The vision tower begins as the base's, layer by layer: what Qwen3-VL's has instead of the class token and the first
norm, it learns. Its rotary turns are new to the base's queries and keys, so these are written in a basis in which most
of them stands where the turns are slow. In the first stage it learns, without any text, to give at every patch what the
base's tower gives there, and its merger the mean of what the base's projector makes of the four patches of a token;
pictures come in many sizes and aspect ratios, the base's features resampled to their grid. In the second stage the
language model, which begins as the base's, and the mergers learn from dialogues; DeepStack begins as nothing, and the
vision tower stays as it is.

The result goes to `lab/weights/tiny-qwen3vl`, its account to `lab/results/training-qwen3vl.json`. Resumable at any step
(`lab/work/` holds its state).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLVideoProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from foveate.lab import lab_folder
from foveate.lab.language import TYPE_SHARES, language_tokenizer
from foveate.lab.scenes import (
    IMAGE_SIZE,
    PATCH_SIZE,
    QUESTION_TYPES,
    QuestionAnswer,
    Scene,
    ask_questions,
    describe,
    draw_scene,
    draw_scenes,
    sample_scene,
)
from foveate.lab.stages import Stage, fast_autocast, run_stage
from foveate.lab.tower import normalize
from foveate.lab.validation import ask_validation, begin_account, write_account
from foveate.lab.vocabulary import QWEN_SPECIAL_TOKENS, make_qwen_tokenizer, save_tokenizer


SEED, SCENE_SEED = 0, 4
MERGE, SIDE = 2, IMAGE_SIZE // PATCH_SIZE
# Pictures between 140 × 140 and 280 × 280 pixels keep their size, up to multiples of a merged token's side.
GRID_SIDES = tuple(range(10, 21, MERGE))
MIN_PIXELS, MAX_PIXELS = ((side * PATCH_SIZE) ** 2 for side in (GRID_SIDES[0], GRID_SIDES[-1]))
MEAN = STD = 0.5
DEEPSTACK_LAYERS = [3, 7]
NUM_HEADS, MROPE_SECTION, SPARE_ROWS = 6, [12, 10, 10], 8
TOWER_STEPS, TOWER_RATE, TOWER_BATCH = 320, 7e-4, 32
NUM_STEPS, LEARNING_RATE, BATCH_SIZE = 1200, 1.5e-3, 24
# Things are looked up soon, then counting is what takes longest to learn and is asked most (as in `QUESTION_TYPES`).
LOOKUP_STEPS, LATER_SHARES = 450, np.array([1, 2, 2, 4, 3, 1]) / 13
EQUAL_SHARES = np.full(len(QUESTION_TYPES), 1 / len(QUESTION_TYPES))
TURNS = 9
HERE = Path(__file__).resolve().parent
console = Console()


@functools.lru_cache(maxsize=1)
def tokenizer():
    return make_qwen_tokenizer()


def make_config(base: Any) -> Qwen3VLConfig:
    """Qwen3-VL with the sizes of the lab's base, whose config this takes."""
    words, vision, text = tokenizer(), base.vision_config, base.text_config
    token = words.convert_tokens_to_ids
    rope = {
        "rope_type": "default",
        "rope_theta": text.rope_parameters["rope_theta"],
        "mrope_section": MROPE_SECTION,
        "mrope_interleaved": True,
    }
    return Qwen3VLConfig(
        vision_config={
            "depth": vision.num_hidden_layers - 1,  # LLaVA reads the last layer but one
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_attention_heads,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": SIDE**2,
            "deepstack_visual_indexes": DEEPSTACK_LAYERS,
        },
        text_config={
            "vocab_size": -(-(len(words) + SPARE_ROWS) // 64) * 64,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


# What the base gives to begin with


def make_model(base: LlavaForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL that begins as near to the base as it can, in float32."""
    model = Qwen3VLForConditionalGeneration._from_config(make_config(base.config), attn_implementation="eager")
    with torch.no_grad():
        _copy_tower(base, model.model.visual)
        _copy_language_model(base, model.model.language_model)
        for merger in model.model.visual.deepstack_merger_list:
            nn.init.zeros_(merger.linear_fc2.weight)
    return model


def _copy_tower(base: Any, tower: Any) -> None:
    clip = getattr(base.model.vision_tower, "vision_model", base.model.vision_tower)
    pictures, _ = draw_scenes([sample_scene("train", index, SCENE_SEED + 1) for index in range(64)], augment=True)
    hidden = clip(normalize(pictures), output_hidden_states=True).hidden_states
    _copy_patch_embedding(clip, tower, normalize(pictures))
    for layer, block, states in zip(clip.encoder.layers, tower.blocks, hidden):
        attention = layer.self_attn
        query, key = _slow_first(attention, layer.layer_norm1(states[:, 1:]).flatten(0, 1))
        block.attn.qkv.weight.copy_(torch.cat([query[:, :-1], key[:, :-1], attention.v_proj.weight]))
        block.attn.qkv.bias.copy_(torch.cat([query[:, -1], key[:, -1], attention.v_proj.bias]))
        block.attn.proj.load_state_dict(attention.out_proj.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp.linear_fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.linear_fc2.load_state_dict(layer.mlp.fc2.state_dict())


def _copy_patch_embedding(clip: Any, tower: Any, pictures: torch.Tensor) -> None:
    """Patches and places as after CLIP's first norm, by the linear map that comes nearest to it; the same for both
    frames of an image, for pixels that are normalised otherwise."""
    embedded = clip.embeddings(pictures)[:, 1:].flatten(0, 1)
    inputs = F.pad(embedded, (0, 1), value=1.0)
    near = torch.linalg.lstsq(inputs, clip.pre_layrnorm(embedded)).solution.T  # (width, width + 1)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    pixels = clip.embeddings.patch_embedding.weight
    offset = torch.einsum("ochw,c->o", pixels, (MEAN - mean) / std)
    pixels = torch.einsum("po,ochw,c->pchw", near[:, :-1], pixels, STD / std)
    tower.patch_embed.proj.weight.copy_(pixels[:, :, None].expand(-1, -1, 2, -1, -1) / 2)
    tower.patch_embed.proj.bias.copy_(near[:, :-1] @ offset + near[:, -1])
    tower.pos_embed.weight.copy_(clip.embeddings.position_embedding.weight[1:] @ near[:, :-1].T)


def _slow_first(attention: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries' and keys' weights, (width, width + 1), the bias last, that give the same scores from `inputs` but for
    rotary turns: what matters most for the scores stands in the pairs of dimensions that turn slowest."""
    inputs = F.pad(inputs, (0, 1), value=1.0).double()
    energy, axes = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    root = energy.clamp(min=1e-9).sqrt()
    whiten, unwhiten = axes / root, axes * root  # inputs @ whiten has unit covariance
    pairs = attention.head_dim // 2
    # The first half of the pairs turns with the row and the second with the column, each the slower the later.
    slots = torch.arange(pairs).view(2, -1).flip(1).T.flatten()
    slots = torch.stack([slots, slots + pairs], dim=1).flatten()
    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []

    def augmented(linear: nn.Linear) -> torch.Tensor:
        return torch.cat([linear.weight, linear.bias[:, None]], dim=1).double().unflatten(0, (-1, attention.head_dim))

    for query, key in zip(augmented(attention.q_proj), augmented(attention.k_proj)):
        left, strength, right = torch.linalg.svd((query @ unwhiten).T @ (key @ unwhiten))
        strength = strength[: attention.head_dim, None].sqrt()
        for found, side in ((queries, left.T), (keys, right)):
            weights = torch.empty(attention.head_dim, inputs.shape[1], dtype=torch.float64)
            weights[slots] = strength * side[: attention.head_dim] @ whiten.T
            found.append(weights.float())
    return torch.cat(queries), torch.cat(keys)


def _copy_words(base: Any, embedding: torch.Tensor) -> None:
    """Rows of tied words. What is said after a line break, the base says after a space and reads as such."""
    read, said = base.model.language_model.embed_tokens.weight, base.lm_head.weight
    known = language_tokenizer().get_vocab()
    for token, row in tokenizer().get_vocab().items():
        spaced = known.get(f"Ġ{token}")
        if spaced is not None:
            embedding[row] = said[spaced]
        elif token in known:
            embedding[row] = (read[known[token]] + said[known[token]]) / 2 if token.isdigit() else read[known[token]]
    embedding[tokenizer().eos_token_id] = said[known["</s>"]]
    embedding[tokenizer().get_vocab()["Ċ"]] = read[known[":"]]  # after which the base answers


def _copy_language_model(base: Any, text: Any) -> None:
    old = base.model.language_model
    _copy_words(base, text.embed_tokens.weight)
    text.norm.load_state_dict(old.norm.state_dict())
    for layer, new in zip(old.layers, text.layers):
        attention, ours = layer.self_attn, new.self_attn
        new.input_layernorm.load_state_dict(layer.input_layernorm.state_dict())
        new.post_attention_layernorm.load_state_dict(layer.post_attention_layernorm.state_dict())
        new.mlp.load_state_dict(layer.mlp.state_dict())
        ours.k_proj.load_state_dict(attention.k_proj.state_dict())
        ours.v_proj.load_state_dict(attention.v_proj.state_dict())
        # Of the heads of a group the first is the base's; the others change nothing yet.
        head, kept = attention.head_dim, ours.num_key_value_groups
        queries = ours.q_proj.weight.view(-1, kept, head, ours.q_proj.in_features)
        queries[:, 0] = attention.q_proj.weight.unflatten(0, (-1, head))
        outputs = ours.o_proj.weight.view(len(ours.o_proj.weight), -1, kept, head)
        outputs.zero_()
        outputs[:, :, 0] = attention.o_proj.weight.unflatten(1, (-1, head))
        # Queries and keys have a norm now: as long as they would be of inputs without direction.
        for norm, linear in ((ours.q_norm, attention.q_proj), (ours.k_norm, attention.k_proj)):
            seen = linear.weight * layer.input_layernorm.weight
            norm.weight.fill_(seen.square().sum(1).mean().sqrt())


# The first stage


def patches_of(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (batch, 3, height, width) → what the image processor would give,
    (batch · patches, 3 · 2 · 14 · 14): the four patches of a token one after the other, each frame twice."""
    batch, channels, height, width = pictures.shape
    rows, columns = height // PATCH_SIZE // MERGE, width // PATCH_SIZE // MERGE
    values = (pictures.float() / 255 - MEAN) / STD
    values = values.view(batch, channels, rows, MERGE, PATCH_SIZE, columns, MERGE, PATCH_SIZE)
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return values.reshape(batch * rows * columns * MERGE**2, -1)


def to_grid(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Features on the base's grid, (batch, 144, channels), resampled to `height` × `width` patches, in the order of
    `patches_of`, (batch, patches, channels)."""
    grid = features.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    if (height, width) != (SIDE, SIDE):
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
    blocks = grid.view(*grid.shape[:2], height // MERGE, MERGE, width // MERGE, MERGE)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)


def draw_resized(scenes: list[Scene], height: int, width: int, augment: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of 168 × 168 pixels, and the same resized to `height` × `width` patches, both uint8."""
    pictures, _ = draw_scenes(scenes, augment)
    size = (height * PATCH_SIZE, width * PATCH_SIZE)
    if size == (IMAGE_SIZE, IMAGE_SIZE):
        return pictures, pictures
    resized = F.interpolate(pictures.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return pictures, resized.round().clamp(0, 255).to(torch.uint8)


def grid_of(step: int) -> tuple[int, int]:
    """Height and width in patches of a step's pictures: random in every second step, else the base's."""
    if step % 2 == 0:
        return SIDE, SIDE
    height, width = np.random.default_rng([SEED, step]).choice(GRID_SIDES, size=2)
    return int(height), int(width)


class Seer(nn.Module):
    """The vision tower and how it learns from the base's, which is in lists so that it is no part of the module."""

    def __init__(self, base: LlavaForConditionalGeneration, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.clip = [getattr(base.model.vision_tower, "vision_model", base.model.vision_tower)]
        self.projector = [base.model.multi_modal_projector]

    @torch.no_grad()
    def taught(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of the base: what each layer gives at every patch, and what the language model gets of the last."""
        hidden = self.clip[0](normalize(pictures), output_hidden_states=True).hidden_states[1:-1]
        hidden = [states[:, 1:].float() for states in hidden]
        return hidden, self.projector[0](hidden[-1])

    def batch(self, step: int, split: str = "train") -> dict[str, torch.Tensor]:
        height, width = grid_of(step)
        number = TOWER_BATCH * SIDE**2 // (height * width)
        scenes = [sample_scene(split, step * TOWER_BATCH + index, SCENE_SEED) for index in range(number)]
        pictures, resized = draw_resized(scenes, height, width, augment=split == "train")
        grid = torch.tensor([[1, height, width]]).expand(number, -1)
        return {"pictures": pictures, "patches": patches_of(resized), "grid": grid}

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Squared errors relative to how much the features vary: of the last layer and the merger, and, where the
        picture has the base's size, of the layers below."""
        height, width = batch["grid"][0, 1:].tolist()
        hidden, projected = self.taught(batch["pictures"])
        found = self.visual(batch["patches"], grid_thw=batch["grid"], output_hidden_states=True)
        last = _error(found.last_hidden_state, to_grid(hidden[-1], height, width))
        wanted = to_grid(projected, height, width).unflatten(1, (-1, MERGE**2)).mean(2)
        merged = _error(found.pooler_output, wanted)
        loss = last + merged
        if (height, width) == (SIDE, SIDE):
            below = [
                _error(ours, to_grid(theirs, *(SIDE, SIDE))) for ours, theirs in zip(found.hidden_states[1:], hidden)
            ]
            loss = loss + torch.stack(below).mean()
        return loss, {"last": last.item(), "merged": merged.item(), "loss": loss.item()}

    @torch.no_grad()
    def evaluate(self, num_batches: int = 4) -> dict[str, float]:
        """Errors on validation scenes: of pictures of the base's size, and of others."""
        found: dict[str, float] = {}
        for name, first in (("same", 0), ("resized", 1)):
            numbers = [self.loss(self.batch(first + 2 * step, "validation"))[1] for step in range(num_batches)]
            found |= {f"{name}_{key}": float(np.mean([one[key] for one in numbers])) for key in ("last", "merged")}
        return found


def _error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    wanted = wanted.flatten(0, 1)
    found = found.view(wanted.shape).float()
    return (found - wanted).square().sum(-1).mean() / (wanted - wanted.mean(0)).square().sum(-1).mean()


# The second stage


@functools.lru_cache(maxsize=20_000)
def _turn_tokens(question: str, answer: str, first: bool) -> tuple[list[int], list[int]]:
    before = "" if first else "\n<|im_start|>user\n"
    asked = f"{before}{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer()(asked)["input_ids"], tokenizer()(f"{answer}<|im_end|>")["input_ids"]


def dialogue_tokens(questions: list[QuestionAnswer], num_visual_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a dialogue about one image, their labels (−100 outside answers) and the turn of each label."""
    image = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * num_visual_tokens + "<|vision_end|>"
    ids = tokenizer()(image)["input_ids"]
    labels, turns = [-100] * len(ids), [-1] * len(ids)
    for turn, qa in enumerate(questions):
        asked, answered = _turn_tokens(qa.question, qa.answer, turn == 0)
        ids = ids + asked + answered
        labels += [-100] * len(asked) + answered
        turns += [-1] * len(asked) + [turn] * len(answered)
    return ids, labels, turns


def dialogue_batch(
    step: int,
    split: str = "train",
    grid: tuple[int, int] = (SIDE, SIDE),
    num_turns: int = TURNS,
    described: bool = False,
    shares: np.ndarray = EQUAL_SHARES,
) -> dict[str, torch.Tensor]:
    """Inputs of the model for one dialogue about each of a step's scenes, `labels`, the `turn` of each label and the
    types of the turns, `kinds`.

    `described`: the first turn asks for all that is in the picture. `shares`: of the types of question.
    """
    scenes = [sample_scene(split, step * BATCH_SIZE + index, SCENE_SEED + 2) for index in range(BATCH_SIZE)]
    height, width = grid
    _, pictures = draw_resized(scenes, height, width, augment=split == "train")
    rows, kinds = [], torch.full((BATCH_SIZE, num_turns), -1)
    for index, scene in enumerate(scenes):
        types = scene.random(100).choice(len(QUESTION_TYPES), size=num_turns, p=shares)
        asked = ask_questions(scene, [QUESTION_TYPES[kind] for kind in types], stream=1000)
        if described:
            asked = [describe(scene, stream=1000), *asked[1:]]
        rows.append(dialogue_tokens(asked, height * width // MERGE**2))
        for turn, qa in enumerate(asked):
            kinds[index, turn] = QUESTION_TYPES.index(qa.type) if qa.type in QUESTION_TYPES else -1
    longest = max(len(ids) for ids, _, _ in rows)

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in rows])

    ids = padded(0, tokenizer().pad_token_id)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tokenizer().convert_tokens_to_ids("<|image_pad|>")).long(),
        "pixel_values": patches_of(pictures),
        "image_grid_thw": torch.tensor([[1, height, width]]).expand(BATCH_SIZE, -1),
        "labels": padded(1, -100),
        "turn": padded(2, -1),
        "kinds": kinds,
    }


class Speaker(nn.Module):
    """The model, of whose vision tower only the mergers train."""

    def __init__(self, model: Qwen3VLForConditionalGeneration):
        super().__init__()
        self.model = model
        visual = model.model.visual
        for frozen in (visual.patch_embed, visual.pos_embed, visual.blocks):
            frozen.requires_grad_(False)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        grid = grid_of(step // 2) if step % 2 else (SIDE, SIDE)
        if step >= LOOKUP_STEPS:
            return dialogue_batch(step, grid=grid, shares=LATER_SHARES)
        described = step % 4 == 0
        return dialogue_batch(
            step, grid=grid, num_turns=5 if described else TURNS, described=described, shares=TYPE_SHARES
        )

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(batch, length of `labels`, vocabulary), each at the position that predicts the label of that place."""
        names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        # Rows are padded on the right, where nothing that counts looks.
        found = self.model(**{name: batch[name] for name in names}, use_cache=False).logits
        return F.pad(found[:, :-1], (0, 0, 1, 0))

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        asked = batch["labels"] >= 0
        logits, labels = self.logits(batch)[asked].float(), batch["labels"][asked]
        loss = F.cross_entropy(logits, labels)
        return loss, {"loss": loss.item(), "token": (logits.argmax(-1) == labels).float().mean().item()}

    @torch.no_grad()
    def evaluate(self, num_batches: int = 8) -> dict[str, float]:
        """Exact match on validation scenes, given the right earlier answers: of all questions, by type, and of all
        questions about scenes of other sizes."""
        right, kinds = self._answered(num_batches, lambda step: (SIDE, SIDE))
        found = {kind: right[kinds == i].mean().item() for i, kind in enumerate(QUESTION_TYPES)}
        resized, _ = self._answered(num_batches // 2, lambda step: grid_of(2 * step + 1))
        return {"all": right.mean().item(), **found, "resized": resized.mean().item()}

    def _answered(self, num_batches: int, grid: Callable[[int], tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        right, kinds = [], []
        for step in range(num_batches):
            batch = dialogue_batch(step, "validation", grid(step), num_turns=3)
            hit = (self.logits(batch).argmax(-1) == batch["labels"]) | (batch["labels"] < 0)
            for turn in range(batch["kinds"].shape[1]):
                there = batch["kinds"][:, turn] >= 0
                right.append((hit | (batch["turn"] != turn)).all(1)[there])
                kinds.append(batch["kinds"][there, turn])
        return torch.cat(right).float(), torch.cat(kinds)


# The checkpoint


def write_checkpoint(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Writes the model in bf16 as published checkpoints are named, with its processor."""
    words, size = tokenizer(), {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    model.generation_config.update(
        bos_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    model.generation_config.max_new_tokens = 16
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    save_tokenizer(words, folder)
    names = {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": QWEN_SPECIAL_TOKENS}
    _change(folder / "tokenizer_config.json", extra_special_tokens=None, **names)
    shape: dict[str, Any] = {"patch_size": PATCH_SIZE, "merge_size": MERGE, "temporal_patch_size": 2}
    values: dict[str, Any] = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    for kind in (Qwen2VLImageProcessor, Qwen3VLVideoProcessor):
        kind(size=size, **shape, **values).save_pretrained(folder)
    # Under the names of the published files, which every version reads.
    names = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    _change(folder / "preprocessor_config.json", **names)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = dict(text["rope_parameters"])
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}  # where 4.57 looks for them
    _change(folder / "config.json", text_config=text)
    for path in folder.iterdir():
        path.chmod(0o644)


def _change(path: Path, **values: object) -> None:
    """Sets keys of a JSON file; `None` takes one away."""
    content = json.loads(path.read_text()) | values
    content = {key: value for key, value in content.items() if value is not None or key not in values}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def measure(
    folder: Path, number: int = 600, turns: int = 1, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> dict[str, object]:
    """See [`ask_validation`]; each scene is resized to `size`, width and height in pixels."""

    def draw(scene: Scene) -> Image.Image:
        return draw_scene(scene).resize(size, Image.Resampling.BICUBIC)

    return ask_validation(folder, draw, SCENE_SEED + 3, number, turns)


def train(work: Path) -> tuple[dict[str, dict[str, float]], Speaker]:
    """Runs both stages (or goes on, or skips what is done); returns an account of each, and the trained module."""
    torch.manual_seed(SEED)
    base = LlavaForConditionalGeneration.from_pretrained(lab_folder("tiny-llava"), dtype=torch.float32).eval()
    model = make_model(base)
    seer = Seer(base, model.model.visual)
    tower = Stage("qwen3vl-tower", seer, seer.batch, seer.loss, TOWER_STEPS, TOWER_RATE, warmup_steps=30)
    tower.evaluate, tower.evaluate_every = seer.evaluate, 80
    accounts = {"tower": _account(tower, run_stage(tower, work, console.print))}
    speaker = Speaker(model)
    dialogues = Stage("qwen3vl", speaker, speaker.batch, speaker.loss, NUM_STEPS, LEARNING_RATE, save_every=50)
    dialogues.evaluate, dialogues.evaluate_every = speaker.evaluate, 200
    accounts["dialogues"] = _account(dialogues, run_stage(dialogues, work, console.print))
    return accounts, speaker


def _account(stage: Stage, seconds: float) -> dict[str, float]:
    stage.module.eval()
    with torch.no_grad(), fast_autocast():
        found = {} if stage.evaluate is None else stage.evaluate()
    rounded = {key: round(value, 4) for key, value in found.items()}
    return {"minutes": round(seconds / 60, 1), "steps": stage.num_steps, **rounded}


def main(
    work: Path = HERE / "work",
    weights: Path = HERE / "weights",
    results: Path = HERE / "results",
    note: str = "",
) -> None:
    """Trains what is not yet trained, writes the checkpoint and asks it. `note`: what the account should say."""
    for folder in (work, weights, results):
        folder.mkdir(parents=True, exist_ok=True)
    accounts, speaker = train(work)
    checkpoint = weights / "tiny-qwen3vl"
    write_checkpoint(speaker.model, checkpoint)
    account = {
        **begin_account("python -m foveate.lab.qwen3vl", SEED, note),
        **accounts,
        "validation": {
            "questions": measure(checkpoint),
            "resized": measure(checkpoint, 200, size=(252, 140)),
            "dialogues": measure(checkpoint, 200, turns=3),
        },
    }
    write_account(account, results / "training-qwen3vl.json")
    console.print(account)


if __name__ == "__main__":
    typer.run(main)
