"""Where the patches lie that a compressed model keeps: `python -m foveate.lab.kept CKPT …`.

Of the patches that the tokens of an image were, the share in the grid cell of the object that is asked about, and the
share in a cell with any object; over test scenes and the questions that are about one object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from foveate.evaluation.harness import open_checkpoint, write_json
from foveate.lab.scenes import GRID, PLACES, QUESTION_TYPES, ask_questions, draw_scene, sample_scene


@torch.inference_mode()
def measure(checkpoint: str | Path, number: int = 400, seed: int = 0, batch_size: int = 50) -> dict[str, Any]:
    """Shares of kept patches, each a mean over images: `asked` (in the cell of the object asked about; a ninth by
    chance), `objects` (in a cell with an object) and `objects_by_chance` (the share of cells that have one); and `n`.

    Args:
        checkpoint: a folder or `lab:NAME`, of a method whose tokens each have a patch of their own.
        number, seed: of test scenes.
    """
    opened = open_checkpoint(checkpoint, dtype="float32")
    examples = []
    for index in range(number):
        scene = sample_scene("test", index, seed=seed)
        found = ask_questions(scene, [QUESTION_TYPES[index % len(QUESTION_TYPES)]])
        if found and found[0].about is not None:
            examples.append((scene, found[0]))
    shares = []
    for start in track(range(0, len(examples), batch_size), description=str(checkpoint)):
        batch = examples[start : start + batch_size]
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.question}]}]
            for _, asked in batch
        ]
        inputs = opened.encode(turns, [draw_scene(scene) for scene, _ in batch])
        output = opened.model(**inputs, output_compression=True, logits_to_keep=1)
        shares += [_shares(image.weights.argmax(1), *example) for image, example in zip(output.compression, batch)]
    asked, objects, by_chance = torch.tensor(shares).mean(0).tolist()
    return {"asked": asked, "objects": objects, "objects_by_chance": by_chance, "n": len(shares), "seed": seed}


def _shares(patches: torch.Tensor, scene: Any, asked: Any) -> tuple[float, float, float]:
    side = 12 // GRID
    cells = patches // 12 // side * GRID + patches % 12 // side
    occupied = torch.tensor([PLACES.index(thing.place) for thing in scene.objects])
    on_asked = (cells == PLACES.index(asked.about.place)).float().mean()
    return float(on_asked), float(torch.isin(cells, occupied).float().mean()), len(occupied) / GRID**2


def main(
    checkpoints: list[str], json_file: Annotated[Path | None, typer.Option("--json")] = None, limit: int = 400
) -> None:
    """Prints the shares for each checkpoint, and writes them into a file for the results' page."""
    found = {Path(name).name.removeprefix("lab:"): measure(name, limit) for name in checkpoints}
    for name, shares in found.items():
        Console(soft_wrap=True).print(name, {key: round(value, 3) for key, value in shares.items()})
    if json_file:
        command = f"python -m foveate.lab.kept {' '.join(checkpoints)} --json {json_file}"
        write_json({"command": command, **found}, json_file)


if __name__ == "__main__":
    typer.run(main)
