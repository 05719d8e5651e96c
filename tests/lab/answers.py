"""What the lab's checkpoints answer, with how sure they are: `python -m tests.lab.answers` prints it as JSON.

`tests/data/lab_answers.json` was written so with the code of commit e3b98f2, before the classes were made from a method
and a backbone. It is written anew only where an answer is meant to change.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import torch

from foveate import __version__, convert
from foveate.evaluation.harness import open_checkpoint, visual_tokens_kept
from foveate.lab.large_scenes import draw_large_scene, draw_sliced_scene
from foveate.lab.scenes import QUESTION_TYPES, ask_questions, draw_scene, sample_scene
from foveate.modeling.compatibility import cache_of


NUM_QUESTIONS, MAX_NEW_TOKENS, SEED = 24, 8, 0

SHIPPED = {
    "lab:tiny-llava": draw_scene,
    "lab:tiny-llava-next": draw_large_scene,
    "lab:tiny-qwen3vl": draw_scene,
    **{f"lab:tiny-llava-qg-vtc-{kept}": draw_scene for kept in (72, 36, 18)},
    **{f"lab:tiny-llava-metacompress-{left_out}": draw_scene for left_out in (50, 70, 90, 95)},
    **{f"lab:tiny-llava-meteor-{kept}": draw_sliced_scene for kept in (36, 16, 8)},
}

# Methods without training, at their defaults. Random pruning is left out: its draws are not to be kept.
CONVERTED = [
    ("lab:tiny-llava", "recoverable"),
    *[(base, method) for base in list(SHIPPED)[:3] for method in ("sample", "spatial")],
]


@torch.inference_mode()
def answer(checkpoint: str | Path, draw) -> dict[str, list]:
    """Greedy answers in float32 to questions about the lab's test scenes.

    Args:
        checkpoint: a folder, or `lab:NAME`.
        draw: what makes a picture of a scene.

    Returns:
        "answers"; "margins": of each answer the smallest distance between the two best logits of a step;
        "visual_tokens": of each question what the cache kept of its image.
    """
    opened = open_checkpoint(checkpoint, dtype="float32", device="cpu")
    scenes = [sample_scene("test", index, seed=SEED) for index in range(NUM_QUESTIONS)]
    types = [QUESTION_TYPES[index % len(QUESTION_TYPES)] for index in range(NUM_QUESTIONS)]
    asked = [ask_questions(scene, [wanted])[0].question for scene, wanted in zip(scenes, types)]
    talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in asked]
    inputs = opened.encode(talks, [draw(scene) for scene in scenes])
    output = opened.model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=opened.processor.tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits).topk(2).values
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    after_end = (new == opened.processor.tokenizer.pad_token_id).T  # nothing is decided there
    margins = (best[..., 0] - best[..., 1]).masked_fill(after_end, torch.inf).amin(dim=0)
    kept = visual_tokens_kept(cache_of(output), inputs["input_ids"] == opened.model.config.image_token_id)
    return {
        "answers": opened.decode(output.sequences, inputs["input_ids"].shape[1]),
        "margins": [round(margin, 4) for margin in margins.tolist()],
        "visual_tokens": kept.tolist(),
    }


def answer_converted(base: str, method: str, folder: Path) -> dict[str, list]:
    """What a base answers once a method without training was put on it."""
    return answer(convert(base, folder / "checkpoint", method=method), SHIPPED[base])


def main() -> None:
    found = {name: answer(name, draw) for name, draw in SHIPPED.items()}
    for base, method in CONVERTED:
        with tempfile.TemporaryDirectory() as folder:
            found[f"{method} on {base}"] = answer_converted(base, method, Path(folder))
    written_by = {"foveate": __version__, "torch": torch.__version__, "machine": platform.machine(), "seed": SEED}
    lines = [f"  {json.dumps(name)}: {json.dumps(content)}" for name, content in found.items()]
    print(f'{{\n "written_by": {json.dumps(written_by)},\n "answers": {{')
    print(",\n".join(lines) + "\n }\n}")


if __name__ == "__main__":
    main()
