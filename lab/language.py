"""Stage 3: the projector and the language model learn to answer, with the vision tower frozen and its features cached.

Several question-answer pairs about a picture are one dialogue, which teaches single questions and later turns at once.
First the patches are averaged per cell (9 tokens a picture, so that looking things up is learned cheaply), then the
language model gets all 144, as it will in use.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.lab.scenes import GRID, QUESTION_TYPES, ask_questions, describe, draw_scenes, sample_scene
from foveate.lab.stages import fast_autocast
from foveate.lab.tower import Tower
from foveate.lab.vocabulary import make_language_tokenizer


NUM_SCENES = {"train": 24_576, "validation": 512}
BATCH_SIZE = 64
TURNS = 8
NUM_PATCHES, _SIDE = 144, 12
# What is looked up by its name, among 30, takes longest to learn and is asked most (as in `QUESTION_TYPES`).
TYPE_SHARES = np.array([1, 4, 4, 1, 3, 1]) / 14


@functools.lru_cache(maxsize=1)
def language_tokenizer():
    return make_language_tokenizer()


def text_config() -> LlamaConfig:
    tokenizer = language_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def cache_features(tower: Tower, folder: Path, log: Callable[[str], None] = print) -> dict[str, torch.Tensor]:
    """Features of all scenes that stage 3 uses, bf16 (scenes, 144, width), written once and then mapped from disk."""
    features = {}
    tower.eval()
    for split, number in NUM_SCENES.items():
        path = folder / f"features_{split}.pt"
        if not path.exists():
            found = torch.empty(number, NUM_PATCHES, tower.vision.config.hidden_size, dtype=torch.bfloat16)
            for start in track(range(0, number, 128), description=f"features of {split} scenes"):
                scenes = [sample_scene(split, index, seed=2) for index in range(start, min(start + 128, number))]
                pictures, _ = draw_scenes(scenes, augment=split == "train")
                with torch.no_grad(), fast_autocast():
                    found[start : start + 128] = tower.features(pictures)[:, 1:]
            torch.save(found, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            log(f"features of {number} {split} scenes")
        features[split] = torch.load(path, mmap=True, weights_only=True)
    return features


def dialogue_tokens(questions: list) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a dialogue after its image, their labels (−100 outside answers) and the turn of each label."""
    ids, labels, turns = [], [], []
    for turn, qa in enumerate(questions):
        asked, answered = _turn_tokens(f"\n{qa.question}" if turn == 0 else f"USER: {qa.question}", qa.answer)
        ids += asked + answered
        labels += [-100] * len(asked) + answered
        turns += [-1] * len(asked) + [turn] * len(answered)
    return ids, labels, turns


@functools.lru_cache(maxsize=20_000)
def _turn_tokens(question: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = language_tokenizer()
    asked = tokenizer(f"{question} ASSISTANT:", add_special_tokens=False)["input_ids"]
    return asked, tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"]


def language_batch(
    step: int,
    split: str = "train",
    batch_size: int = BATCH_SIZE,
    turns: int = TURNS,
    described: bool = False,
    first_epoch: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of scenes (their indices) with dialogues of `turns` turns, other questions every time a scene returns.

    `described`: the first turn asks for all that is in the picture.
    """
    number = NUM_SCENES[split]
    epoch, within = divmod(step, number // batch_size)
    epoch += first_epoch
    order = torch.randperm(number, generator=torch.Generator().manual_seed(epoch))
    chosen = order[within * batch_size : (within + 1) * batch_size]
    rows, kinds = [], []
    for index in chosen.tolist():
        scene = sample_scene(split, index, seed=2)
        random = scene.random(100 + epoch)
        types = [QUESTION_TYPES[int(kind)] for kind in random.choice(len(QUESTION_TYPES), size=turns, p=TYPE_SHARES)]
        questions = ask_questions(scene, types, stream=1000 + epoch)
        if described:
            questions = [describe(scene, stream=1000 + epoch), *questions[1:]]
        rows.append(dialogue_tokens(questions))
        kinds.append(
            [QUESTION_TYPES.index(qa.type) if qa.type in QUESTION_TYPES else -1 for qa in questions]
            + [-1] * (turns - len(questions))
        )
    longest = max(len(ids) for ids, _, _ in rows)
    pad = language_tokenizer().pad_token_id

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in rows])

    return {
        "scenes": chosen,
        "ids": padded(0, pad),
        "labels": padded(1, -100),
        "turn": padded(2, -1),
        "kinds": torch.tensor(kinds),
    }


class Speaker(nn.Module):
    """Projector and language model (eager attention: faster to train at this size on a CPU)."""

    def __init__(self, features: dict[str, torch.Tensor], pooled: bool):
        super().__init__()
        self.features, self.pooled = features, pooled
        tokenizer = language_tokenizer()
        self.prefix = tokenizer("USER: ")["input_ids"]
        self.language_model = LlamaForCausalLM._from_config(text_config(), attn_implementation="eager")
        width = text_config().hidden_size
        # The parts of LlavaMultiModalProjector, under its names.
        self.multi_modal_projector = nn.ModuleDict(
            {"linear_1": nn.Linear(features["train"].shape[-1], width), "linear_2": nn.Linear(width, width)}
        )

    def logits(self, batch: dict[str, torch.Tensor], split: str) -> torch.Tensor:
        """(batch, length of `ids`, vocabulary), each at the position that predicts the id of that place."""
        projector = self.multi_modal_projector
        patches = self.features[split][batch["scenes"]].float()
        tokens = projector["linear_2"](F.gelu(projector["linear_1"](patches)))
        if self.pooled:
            side = _SIDE // GRID
            tokens = tokens.view(-1, GRID, side, GRID, side, tokens.shape[-1]).mean((2, 4)).flatten(1, 2)
        embed = self.language_model.get_input_embeddings()
        prefix = embed(torch.tensor(self.prefix)).expand(len(tokens), -1, -1)
        hidden = torch.cat([prefix, tokens, embed(batch["ids"])], dim=1)
        hidden = self.language_model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return self.language_model.lm_head(hidden[:, -batch["ids"].shape[1] - 1 : -1])

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        asked = batch["labels"] >= 0
        logits, labels = self.logits(batch, "train")[asked].float(), batch["labels"][asked]
        loss = F.cross_entropy(logits, labels)
        return loss, {"loss": loss.item(), "token": (logits.argmax(-1) == labels).float().mean().item()}

    @torch.no_grad()
    def evaluate(self, num_batches: int = 8) -> dict[str, float]:
        """Exact match on validation scenes, given the right earlier answers: of all questions, and by type."""
        right, kinds = [], []
        for step in range(num_batches):
            batch = language_batch(step, "validation", turns=4 if self.pooled else 3, described=self.pooled)
            hit = (self.logits(batch, "validation").argmax(-1) == batch["labels"]) | (batch["labels"] < 0)
            for turn in range(batch["kinds"].shape[1]):
                there = batch["kinds"][:, turn] >= 0
                right.append((hit | (batch["turn"] != turn)).all(1)[there])
                kinds.append(batch["kinds"][there, turn])
        hits, kind_of = torch.cat(right).float(), torch.cat(kinds)
        found = {kind: hits[kind_of == i].mean().item() for i, kind in enumerate(QUESTION_TYPES)}
        return {"all": hits.mean().item()} | found
