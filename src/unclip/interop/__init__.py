"""Import public weights into a bundle: Karlo's, and CLIPs of open_clip."""

from unclip.interop.karlo import STAGES, convert_karlo
from unclip.interop.public_clip import public_name, write_public_clip

__all__ = ["STAGES", "convert_karlo", "public_name", "write_public_clip"]
