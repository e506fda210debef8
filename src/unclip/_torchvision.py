"""Lets torchvision be imported beside a CPU build of torch.

PyPI's torchvision wheel is built for CUDA. Beside a CPU torch its compiled operators do not load,
and `import torchvision` then fails where it registers a fake for two of them. Defining the two
schemas is enough for the import; calling them still fails, and unclip never does. With a matching
pair this does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # torch forgets the operators when the Library that defined them is collected


def define_missing_operators() -> list[str]:
    """Defines `torchvision::nms` and `torchvision::qnms` where the compiled ones cannot be loaded.

    Returns:
        The names defined by this call: empty when torchvision is not installed, when its own
        operators load, and from the second call on.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")  # finds the folder, imports nothing
    if spec is None or _loads_own_operators(spec.submodule_search_locations or ()):
        return []
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing and _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _library.define(name + _SCHEMA)
    return missing


def _loads_own_operators(folders) -> bool:
    """Whether a compiled library of torchvision's lies in these folders and loads."""
    for folder in folders:
        for path in sorted(Path(folder).glob("_C*.*")):
            if path.suffix not in (".so", ".pyd"):
                continue
            try:
                torch.ops.load_library(path)
            except OSError:  # built for another torch: a symbol or libtorch_cuda is missing
                continue
            return True
    return False


define_missing_operators()
