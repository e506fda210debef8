"""Make `import torchvision` work next to a CPU build of torch.

PyPI's torchvision wheel is built for CUDA. With a CPU torch its compiled operators do not load, and
`import torchvision` then fails when it registers fakes for two of them. Defining the schemas of
these two is enough for the import; calling them still fails, and unclip never does. With a matching
pair of packages this module does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# Kept, because torch removes the operators with their Library.
_libraries: list[torch.library.Library] = []


def define_missing_operators() -> list[str]:
    """Define `torchvision::nms` and `torchvision::qnms` if the compiled ones do not load.

    Returns:
        The names defined by this call: none if torchvision is not installed, if its own operators
        load, or if an earlier call has defined them.
    """
    spec = importlib.util.find_spec("torchvision")  # finds the folder without importing it
    if spec is None or _loads_own_operators(spec.submodule_search_locations or ()):
        return []
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _SCHEMA)
        _libraries.append(library)
    return missing


def _loads_own_operators(folders) -> bool:
    """Return whether these folders have a compiled library of torchvision that loads."""
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
