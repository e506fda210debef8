"""unclip's networks, trained and sampled as in its stages."""

from collections.abc import Callable
from functools import cache, partial

import torch
from contender import GUIDANCE_SCALE, NOISES, TRANSFORMER, UNET, Contender, Problem, Task
from torch import Tensor

from unclip.clip.model import build_clip
from unclip.diffusion import GaussianDiffusion, ddpm
from unclip.networks import PriorTransformer, UNet
from unclip.stages import PriorStage
from unclip.training.optim import parameter_groups
from unclip.training.trainer import tune_malloc


def unet_network(task: Task) -> UNet:
    """Build the paper's U-Net of a decoder with a learned variance, or of an upsampler."""
    size = {name: getattr(task, name) for name in UNET}
    if not hasattr(task, "context_width"):
        return UNet(**size, in_channels=6)
    dim = task.embedding_dim
    conditioning = {"image_embedding": dim, "text_states": dim}
    conditioning["context_width"] = task.context_width
    return UNet(**size, out_channels=6, conditioning=conditioning)


def prior_network(task: Task) -> PriorTransformer:
    """Build the paper's prior; the peers match its parameters."""
    dim, size = task.embedding_dim, {name: getattr(task, name) for name in TRANSFORMER}
    return PriorTransformer(embedding_dim=dim, text_width=dim, context_length=task.tokens, **size)


def unet(task: Task) -> Contender:
    """`UNet` in channels_last with fused AdamW and freed memory kept."""
    tune_malloc()
    problem = Problem.sample(task)
    x_t = problem.x_t.to(memory_format=torch.channels_last)
    with torch.device(task.device):
        network = unet_network(task).to(memory_format=torch.channels_last)
    condition = problem.condition if network.conditioning else {"concat": problem.concat}
    run = task.compiled(network)

    def predict() -> Tensor:
        return run(x_t, problem.t, **condition)[:, :3]

    def prepare() -> Callable[[], Tensor]:
        prepared = task.compiled(network.bind(**condition))
        return lambda: prepared(x_t, problem.t)

    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4, fused=True)
    return Contender(task, problem, network, optimizer, predict, prepare)


def prior(task: Task) -> Contender:
    """`PriorTransformer` with several noises per caption and one prefix per prompt."""
    tune_malloc()
    problem = Problem.sample(task)
    with torch.device(task.device):
        network = prior_network(task)
    run_prefix, run_suffix = task.compiled(network.prefix), task.compiled(network.suffix)
    x_t = problem.x_t[:, None].repeat(1, NOISES, 1)
    t = torch.randint(0, 1000, (task.batch, NOISES), device=task.device)

    @cache
    def stage() -> PriorStage:
        options = {"text_width": task.embedding_dim, "scaling": "none", "clip_range": 10.0}
        options |= {"candidates": 1, "guidance_scale": GUIDANCE_SCALE}
        sampler = partial(ddpm, steps=task.sample_steps)
        diffusion = GaussianDiffusion(prediction="x0")
        return PriorStage(network, diffusion, sampler, **options).to(task.device)

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


def clip(task: Task) -> Contender:
    """Build open_clip's towers, in channels_last with fused AdamW, without the contrastive loss."""
    tune_malloc()
    problem = Problem.sample(task)
    text = {**task.text, "context_length": task.tokens}
    with torch.device(task.device):
        network = build_clip(embed_dim=task.embedding_dim, vision=task.vision, text=text)
        network = network.to(memory_format=torch.channels_last)
        image = torch.randn(task.batch, 3, *[task.vision["image_size"]] * 2)
        tokens = torch.randint(task.text["vocab_size"], (task.batch, task.tokens))
    encode_image, encode_text = map(task.compiled, (network.encode_image, network.encode_text))

    def predict() -> Tensor:
        return encode_image(image) + encode_text(tokens)

    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4, fused=True)
    return Contender(task, problem, network, optimizer, predict, lambda: predict)
