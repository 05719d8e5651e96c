"""What the training tests share: a tiny checkpoint to train, and a file in LLaVA's format with its images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import convert

from ..helpers.tiny_checkpoints import write_clip, write_llava


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random LLaVA converted to QG-VTC, float32."""
    folder = tmp_path_factory.mktemp("tiny")
    base = write_llava(folder / "llava", dtype=torch.float32)
    budget = {"num_visual_tokens": 4}  # of 9; with one token left there is nothing to weigh against it
    return convert(base, folder / "qgvtc", method="qg-vtc", text_encoder=write_clip(folder / "clip"), settings=budget)


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Eight samples as in `llava_v1_5_mix665k.json`: dialogues of one to three questions, one of them without image."""
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "coco" / "train2017").mkdir(parents=True)
    questions = ["what colour is it", "is it red", "what is it"]
    samples = []
    for index in range(8):
        image = f"coco/train2017/{index:012d}.jpg"
        pixels = np.random.default_rng(index).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image)
        turns = []
        for turn in range(1 + index % 3):
            asked = questions[(index + turn) % 3]
            asked = f"<image>\n{asked}" if turn == 0 and index % 2 else f"{asked}\n<image>" if turn == 0 else asked
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": "it is red" if turn else "red"}]
        samples.append({"id": f"{index:012d}", "image": image, "conversations": turns})
    text = [{"from": "human", "value": "what is red"}, {"from": "gpt", "value": "it is it"}]
    samples.insert(3, {"id": "wgByO4Y_0", "model": "", "conversations": text})
    path = folder / "llava_v1_5_mix665k.json"
    path.write_text(json.dumps(samples))
    return path
