"""`foveate demo`: a checkpoint is converted, and asked by a process without foveate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from foveate.conversion.checkpoints import declared_dtype, read_shards
from foveate.conversion.convert import convert
from foveate.evaluation.ask import ask, draw_picture, open_image
from foveate.modeling.core.precision import dtype_name, fast_dtype


SCENE = "lab:7"

#: Runs without foveate: only Transformers and the checkpoint's own code. Nothing is printed but the answers.
STRANGER = """
import importlib.abc, logging, sys, warnings

class NoFoveate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "foveate":
            raise ModuleNotFoundError("this process has no foveate", name=name)

sys.meta_path.insert(0, NoFoveate())
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
folder, picture, dtype, *questions = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.open(picture)
for question in questions:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    counts = len(model(**inputs, output_compression=True).compression[0].weights)
    tokens = f"{counts} of {model.config.num_patches} visual tokens"
    print(f"  AutoModelForImageTextToText  {question}  ->  {answer}   ({tokens})")
ask = pipeline("image-text-to-text", model=model, processor=processor)
for question in questions:
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    answer = ask(text=chat, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"].strip()
    print(f"  pipeline                     {question}  ->  {answer}")
assert "foveate" not in sys.modules
"""


def run_demo(folder: Path, picture: Path | None = None, question: str | None = None) -> None:
    """Converts the lab model into `folder`/checkpoint, asks about a picture and leaves the picture of what was kept.

    Args:
        folder: is made if it isn't there; what an earlier demo left is replaced.
        picture: what to ask about; a scene of the lab, which is drawn into `folder`, if `None`.
        question: what to ask about `picture`.

    Raises:
        FoveateError: a picture that can't be read.
    """
    if picture is not None:
        open_image(picture)
    folder.mkdir(parents=True, exist_ok=True)
    if picture is None:
        scene = draw_picture(SCENE)
        assert scene is not None, "the lab is part of foveate"
        picture = folder / "scene.png"
        scene.image.save(picture)
        questions = list(scene.questions)
        print(f"Drew {picture}: {scene.caption}.")
    else:
        questions = [question or "What is in the picture?"]
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    convert("lab:tiny-llava", checkpoint, method="recoverable")
    # A process without foveate can't ask what its processor computes fast in, so it is told.
    dtype = dtype_name(fast_dtype("cpu", declared_dtype(checkpoint, read_shards(checkpoint))))
    print(f"Converted lab:tiny-llava to {checkpoint}. Asked in {dtype} by a process without foveate:", flush=True)
    environment = {**os.environ, "HF_HOME": str(folder.absolute() / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(checkpoint), str(picture), dtype, *questions]
    subprocess.run(command, check=True, env=environment)
    answer = ask(checkpoint, picture, questions[0], compare="lab:tiny-llava", show=folder / "kept.png")
    print(
        f"Visual tokens {answer.visual_tokens_before} -> {answer.visual_tokens_after}; what was kept, recovered and "
        f"merged is drawn in {folder / 'kept.png'}."
    )
