"""unclip's decoder and prior, trained and sampled as in its stages."""

from collections.abc import Callable
from functools import partial

import torch
from contender import GUIDANCE_SCALE, Contender, DecoderSize, PriorSize, Problem, Setting
from torch import Tensor, nn

from unclip.diffusion import GaussianDiffusion, ddpm
from unclip.networks import PriorTransformer, UNet
from unclip.stages import DecoderStage, PriorStage, Stage
from unclip.training.optim import adamw, parameter_groups
from unclip.training.trainer import keep_freed_memory


def decoder_network(size: DecoderSize) -> UNet:
    """Build the paper's U-Net with a learned variance; the peers match its parameters."""
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
    """Build the paper's prior; the peers match its parameters."""
    return PriorTransformer(
        embedding_dim=size.embedding_dim,
        text_width=size.embedding_dim,
        context_length=size.tokens,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
    )


class _Ours(Contender):
    stage: Stage

    def __init__(self, network: nn.Module, size: DecoderSize | PriorSize, setting: Setting):
        keep_freed_memory()
        super().__init__(network, size, setting, lambda m: adamw(parameter_groups(m), lr=1e-4))

    def guided(self, problem: Problem) -> Tensor:
        condition = self.stage.condition({**_condition(problem), "caption": ["a caption"]})
        return self.stage.sample(condition, generators=[torch.Generator().manual_seed(0)])


class Decoder(_Ours):
    """`UNet` in channels_last with fused AdamW and freed memory kept."""

    memory_format = torch.channels_last

    def __init__(self, size: DecoderSize, setting: Setting):
        super().__init__(decoder_network(size), size, setting)
        self.network = setting.compiled(self.modules)
        self.stage = DecoderStage(
            self.modules,
            GaussianDiffusion(variance="learned_range"),
            partial(ddpm, steps=setting.sample_steps),
            embedding_dim=size.embedding_dim,
            text_width=size.embedding_dim,
            image_size=size.image_size,
            guidance_scale=GUIDANCE_SCALE,
        ).to(setting.device)

    def predict(self) -> Tensor:
        return self.network(self.problem.x_t, self.problem.t, **_condition(self.problem))[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Compute the context's keys and values, among others."""
        prepared = self.setting.compiled(self.modules.prepare(**_condition(self.problem)))
        return lambda: prepared(self.problem.x_t, self.problem.t)


class Prior(_Ours):
    """`PriorTransformer` with several noises per caption; its prefix is computed once per prompt."""

    def __init__(self, size: PriorSize, setting: Setting):
        super().__init__(prior_network(size), size, setting)
        self.prefix = setting.compiled(self.modules.prefix)
        self.suffix = setting.compiled(self.modules.suffix)
        self.noises = size.noises
        self.x_t = self.problem.x_t[:, None].repeat(1, size.noises, 1)
        self.t = torch.randint(0, 1000, (size.batch, size.noises), device=setting.device)
        self.stage = PriorStage(
            self.modules,
            GaussianDiffusion(prediction="x0"),
            partial(ddpm, steps=setting.sample_steps),
            text_width=size.embedding_dim,
            scaling="none",
            candidates=1,
            guidance_scale=GUIDANCE_SCALE,
            clip=10.0,
        ).to(setting.device)

    def predict(self) -> Tensor:
        return self.suffix(self._prefix(), self.x_t, self.t)

    def target(self) -> Tensor:
        """Return the embedding once per noise."""
        return self.problem.target[:, None].expand_as(self.x_t)

    def prepare(self) -> Callable[[], Tensor]:
        """Compute the prefix's keys and values."""
        prefix = self._prefix()
        return lambda: self.suffix(prefix, self.problem.x_t[:, None], self.problem.t[:, None])

    def _prefix(self) -> tuple:
        condition = _condition(self.problem)
        del condition["image_embedding"]
        return self.prefix(**condition)


def _condition(problem: Problem) -> dict[str, Tensor]:
    names = ("image_embedding", "text_embedding", "text_states", "text_mask")
    return {name: getattr(problem, name) for name in names}
