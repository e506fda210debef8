"""Import open_clip without wandb, which its dependency timm imports if it is installed."""

import sys

_wandb = sys.modules.setdefault("wandb", None)
try:
    import open_clip as open_clip
finally:
    if _wandb is None:
        del sys.modules["wandb"]
