"""The smallest stages, and batches with CLIP's features for them."""

from functools import partial

import torch
import torch.nn.functional as F
from random_weights import randomize

from unclip.diffusion import GaussianDiffusion, LogitNormal, ddim, dpm_solver_pp_2m
from unclip.networks import ARTransformer, PriorTransformer, TextTransformer, UNet
from unclip.stages import AutoregressivePriorStage, DecoderStage, PriorStage, UpsamplerStage

D, W, L, BUCKETS = 8, 12, 5, 16
TEXT = {"embedding_dim": D, "text_width": W, "context_length": L}
TRANSFORMER = {"width": 16, "layers": 2, "heads": 2}


def embedded_batch(count: int = 4) -> dict:
    return {
        "caption": ["a red apple"] * count,
        "image": torch.rand(count, 3, 8, 8) * 2 - 1,
        "low_res": torch.rand(count, 3, 2, 2) * 2 - 1,
        "image_embedding": F.normalize(torch.randn(count, D), dim=1),
        "text_embedding": F.normalize(torch.randn(count, D), dim=1),
        "text_states": torch.randn(count, L, W),
        "text_mask": torch.arange(L)[None].expand(count, -1) < 4,
        "tokens": torch.randint(0, 20, (count, L)),
    }


def randomized(stage):
    """Give all parameters random values, so that branches that start at zero take part."""
    return randomize(stage, std=0.2)


def train(stage, batch: dict, *, steps: int, lr: float) -> list[float]:
    """Train on one batch and return the losses of all steps."""
    optimizer, losses = torch.optim.AdamW(stage.parameters(), lr=lr), []
    for _ in range(steps):
        loss = stage.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def text_encoder(layers: int) -> TextTransformer:
    return TextTransformer(vocabulary_size=20, context_length=L, width=W, layers=layers, heads=2)


def prior(**options) -> PriorStage:
    return PriorStage(
        PriorTransformer(**TEXT, **TRANSFORMER),
        GaussianDiffusion(prediction="x0"),
        partial(ddim, steps=4),
        text_width=W,
        **options,
    )


def prior_ar(components: int = D, buckets: int = BUCKETS, **options) -> AutoregressivePriorStage:
    """Return a stage fitted to embeddings whose dimensions all vary equally."""
    network = ARTransformer(**TEXT, **TRANSFORMER, components=components, buckets=buckets)
    stage = AutoregressivePriorStage(network, text_width=W, **options)
    stage.fit_statistics([embedded_batch(300), embedded_batch(200)])
    return stage


def unet(**options) -> UNet:
    return UNet(channels=16, multipliers=[1, 2], blocks=1, head_width=8, groups=8, **options)


def decoder(*, feature_maps: bool = False, **options) -> DecoderStage:
    """Return a decoder with a learned variance, or with feature maps and logit-normal timesteps."""
    conditioning = {"image_embedding": D, "text_states": W, "context_width": 16}
    if feature_maps:
        maps = {"levels": [0, 1], "hidden": 8, "rank": 3, "image_size": 8}
        network = unet(conditioning=conditioning, attention_levels=[0, 1], feature_maps=maps)
        density = LogitNormal(mean=0.6, std=1.0)
        diffusion = GaussianDiffusion(prediction="x0", timestep_density=density)
        sampler = partial(ddim, steps=3)
    else:
        network = unet(conditioning=conditioning, attention_levels=[1], out_channels=6)
        diffusion = GaussianDiffusion(prediction="x0", variance="learned_range")
        sampler = partial(dpm_solver_pp_2m, steps=4)
    sizes = {"embedding_dim": D, "text_width": W, "image_size": 8}
    return DecoderStage(network, diffusion, sampler, **sizes, **options)


def upsampler(**options) -> UpsamplerStage:
    return UpsamplerStage(
        unet(in_channels=6),
        GaussianDiffusion(prediction="x0"),
        partial(ddim, steps=3),
        name="upsampler_256",
        **options,
    )
