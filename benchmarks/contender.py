"""Sizes, inputs and settings that all contenders share, and the base class that describes one."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GUIDANCE_SCALE = 3.0
# stage → contender → its package and class; ours is first, and the others are compared with it
CONTENDERS = {
    "prior": {
        "unclip": ("unclip", "ours.Prior"),
        "diffusers": ("diffusers", "peer_diffusers.Prior"),
        "DALLE2-pytorch": ("dalle2_pytorch", "peer_dalle2.Prior"),
    },
    "decoder": {
        "unclip": ("unclip", "ours.Decoder"),
        "diffusers": ("diffusers", "peer_diffusers.Decoder"),
        "diffusers, channels_last": ("diffusers", "peer_diffusers.ChannelsLastDecoder"),
        "GLIDE": ("glide_text2im", "peer_glide.Decoder"),
        "DALLE2-pytorch": ("dalle2_pytorch", "peer_dalle2.Decoder"),
    },
}


@dataclass(frozen=True)
class Setting:
    """Device, precision and steps of a whole sample; on a GPU the networks are compiled."""

    device: str  # "cpu" or "cuda"
    bf16: bool
    sample_steps: int
    threads: int = 2  # of each process, on a CPU

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.device == "cuda" else function


@dataclass(frozen=True)
class DecoderSize:
    """A 64 px decoder's U-Net: 31 M parameters, 22 GFLOP per image."""

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_width: int = 64
    context_width: int = 512
    embedding_dim: int = 768
    tokens: int = 77
    image_size: int = 64
    batch: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.image_size, self.image_size)


@dataclass(frozen=True)
class PriorSize:
    """A prior's transformer: 21 M parameters over 77 text tokens and four more."""

    width: int = 512
    layers: int = 6
    heads: int = 8
    embedding_dim: int = 768
    tokens: int = 77
    batch: int = 16
    noises: int = 4  # noised samples per caption in training

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.embedding_dim,)


Size = DecoderSize | PriorSize
SIZES: dict[str, Size] = {"prior": PriorSize(), "decoder": DecoderSize()}
QUICK_SIZES: dict[str, Size] = {
    "prior": PriorSize(32, layers=2, heads=2, embedding_dim=32, tokens=8, batch=2, noises=2),
    "decoder": DecoderSize(
        32, (1, 2), 1, (1,), 32, 48, embedding_dim=32, tokens=8, image_size=16, batch=2
    ),
}


class Problem(NamedTuple):
    """Random inputs and targets of a stage, the same for all contenders."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    image_embedding: Tensor  # N D
    text_embedding: Tensor  # N D
    text_states: Tensor  # N L D
    text_mask: Tensor  # N L

    @classmethod
    def sample(cls, size: Size, device: str) -> "Problem":
        """Sample a batch whose captions differ in length."""
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(size.batch, *shape, generator=generator)

        lengths = torch.randint(3, size.tokens + 1, (size.batch, 1), generator=generator)
        tensors = (
            noise(*size.shape),
            torch.randint(0, 1000, (size.batch,), generator=generator),
            noise(*size.shape),
            noise(size.embedding_dim),
            noise(size.embedding_dim),
            noise(size.tokens, size.embedding_dim),
            torch.arange(size.tokens) < lengths,
        )
        return cls(*(tensor.to(device) for tensor in tensors))


class Contender:
    """A network with its project's optimizer, ready to be timed.

    Subclasses implement `predict` and, if more is timed than training, `prepare` and `guided`.

    Args:
        modules: everything that is trained.
        size: size of the problem.
        setting: device and precision.
        optimizer: creates the project's optimizer from `modules`.
    """

    measures: tuple[str, ...] = ("step", "train")
    noises = 1  # noised samples per caption from which one training step learns
    memory_format = torch.contiguous_format

    def __init__(
        self,
        modules: nn.Module,
        size: Size,
        setting: Setting,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ):
        self.size, self.setting = size, setting
        self.modules = modules.to(setting.device, memory_format=self.memory_format)
        self.optimizer = optimizer(self.modules)
        problem = Problem.sample(size, setting.device)
        self.problem = problem._replace(x_t=problem.x_t.to(memory_format=self.memory_format))
        self._evaluate: Callable[[], Tensor] | None = None

    def predict(self) -> Tensor:
        """Run the network as in training."""
        raise NotImplementedError

    def target(self) -> Tensor:
        """Return the training target, of the shape of `predict`."""
        return self.problem.target

    def prepare(self) -> Callable[[], Tensor]:
        """Compute what is needed once per prompt; return one evaluation without guidance."""
        return self.predict

    def guided(self, problem: Problem) -> Tensor:
        """Sample one prompt with guidance, using the project's own sampler."""
        raise NotImplementedError

    def train(self) -> None:
        """Time this: forward pass, backward pass and optimizer step."""
        self._mode(training=True)
        with self.setting.autocast():
            prediction = self.predict()
        F.mse_loss(prediction.float(), self.target()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def step(self) -> None:
        """Time this: one evaluation while sampling; the prompts were prepared before."""
        self._mode(training=False)
        with self.setting.autocast():
            if self._evaluate is None:
                self._evaluate = self.prepare()
            self._evaluate()

    @torch.inference_mode()
    def sample(self) -> None:
        """Time this: a whole guided sample of one prompt."""
        self._mode(training=False)
        with self.setting.autocast():
            self.guided(Problem(*(tensor[:1] for tensor in self.problem)))

    def _mode(self, *, training: bool) -> None:
        if self.modules.training != training:  # `train` visits every module
            self.modules.train(training)


def find(stage: str, name: str) -> type[Contender]:
    """Import a contender's class and its project."""
    module, _, cls = CONTENDERS[stage][name][1].partition(".")
    return getattr(importlib.import_module(module), cls)


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
