"""The task that all contenders have, and the class that describes one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GUIDANCE_SCALE = 3.0
NOISES = 4  # noised samples per caption in our prior's training
MEASURES = {"prior": ("step", "sample", "train"), "decoder": ("step", "train")}
SHARED = {"embedding_dim": 768, "tokens": 77, "sample_steps": 8}
TRANSFORMER = {"width": 512, "layers": 6, "heads": 8}
UNET = {"channels": 64, "multipliers": (1, 2, 3, 4), "blocks": 2, "attention_levels": (1, 2, 3)}
SIZES = {
    # 21 M parameters; 31 M parameters and 22 GFLOP per image
    "prior": {**SHARED, **TRANSFORMER, "batch": 16},
    "decoder": {**SHARED, **UNET, "head_width": 64, "context_width": 512, "batch": 4},
}
TINY = {"embedding_dim": 32, "tokens": 8, "sample_steps": 2, "batch": 2}
TINY_UNET = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}
QUICK_SIZES = {
    "prior": {**TINY, "width": 32, "layers": 2, "heads": 2},
    "decoder": {**TINY, **TINY_UNET, "head_width": 32, "context_width": 64},
}


class Task(SimpleNamespace):
    """A stage's size, and how all contenders run: `device` ("cpu" or "cuda"), `bf16`, `threads`."""

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.device == "cuda" else function


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
    def sample(cls, task: Task) -> "Problem":
        """Sample a batch whose captions differ in length."""
        torch.manual_seed(0)
        batch, dim, tokens = task.batch, task.embedding_dim, task.tokens
        shape = (3, 64, 64) if hasattr(task, "channels") else (dim,)
        problem = cls(
            x_t=torch.randn(batch, *shape),
            t=torch.randint(0, 1000, (batch,)),
            target=torch.randn(batch, *shape),
            image_embedding=torch.randn(batch, dim),
            text_embedding=torch.randn(batch, dim),
            text_states=torch.randn(batch, tokens, dim),
            text_mask=torch.arange(tokens) < torch.randint(3, tokens + 1, (batch, 1)),
        )
        return cls(*(tensor.to(task.device) for tensor in problem))

    @property
    def condition(self) -> dict[str, Tensor]:
        """The inputs that a prompt determines, by our networks' names."""
        return {name: getattr(self, name) for name in self._fields[3:]}


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
