"""unclip's own decoder and prior, as its stages train and sample them."""

from collections.abc import Callable
from functools import partial

import torch
from contender import Contender
from setting import DecoderSize, PriorSize, Problem, Setting
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, ddpm
from unclip.networks import PriorTransformer, UNet
from unclip.stages import DecoderStage, PriorStage
from unclip.training.optim import adamw, parameter_groups
from unclip.training.trainer import tune_malloc


def decoder_network(size: DecoderSize) -> UNet:
    """The paper's U-Net with a learned variance; its size is what peers are built to."""
    return UNet(
        channels=size.channels,
        multipliers=size.multipliers,
        blocks=size.blocks,
        attention_levels=size.attention_levels,
        head_width=size.head_width,
        out_channels=6,
        conditioning={
            "image_embedding": size.embedding_dim,
            "text_states": size.embedding_dim,
            "context_width": size.context_width,
        },
    )


def prior_network(size: PriorSize) -> PriorTransformer:
    """The paper's prior; its size is what peers are built to."""
    return PriorTransformer(
        embedding_dim=size.embedding_dim,
        text_width=size.embedding_dim,
        context_length=size.tokens,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
    )


class Decoder(Contender):
    """`UNet` in channels_last, fused AdamW, freed memory kept."""

    def __init__(self, size: DecoderSize, setting: Setting):
        tune_malloc()
        problem = Problem.draw(size, setting.device)
        network = decoder_network(size).to(setting.device, memory_format=torch.channels_last)
        optimizer = adamw(parameter_groups(network), lr=1e-4)
        super().__init__(network, optimizer, problem, setting)
        self.network = setting.compiled(network)
        self.x_t = problem.x_t.to(memory_format=torch.channels_last)
        self.stage = DecoderStage(
            network,
            GaussianDiffusion(variance="learned_range"),
            partial(ddpm, steps=setting.sample_steps),
            embedding_dim=size.embedding_dim,
            text_width=size.embedding_dim,
            image_size=size.image_size,
            guidance_scale=size.guidance_scale,
        ).to(setting.device)

    def predict(self) -> Tensor:
        """The noise."""
        return self.network(self.x_t, self.problem.t, **_condition(self.problem))[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Context keys and values, and all else that a prompt needs once."""
        prepared = self.setting.compiled(self.modules.prepare(**_condition(self.problem)))
        return lambda: prepared(self.x_t, self.problem.t)

    def draw(self, problem: Problem) -> Tensor:
        """Through the stage."""
        condition = self.stage.condition(_batch(problem))
        return self.stage.sample(condition, generators=problem.generators)


class Prior(Contender):
    """`PriorTransformer` with several noises a caption, its prefix computed once a prompt."""

    def __init__(self, size: PriorSize, setting: Setting):
        tune_malloc()
        problem = Problem.draw(size, setting.device)
        network = prior_network(size).to(setting.device)
        optimizer = adamw(parameter_groups(network), lr=1e-4)
        super().__init__(network, optimizer, problem, setting)
        self.prefix = setting.compiled(network.prefix)
        self.suffix = setting.compiled(network.suffix)
        self.noises = size.noises
        self.x_t = problem.x_t[:, None].repeat(1, size.noises, 1)
        self.t = torch.randint(0, 1000, (size.batch, size.noises), device=setting.device)
        self.stage = PriorStage(
            network,
            GaussianDiffusion(prediction="x0"),
            partial(ddpm, steps=setting.sample_steps),
            text_width=size.embedding_dim,
            scaling="none",
            candidates=1,
            guidance_scale=size.guidance_scale,
            clip=10.0,
        ).to(setting.device)

    def predict(self) -> Tensor:
        """The clean embedding under each noise."""
        return self.suffix(self._prefix(), self.x_t, self.t)

    def target(self) -> Tensor:
        """The same embedding for all noises of a caption."""
        return self.problem.target[:, None].expand_as(self.x_t)

    def _prefix(self) -> tuple:
        condition = _condition(self.problem)
        condition.pop("image_embedding")
        return self.prefix(**condition)

    def prepare(self) -> Callable[[], Tensor]:
        """The prefix's keys and values."""
        prefix = self._prefix()
        return lambda: self.suffix(prefix, self.problem.x_t[:, None], self.problem.t[:, None])

    def draw(self, problem: Problem) -> Tensor:
        """Through the stage, one candidate."""
        condition = self.stage.condition(_batch(problem))
        return self.stage.sample(condition, generators=problem.generators)


def _condition(problem: Problem) -> dict[str, Tensor]:
    return {
        "image_embedding": problem.image_embedding,
        "text_embedding": problem.text_embedding,
        "text_states": problem.text_states,
        "text_mask": problem.text_mask,
    }


def _batch(problem: Problem) -> dict:
    return {**_condition(problem), "caption": ["a caption"] * len(problem.text_mask)}
