"""Compression matrices, as in MetaCompress's Figures 6 and 7, and what they are like: `python -m foveate.lab.matrices
CKPT …`.

In the picture a row is a checkpoint and a column a test scene: reduced tokens downwards, the tokens of the image's
sequence to the right, the darker the more of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from foveate.errors import FoveateError
from foveate.evaluation.harness import open_checkpoint, write_json
from foveate.lab.large_scenes import draw_large_scene
from foveate.lab.scenes import GRID, IMAGE_SIZE, PATCH_SIZE, PLACES, Scene, draw_scene, sample_scene
from foveate.training.distillation import collapse_loss, entropy_loss


SHOWN = (7, 8)  # test scenes in the picture


@torch.inference_mode()
def matrices_of(checkpoint: str | Path, scenes: Iterable[Scene]) -> Iterator[torch.Tensor]:
    """P, (m, n), for each scene. Raises `FoveateError` for a checkpoint that makes no such matrix."""
    opened = open_checkpoint(checkpoint, dtype="float32")
    compressor = getattr(opened.model.model, "compressor", None)
    if compressor is None:
        raise FoveateError(f"{checkpoint} makes no compression matrices: name a checkpoint of metacompress.")
    has_tiles = hasattr(opened.model.config, "image_grid_pinpoints")
    found: list[torch.Tensor] = []
    compressor.register_forward_hook(lambda _, __, output: found.append(output[0]))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is where?"}]}]
    for scene in scenes:
        inputs = opened.encode([chat], [draw_large_scene(scene) if has_tiles else draw_scene(scene)])
        opened.model(**inputs, logits_to_keep=1)
        yield found.pop()


def measure(checkpoint: str | Path, number: int = 400, seed: int = 0) -> dict[str, Any]:
    """What the matrices of test scenes are like, means over scenes: `entropy` of a row in nats, `collapse` (how many
    tokens hang on the one source that is used most), `distinct` (different strongest sources, a share of m) and, where
    an image is one tile, `objects` (the share of strongest sources in a cell with an object; 56 % by chance)."""
    scenes = [sample_scene("test", index, seed=seed) for index in range(number)]
    rows = []
    shown = track(matrices_of(checkpoint, scenes), str(checkpoint), number, console=Console(stderr=True))
    for scene, matrix in zip(scenes, shown):
        strongest = matrix.argmax(1)
        numbers = [float(entropy_loss([matrix[None]])), float(collapse_loss([matrix[None]]))]
        numbers.append(len(strongest.unique()) / len(strongest))
        if matrix.shape[1] == (IMAGE_SIZE // PATCH_SIZE) ** 2:
            numbers.append(_share_on_objects(strongest, scene))
        rows.append(numbers)
    means = torch.tensor(rows).mean(0).tolist()
    return dict(zip(("entropy", "collapse", "distinct", "objects"), means)) | {"n": number, "seed": seed}


def _share_on_objects(patches: torch.Tensor, scene: Scene) -> float:
    across = IMAGE_SIZE // PATCH_SIZE
    side = across // GRID
    cells = patches // across // side * GRID + patches % across // side
    occupied = torch.tensor([PLACES.index(thing.place) for thing in scene.objects])
    return float(torch.isin(cells, occupied).float().mean())


def draw(rows: dict[str, list[torch.Tensor]], path: Path) -> None:
    """Writes a PNG of the matrices, a row a name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = max(len(matrices) for matrices in rows.values())
    heights = [max(0.9, 9 * len(matrices[0]) / matrices[0].shape[1]) for matrices in rows.values()]
    figure, axes = plt.subplots(
        len(rows), across, figsize=(4.2 * across, sum(heights) + 0.9 * len(rows)), squeeze=False,
        layout="constrained", gridspec_kw={"height_ratios": heights}, dpi=100,
    )  # fmt: skip
    for (name, matrices), of_row in zip(rows.items(), axes):
        for place, (matrix, panel) in enumerate(zip(matrices, of_row)):
            panel.imshow(matrix.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_title(name if place == 0 else "", loc="left", fontsize=9)
            panel.set(xlabel="token of the sequence", ylabel="reduced token")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(
    checkpoints: list[str],
    show: Annotated[Path | None, typer.Option(metavar="PNG", help="The picture to write.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="For the results' page.")] = None,
    limit: Annotated[int, typer.Option(help="Test scenes to measure on.")] = 400,
) -> None:
    """Draws and measures the compression matrices of checkpoints."""
    if show:
        scenes = [sample_scene("test", index) for index in SHOWN]
        draw({_name(checkpoint): list(matrices_of(checkpoint, scenes)) for checkpoint in checkpoints}, show)
        print(f"Picture: {show}")
    if json_file is None:
        return
    found = {_name(checkpoint): measure(checkpoint, limit) for checkpoint in checkpoints}
    for name, numbers in found.items():
        print(name, {key: round(value, 3) for key, value in numbers.items()})
    words = ["python -m foveate.lab.matrices", *checkpoints, f"--limit {limit} --json {json_file}"]
    words += [f"--show {show}"] if show else []
    write_json({"command": " ".join(words), "matrices": found}, json_file)


def _name(checkpoint: str) -> str:
    return Path(checkpoint).name.removeprefix("lab:")


if __name__ == "__main__":
    typer.run(main)
