"""How many of foveate's files a reader meets on the way of one call: those in which a function runs while the processor
prepares one question about one picture, and those while the model answers it.

    python -m benchmarks.files_visited
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import foveate


BASES = {"llava": "lab:tiny-llava", "llava_next": "lab:tiny-llava-next", "qwen3_vl": "lab:tiny-qwen3vl"}
PAIRS = (
    ("qg-vtc", "llava"),
    ("qg-vtc", "llava_next"),
    ("metacompress", "llava"),
    ("metacompress", "llava_next"),
    ("sample", "llava"),
    ("sample", "qwen3_vl"),
    ("meteor", "llava"),
    ("recoverable", "llava"),
    ("etc", "llava"),
    ("etc", "qwen3_vl"),
)
FOLDERS = ("configuration", "modeling", "processing")


def files_visited(call: Callable[[], Any]) -> tuple[set[str], Any]:
    """Files of the package in which a function runs during a call, and what the call returns."""
    found: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(folder in path.parts for folder in FOLDERS) and "site-packages" not in path.parts:
            found.add("/".join(path.parts[-2:]))

    sys.setprofile(note)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return found, result


def visit(method: str, backbone: str) -> tuple[set[str], set[str]]:
    """Files of one processor's call, and of one model's."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_visual_tokens": 1} if method == "etc" else None
        checkpoint = foveate.convert(BASES[backbone], Path(folder) / "checkpoint", method, settings=settings)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What color is the square?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.new("RGB", (200, 140), "red")
    of_processor, inputs = files_visited(lambda: processor(images=image, text=prompt, return_tensors="pt"))
    with torch.no_grad():
        of_model, _ = files_visited(lambda: model(**inputs))
    return of_processor, of_model


def main() -> None:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"{'method':14}{'backbone':12}{'processor':>10}{'model':>7}  the model's")
    for method, backbone in PAIRS:
        of_processor, of_model = visit(method, backbone)
        row = f"{method:14}{backbone:12}{len(of_processor):10}{len(of_model):7}"
        print(f"{row}  {' '.join(sorted(of_model))}")


if __name__ == "__main__":
    main()
