"""Trains the lab model: `make lab`, or `python -m foveate.lab.train`.

Four stages, each resumable at any step (`lab/work/` holds their state): the vision tower learns to see (`tower.py`),
the text tower is aligned with it (`alignment.py`), the language model learns to look things up (9 tokens a picture),
then to answer from all 144 (`language.py`). The result goes to `lab/weights/` as two ordinary checkpoints, and the
numbers of the training to `lab/results/training.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from foveate.lab.alignment import Alignment, alignment_batch, clip_tokenizer
from foveate.lab.language import Speaker, cache_features, language_batch, language_tokenizer, text_config
from foveate.lab.scenes import IMAGE_SIZE, PATCH_SIZE
from foveate.lab.stages import Stage, fast_autocast, run_stage
from foveate.lab.tower import Tower, tower_batch, vision_config
from foveate.lab.validation import begin_account, write_account
from foveate.lab.vocabulary import CHAT_TEMPLATE, save_tokenizer


SEED = 0
HERE = Path(__file__).resolve().parent
console = Console()


def make_stages(folder: Path):
    """Runs the four stages in order and yields (name, seconds of training, module, steps)."""
    torch.manual_seed(SEED)
    tower = Tower()
    seconds = _run("tower", tower, tower_batch, tower.loss, 1600, 2e-3, folder, tower.evaluate)
    yield "tower", seconds, tower

    torch.manual_seed(SEED + 1)
    alignment = Alignment(tower)
    seconds = _run("alignment", alignment, alignment_batch, alignment.loss, 240, 1e-3, folder, alignment.evaluate)
    yield "alignment", seconds, alignment

    features = cache_features(tower, folder, console.print)
    torch.manual_seed(SEED + 2)
    lookup = Speaker(features, pooled=True)
    seconds = _run("lookup", lookup, lookup_batch, lookup.loss, LOOKUP_STEPS, LOOKUP_RATE, folder, lookup.evaluate)
    yield "lookup", seconds, lookup

    speaker = Speaker(features, pooled=False)
    speaker.load_state_dict(lookup.state_dict())
    seconds = _run("language", speaker, speaker_batch, speaker.loss, SPEAK_STEPS, SPEAK_RATE, folder, speaker.evaluate)
    yield "language", seconds, speaker


LOOKUP_STEPS, LOOKUP_RATE = 3000, 2e-3
SPEAK_STEPS, SPEAK_RATE = 2700, 2e-3


def lookup_batch(step: int) -> dict:
    return language_batch(step, batch_size=24, turns=5, described=True)


def speaker_batch(step: int) -> dict:
    described = step % 4 == 0
    return language_batch(step, batch_size=24, turns=5 if described else 9, described=described, first_epoch=100)


def _run(name, module, batches, loss, num_steps, learning_rate, folder, evaluate) -> float:
    stage = Stage(name, module, batches, loss, num_steps, learning_rate, evaluate=evaluate, evaluate_every=200)
    return run_stage(stage, folder, console.print)


def write_checkpoints(tower_and_text: Alignment, speaker: Speaker, folder: Path) -> None:
    """Writes `tiny-llava` and `tiny-clip` in bf16, as published checkpoints are named."""
    clip = tower_and_text.clip
    tokenizer, questions = language_tokenizer(), clip_tokenizer()
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    config = LlavaConfig(
        vision_config=vision_config().to_dict(),
        text_config=text_config().to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    vision = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    vision.load_state_dict(getattr(clip.vision_model, "vision_model", clip.vision_model).state_dict())
    model.model.multi_modal_projector.load_state_dict(speaker.multi_modal_projector.state_dict())
    model.model.language_model.load_state_dict(speaker.language_model.model.state_dict())
    model.lm_head.load_state_dict(speaker.language_model.lm_head.state_dict())
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    llava = folder / "tiny-llava"
    model.to(dtype=torch.bfloat16).save_pretrained(llava)  # type: ignore[call-arg]
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(llava)
    image_processor.save_pretrained(llava)  # where 4.57 looks for it
    save_tokenizer(tokenizer, llava)
    _publish(llava, "vision_tower.", "vision_tower.vision_model.")

    clip_folder = folder / "tiny-clip"
    clip.to(torch.bfloat16).save_pretrained(clip_folder)
    image_processor.save_pretrained(clip_folder)
    save_tokenizer(questions, clip_folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _publish(folder: Path, prefix: str, published: str) -> None:
    """Names tensors as published checkpoints do, which every version reads (5.x leaves `vision_model.` out)."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    tensors = {
        published + key.removeprefix(prefix) if key.startswith(prefix) and not key.startswith(published) else key: value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].setdefault("rope_theta", 10000.0)  # 5.x writes it in a block that 4.57 does not read
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(
    work: Path = HERE / "work",
    weights: Path = HERE / "weights",
    results: Path = HERE / "results",
    note: str = "",
) -> None:
    """Trains what is not yet trained and writes the checkpoints. `note`: what the account should say of this run."""
    for folder in (work, weights, results):
        folder.mkdir(parents=True, exist_ok=True)
    account = begin_account("make lab", SEED, note)
    modules = {}
    for name, seconds, module in make_stages(work):
        modules[name] = module
        module.eval()
        with torch.no_grad(), fast_autocast():
            found = module.evaluate()
            if name == "alignment":
                found |= {f"test_{key}": value for key, value in module.evaluate("test", 960).items()}
        account[name] = {"minutes": round(seconds / 60, 1), **{key: round(value, 4) for key, value in found.items()}}
        console.print(f"{name}: {account[name]}")
    write_checkpoints(modules["alignment"], modules["language"], weights)
    write_account(account, results / "training.json")


if __name__ == "__main__":
    typer.run(main)
