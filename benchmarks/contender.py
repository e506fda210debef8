"""A network with its project's own optimizer, ready to be timed; and who there is."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from setting import Problem, Setting
from torch import Tensor, nn

# stage → contender → the module and class of it; ours comes first, peers are measured against it
CONTENDERS = {
    "decoder": {
        "unclip": ("ours", "Decoder"),
        "diffusers": ("peer_diffusers", "Decoder"),
        "diffusers, channels_last": ("peer_diffusers", "ChannelsLastDecoder"),
        "GLIDE": ("peer_glide", "Decoder"),
        "DALLE2-pytorch": ("peer_dalle2", "Decoder"),
    },
    "prior": {
        "unclip": ("ours", "Prior"),
        "diffusers": ("peer_diffusers", "Prior"),
        "DALLE2-pytorch": ("peer_dalle2", "Prior"),
    },
}
# contender → its package, and how that is installed
PACKAGES = {
    "diffusers": ("diffusers", "pip install -e '.[dev]'"),
    "GLIDE": ("glide_text2im", "pip install git+https://github.com/openai/glide-text2im"),
    "DALLE2-pytorch": ("dalle2_pytorch", "benchmarks/README.md says how"),
}


class Contender:
    """What is timed: `train`, `step` and `sample`.

    Args:
        modules: all that is trained.
        optimizer: as the project ships it.
        problem: the inputs.
        setting: the machine's.
    """

    measures = ("train", "step", "sample")
    noises = 1  # noised samples that one training step learns from, a caption

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        problem: Problem,
        setting: Setting,
    ):
        self.modules = modules
        self.optimizer = optimizer
        self.problem = problem
        self.setting = setting
        self._step: Callable[[], Tensor] | None = None

    @property
    def parameters(self) -> int:
        """How many it trains."""
        return sum(parameter.numel() for parameter in self.modules.parameters())

    def predict(self) -> Tensor:
        """The training pass: a prediction like `target`."""
        raise NotImplementedError

    def target(self) -> Tensor:
        """What `predict` should have returned."""
        return self.problem.target

    def prepare(self) -> Callable[[], Tensor]:
        """Does what a prompt needs once, and returns one evaluation without guidance."""
        raise NotImplementedError

    def draw(self, problem: Problem) -> Tensor:
        """A whole guided sample of one prompt, by the project's own sampler."""
        raise NotImplementedError

    def _mode(self, *, training: bool) -> None:
        if self.modules.training != training:  # it walks through all modules
            self.modules.train(training)

    def train(self) -> None:
        """Forward, backward and optimizer step."""
        self._mode(training=True)
        with self.setting.autocast():
            prediction = self.predict()
        F.mse_loss(prediction.float(), self.target()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def step(self) -> None:
        """One evaluation while sampling, all prompts prepared before."""
        self._mode(training=False)
        with self.setting.autocast():
            if self._step is None:
                self._step = self.prepare()
            self._step()

    @torch.inference_mode()
    def sample(self) -> None:
        """One guided sample from its prompt to its end."""
        self._mode(training=False)
        with self.setting.autocast():
            self.draw(self.problem.first())


def find(stage: str, name: str) -> type[Contender]:
    """A contender's class by its name; imports its project."""
    module, cls = CONTENDERS[stage][name]
    return getattr(importlib.import_module(module), cls)


def not_installed(name: str) -> str | None:
    """What to say of a contender whose package is missing; None where it is there."""
    package, mend = PACKAGES.get(name.partition(",")[0], ("unclip", ""))
    if importlib.util.find_spec(package) is not None:
        return None
    return f"not installed: {mend}"


def nearest(make: Callable[..., nn.Module], choices: Iterable[dict], parameters: int) -> nn.Module:
    """The module whose parameters are nearest in number, for peers of another layout."""

    def distance(choice: dict) -> int:
        with torch.device("meta"):
            module = make(**choice)
        return abs(sum(parameter.numel() for parameter in module.parameters()) - parameters)

    return make(**min(choices, key=distance))
