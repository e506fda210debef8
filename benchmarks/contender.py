"""The task that all contenders have, the class that describes one, and unclip's networks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from cli.config_check import compose_strictly
from unclip import bundle
from unclip.diffusion import GaussianDiffusion, ddpm
from unclip.networks import PriorTransformer, UNet
from unclip.stages import PriorStage
from unclip.training.optim import parameter_groups
from unclip.training.trainer import tune_malloc

GUIDANCE_SCALE = 3.0
NOISES = 4  # noised samples per caption in our prior's training
MEASURES = {"prior": ("step", "sample", "train")}
MEASURES |= dict.fromkeys(("decoder", "upsampler_256", "upsampler_1024", "clip"), ("step", "train"))
TRANSFORMER = ("width", "layers", "heads")
UNET = ("channels", "multipliers", "blocks", "attention_levels", "head_width")


def _prior(
    width: int, layers: int, heads: int, dim: int, tokens: int, batch: int
) -> dict[str, Any]:
    size = {"width": width, "layers": layers, "heads": heads, "embedding_dim": dim}
    return {**size, "tokens": tokens, "sample_steps": 8, "batch": batch}


def _unet(
    channels: int, multipliers: tuple, blocks: int, batch: int, **more: Any
) -> dict[str, Any]:
    size = {"channels": channels, "multipliers": multipliers, "blocks": blocks, "batch": batch}
    defaults = {"embedding_dim": 768, "tokens": 77, "side": 64, "head_width": 64}
    levels = tuple(range(1, len(multipliers))) if "context_width" in more else ()
    return {**size, **defaults, "attention_levels": levels, **more}


FOUR, SIX = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)
# The sizes of conf/preset, without the front ends and feature maps that peers do not have.
SIZES = {
    "bench": {  # 21 M parameters; 31 M parameters and 22 GFLOP per image
        "prior": _prior(512, 6, 8, 768, 77, 16),
        "decoder": _unet(64, FOUR, 2, 4, context_width=512),
    },
    "emoji": {
        "prior": _prior(192, 4, 3, 192, 24, 64),
        "decoder": _unet(32, FOUR, 1, 16, context_width=128, head_width=32),
        "upsampler_256": _unet(64, (1, 1), 1, 16),
        "upsampler_1024": _unet(32, (1, 1), 1, 16),
    },
    "karlo": {
        "prior": _prior(2048, 20, 32, 768, 77, 64),
        "decoder": _unet(320, FOUR, 3, 16, context_width=1536),
        "upsampler_256": _unet(320, FOUR, 3, 32),
    },
    "paper": {
        "prior": _prior(2048, 24, 32, 1024, 256, 64),
        "decoder": _unet(512, FOUR, 3, 16, context_width=2048),
        "upsampler_256": _unet(320, FOUR, 3, 32),
        "upsampler_1024": _unet(192, SIX, 2, 16, side=256),
    },
    "quick": {
        "prior": {**_prior(32, 2, 2, 32, 8, 2), "sample_steps": 2},
        "decoder": _unet(32, (1, 2), 1, 2, context_width=64, head_width=32, embedding_dim=32),
        "upsampler_256": _unet(32, (1, 1), 1, 2, side=16),
    },
}


for scale in ("emoji", "karlo", "paper", "quick"):
    SIZES[scale]["clip"] = {"scale": scale}  # conf/preset/clip has the sizes


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


def our_unet_network(task: Task) -> UNet:
    """Build the paper's U-Net of a decoder with a learned variance, or of an upsampler."""
    size, dim = {name: getattr(task, name) for name in UNET}, task.embedding_dim
    if not hasattr(task, "context_width"):
        return UNet(**size, in_channels=6)
    widths = {"image_embedding": dim, "text_states": dim, "context_width": task.context_width}
    return UNet(**size, out_channels=6, conditioning=widths)


def our_unet(task: Task) -> Contender:
    """`UNet` in channels_last with fused AdamW and freed memory kept."""
    tune_malloc()
    problem = Problem.sample(task)
    x_t = problem.x_t.to(memory_format=torch.channels_last)
    with torch.device(task.device):
        network = our_unet_network(task).to(memory_format=torch.channels_last)
    condition = problem.condition if network.conditioning else {"concat": problem.concat}
    run = task.compiled(network)

    def predict() -> Tensor:
        return run(x_t, problem.t, **condition)[:, :3]

    def prepare() -> Callable[[], Tensor]:
        prepared = task.compiled(network.bind(**condition))
        return lambda: prepared(x_t, problem.t)

    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4, fused=True)
    return Contender(task, problem, network, optimizer, predict, prepare)


def our_prior(task: Task) -> Contender:
    """`PriorTransformer` with several noises per caption and one prefix per prompt."""
    tune_malloc()
    problem, dim = Problem.sample(task), task.embedding_dim
    size = {name: getattr(task, name) for name in TRANSFORMER} | {"context_length": task.tokens}
    with torch.device(task.device):
        network = PriorTransformer(embedding_dim=dim, text_width=dim, **size)
    run_prefix, run_suffix = task.compiled(network.prefix), task.compiled(network.suffix)
    x_t = problem.x_t[:, None].repeat(1, NOISES, 1)
    t = torch.randint(0, 1000, (task.batch, NOISES), device=task.device)

    @cache
    def stage() -> PriorStage:
        options = {"text_width": task.embedding_dim, "scaling": "none", "clip_range": 10.0}
        options |= {"candidates": 1, "guidance_scale": GUIDANCE_SCALE}
        parts = GaussianDiffusion(prediction="x0"), partial(ddpm, steps=task.sample_steps)
        return PriorStage(network, *parts, **options).to(task.device)

    def prefix() -> tuple:
        text = {name: value for name, value in problem.condition.items() if "text" in name}
        return run_prefix(**text)

    def predict() -> Tensor:
        return run_suffix(prefix(), x_t, t)

    def prepare() -> Callable[[], Tensor]:
        prepared = prefix()
        return lambda: run_suffix(prepared, problem.x_t[:, None], problem.t[:, None])

    def guided(problem: Problem) -> Tensor:
        condition = stage().condition({**problem.condition, "caption": ["a caption"]})
        return stage().sample(condition, generators=[torch.Generator().manual_seed(0)])

    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4, fused=True)
    return Contender(task, problem, network, optimizer, predict, prepare, guided, NOISES)


def our_clip(task: Task) -> Contender:
    """Build open_clip's towers, in channels_last with fused AdamW, without the contrastive loss."""
    tune_malloc()
    cfg = compose_strictly("train", ["stage=clip", f"scale={task.scale}"])
    size, batch = cfg.network, cfg.data.batch_size
    sizes = {"batch": batch, "embedding_dim": size.embed_dim, "tokens": size.context_length}
    problem = Problem.sample(Task(**vars(task), **sizes))
    with torch.device(task.device):
        network = bundle.build(OmegaConf.to_container(cfg.model, resolve=True)).model
        network = network.to(memory_format=torch.channels_last)
        image = torch.randn(batch, 3, size.image_size, size.image_size)
        tokens = torch.randint(network.vocab_size, (batch, size.context_length))
    encode_image, encode_text = map(task.compiled, (network.encode_image, network.encode_text))

    def predict() -> Tensor:
        return encode_image(image) + encode_text(tokens)

    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4, fused=True)
    return Contender(task, problem, network, optimizer, predict, lambda: predict)
