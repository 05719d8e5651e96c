"""Carries the lab's base over to LLaVA-NeXT's tiles: `python -m foveate.lab.next`.

The base looks things up in its first two layers, by the place that the vision tower gives each patch; in a tile that is
the place within the tile. So the language model gets two more layers below, which begin as the identity. In the first
stage they learn, without any text, to give for a patch of a large scene what the base gets for it where the same
objects lie in one tile, and for the overview what it gets for nothing. In the second, language model, projector and
newline learn from dialogues about large scenes. Visual tokens are most of the cost, so several dialogues share one
image: each goes on from the image alone, at the positions that it would have without the others. The vision tower stays
as it is.

The result goes to `lab/weights/tiny-llava-next`, its account to `lab/results/training-next.json`. Resumable at any step
(`lab/work/` holds its state).
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from foveate.lab import lab_folder
from foveate.lab.language import TYPE_SHARES, dialogue_tokens, language_tokenizer
from foveate.lab.large_scenes import PINPOINTS, SHAPES_IN_TILES, canvas_of, draw_in_one_tile, draw_large_scene
from foveate.lab.scenes import (
    GRID,
    IMAGE_SIZE,
    PATCH_SIZE,
    PLACES,
    QUESTION_TYPES,
    Scene,
    ask_questions,
    background,
    describe,
    sample_scene,
)
from foveate.lab.stages import Stage, fast_autocast, run_stage
from foveate.lab.tower import normalize
from foveate.lab.train import _publish
from foveate.lab.validation import ask_validation, begin_account, write_account
from foveate.lab.vocabulary import CHAT_TEMPLATE, save_tokenizer


SEED, SCENE_SEED = 0, 3
NEW_LAYERS = 2
# Five times the tokens: slower turns keep the distances in the range that the base knows, larger queries its attention
# from spreading over all of them. Given what the base would see, it answers about 90 % so before any training and 77 %
# otherwise (14 validation scenes).
ROPE_THETA, SHARPER = 30_000.0, 1.3
TILES_STEPS, TILES_RATE = 700, 2e-3
NUM_STEPS, LEARNING_RATE, BATCH_SIZE = 1000, 1e-3, 4
KEEP = 0.2
DIALOGUES, TURNS = 8, 3
HERE = Path(__file__).resolve().parent
console = Console()


@functools.lru_cache(maxsize=1)
def image_processor() -> LlavaNextImageProcessor:
    return LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=PINPOINTS,
    )


def make_model() -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT with the weights of the lab's base above new layers that change nothing, and a small random newline,
    in float32."""
    base: Any = LlavaForConditionalGeneration.from_pretrained(lab_folder("tiny-llava"), dtype=torch.float32)
    text_config = base.config.text_config.to_dict()
    text_config["num_hidden_layers"] += NEW_LAYERS
    text_config["rope_parameters"]["rope_theta"] = ROPE_THETA
    config = LlavaNextConfig(
        vision_config=base.config.vision_config.to_dict(),
        text_config=text_config,
        image_token_index=base.config.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=base.config.image_seq_length,
        vision_feature_layer=base.config.vision_feature_layer,
        vision_feature_select_strategy=base.config.vision_feature_select_strategy,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration._from_config(config, attn_implementation="eager")
    inner = model.model
    inner.vision_tower.load_state_dict(base.model.vision_tower.state_dict())
    inner.multi_modal_projector.load_state_dict(base.model.multi_modal_projector.state_dict())
    inner.language_model.embed_tokens.load_state_dict(base.model.language_model.embed_tokens.state_dict())
    inner.language_model.norm.load_state_dict(base.model.language_model.norm.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    inner.language_model.layers[NEW_LAYERS:].load_state_dict(base.model.language_model.layers.state_dict())
    with torch.no_grad():
        for layer in inner.language_model.layers[NEW_LAYERS:]:
            layer.self_attn.q_proj.weight.mul_(SHARPER)
    for layer in inner.language_model.layers[:NEW_LAYERS]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    nn.init.normal_(inner.image_newline, std=0.02)
    model.generation_config = base.generation_config
    return model


class NextSpeaker(nn.Module):
    """The model, of which the vision tower does not train, and how it learns from features of the tower."""

    def __init__(self):
        super().__init__()
        self.model = make_model()
        self.model.model.vision_tower.requires_grad_(False)
        self.prefix = torch.tensor(language_tokenizer()("USER: ")["input_ids"])
        self.teacher = copy.deepcopy(self.model.model.multi_modal_projector).requires_grad_(False)
        width = self.model.config.text_config.hidden_size
        self.place = nn.Linear(width, len(PLACES) + 1)  # thrown away after training
        empty = background(np.random.default_rng(SEED)).clamp(0, 255).byte()
        self.nothing = self._taught(empty[None])[0]

    @torch.no_grad()
    def features(self, pictures: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each picture what the projector gets, (tiles, 144, 128), and the picture's (height, width)."""
        found = []
        for picture in pictures:
            inputs = image_processor()(picture, return_tensors="pt")
            found.append((self._see(inputs["pixel_values"][0]), inputs["image_sizes"][0]))
        return found

    def _see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        inner = self.model.model
        hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return hidden[inner.config.vision_feature_layer][:, 1:]

    @torch.no_grad()
    def _taught(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the base's language model gets of pictures of one tile, (pictures, 144, width)."""
        return self.teacher(self._see(normalize(pictures)))

    def batch(self, step: int, split: str = "train", batch_size: int = BATCH_SIZE) -> dict[str, list]:
        """Large scenes, each with its features, what the base gets of the same scene and its dialogues."""
        scenes = [sample_scene(split, step * batch_size + i, SCENE_SEED) for i in range(batch_size)]
        augment = split == "train"
        taught = self._taught(torch.stack([draw_in_one_tile(scene, augment) for scene in scenes]))
        return {
            "images": self.features([draw_large_scene(scene, augment) for scene in scenes]),
            "wanted": [self._wanted(scene, tile) for scene, tile in zip(scenes, taught)],
            "dialogues": [_dialogues(scene, augment) for scene in scenes],
        }

    def later_batch(self, step: int) -> dict[str, list]:
        """Batches of the second stage: scenes that the first has not had."""
        return self.batch(TILES_STEPS + step)

    def _wanted(self, scene: Scene, taught: torch.Tensor) -> torch.Tensor:
        """What the new layers should make of each patch, whether it shows an object, and which place it belongs to (the
        overview is a tenth), (tiles, 144, width + 2)."""
        canvas = canvas_of(scene)
        rows, columns, side = canvas.rows, canvas.columns, IMAGE_SIZE // PATCH_SIZE // GRID
        places = torch.arange(len(PLACES)).view(GRID, GRID, 1, 1, 1).expand(-1, -1, side, side, -1)

        def of_places(patches: torch.Tensor, there: float) -> torch.Tensor:
            cells = patches.view(GRID, side, GRID, side, -1).transpose(1, 2)
            return torch.cat([cells, torch.full_like(cells[..., :1], there), places], dim=-1)

        full = of_places(taught, 1.0)
        cells = of_places(self.nothing, 0.0).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        for item, (row, column) in zip(scene.objects, canvas.cells):
            cells[row, column] = full[divmod(PLACES.index(item.place), GRID)]
        tiles = cells.view(rows, GRID, columns, GRID, side, side, -1).permute(0, 2, 1, 4, 3, 5, 6)
        overview = F.pad(F.pad(self.nothing, (0, 1)), (0, 1), value=len(PLACES))
        return torch.cat([overview[None], tiles.reshape(rows * columns, len(overview), -1)])

    def pack(self, tiles: torch.Tensor, size: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """(tiles, 144, width) → (visual tokens, width), as the model does it."""
        strategy = self.model.config.vision_feature_select_strategy
        (packed,), _ = self.model.model.pack_image_features([tiles], size[None], strategy, newline)
        return packed

    def image_states(self, image: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The tokens up to an image's end, as they enter the first layer, (tokens, width)."""
        features, size = image
        visual = self.pack(self.model.model.multi_modal_projector(features), size, self.model.model.image_newline)
        return torch.cat([self.model.get_input_embeddings()(self.prefix), visual])

    def through(
        self, states: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor, start: int, stop: int | None
    ) -> torch.Tensor:
        """States of one row, (tokens, width), after the layers from `start` to `stop`."""
        language_model = self.model.model.language_model
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        states, positions = states[None], positions[None]
        turns = language_model.rotary_emb(states, positions)
        for layer in language_model.layers[start:stop]:
            states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=turns)
        return states[0]

    def below(
        self, image: tuple[torch.Tensor, torch.Tensor], dialogues: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """States of an image and dialogues about it before the new layers and after them, (tokens, width), and what
        `through` needs: which tokens see which, and their positions."""
        shared = self.image_states(image)
        owner = torch.cat([torch.full((len(shared),), -1), dialogues["dialogue"]])
        positions = torch.cat([torch.arange(len(shared)), len(shared) + dialogues["position"]])
        seen = (owner[None] == owner[:, None]) | (owner[None] == -1)
        seen &= torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        states = torch.cat([shared, self.model.get_input_embeddings()(dialogues["ids"])])
        return states, self.through(states, seen, positions, 0, NEW_LAYERS), seen, positions

    def forward(
        self, image: tuple[torch.Tensor, torch.Tensor], dialogues: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, (tokens of all dialogues, vocabulary), each at the position that predicts the token of that place;
        and all states after the new layers, (tokens, width)."""
        _, below, seen, positions = self.below(image, dialogues)
        above = self.model.model.language_model.norm(self.through(below, seen, positions, NEW_LAYERS, None))
        # A dialogue's first token is part of its question, so that what stands before it does not matter.
        return self.model.lm_head(above[-len(dialogues["ids"]) - 1 : -1]), below

    def _tiles_loss(self, below: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """How far the visual tokens are from what is wanted, newlines left out: squared errors of those that show
        objects and of the others, relative to how far objects are from nothing; and how hard their places are to
        tell."""
        packed = self.pack(wanted, size, torch.full((wanted.shape[-1],), -1.0))
        target, there, places = packed[:, :-2], packed[:, -2], packed[:, -1].long()
        visual = below[len(self.prefix) : len(self.prefix) + len(packed)].float()
        scale = self.nothing.var(0).sum() + (target[there == 1].mean(0) - self.nothing.mean(0)).square().sum()
        error = (visual - target).square().sum(-1) / scale
        place = F.cross_entropy(self.place(visual).float(), places, ignore_index=-1)
        return error[there == 1].mean(), error[there == 0].mean(), place

    def tiles_loss(self, batch: dict[str, list]) -> tuple[torch.Tensor, dict[str, float]]:
        """Of the first stage: the new layers alone, which should leave text as it is."""
        found = []
        for image, wanted, dialogues in zip(batch["images"], batch["wanted"], batch["dialogues"]):
            first = dialogues["dialogue"] < 2
            some = {name: dialogues[name][first] for name in ("ids", "dialogue", "position")}
            states, below, _, _ = self.below(image, some)
            text = states[-len(some["ids"]) :].detach()
            changed = (below[-len(text) :].float() - text).square().sum() / text.square().sum()
            found.append(torch.stack([*self._tiles_loss(below, wanted, image[1]), changed]))
        objects, others, place, text = torch.stack(found).mean(0)
        numbers = {"objects": objects.item(), "others": others.item(), "place": place.item(), "text": text.item()}
        return objects + 0.5 * others + place + text, numbers

    def loss(self, batch: dict[str, list]) -> tuple[torch.Tensor, dict[str, float]]:
        """Of the second stage."""
        logits, labels, found = [], [], []
        for image, wanted, dialogues in zip(batch["images"], batch["wanted"], batch["dialogues"]):
            asked = dialogues["labels"] >= 0
            answers, below = self(image, dialogues)
            logits.append(answers[asked].float())
            labels.append(dialogues["labels"][asked])
            found.append(torch.stack(self._tiles_loss(below, wanted, image[1])))
        all_logits, all_labels = torch.cat(logits), torch.cat(labels)
        answer, (objects, others, place) = F.cross_entropy(all_logits, all_labels), torch.stack(found).mean(0)
        right = (all_logits.argmax(-1) == all_labels).float().mean()
        numbers = {"answer": answer.item(), "objects": objects.item(), "place": place.item(), "token": right.item()}
        return answer + KEEP * (objects + 0.5 * others + place), numbers

    @torch.no_grad()
    def evaluate(self, number: int = 60) -> dict[str, float]:
        """Exact match on validation scenes, given the right earlier answers: of all questions, and by type."""
        right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_TYPES}
        for step in range(number):
            batch = self.batch(step, "validation", batch_size=1)
            dialogues = batch["dialogues"][0]
            labels = dialogues["labels"]
            hit = (self(batch["images"][0], dialogues)[0].argmax(-1) == labels) | (labels < 0)
            for turn, kind in enumerate(dialogues["kinds"].tolist()):
                right[QUESTION_TYPES[kind]].append(bool(hit[dialogues["turn"] == turn].all()))
        found = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {"all": float(np.mean([one for values in right.values() for one in values]))} | found


def _dialogues(scene: Scene, described: bool) -> dict[str, torch.Tensor]:
    """Dialogues about one scene in one row: ids, labels (−100 outside answers), the dialogue of each token and its
    position in it, the turn of each label counted over all dialogues and the type of each turn."""
    random = scene.random(100)
    rows: dict[str, list[int]] = {name: [] for name in ("ids", "labels", "dialogue", "position", "turn", "kinds")}
    for dialogue in range(DIALOGUES):
        kinds = [QUESTION_TYPES[int(kind)] for kind in random.choice(len(QUESTION_TYPES), size=TURNS, p=TYPE_SHARES)]
        asked = ask_questions(scene, kinds, stream=1000 + dialogue)
        if described and dialogue == 0:
            asked = [describe(scene, stream=1000)]
        ids, labels, turns = dialogue_tokens(asked)
        before = len(rows["kinds"])
        rows["ids"] += ids
        rows["labels"] += labels
        rows["dialogue"] += [dialogue] * len(ids)
        rows["position"] += range(len(ids))
        rows["turn"] += [before + turn if turn >= 0 else -1 for turn in turns]
        rows["kinds"] += [QUESTION_TYPES.index(qa.type) if qa.type in QUESTION_TYPES else -1 for qa in asked]
    return {name: torch.tensor(values) for name, values in rows.items()}


def write_checkpoint(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Writes the model in bf16 as published checkpoints are named, with its processor."""
    tokenizer = language_tokenizer()
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    processor = LlavaNextProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    image_processor().save_pretrained(folder)  # where 4.57 looks for it
    save_tokenizer(tokenizer, folder)
    _publish(folder, "vision_tower.", "vision_tower.vision_model.")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = ROPE_THETA  # where 4.57 looks for it
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def train(work: Path) -> tuple[dict[str, float], NextSpeaker]:
    """Runs both stages (or goes on, or skips what is done); returns their seconds and the trained module."""
    torch.manual_seed(SEED)
    speaker = NextSpeaker()
    new = [speaker.model.model.image_newline, *speaker.place.parameters()]
    new += speaker.model.model.language_model.layers[:NEW_LAYERS].parameters()
    learned = [parameter for parameter in speaker.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(any(parameter is one for one in new))
    tiles = Stage("next-tiles", speaker, speaker.batch, speaker.tiles_loss, TILES_STEPS, TILES_RATE)
    seconds = {"tiles": run_stage(tiles, work, console.print)}
    for parameter in learned:
        parameter.requires_grad_()
    stage = Stage("next", speaker, speaker.later_batch, speaker.loss, NUM_STEPS, LEARNING_RATE)
    stage.evaluate, stage.evaluate_every = speaker.evaluate, 150
    seconds["dialogues"] = run_stage(stage, work, console.print)
    return seconds, speaker


def measure(folder: Path, number: int = 600, turns: int = 1) -> dict[str, object]:
    """See [`ask_validation`]; also by canvas, "rows × columns" in tiles."""

    def name_of(rows: int, columns: int) -> str:
        return f"{rows} × {columns}"

    def canvas_name(scene: Scene) -> str:
        canvas = canvas_of(scene)
        return name_of(canvas.rows, canvas.columns)

    groups = [name_of(rows, columns) for rows, columns in SHAPES_IN_TILES]
    return ask_validation(folder, draw_large_scene, SCENE_SEED + 1, number, turns, canvas_name, groups)


def main(
    work: Path = HERE / "work",
    weights: Path = HERE / "weights",
    results: Path = HERE / "results",
    note: str = "",
) -> None:
    """Trains what is not yet trained, writes the checkpoint and asks it. `note`: what the account should say."""
    for folder in (work, weights, results):
        folder.mkdir(parents=True, exist_ok=True)
    seconds, speaker = train(work)
    checkpoint = weights / "tiny-llava-next"
    speaker.eval()
    with torch.no_grad(), fast_autocast():
        found = speaker.evaluate()
    write_checkpoint(speaker.model, checkpoint)
    account = {
        **begin_account("python -m foveate.lab.next", SEED, note),
        "tiles": {"minutes": round(seconds["tiles"] / 60, 1), "steps": TILES_STEPS},
        "next": {
            "minutes": round(seconds["dialogues"] / 60, 1),
            "steps": NUM_STEPS,
            "images": NUM_STEPS * BATCH_SIZE,
            **{key: round(value, 4) for key, value in found.items()},
        },
        "validation": {"questions": measure(checkpoint), "dialogues": measure(checkpoint, 200, turns=3)},
    }
    write_account(account, results / "training-next.json")
    console.print(account)


if __name__ == "__main__":
    typer.run(main)
