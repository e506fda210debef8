"""DALLE2-pytorch's U-Net and prior, near ours in size, with its own optimizer and samplers."""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import ours
import torch
from contender import (
    GUIDANCE_SCALE,
    Contender,
    DecoderSize,
    PriorSize,
    Problem,
    Setting,
    count_parameters,
)
from dalle2_pytorch.dalle2_pytorch import Decoder as Diffusion
from dalle2_pytorch.dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork, Unet
from dalle2_pytorch.optimizer import get_optimizer
from torch import Tensor, nn


class Decoder(Contender):
    """Unet with self-attention at the same levels as ours."""

    def __init__(self, size: DecoderSize, setting: Setting):
        levels = range(len(size.multipliers))
        make = partial(
            Unet,
            image_embed_dim=size.embedding_dim,
            text_embed_dim=size.embedding_dim,
            dim_mults=size.multipliers,
            num_resnet_blocks=size.blocks,
            self_attn=tuple(level in size.attention_levels for level in levels),
            max_text_len=size.tokens,
            cond_on_text_encodings=True,
            cond_on_image_embeds=True,
            channels_out=6,
        )
        widths = (size.channels - 8, size.channels, size.channels + 8)
        contexts = (size.context_width // 4, size.context_width // 2, size.context_width)
        choices = [{"dim": dim, "cond_dim": width} for dim, width in product(widths, contexts)]
        network = _nearest(make, choices, count_parameters(ours.decoder_network(size)))
        super().__init__(network, size, setting, _optimizer)
        self.network = setting.compiled(self.modules)
        self.diffusion = Diffusion(
            self.modules,
            image_sizes=(size.image_size,),
            sample_timesteps=setting.sample_steps,
            beta_schedule=("cosine",),
        ).to(setting.device)

    def predict(self) -> Tensor:
        return self.prepare()()[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Prepare nothing: the conditions are computed at each step."""
        problem = self.problem
        return lambda: self.network(
            problem.x_t,
            problem.t,
            image_embed=problem.image_embedding,
            text_encodings=_masked(problem),
        )

    def guided(self, problem: Problem) -> Tensor:
        """Sample; the two halves of the guidance are computed one after the other."""
        return self.diffusion.sample(
            image_embed=problem.image_embedding,
            text_encodings=_masked(problem),
            cond_scale=GUIDANCE_SCALE,
        )


class Prior(Contender):
    """DiffusionPriorNetwork, whose width is always that of the embeddings."""

    def __init__(self, size: PriorSize, setting: Setting):
        make = partial(DiffusionPriorNetwork, dim=size.embedding_dim, max_text_len=size.tokens)
        choices = [{"depth": n, "ff_mult": mult} for n, mult in product(range(1, 9), (3, 4))]
        network = _nearest(make, choices, count_parameters(ours.prior_network(size)))
        super().__init__(network, size, setting, _optimizer)
        self.network = setting.compiled(self.modules)
        self.diffusion = DiffusionPrior(
            self.modules,
            image_embed_dim=size.embedding_dim,
            sample_timesteps=setting.sample_steps,
        ).to(setting.device)

    def predict(self) -> Tensor:
        return self.network(self.problem.x_t, self.problem.t, **_text(self.problem))

    def guided(self, problem: Problem) -> Tensor:
        """Sample; the two halves of the guidance are computed one after the other."""
        return self.diffusion.p_sample_loop(
            tuple(problem.x_t.shape),
            text_cond=_text(problem),
            cond_scale=GUIDANCE_SCALE,
            timesteps=self.setting.sample_steps + 1,  # makes `sample_steps` evaluations
        )


def _nearest(make: Callable, choices: Iterable[dict], parameters: int) -> nn.Module:
    """Build the choice whose number of parameters is nearest."""

    def distance(choice: dict) -> int:
        with torch.device("meta"):
            return abs(count_parameters(make(**choice)) - parameters)

    return make(**min(choices, key=distance))


def _optimizer(modules: nn.Module) -> torch.optim.Optimizer:
    return get_optimizer(modules.parameters())


def _masked(problem: Problem) -> Tensor:
    """Return text states with zeros for padding, from which the network derives its mask."""
    return problem.text_states * problem.text_mask[..., None]


def _text(problem: Problem) -> dict[str, Tensor]:
    return {"text_embed": problem.text_embedding, "text_encodings": _masked(problem)}
