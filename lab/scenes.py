"""The lab's world: small pictures of digits, shapes and words on a 3 × 3 grid, and questions about them.

A scene is 168 × 168 pixels. Each of its nine cells holds at most one object: a real handwritten digit (scikit-learn's
`load_digits`, tinted), a shape or a short printed word, jittered, rotated a little and drawn over a noisy background.
Scene `i` of a split is the same scene on every machine and in every batch: all its choices come from one random
stream that is seeded by (split, seed, i). The splits share shapes, words and colours, never a handwritten digit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


IMAGE_SIZE, PATCH_SIZE, GRID = 168, 14, 3
CELL_SIZE = IMAGE_SIZE // GRID
SPRITE_SIZE = 64

COLOURS = {
    "red": (225, 45, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 50),
    "green": (50, 185, 65),
    "cyan": (60, 215, 225),
    "blue": (55, 95, 240),
    "purple": (165, 65, 215),
    "white": (245, 245, 245),
}
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
WORDS = ("cat", "dog", "sun", "map", "key", "box", "cup", "hat", "bus", "pen", "egg", "car")
NAMES = DIGITS + SHAPES + WORDS
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
QUESTION_TYPES = ("what", "colour", "where", "count", "exist", "read")
SPLITS = ("train", "validation", "test")
_DIGITS_IN_SPLIT = {"train": (0, 1400), "validation": (1400, 1500), "test": (1500, 1797)}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its name (one of `NAMES`), its colour and its place (one of `PLACES`)."""

    name: str
    colour: str
    place: str

    @property
    def kind(self) -> str:
        return "digit" if self.name in DIGITS else "shape" if self.name in SHAPES else "word"

    @property
    def noun(self) -> str:
        """How a sentence names it: "star", "digit 7", "word cat"."""
        return self.name if self.kind == "shape" else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about a scene, its exact answer (one to three words), its type and the one object it is about."""

    question: str
    answer: str
    type: str
    about: SceneObject | None = None


@dataclass(frozen=True)
class Scene:
    """The objects of scene `index` of a split, and the numbers that its drawing needs."""

    split: str
    seed: int
    index: int
    objects: tuple[SceneObject, ...]
    sprites: tuple[int, ...]

    @property
    def caption(self) -> str:
        return ", ".join(f"{o.colour} {o.noun} at the {o.place}" for o in self.objects)

    def random(self, stream: int) -> np.random.Generator:
        """An independent random stream of this scene (0: layout, 1: drawing, 2 and on: questions)."""
        return np.random.default_rng([SPLITS.index(self.split), self.seed, self.index, stream])


def sample_scene(split: str, index: int, seed: int = 0, num_objects: tuple[int, int] = (3, 7)) -> Scene:
    """Scene `index` of `split`, with a number of objects drawn uniformly from the closed range `num_objects`."""
    empty = Scene(split, seed, index, (), ())
    random = empty.random(0)
    number = int(random.integers(num_objects[0], num_objects[1] + 1))
    objects, sprites = [], []
    for cell in sorted(random.choice(GRID * GRID, number, replace=False)):
        name = str(random.choice((DIGITS, SHAPES, WORDS)[random.choice(3, p=(0.4, 0.3, 0.3))]))
        objects.append(SceneObject(name, str(random.choice(list(COLOURS))), PLACES[cell]))
        sprites.append(int(random.choice(_sprites_of(split)[name])))
    return Scene(split, seed, index, tuple(objects), tuple(sprites))


# Drawing


@functools.lru_cache(maxsize=1)
def _sprites() -> tuple[torch.Tensor, np.ndarray]:
    """All alpha masks, (n, 1, 64, 64) in [0, 1], and the index in `NAMES` of each; handwritten digits come first."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # load_digits is sorted by writer; a fixed shuffle gives each split every hand.
    order = np.random.default_rng(0).permutation(len(digits.target))
    strokes = torch.tensor(digits.images[order] / 16.0, dtype=torch.float32)[:, None]
    strokes = F.interpolate(strokes, size=52, mode="bicubic", align_corners=False).clamp(0, 1)
    handwritten = F.pad(strokes, [(SPRITE_SIZE - 52) // 2] * 4)
    drawn = torch.stack([_draw_shape(shape) for shape in SHAPES] + [_draw_word(word) for word in WORDS])
    names = np.concatenate([digits.target[order], np.arange(len(DIGITS), len(NAMES))])
    return torch.cat([handwritten, drawn]), names


@functools.lru_cache(maxsize=len(SPLITS))
def _sprites_of(split: str) -> dict[str, np.ndarray]:
    """For each name the sprites that `split` may draw it with."""
    _, names = _sprites()
    start, stop = _DIGITS_IN_SPLIT[split]
    num_handwritten = _DIGITS_IN_SPLIT["test"][1]
    allowed = np.zeros(len(names), dtype=bool)
    allowed[start:stop] = allowed[num_handwritten:] = True
    return {name: np.flatnonzero((names == i) & allowed) for i, name in enumerate(NAMES)}


def _to_mask(canvas: Image.Image) -> torch.Tensor:
    small = canvas.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0)[None]


def _draw_shape(shape: str) -> torch.Tensor:
    size = 4 * SPRITE_SIZE
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    low, high, middle = 0.1 * size, 0.9 * size, 0.5 * size
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "ring":
        draw.ellipse((low, low, high, high), outline=255, width=size // 9)
    elif shape == "square":
        draw.rectangle((0.15 * size, 0.15 * size, 0.85 * size, 0.85 * size), fill=255)
    elif shape == "diamond":
        draw.polygon([(middle, low), (0.82 * size, middle), (middle, high), (0.18 * size, middle)], fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, 0.85 * size), (low, 0.85 * size)], fill=255)
    elif shape == "cross":
        draw.rectangle((0.38 * size, low, 0.62 * size, high), fill=255)
        draw.rectangle((low, 0.38 * size, high, 0.62 * size), fill=255)
    elif shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 0.45, 0.18) * size
        draw.polygon([(middle + r * np.cos(a), middle + r * np.sin(a)) for r, a in zip(radii, angles)], fill=255)
    else:  # heart
        draw.ellipse((low, 0.15 * size, middle + 4, 0.55 * size), fill=255)
        draw.ellipse((middle - 4, 0.15 * size, high, 0.55 * size), fill=255)
        draw.polygon([(0.13 * size, 0.45 * size), (0.87 * size, 0.45 * size), (middle, high)], fill=255)
    return _to_mask(canvas)


def _draw_word(word: str) -> torch.Tensor:
    size = 4 * SPRITE_SIZE
    canvas = Image.new("L", (size, size))
    font = ImageFont.load_default(size=size // 2)
    box = font.getbbox(word, stroke_width=3)
    scale = 0.94 * size / (box[2] - box[0])
    font = ImageFont.load_default(size=min(size // 2 * scale, 0.62 * size))
    ImageDraw.Draw(canvas).text((size / 2, size / 2), word, fill=255, font=font, anchor="mm", stroke_width=3)
    return _to_mask(canvas)


def draw_scenes(scenes: list[Scene], augment: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a batch of scenes.

    `augment=True` (training only) also bends the strokes by a smooth random field and changes their weight.

    Returns:
        The pictures, uint8 (batch, 3, 168, 168), and the share of each patch that its object covers,
        float32 (batch, 12, 12).
    """
    batch = len(scenes)
    row_list: list[int] = []
    cell_list: list[int] = []
    sprites: list = []
    brushes: list = []
    pictures = torch.empty(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    for row, scene in enumerate(scenes):
        random = scene.random(1)
        pictures[row] = background(random)
        row_list += [row] * len(scene.objects)
        cell_list += [PLACES.index(item.place) for item in scene.objects]
        sprites += scene.sprites
        brushes += [draw_brush(random, item, augment) for item in scene.objects]
    rows, cells = torch.tensor(row_list), torch.tensor(cell_list)
    tiles = pictures.view(batch, 3, GRID, CELL_SIZE, GRID, CELL_SIZE).permute(0, 2, 4, 1, 3, 5)  # (b, 3, 3, rgb, h, w)
    painted, alpha = paint(tiles[rows, cells // GRID, cells % GRID], sprites, brushes, augment)
    tiles[rows, cells // GRID, cells % GRID] = painted

    side = CELL_SIZE // PATCH_SIZE
    covered = torch.zeros(batch, GRID, GRID, side, side)
    covered[rows, cells // GRID, cells % GRID] = F.avg_pool2d(alpha, PATCH_SIZE)
    covered = covered.permute(0, 1, 3, 2, 4).reshape(batch, GRID * side, GRID * side)
    return pictures.clamp(0, 255).to(torch.uint8), covered


@dataclass(frozen=True)
class Brush:
    """How one object is drawn: its tint, where its sprite goes, and the changes of its strokes in training."""

    tint: np.ndarray
    affine: np.ndarray
    bend: np.ndarray
    weight: float


def draw_brush(random: np.random.Generator, item: SceneObject, augment: bool) -> Brush:
    """The next brush of a scene's drawing stream."""
    return Brush(
        np.array(COLOURS[item.colour]) + random.uniform(-14, 14, 3),
        _jitter(random, 40 if item.kind != "word" else 46),
        random.normal(0, 0.025, (2, 4, 4)) if augment else np.zeros((2, 4, 4)),
        random.uniform(-0.15, 0.15) if augment else 0.0,
    )


def paint(
    under: torch.Tensor, sprites: list[int], brushes: list[Brush], augment: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells with their objects over what was `under` them, (objects, 3, 56, 56), and how much of each pixel an object
    covers, (objects, 56, 56)."""
    masks, _ = _sprites()

    def stacked(values: list) -> torch.Tensor:
        return torch.tensor(np.stack(values), dtype=torch.float32)

    affine = stacked([brush.affine for brush in brushes])
    grid = F.affine_grid(affine, [len(brushes), 1, CELL_SIZE, CELL_SIZE], False)
    if augment:
        bend = stacked([brush.bend for brush in brushes])
        grid = grid + F.interpolate(bend, size=CELL_SIZE, mode="bicubic").permute(0, 2, 3, 1)
    alpha = F.grid_sample(masks[sprites], grid, align_corners=False)[:, 0]
    if augment:
        weight = stacked([brush.weight for brush in brushes])
        alpha = (alpha + weight[:, None, None] * (alpha > 0.05)).clamp(0, 1)
    tint = stacked([brush.tint for brush in brushes])[:, :, None, None]
    shade = 0.75 + 0.25 * under.mean(1, keepdim=True) / 128  # the background's grain shows through a little
    return under + alpha[:, None] * (tint * shade - under), alpha


def background(
    random: np.random.Generator, rows: int = 1, columns: int = 1, tint: torch.Tensor | None = None
) -> torch.Tensor:
    """Dark, slowly varying and grainy, (3, rows · 168, columns · 168) in 0–255, with `tint` or a random one."""
    size = (rows * IMAGE_SIZE, columns * IMAGE_SIZE)
    light, hue = random.uniform(20, 110, (1, 1, 4 * rows, 4 * columns)), random.uniform(-12, 12, (1, 3, 1, 1))
    coarse = torch.tensor(light + (hue if tint is None else np.zeros_like(hue)))
    smooth = F.interpolate(coarse.float(), size=size, mode="bilinear", align_corners=False)[0]
    grain = random.integers(0, 256, (3, *size), dtype=np.uint8)
    return smooth + (0 if tint is None else tint) + (torch.from_numpy(grain).float() - 128) * 0.12


def _jitter(random: np.random.Generator, smallest: int) -> np.ndarray:
    """The 2 × 3 matrix that takes cell coordinates to sprite coordinates: size, rotation, shear, place in the cell."""
    size = random.uniform(smallest, CELL_SIZE - 2)
    angle, shear = random.uniform(-0.17, 0.17), random.uniform(-0.12, 0.12)
    stretch = random.uniform(0.92, 1.08)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = CELL_SIZE / size * (turn @ np.array([[stretch, shear], [0, 1 / stretch]]))
    room = (CELL_SIZE - size) / CELL_SIZE
    offset = random.uniform(-room, room, 2)
    return np.concatenate([matrix, -(matrix @ offset)[:, None]], axis=1)


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of one scene."""
    pictures, _ = draw_scenes([scene])
    return Image.fromarray(pictures[0].permute(1, 2, 0).numpy())


# Questions


def ask_questions(scene: Scene, types: list[str] | tuple[str, ...], stream: int = 2) -> list[QuestionAnswer]:
    """One question of each type in `types`, in that order and without repeats; a type that the scene can't serve
    (nothing to read, no unambiguous object) is replaced by "what"."""
    random = scene.random(stream)
    asked: list[QuestionAnswer] = []
    for kind in types:
        for attempt in range(8):
            question = _QUESTIONS[kind if attempt < 4 else "what" if attempt < 6 else "count"](scene, random)
            if question is not None and all(question.question != other.question for other in asked):
                asked.append(question)
                break
    return asked


def describe(scene: Scene, stream: int = 2) -> QuestionAnswer:
    """All objects in a random order, each after its place or before it: what the language model is first taught with,
    so that it learns to look up both what is at a place and where a thing is."""
    random = scene.random(stream)
    objects = [scene.objects[i] for i in random.permutation(len(scene.objects))]
    if random.random() < 0.5:
        parts = [f"{item.place} {item.colour} {item.noun}" for item in objects]
        return QuestionAnswer("What is where?", ", ".join(parts), "describe")
    parts = [f"{item.colour} {item.noun} {item.place}" for item in objects]
    return QuestionAnswer("What is in the picture?", ", ".join(parts), "describe")


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]


def _pick(random: np.random.Generator, options):
    return options[int(random.integers(len(options)))] if len(options) else None


def _ask_what(scene: Scene, random: np.random.Generator) -> QuestionAnswer:
    item = _pick(random, scene.objects)
    answer = "word" if item.kind == "word" else item.name
    return QuestionAnswer(f"What is at the {item.place}?", answer, "what", item)


def _ask_colour(scene: Scene, random: np.random.Generator) -> QuestionAnswer:
    named = _unique(scene, "name")
    if named and random.random() < 0.6:
        item = _pick(random, named)
        return QuestionAnswer(f"What colour is the {item.noun}?", item.colour, "colour", item)
    item = _pick(random, scene.objects)
    return QuestionAnswer(f"What colour is the object at the {item.place}?", item.colour, "colour", item)


def _ask_where(scene: Scene, random: np.random.Generator) -> QuestionAnswer | None:
    by_name = random.random() < 0.6
    item = _pick(random, _unique(scene, "name" if by_name else "colour"))
    if item is None:
        return None
    return QuestionAnswer(
        f"Where is the {item.noun if by_name else item.colour + ' object'}?", item.place, "where", item
    )


def _ask_count(scene: Scene, random: np.random.Generator) -> QuestionAnswer:
    if random.random() < 0.5:
        kind = _pick(random, ("digit", "shape", "word"))
        return QuestionAnswer(f"How many {kind}s are there?", str(sum(o.kind == kind for o in scene.objects)), "count")
    if random.random() < 0.8:
        present = random.random() < 0.8
        colour = _pick(random, [o.colour for o in scene.objects] if present else list(COLOURS))
        number = sum(o.colour == colour for o in scene.objects)
        return QuestionAnswer(f"How many {colour} objects are there?", str(number), "count")
    return QuestionAnswer("How many objects are there?", str(len(scene.objects)), "count")


def _ask_exist(scene: Scene, random: np.random.Generator) -> QuestionAnswer:
    """Half of the answers are yes; of the refused objects half have a colour or a name that is there, not both."""
    item = _pick(random, scene.objects)
    with_colour, truth = random.random() < 0.6, random.random() < 0.5
    if not truth:
        near = with_colour and random.random() < 0.5
        other = SceneObject(str(random.choice(NAMES)), str(random.choice(list(COLOURS))), item.place)
        item = SceneObject(item.name if near else other.name, other.colour, item.place)
    there = any(o.name == item.name and (o.colour == item.colour or not with_colour) for o in scene.objects)
    phrase = f"{item.colour} {item.noun}" if with_colour else item.noun
    article = "an" if phrase[0] in "aeiou" else "a"
    return QuestionAnswer(
        f"Is there {article} {phrase}?", "yes" if there else "no", "exist", item if there and truth else None
    )


def _ask_read(scene: Scene, random: np.random.Generator) -> QuestionAnswer | None:
    words = [o for o in scene.objects if o.kind == "word"]
    item = _pick(random, words)
    if item is None:
        return None
    if sum(o.colour == item.colour for o in words) == 1 and random.random() < 0.5:
        return QuestionAnswer(f"What does the {item.colour} word say?", item.name, "read", item)
    return QuestionAnswer(f"What does the word at the {item.place} say?", item.name, "read", item)


_QUESTIONS = {
    "what": _ask_what,
    "colour": _ask_colour,
    "where": _ask_where,
    "count": _ask_count,
    "exist": _ask_exist,
    "read": _ask_read,
}
