"""A compression matrix for one image and dialogue: `python -m foveate.lab.fixed_matrix CKPT` (Section 4,
Algorithm 2 of MetaCompress).

A research tool: what would a matrix keep that is free to choose, for nothing but this picture and what is asked of it?
P = softmax(P_raw) trains by the same loss as MetaCompress, without its last term.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from foveate.errors import FoveateError
from foveate.evaluation.harness import open_checkpoint
from foveate.evaluation.picture import draw_compression, seen_image
from foveate.modeling.compatibility import image_features_output
from foveate.modeling.core.exact import SequenceModelMixin
from foveate.modeling.core.outputs import TokenProvenance
from foveate.modeling.core.precision import dtype_name
from foveate.modeling.layers.tiles import tile_grid_of
from foveate.training.data import Collator, Example, open_data
from foveate.training.distillation import (
    answer_logits,
    entropy_loss,
    expand_placeholders,
    prediction_loss,
    uncompressed,
)
from foveate.training.recipe import make_stage


STEPS, LEARNING_RATE, STANDARD_DEVIATION = 500, 10.0, 0.1  # Section 8.1


@dataclass(frozen=True)
class FixedMatrix:
    """What training a matrix gave.

    Attributes:
        matrix: P, (m, n) float32.
        prediction, entropy: the loss's terms at every step.
        provenance: the same over the image's patches.
    """

    matrix: torch.Tensor
    prediction: list[float]
    entropy: list[float]
    provenance: TokenProvenance


def fit_matrix(
    model: Any,
    processor: Any,
    example: Example,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    entropy: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> FixedMatrix:
    """Trains the matrix of an image.

    Args:
        model, processor: a checkpoint of MetaCompress or of one of its baselines; its budget says how many tokens are
            kept, its own compressor has no part in it.
        example: one image and a dialogue about it.
        steps, learning_rate: of SGD.
        entropy: weight of the rows' mean entropy (α in Eq. 5).
        seed: of P_raw.
        progress: whether to show a bar.

    Raises:
        FoveateError: a model that compresses elsewhere, an example that has not just one image.
    """
    if not isinstance(getattr(model, "model", None), SequenceModelMixin):
        raise FoveateError(
            "A matrix over the whole sequence needs a checkpoint of metacompress, random, sample or spatial."
        )
    if len(example.images) != 1:
        raise FoveateError(f"{example.name} has {len(example.images)} images: a matrix is made for one.")
    batch = {name: value.to(model.device) for name, value in Collator(processor, max_length=1 << 20)([example]).items()}
    text = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "labels")}
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    whole = expand_placeholders(model, text, batch)
    with torch.no_grad(), uncompressed(model):
        teacher, sequence = answer_logits(model, whole, batch)
    number = int(model.count_placeholders(batch).sum())
    raw = torch.randn(number, len(sequence), generator=torch.Generator().manual_seed(seed)) * STANDARD_DEVIATION
    raw = raw.to(model.device).requires_grad_()
    optimizer = torch.optim.SGD([raw], lr=learning_rate)
    found: dict[str, list[float]] = {"prediction": [], "entropy": []}
    model.requires_grad_(False)
    for _ in track(range(steps), "matrix", console=Console(stderr=True), disable=not progress):
        matrix = raw.softmax(-1)
        tokens = image_features_output([matrix.to(sequence.dtype) @ sequence])
        student, _ = answer_logits(model, text, {"mm_encoder_outputs": {"image": tokens}})
        terms = {"prediction": prediction_loss(teacher, student), "entropy": entropy_loss([matrix[None]])}
        optimizer.zero_grad()
        (terms["prediction"] + entropy * terms["entropy"]).backward()
        optimizer.step()
        for name, term in terms.items():
            found[name].append(float(term.detach()))
    matrix = raw.detach().softmax(-1)
    (weights,) = model.model.patches_of([matrix], batch)
    roles = torch.full((number,), SequenceModelMixin.role_names.index("kept"))
    return FixedMatrix(matrix, provenance=TokenProvenance(weights, roles, SequenceModelMixin.role_names), **found)


def retained(provenance: TokenProvenance) -> TokenProvenance:
    """Every token as the patch that it holds most of, for a picture of what was retained."""
    strongest = torch.zeros_like(provenance.weights)
    made_of_patches = provenance.weights.sum(1) > 0
    strongest[made_of_patches, provenance.weights.argmax(1)[made_of_patches]] = 1
    return TokenProvenance(strongest, provenance.roles, provenance.role_names)


def main(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Of metacompress, random, sample or spatial.")],
    data: Annotated[str, typer.Option(metavar="JSON", help="File in LLaVA's format, lab or lab-next.")] = "lab",
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the file's image paths begin.")] = None,
    sample: Annotated[int, typer.Option(help="Which dialogue of the data.")] = 0,
    keep_ratio: Annotated[float | None, typer.Option(help="The checkpoint's own budget, if not said.")] = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    entropy: Annotated[float, typer.Option(help="Weight of the rows' entropy.")] = 1.0,
    seed: int = 0,
    show: Annotated[Path | None, typer.Option(metavar="PNG", help="Picture of the retained tokens.")] = None,
) -> None:
    """Trains a compression matrix for one image and dialogue."""
    stage = {"title": "one image", "learning_rate": {"matrix": learning_rate}, "batch_size": 1, "dialogues": True}
    examples = open_data(make_stage({**stage, "data": data, "images": images and str(images)}, {}, "options"))
    if not 0 <= sample < len(examples):
        raise FoveateError(f"There is no dialogue {sample}: {data} has {len(examples)}.")
    example = examples[sample]
    opened = open_checkpoint(checkpoint, {"keep_ratio": keep_ratio} if keep_ratio is not None else None)
    print(f"{dtype_name(opened.model.dtype)} on {opened.model.device.type}")
    fitted = fit_matrix(opened.model, opened.processor, example, steps, learning_rate, entropy, seed)
    for step in sorted({0, steps // 4, steps // 2, steps - 1}):
        print(f"step {step}: KL {fitted.prediction[step]:.4f}, entropy {fitted.entropy[step]:.4f}")
    if show is not None:
        picture = _picture(opened, example, fitted)
        picture.save(show)
        print(f"Picture: {show}")


def _picture(opened: Any, example: Example, fitted: FixedMatrix) -> Image.Image:
    config, processor = opened.model.config, opened.processor
    seen = processor.image_processor(example.images[0], return_tensors="pt")
    grid = tile_grid_of(config, seen["image_sizes"][0].tolist()) if "image_sizes" in seen else None
    shown = seen_image(seen["pixel_values"], processor.image_processor, config.vision_config.patch_size, grid)
    asked = [(example.question, example.answer), *example.later]
    questions, answers = (" / ".join(texts) for texts in zip(*asked))
    return draw_compression(shown, retained(fitted.provenance), questions, answers)


if __name__ == "__main__":
    typer.run(main)
