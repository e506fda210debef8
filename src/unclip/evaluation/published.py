"""Numbers that papers print for MS-COCO at 256 px, and how each was taken.

They stand in a table of their own: one model's number moves by several points with the protocol
(Stable Diffusion from 8.3 to 12.6, DeepFloyd IF from 6.7 to 15.1), so that ours may be laid beside
those rows only whose protocol is the same.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One printed number.

    Attributes:
        model: its name.
        fid: the Fréchet Inception distance.
        protocol: how it was taken, as far as its source says.
        source: where it is printed.
    """

    model: str
    fid: float
    protocol: str
    source: str


ZERO_SHOT = "zero-shot FID-30K, whole val2014"
FILTERED = "zero-shot, captions filtered"
TRAINED = "trained on COCO"
_TABLE_2 = "unCLIP, table 2"
_GLIDE = "GLIDE, table 2"
_PIXART = "PixArt-α, table 2"
_RAPHAEL = "RAPHAEL, table 1"
_KANDINSKY = "Kandinsky, table 1"
_CM3LEON = "CM3Leon, table 1"

PUBLISHED = (
    Published("unCLIP, diffusion prior", 10.39, f"{ZERO_SHOT}, guidance 1.25", _TABLE_2),
    Published("unCLIP, AR prior", 10.63, f"{ZERO_SHOT}, guidance 1.25", _TABLE_2),
    Published("unCLIP, diffusion prior", 10.87, FILTERED, _TABLE_2),
    Published("unCLIP, AR prior", 11.08, FILTERED, _TABLE_2),
    Published("GLIDE", 12.24, f"{ZERO_SHOT}, guidance 1.5", _GLIDE),
    Published("GLIDE", 12.89, FILTERED, _GLIDE),
    Published("Make-A-Scene", 11.84, FILTERED, _TABLE_2),
    Published("DALL-E", 28.0, "zero-shot, about", _TABLE_2),
    Published("LAFITE", 26.94, "zero-shot", _TABLE_2),
    Published("AttnGAN", 35.49, TRAINED, _TABLE_2),
    Published("DM-GAN", 32.64, TRAINED, _TABLE_2),
    Published("DF-GAN", 21.42, TRAINED, _TABLE_2),
    Published("DM-GAN + CL", 20.79, TRAINED, _TABLE_2),
    Published("XMC-GAN", 9.33, TRAINED, _TABLE_2),
    Published("LAFITE", 8.12, f"{TRAINED}, measured against its training set", _TABLE_2),
    Published("Make-A-Scene", 7.55, TRAINED, _TABLE_2),
    Published(
        "Karlo, 25 + 50 + 7 steps",
        14.43,
        "zero-shot, 30,000 captions, guidance 4 and 8, short side to 256, cropped",
        "Karlo's README",
    ),
    Published(
        "Karlo, 25 + 25 + 7 steps",
        15.24,
        "zero-shot, 30,000 captions, guidance 4 and 8, short side to 256, cropped",
        "Karlo's README",
    ),
    Published("Kandinsky 2.1, linear prior", 8.03, "zero-shot FID-30K", _KANDINSKY),
    Published("Kandinsky 2.1, diffusion prior", 9.86, "zero-shot FID-30K", _KANDINSKY),
    Published("Kandinsky 2.1, no prior", 25.92, "zero-shot FID-30K", _KANDINSKY),
    Published("Stable Diffusion 2.1", 8.59, "zero-shot FID-30K", _KANDINSKY),
    Published("DeepFloyd IF", 15.10, "zero-shot FID-30K, measured again", _KANDINSKY),
    Published("Stable Diffusion 1.5", 9.62, "zero-shot FID-30K", _PIXART),
    Published("GigaGAN", 9.09, "zero-shot FID-30K", _PIXART),
    Published("PixArt-α", 7.32, "zero-shot FID-30K", _PIXART),
    Published("Stable Diffusion", 8.32, "zero-shot FID-30K", _RAPHAEL),
    Published("Muse-3B", 7.88, "zero-shot FID-30K", _RAPHAEL),
    Published("ERNIE-ViLG 2.0", 6.75, "zero-shot FID-30K", _RAPHAEL),
    Published("DeepFloyd IF", 6.66, "zero-shot FID-30K", _RAPHAEL),
    Published("RAPHAEL", 6.61, "zero-shot FID-30K", _RAPHAEL),
    Published("Imagen", 7.27, f"{ZERO_SHOT}", "Imagen, section 3"),
    Published("CM3Leon-7B, with retrieval", 4.88, "zero-shot FID-30K", _CM3LEON),
    Published("CM3Leon-7B", 10.82, "zero-shot FID-30K", _CM3LEON),
)
