"""Spelling (section 7, figure 16): words that a picture should show, read by an OCR program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.limits import Bench, Limit, Measured
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.scores import mean_score
from unclip.images import save_png, to_tensor

WORDS = ["HELLO", "STOP", "OPEN", "LOVE", "coffee", "welcome", "deep learning", "good morning"]
_PARTS = ("Det", "Cls", "Rec")  # where text is, which way up, what it says

Read = Callable[[UInt8[Tensor, "3 height width"]], str]


@dataclass(frozen=True, kw_only=True)
class Spelling(Limit):
    """1 − normalised edit distance between the words asked for and those that are read.

    Case and spaces do not count, since the reader itself is unsure of them. What the reader makes
    of the same words drawn in black on white, at the same size, is the ceiling.

    Args:
        words: what is to be spelt.
        prompt: with {} where the words come.
        each: pictures of each prompt.
        size: of the pictures, or the largest below it that the bundle reaches.
    """

    words: Sequence[str] = field(default_factory=WORDS.copy)
    prompt: str = 'a sign that says "{}"'
    each: int = 2
    size: int = 256

    def __call__(self, bench: Bench) -> Measured:
        """The mean over pictures, and the share of pictures in which every letter is right."""
        read, size = reader(), min(self.size, bench.cascade.size)
        asked = [word for word in self.words for _ in range(self.each)]
        prompts = [Prompt(f"{k:05d}", self.prompt.format(word), k) for k, word in enumerate(asked)]
        generated, samples = bench.sample("spelling", prompts, size)
        signs = torch.stack([sign(word, size) for word in self.words])
        texts, of_signs = ([read(image) for image in images] for images in (generated, signs))
        ours, ceiling = _similarities(texts, asked), _similarities(of_signs, self.words)
        scores = {
            name: mean_score(
                rows,
                seed=bench.settings.seed,
                better="higher",
                real=float(real.mean()),
                n_real=len(real),
            )._replace(rows=None)
            for name, rows, real in (
                ("similarity", ours, ceiling),
                ("right", (ours == 1).double(), (ceiling == 1).double()),
            )
        }
        tiles = [
            Tile(image, f"“{word}”: read “{text}”")
            for images, words, seen in ((signs, self.words, of_signs), (generated, asked, texts))
            for image, word, text in zip(images, words, seen, strict=True)
        ]
        sheet = contact_sheet(tiles, columns=8, title="Words as a font draws them, then generated.")
        path = save_png(sheet, bench.out / "pictures" / "spelling.png")
        return Measured(scores, [path], {"size": size, "read": texts, "samples": str(samples)})


def reader() -> Read:
    """RapidOCR with the networks that its package brings; nothing is fetched.

    Raises:
        FileNotFoundError: the package, or a network in it, is missing.
    """
    mend = "pip install -e '.[text]'"
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        raise FileNotFoundError(f"reading words needs rapidocr and onnxruntime: {mend}")
    import rapidocr

    folder, files = Path(rapidocr.__file__).parent / "models", {}
    for part in _PARTS:
        found = sorted(folder.glob(f"*_{part.lower()}_*.onnx"))
        if not found:  # it would be downloaded
            raise FileNotFoundError(f"{folder} has no network for {part}: {mend} again")
        files[f"{part}.model_path"] = str(found[0])
    engine = rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            **files,
        }
    )

    def read(image: UInt8[Tensor, "3 height width"]) -> str:
        pixels = image.permute(1, 2, 0).flip(2).contiguous().numpy()  # BGR, as OpenCV has it
        return " ".join(engine(pixels).txts or ())

    return read


def similarity(text: str, wanted: str) -> float:
    """1 − edit distance over the longer one's length, whatever the case and the spaces."""
    first, second = ("".join(words.split()).casefold() for words in (text, wanted))
    longest = max(len(first), len(second))
    return 1.0 if longest == 0 else 1 - edit_distance(first, second) / longest


def edit_distance(first: str, second: str) -> int:
    """The fewest letters put in, taken out or exchanged (Levenshtein 1966)."""
    above = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        line = [row]
        for column, other in enumerate(second, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != other)))
        above = line
    return above[-1]


def sign(words: str, size: int) -> UInt8[Tensor, "3 size size"]:
    """Words in black on white, as large as fits."""
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size / 3)
    widest = draw.textlength(words, font)
    font = ImageFont.load_default(size / 3 * min(0.85 * size / widest, 1))
    draw.text((size / 2, size / 2), words, "black", font, anchor="mm")
    return to_tensor(picture)


def _similarities(texts: Sequence[str], wanted: Sequence[str]) -> Tensor:
    pairs = zip(texts, wanted, strict=True)
    return torch.tensor([similarity(*pair) for pair in pairs], dtype=torch.float64)
