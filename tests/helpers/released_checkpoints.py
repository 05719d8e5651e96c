"""Tiny checkpoints as foveate 0.1.0 wrote them at commit 4b9f1e1, of every method on every backbone that it had.

`tests/data/checkpoints-0.1.0` has what that version wrote but for weights. Weights are made here, of the names and
shapes in `weights.json`: each value follows from its tensor's name by a hash, so that every version of torch and numpy
makes the same files, whose hashes the checkpoints' own lists have. `pairs/` has what differs from checkpoint to
checkpoint; all else is shared, and found by its hash.

`answers.json` has what their own code, that version's, answers on Transformers 4.57.6 and on 5.19.0. The two agree but
for `random`, whose choice hangs on every bit of the pixels: image processors of 4 and 5 differ in the last of them.

To make them again, with that commit's code (`git worktree add OLD 4b9f1e1; pip install -e 'OLD[test]'`):
`python -P tests/helpers/released_checkpoints.py OLD` on Transformers 5.19.0; then without OLD, on each of the two.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file


DATA = Path(__file__).parents[1] / "data" / "checkpoints-0.1.0"
SOURCE = Path(__file__)
PAIRS = sorted(folder.name for folder in (DATA / "pairs").glob("*"))
ANSWERS = DATA / "answers.json"
MANIFEST_FILE, CARD_FILE, WEIGHTS = "foveate_manifest.json", "README.md", ".safetensors"

#: What is asked, with `<image>` in the processor's own words, and the sides of the images: those of whole patches, for
#: versions differ in how they resize.
QUESTIONS = {
    "one image": ("USER: <image> what is it ASSISTANT:", [(84, 84)]),
    "two images": ("USER: <image> <image> what colour is it ASSISTANT:", [(84, 42), (56, 84)]),
}
NUM_NEW_TOKENS = 8


def picture(size: tuple[int, int]) -> Image.Image:
    """Smooth waves, which look the same however they are resized."""
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [across, down, (across + down) / 2]
    channels = [128 + 120 * np.sin(2 * math.pi * wave + phase) for phase, wave in enumerate(waves)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Values of a tensor, float32: of a scale at which activations neither vanish nor grow; norms' weights about 1."""
    number = math.prod(shape)
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * number), dtype="<u2").astype(np.float32)
    uniform = (bits / np.float32(65535) - np.float32(0.5)).reshape(shape)
    if len(shape) == 1:
        return uniform * np.float32(0.2) + np.float32("norm" in name and name.endswith("weight"))
    return uniform * np.float32(math.sqrt(12 / math.prod(shape[1:])))


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    tensors = {name: make_tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def assemble(pair: str, folder: Path) -> Path:
    """Writes a checkpoint as 0.1.0 wrote it, checked against its own list of files."""
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in DATA.rglob("*") if path.is_file()}
    weights = json.loads((DATA / "weights.json").read_text())
    manifest = json.loads((DATA / "pairs" / pair / MANIFEST_FILE).read_text())
    folder.mkdir(parents=True)
    for name in (MANIFEST_FILE, CARD_FILE):
        shutil.copyfile(DATA / "pairs" / pair / name, folder / name)
    for name, entry in manifest["files"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(WEIGHTS):
            write_weights(folder / name, weights[entry["sha256"]])
        else:
            shutil.copyfile(files[entry["sha256"]], folder / name)
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
    return folder


def answers_of(folder: Path) -> dict[str, dict[str, list]]:
    """What a checkpoint's own code answers, question by question: the ids that it generates, and logits of the first of
    them, which say more than ids."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    limits = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    image = processor.image_token
    if image != "<image>":
        image = f"<|vision_start|>{image}<|vision_end|>"
    answers = {}
    for question, (prompt, sizes) in QUESTIONS.items():
        images, text = [picture(size) for size in sizes], prompt.replace("<image>", image)
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, :8]
        ids = model.generate(**inputs, **limits)
        answers[question] = {
            "ids": ids[0, inputs["input_ids"].shape[1] :].tolist(),
            "logits": [round(value, 4) for value in logits.tolist()],
        }
    return answers


# Making them


def make(old: str) -> None:
    """With the package of that commit installed; its tests' bases and settings are taken from the folder `old`."""
    sys.path.append(old)
    import torch
    from safetensors import safe_open

    from foveate import __version__, convert
    from foveate.hub_cards.manifest import write_manifest
    from tests.conftest import CLASSES, SETTINGS, TINY_BASES

    assert __version__ == "0.1.0"
    shutil.rmtree(DATA, ignore_errors=True)
    shapes_of: dict[str, dict[str, list[int]]] = {}

    def refill(folder: Path) -> None:
        """Weights of the same names and shapes that can be made again."""
        for path in sorted(folder.glob(f"*{WEIGHTS}")):
            with safe_open(path, "pt") as file:
                names = sorted(file.keys())
                assert {file.get_tensor(name).dtype for name in names} <= {torch.float32}
                shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
            write_weights(path, shapes)
            shapes_of[hashlib.sha256(path.read_bytes()).hexdigest()] = shapes

    def name_rope_as_published(path: Path) -> None:
        """In the words of 4.57, which every version reads, as published configs are."""
        config = json.loads(path.read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        if "mrope_section" in rope:
            config["text_config"]["rope_scaling"] = rope
        path.write_text(json.dumps(config, indent=2))

    with tempfile.TemporaryDirectory() as scratch:
        place, holders = Path(scratch), defaultdict(list)
        for method, backbone in CLASSES:
            pair = f"{method.name}-{backbone.base_model_type}"
            base, clip = place / "bases" / backbone.base_model_type, place / "bases" / "clip"
            write_base, write_clip = TINY_BASES[backbone.base_model_type]
            if not base.exists():
                write_base(base, dtype=torch.float32)
                name_rope_as_published(base / "config.json")
            if not clip.exists() and method.reads_question:
                write_clip(clip)
            text_encoder = clip if method.reads_question else None
            folder = convert(base, place / pair, method.name, text_encoder, SETTINGS.get(method.name))
            refill(folder)
            write_manifest(folder, base.name)
            for path in folder.rglob("*"):
                if path.is_file() and path.suffix != WEIGHTS:
                    holders[path.read_bytes()].append(path.relative_to(place))
        for content, paths in holders.items():
            name = Path(*paths[0].parts[1:])
            if name.name in (MANIFEST_FILE, CARD_FILE) or len(paths) == 1:
                targets = [DATA / "pairs" / path for path in paths]
            else:
                kind = "code" if name.suffix == ".py" else "shared"
                targets = [DATA / kind / name]
                if targets[0].exists():  # another file of that name
                    targets = [DATA / kind / paths[0].parts[0] / name]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    used = {
        entry["sha256"]
        for path in DATA.glob(f"pairs/*/{MANIFEST_FILE}")
        for name, entry in json.loads(path.read_text())["files"].items()
        if name.endswith(WEIGHTS)
    }
    rows = [f'"{key}": {json.dumps(shapes_of[key])}' for key in sorted(used)]
    (DATA / "weights.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


def record() -> None:
    """Writes what the checkpoints' own code answers on the Transformers that is installed."""
    import transformers

    major = transformers.__version__.partition(".")[0]
    with tempfile.TemporaryDirectory() as scratch:
        found = {pair: answers_of(assemble(pair, Path(scratch) / pair)) for pair in PAIRS}
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    answers[major] = found
    rows = [
        f'"{version}": {{\n' + ",\n".join(f'"{pair}": {json.dumps(of[pair])}' for pair in sorted(of)) + "\n}"
        for version, of in sorted(answers.items())
    ]
    ANSWERS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    make(sys.argv[1]) if len(sys.argv) > 1 else record()
