"""The licence of the pictures and whom to name, written beside them."""

from pathlib import Path

from unclip.files import atomic_write

LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"

_LICENCE_TEXT = f"""\
The pictures in this folder are licensed under
Creative Commons Attribution-ShareAlike 4.0 International ({LICENCE}).

Summary and full text: {LICENCE_URL}
                       {LICENCE_URL}legalcode

You may share and adapt them, also commercially, as long as you name the source (ATTRIBUTION.txt),
link the licence, say what you changed, and share what you make of them under the same licence.
The captions and annotations were made together with the pictures and come under the same licence.
"""

_ATTRIBUTION_TEXT = f"""\
All emojis designed by OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: {LICENCE} ({LICENCE_URL})

Changed here: the drawings of OpenMoji {{version}} were partly recoloured, turned, scaled, placed
on plain backgrounds, combined into scenes of up to four objects, and rendered to pixels.
"""


def write_licence(root: Path, openmoji_version: str) -> None:
    """Write LICENSE.txt and ATTRIBUTION.txt into `root`."""
    with atomic_write(root / "LICENSE.txt") as temporary:
        temporary.write_text(_LICENCE_TEXT, encoding="utf-8")
    with atomic_write(root / "ATTRIBUTION.txt") as temporary:
        temporary.write_text(_ATTRIBUTION_TEXT.format(version=openmoji_version), encoding="utf-8")
