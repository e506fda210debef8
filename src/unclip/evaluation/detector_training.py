"""Trains the detector on emoji scenes whose objects, boxes and colors are known exactly.

Its scenes are not the data set's: any objects in any colors anywhere, so that it knows no layout,
has seen what the generator never shows to a model, and shares no picture with any split.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from unclip.data.reader import decode_image
from unclip.emoji import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.scenes import CANVAS, Item, Scene
from unclip.images import to_tensor
from unclip.networks.detector import Detector, Heads, boxes_of, cell_centres

SIZE = 64
MOST_OBJECTS = 4
NO_COLOUR = -1  # not asked for: its own color is none of those that have a name here


class Truth(NamedTuple):
    """Pictures and what is in them; rows past `count` mean nothing."""

    images: UInt8[Tensor, "n 3 size size"]
    count: Int[Tensor, " n"]
    label: Int[Tensor, "n objects"]
    box: Float[Tensor, "n objects 4"]  # left, upper, right, lower side in [0, 1]
    color: Int[Tensor, "n objects"]

    def take(self, rows: Tensor) -> "Truth":
        """Some of the pictures."""
        return Truth(*(part[rows] for part in self))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the detector is trained: about two minutes on two CPU cores.

    Args:
        scenes: pictures to draw.
        steps: of the optimizer.
        batch_size: pictures a step.
        lr: the highest; it rises for a tenth of the steps and falls to nothing.
        width: of the network.
        seed: of scenes, weights and batches.
    """

    scenes: int = 6000
    steps: int = 700
    batch_size: int = 32
    lr: float = 3e-3
    width: int = 32
    seed: int = 0


def train_detector(
    concept_set: str, training: Training, *, progress: Callable[[int, float], None] | None = None
) -> Detector:
    """A detector of a set's concepts, in eval mode.

    Args:
        concept_set: S, M or L.
        training: how.
        progress: called with each step's number and loss.
    """
    truth = draw(concept_set, training.scenes, seed=training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        detector = Detector(
            classes=len(concepts(concept_set)), colors=len(COLORS), width=training.width
        )
        optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, training.lr, training.steps, pct_start=0.1
        )
        for step in range(training.steps):
            batch = truth.take(torch.randint(training.scenes, (training.batch_size,)))
            loss = detection_loss(detector(disturbed(batch.images)), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, float(loss.detach()))
    return detector.eval().requires_grad_(False)


def draw(concept_set: str, count: int, *, seed: int) -> Truth:
    """Pictures of random scenes with their objects."""
    from unclip.emoji.render import place, scene_png

    known = concepts(concept_set)
    numbers = {concept.hexcode: number for number, concept in enumerate(known)}
    truth = Truth(
        torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, MOST_OBJECTS, dtype=torch.int64),
        torch.zeros(count, MOST_OBJECTS, 4),
        torch.full((count, MOST_OBJECTS), NO_COLOUR),
    )
    for row in range(count):
        scene = free_scene(known, random.Random(f"{seed}/detector/{concept_set}/{row}"))
        truth.images[row] = to_tensor(decode_image(scene_png(scene, SIZE), "png"))
        truth.count[row] = len(scene.items)
        for k, item in enumerate(scene.items):
            x, y, width, height = (value / CANVAS for value in place(item).box)
            truth.label[row, k] = numbers[item.concept.hexcode]
            truth.box[row, k] = torch.tensor([x, y, x + width, y + height])
            truth.color[row, k] = colour_number(item.color or item.concept.color)
    return truth


def colour_number(name: str) -> int:
    """A colour's place among those that objects can be given."""
    return list(COLORS).index(name) if name in COLORS else NO_COLOUR


def free_scene(known: tuple[Concept, ...], draw: random.Random) -> Scene:
    """One to four objects, of one concept or of several, anywhere but on each other."""
    count = draw.randint(1, MOST_OBJECTS)
    alike = draw.choice(known) if draw.random() < 0.4 else None
    items: list[Item] = []
    while len(items) < count:
        concept = alike or draw.choice(known)
        extent = draw.uniform(40, 62) if count == 1 else draw.uniform(20, 33)
        x, y = (draw.uniform(extent / 2 + 1, CANVAS - extent / 2 - 1) for _ in range(2))
        if any(
            max(abs(x - item.x), abs(y - item.y)) < 0.5 * (extent + item.extent) for item in items
        ):
            if draw.random() < 0.02:  # no room for another
                break
            continue
        color = draw.choice(list(COLORS)) if concept.families and draw.random() < 0.6 else None
        items.append(Item(concept, color, x, y, extent, draw.uniform(-10, 10)))
    taken = {item.color or item.concept.color for item in items}
    background = draw.choice([name for name in BACKGROUNDS if name not in taken])
    return Scene("", 0, "free", tuple(items), None, background, False)


def disturbed(images: UInt8[Tensor, "n 3 size size"]) -> Float[Tensor, "n 3 size size"]:
    """Pictures in [-1, 1] as a model might draw them: half of them blurred, paler, noisy."""
    image = images.float() / 127.5 - 1
    blurred = gaussian_blur(image, [5, 5], [float(torch.empty(()).uniform_(0.4, 1.4))])
    image = torch.where(torch.rand(len(image), 1, 1, 1) < 0.4, blurred, image)
    contrast = 1 + 0.15 * torch.randn(len(image), 1, 1, 1)
    shift = 0.08 * torch.randn(len(image), 3, 1, 1)
    noise = torch.rand(len(image), 1, 1, 1).square() * 0.15 * torch.randn_like(image)
    return (image * contrast + shift + noise).clamp(-1, 1)


def detection_loss(heads: Heads, truth: Truth) -> Float[Tensor, ""]:
    """CenterNet's focal loss of the centres, and of the cells about them boxes and colors.

    Boxes are compared by −log of their intersection over union (Yu et al. 2016).
    """
    wanted, owner = targets(truth, *heads.centre.shape[-2:], classes=heads.centre.shape[1])
    probability = heads.centre.sigmoid().clamp(1e-6, 1 - 1e-6)
    centre = wanted == 1
    focal = torch.where(
        centre,
        (1 - probability) ** 2 * probability.log(),
        (1 - wanted) ** 4 * probability**2 * (1 - probability).log(),
    )
    picture, y, x = (owner >= 0).nonzero(as_tuple=True)
    own = owner[picture, y, x]
    overlap = intersection_over_union(boxes_of(heads.sides)[picture, y, x], truth.box[picture, own])
    colors = heads.color[picture, :, y, x]  # (positives, colors)
    return (
        -focal.sum() / centre.sum()
        - overlap.clamp(min=1e-3).log().mean()
        + F.cross_entropy(colors, truth.color[picture, own], ignore_index=NO_COLOUR)
    )


def targets(
    truth: Truth, rows: int, columns: int, *, classes: int
) -> tuple[Float[Tensor, "n classes rows columns"], Int[Tensor, "n rows columns"]]:
    """A heatmap a class, and which object each cell near a centre belongs to (-1: none).

    A bump is a Gaussian with a standard deviation of a ninth of its box's sides; the cell that
    holds the centre is 1.
    """
    cells = cell_centres(rows, columns)  # (h, w, 2)
    heat = torch.zeros(len(truth.count), classes, rows, columns)
    owner = torch.full((len(truth.count), rows, columns), -1)
    grid = torch.tensor([columns, rows])
    for row in range(len(truth.count)):
        for k in range(int(truth.count[row])):
            low, high = truth.box[row, k, :2], truth.box[row, k, 2:]
            middle, spread = (low + high) / 2, (high - low) / 9
            bump = torch.exp(-0.5 * ((cells - middle) / spread).square().sum(dim=-1))
            x, y = (middle * grid).long().tolist()
            bump[y, x] = 1.0
            label = int(truth.label[row, k])
            heat[row, label] = torch.maximum(heat[row, label], bump)
            owner[row, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = k
    return heat, owner


def intersection_over_union(
    first: Float[Tensor, "n 4"], second: Float[Tensor, "n 4"]
) -> Float[Tensor, " n"]:
    """Of boxes as left, upper, right and lower side, row by row."""
    low, high = torch.maximum(first, second)[:, :2], torch.minimum(first, second)[:, 2:]
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)
