"""Pictures of compression matrices, as in MetaCompress's Figures 6 and 7: `python -m foveate.lab.matrices CKPT …`.

A row a checkpoint, a column a test scene: reduced tokens downwards, the tokens of the image's sequence to the right,
the darker the more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import FoveateError
from ..evaluation.harness import open_checkpoint
from .large_scenes import draw_large_scene
from .scenes import draw_scene, sample_scene


@torch.inference_mode()
def matrices_of(checkpoint: str | Path, scenes: list[int], seed: int = 0) -> list[torch.Tensor]:
    """P, (m, n), for test scenes. Raises `FoveateError` for a checkpoint that has no such matrix."""
    opened = open_checkpoint(checkpoint, dtype="float32")
    compressor = getattr(opened.model.model, "compressor", None)
    if compressor is None:
        raise FoveateError(f"{checkpoint} makes no compression matrices: name a checkpoint of metacompress.")
    is_next = opened.model.config.model_type.startswith("llava_next")
    found: list[torch.Tensor] = []
    hook = compressor.register_forward_hook(lambda _, __, output: found.append(output[1][0]))
    for index in scenes:
        scene = sample_scene("test", index, seed=seed)
        picture = draw_large_scene(scene) if is_next else draw_scene(scene)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is where?"}]}]
        opened.model(**opened.encode([chat], [picture]), logits_to_keep=1)
    hook.remove()
    return found


def draw(rows: dict[str, list[torch.Tensor]], path: Path) -> None:
    """Writes a PNG of the matrices, a row a name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = max(len(matrices) for matrices in rows.values())
    heights = [max(0.9, 9 * len(matrices[0]) / matrices[0].shape[1]) for matrices in rows.values()]
    figure, axes = plt.subplots(
        len(rows), across, figsize=(4.2 * across, sum(heights) + 0.9 * len(rows)), squeeze=False,
        layout="constrained", gridspec_kw={"height_ratios": heights}, dpi=130,
    )  # fmt: skip
    for (name, matrices), of_row in zip(rows.items(), axes):
        for place, (matrix, panel) in enumerate(zip(matrices, of_row)):
            _show(panel, matrix, name if place == 0 else "")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _show(panel: Any, matrix: torch.Tensor, title: str) -> None:
    panel.imshow(matrix, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    panel.set_title(title, loc="left", fontsize=9)
    panel.set(xlabel="token of the sequence", ylabel="reduced token")


def main(
    checkpoints: list[str],
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("matrices.png"),
    scenes: Annotated[str, typer.Option(help="Test scenes, by number.")] = "7,8",
) -> None:
    """Draws the compression matrices of checkpoints."""
    numbers = [int(number) for number in scenes.split(",")]
    draw({Path(name).name.removeprefix("lab:"): matrices_of(name, numbers) for name in checkpoints}, out)
    print(f"Picture: {out}")


if __name__ == "__main__":
    typer.run(main)
