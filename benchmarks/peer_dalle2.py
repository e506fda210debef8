"""DALLE2-pytorch's U-Net and prior, as near ours in size as can be, its optimizer and samplers."""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

from collections.abc import Callable
from functools import partial
from itertools import product

import ours
import torch
from contender import Contender, nearest
from dalle2_pytorch.dalle2_pytorch import Decoder as Diffusion
from dalle2_pytorch.dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork, Unet
from dalle2_pytorch.optimizer import get_optimizer
from setting import DecoderSize, PriorSize, Problem, Setting
from torch import Tensor


class Decoder(Contender):
    """Unet with self-attention at the same levels."""

    def __init__(self, size: DecoderSize, setting: Setting):
        problem = Problem.draw(size, setting.device)
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
        choices = [
            {"dim": dim, "cond_dim": context_width}
            for dim, context_width in product(
                (size.channels - 8, size.channels, size.channels + 8),
                (size.context_width // 4, size.context_width // 2, size.context_width),
            )
        ]
        network = nearest(make, choices, _count(ours.decoder_network(size))).to(setting.device)
        optimizer = get_optimizer(network.parameters())
        super().__init__(network, optimizer, problem, setting)
        self.diffusion = Diffusion(
            network,
            image_sizes=(size.image_size,),
            sample_timesteps=setting.sample_steps,
            beta_schedule=("cosine",),
        ).to(setting.device)
        self.network = setting.compiled(network)
        self.guidance_scale = size.guidance_scale

    def _evaluate(self) -> Tensor:
        return self.network(
            self.problem.x_t,
            self.problem.t,
            image_embed=self.problem.image_embedding,
            text_encodings=_masked(self.problem),
        )

    def predict(self) -> Tensor:
        """The noise."""
        return self._evaluate()[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Nothing: the conditions are computed at each step."""
        return self._evaluate

    def draw(self, problem: Problem) -> Tensor:
        """The two halves of the guidance one after the other, as it does."""
        return self.diffusion.sample(
            image_embed=problem.image_embedding,
            text_encodings=_masked(problem),
            cond_scale=self.guidance_scale,
        )


class Prior(Contender):
    """DiffusionPriorNetwork, whose width is always that of the embeddings."""

    def __init__(self, size: PriorSize, setting: Setting):
        problem = Problem.draw(size, setting.device)
        make = partial(DiffusionPriorNetwork, dim=size.embedding_dim, max_text_len=size.tokens)
        choices = [
            {"depth": depth, "ff_mult": mult} for depth, mult in product(range(1, 9), (3, 4))
        ]
        network = nearest(make, choices, _count(ours.prior_network(size))).to(setting.device)
        optimizer = get_optimizer(network.parameters())
        super().__init__(network, optimizer, problem, setting)
        self.diffusion = DiffusionPrior(
            network, image_embed_dim=size.embedding_dim, sample_timesteps=setting.sample_steps
        ).to(setting.device)
        self.network = setting.compiled(network)
        self.guidance_scale = size.guidance_scale

    def predict(self) -> Tensor:
        """The clean embedding."""
        return self.network(self.problem.x_t, self.problem.t, **_text(self.problem))

    def prepare(self) -> Callable[[], Tensor]:
        """Nothing: the whole sequence is computed at each step."""
        return self.predict

    def draw(self, problem: Problem) -> Tensor:
        """The two halves of the guidance one after the other, as it does."""
        return self.diffusion.p_sample_loop(
            tuple(problem.x_t.shape),
            text_cond=_text(problem),
            cond_scale=self.guidance_scale,
            timesteps=self.setting.sample_steps + 1,  # which makes so many evaluations
        )


def _masked(problem: Problem) -> Tensor:
    """Text states with zeros for padding, from which it reads the mask."""
    return problem.text_states * problem.text_mask[..., None]


def _text(problem: Problem) -> dict[str, Tensor]:
    return {"text_embed": problem.text_embedding, "text_encodings": _masked(problem)}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
