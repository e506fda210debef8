"""Import open_clip without wandb, which its dependency timm imports if it is installed."""

import sys
from types import ModuleType
from typing import cast

_wandb = sys.modules.setdefault("wandb", cast(ModuleType, None))  # None: not importable
try:
    import open_clip as open_clip
finally:
    if _wandb is None:
        del sys.modules["wandb"]
