"""Spelling (section 7, figure 16): words that an image should show, read by an OCR program."""

from collections.abc import Callable, Sequence
from dataclasses import field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import Context
from unclip.evaluation.measurement import Measurement, Result, mean_score
from unclip.evaluation.report.tables import score_table
from unclip.images import to_tensor

WORDS = ["HELLO", "STOP", "OPEN", "LOVE", "coffee", "welcome", "deep learning", "good morning"]
_PARTS = ("Det", "Cls", "Rec")  # text detection, orientation, recognition

Read = Callable[[UInt8[Tensor, "3 height width"]], str]


class Spelling(Measurement):
    """1 - normalized edit distance between the requested words and those that OCR reads.

    Case and spaces are ignored, because OCR itself is unreliable there. The baseline is the same
    number for the words drawn by a font in black on white, at the same size.
    """

    words: Sequence[str] = field(default_factory=WORDS.copy)  # words to spell
    prompt: str = 'a sign that says "{}"'  # prompt with {} in place of the words
    each: int = 2  # number of images per prompt
    size: int = 256  # side of the images in pixels; the bundle's largest size if that is smaller

    title = "Spelling (section 7, figure 16)"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Return the mean over images, and the share of images with every letter right."""
        read, size = load_reader(), min(self.size, context.cascade.size)
        wanted = [word for word in self.words for _ in range(self.each)]
        prompts = [self.prompt.format(word) for word in wanted]
        generated, folder = context.samples("spelling", prompts, size)
        signs = torch.stack([sign(word, size) for word in self.words])
        texts, sign_texts = ([read(image) for image in images] for images in (generated, signs))
        ours, ceiling = similarity(texts, wanted), similarity(sign_texts, self.words)
        pairs = {"similarity": (ours, ceiling), "right": (ours == 1, ceiling == 1)}
        scores = {
            name: mean_score(rows, seed=context.seed, real=real).plain()
            for name, (rows, real) in pairs.items()
        }
        shown = zip([*signs, *generated], [*self.words, *wanted], sign_texts + texts, strict=True)
        tiles = [Tile(image, f"“{word}”: read “{text}”") for image, word, text in shown]
        title = "Words drawn by a font, then generated."
        about = {"size": size, "read": texts, "samples": str(folder)}
        return Result(
            tables={"Spelling": score_table(scores)},
            images={"spelling": contact_sheet(tiles, columns=8, title=title)},
            values={"limits": {"spelling": {"scores": scores, "about": about}}},
            note="“real” is the same number for words drawn by a font: the reader's own accuracy.",
        )


def load_reader() -> Read:
    """Load RapidOCR with the networks in its package; nothing is downloaded."""
    fix = "pip install -e '.[text]'"
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        raise FileNotFoundError(f"reading words needs rapidocr and onnxruntime: {fix}")
    rapidocr: Any = import_module("rapidocr")
    folder, files = Path(rapidocr.__file__).parent / "models", {}
    for part in _PARTS:
        found = sorted(folder.glob(f"*_{part.lower()}_*.onnx"))
        if not found:  # RapidOCR would download it
            raise FileNotFoundError(f"{folder} has no network for {part}: reinstall it with {fix}")
        files[f"{part}.model_path"] = str(found[0])
    engine = rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            **files,
        }
    )

    def read(image: UInt8[Tensor, "3 height width"]) -> str:
        pixels = image.permute(1, 2, 0).flip(2).contiguous().numpy()  # BGR, as OpenCV expects
        return " ".join(engine(pixels).txts or ())

    return read


def similarity(texts: Sequence[str], wanted: Sequence[str]) -> Float[Tensor, " count"]:
    """Return 1 - edit distance / length of the longer text, ignoring case and spaces."""
    first, second = (
        ["".join(text.split()).casefold() for text in side] for side in (texts, wanted)
    )
    pairs = zip(first, second, strict=True)
    longest = torch.tensor([max(len(one), len(other), 1) for one, other in pairs])
    return 1 - edit_distance(first, second, reduction="none").double() / longest


def sign(words: str, size: int) -> UInt8[Tensor, "3 size size"]:
    """Draw words in black on white, as large as fits."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size / 3)
    widest = draw.textlength(words, font)
    font = ImageFont.load_default(size / 3 * min(0.85 * size / widest, 1))
    draw.text((size / 2, size / 2), words, "black", font, anchor="mm")
    return to_tensor(image)
