"""Import Karlo's public weights into a bundle."""

from unclip.interop.karlo import STAGES, convert_karlo

__all__ = ["STAGES", "convert_karlo"]
