"""What a training of the lab says of itself at its end: answers on validation scenes, and the file of its account."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.lab.scenes import QUESTION_TYPES, Scene, ask_questions, sample_scene
from foveate.modeling.core.precision import dtype_name, fast_dtype


@torch.inference_mode()
def ask_validation(
    folder: Path,
    draw: Callable[[Scene], Image.Image],
    seed: int,
    number: int,
    turns: int = 1,
    group_of: Callable[[Scene], str] | None = None,
    groups: Iterable[str] = (),
    batch_size: int = 20,
) -> dict[str, object]:
    """Asks a checkpoint about validation scenes as any user would: through its processor, chat template and `generate`,
    later turns after its own answers.

    Args:
        folder: of the checkpoint.
        draw: a scene's picture.
        seed: of the scenes.
        number: of scenes.
        turns: of a dialogue about one scene.
        group_of: a further group of a scene, one of `groups`.
        batch_size: scenes asked together.

    Returns:
        Exact match of all questions, by type, by group and by turn, each with its number.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right: dict[str, list[bool]] = {}
    for start in track(range(0, number, batch_size), description=f"{turns}-turn validation"):
        indices = range(start, min(start + batch_size, number))
        scenes = [sample_scene("validation", index, seed) for index in indices]
        questions = [
            ask_questions(scene, [QUESTION_TYPES[(index + turn) % len(QUESTION_TYPES)] for turn in range(turns)])
            for index, scene in zip(indices, scenes)
        ]
        images = [draw(scene) for scene in scenes]
        talks: list[list[dict]] = [[] for _ in scenes]
        for turn in range(turns):
            for talk, asked in zip(talks, questions):
                picture = [{"type": "image"}] if turn == 0 else []
                talk.append({"role": "user", "content": [*picture, {"type": "text", "text": asked[turn].question}]})
            prompts = processor.apply_chat_template(talks, add_generation_prompt=True)
            inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
            output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
            answers = [answer.strip() for answer in processor.batch_decode(output, skip_special_tokens=True)]
            for scene, talk, asked, answer in zip(scenes, talks, questions, answers):
                talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
                of_scene = [group_of(scene)] if group_of else []
                for group in ("all", asked[turn].type, *of_scene, f"turn {turn + 1}"):
                    right.setdefault(group, []).append(answer == asked[turn].answer)
    shown = ["all", *QUESTION_TYPES, *groups, *([f"turn {turn + 1}" for turn in range(turns)] if turns > 1 else [])]
    return {group: {"value": round(float(np.mean(right[group])), 4), "n": len(right[group])} for group in shown}


def begin_account(command: str, seed: int, note: str) -> dict[str, object]:
    """What every account begins with: what ran, on what. `note`: what it should say of this run, if anything."""
    return {
        "command": command,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(fast_dtype("cpu")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **({"note": note} if note else {}),
    }


def write_account(account: dict[str, object], path: Path) -> None:
    """Writes it as JSON, whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(account, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)
