"""The task that all contenders have, and the class that describes one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GUIDANCE_SCALE = 3.0
NOISES = 4  # noised samples per caption in our prior's training
MEASURES = {"prior": ("step", "sample", "train")}
MEASURES |= dict.fromkeys(("decoder", "upsampler_256", "upsampler_1024", "clip"), ("step", "train"))
TRANSFORMER = ("width", "layers", "heads")
UNET = ("channels", "multipliers", "blocks", "attention_levels", "head_width")


def prior(width: int, layers: int, heads: int, dim: int, tokens: int, batch: int) -> dict[str, Any]:
    size = {"width": width, "layers": layers, "heads": heads, "embedding_dim": dim}
    return {**size, "tokens": tokens, "sample_steps": 8, "batch": batch}


def unet(channels: int, multipliers: tuple, blocks: int, batch: int, **more: Any) -> dict[str, Any]:
    size = {"channels": channels, "multipliers": multipliers, "blocks": blocks, "batch": batch}
    defaults = {"embedding_dim": 768, "tokens": 77, "side": 64, "head_width": 64}
    levels = tuple(range(1, len(multipliers))) if "context_width" in more else ()
    return {**size, **defaults, "attention_levels": levels, **more}


def clip(dim: int, tokens: int, batch: int, vision: dict, text: dict) -> dict[str, Any]:
    return {"embedding_dim": dim, "tokens": tokens, "batch": batch, "vision": vision, "text": text}


def tower(width: int, layers: int, **more: int) -> dict[str, int]:
    return {"width": width, "layers": layers, **more}


FOUR, SIX = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)
# The sizes of conf/preset, without the front ends and feature maps that peers do not have.
SIZES = {
    "bench": {  # 21 M parameters; 31 M parameters and 22 GFLOP per image
        "prior": prior(512, 6, 8, 768, 77, 16),
        "decoder": unet(64, FOUR, 2, 4, context_width=512),
    },
    "emoji": {
        "prior": prior(192, 4, 3, 192, 24, 64),
        "decoder": unet(32, FOUR, 1, 16, context_width=128, head_width=32),
        "upsampler_256": unet(64, (1, 1), 1, 16),
        "upsampler_1024": unet(32, (1, 1), 1, 16),
        "clip": clip(
            *(192, 24, 256, tower(192, 4, head_width=48, image_size=64, patch_size=8)),
            tower(192, 3, heads=4, vocab_size=1024),
        ),
    },
    "karlo": {
        "prior": prior(2048, 20, 32, 768, 77, 64),
        "decoder": unet(320, FOUR, 3, 16, context_width=1536),
        "upsampler_256": unet(320, FOUR, 3, 32),
        "clip": clip(
            *(768, 77, 256, tower(1024, 24, image_size=224, patch_size=14)),
            tower(768, 12, heads=12, vocab_size=49408),
        ),
    },
    "paper": {
        "prior": prior(2048, 24, 32, 1024, 256, 64),
        "decoder": unet(512, FOUR, 3, 16, context_width=2048),
        "upsampler_256": unet(320, FOUR, 3, 32),
        "upsampler_1024": unet(192, SIX, 2, 16, side=256),
        "clip": clip(
            *(1024, 256, 64, tower(1280, 32, head_width=80, image_size=256, patch_size=16)),
            tower(1024, 24, heads=16, vocab_size=49408),
        ),
    },
    "quick": {
        "prior": {**prior(32, 2, 2, 32, 8, 2), "sample_steps": 2},
        "decoder": unet(32, (1, 2), 1, 2, context_width=64, head_width=32, embedding_dim=32),
        "upsampler_256": unet(32, (1, 1), 1, 2, side=16),
        "clip": clip(
            *(32, 8, 2, tower(64, 1, image_size=32, patch_size=16)),
            tower(32, 1, heads=2, vocab_size=600),
        ),
    },
}


class Task(SimpleNamespace):
    """A stage's size, and how all contenders run: `device`, `bf16`, `threads`, `compile`."""

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.compile else function


class Problem(NamedTuple):
    """Random inputs and targets of a stage, the same for all contenders."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    image_embedding: Tensor  # N D
    text_embedding: Tensor  # N D
    text_states: Tensor  # N L D
    text_mask: Tensor  # N L
    concat: Tensor  # the enlarged image of an upsampler

    @classmethod
    def sample(cls, task: Task) -> "Problem":
        """Sample a batch whose captions differ in length."""
        torch.manual_seed(0)
        batch, dim, tokens = task.batch, task.embedding_dim, task.tokens
        shape = (3, task.side, task.side) if hasattr(task, "channels") else (dim,)
        problem = cls(
            x_t=torch.randn(batch, *shape),
            t=torch.randint(0, 1000, (batch,)),
            target=torch.randn(batch, *shape),
            image_embedding=torch.randn(batch, dim),
            text_embedding=torch.randn(batch, dim),
            text_states=torch.randn(batch, tokens, dim),
            text_mask=torch.arange(tokens) < torch.randint(3, tokens + 1, (batch, 1)),
            concat=torch.randn(batch, *shape),
        )
        return cls(*(tensor.to(task.device) for tensor in problem))

    @property
    def condition(self) -> dict[str, Tensor]:
        """The inputs that a prompt determines, by our networks' names."""
        return {name: getattr(self, name) for name in self._fields[3:-1]}


@dataclass
class Contender:
    """A network with its project's optimizer, ready to be timed."""

    task: Task
    problem: Problem
    modules: nn.Module  # everything that is trained
    optimizer: torch.optim.Optimizer
    predict: Callable[[], Tensor]  # runs the network as in training
    prepare: Callable[[], Callable[[], Tensor]]  # once per prompt; returns an unguided evaluation
    guided: Callable[[Problem], Tensor] | None = None  # samples with the project's own sampler
    noises: int = 1  # noised samples per caption from which a training step learns
    evaluate: Callable[[], Tensor] | None = None  # kept from `prepare`

    def train(self) -> None:
        """Run a forward pass, a backward pass and an optimizer step."""
        self._mode(training=True)
        with self.task.autocast():
            prediction = self.predict()
        target = self.problem.target
        target = target if self.noises == 1 else target[:, None].expand_as(prediction)
        F.mse_loss(prediction.float(), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def step(self) -> None:
        """Evaluate the network once as in sampling; the first call prepares the prompts."""
        self._mode(training=False)
        with self.task.autocast():
            if self.evaluate is None:
                self.evaluate = self.prepare()
            self.evaluate()

    @torch.inference_mode()
    def sample(self) -> None:
        """Sample one prompt with guidance."""
        self._mode(training=False)
        with self.task.autocast():
            self.guided(Problem(*(tensor[:1] for tensor in self.problem)))

    def _mode(self, *, training: bool) -> None:
        if self.modules.training != training:  # `train` visits every module
            self.modules.train(training)


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
