"""The peers of our networks: diffusers and DALLE2-pytorch.

Their packages are imported where they are used: each only in its own process, and if installed.
"""

from collections.abc import Callable
from functools import partial

import ours
import torch
import torch.nn.functional as F
from contender import GUIDANCE_SCALE, Contender, Problem, Task
from torch import Tensor, nn
from torch.optim import AdamW


def diffusers_modules(task: Task) -> nn.ModuleDict:
    """Build the U-Net of ADM and GLIDE, and the layers that pass embeddings and caption to it."""
    from diffusers import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    attends = [level in task.attention_levels for level in range(len(task.multipliers))]
    down = ["SimpleCrossAttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends]
    up = ["SimpleCrossAttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in attends]
    unet = UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        block_out_channels=[task.channels * multiplier for multiplier in task.multipliers],
        layers_per_block=task.blocks,
        down_block_types=down,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=up[::-1],
        cross_attention_dim=task.context_width,
        attention_head_dim=task.head_width,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=task.embedding_dim,
        time_embed_dim=4 * task.channels,
        cross_attention_dim=task.context_width,
    )
    return nn.ModuleDict({"unet": unet, "projection": projection})


def diffusers_decoder(task: Task, *, channels_last: bool = False) -> Contender:
    """diffusers' unCLIP U-Net."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    problem = Problem.sample(task)
    x_t = problem.x_t.to(memory_format=memory_format)
    with torch.device(task.device):
        modules = diffusers_modules(task).to(memory_format=memory_format)
    unet = task.compiled(modules["unet"])

    def prepare() -> Callable[[], Tensor]:
        """Compute the projections, as UnCLIPPipeline does once per prompt."""
        context, embedding = modules["projection"](
            image_embeddings=problem.image_embedding,
            prompt_embeds=problem.text_embedding,
            text_encoder_hidden_states=problem.text_states,
            do_classifier_free_guidance=False,
        )
        mask = F.pad(problem.text_mask, (4, 0), value=True)
        options = {"class_labels": embedding, "attention_mask": mask}
        return lambda: unet(x_t, problem.t, context, **options).sample

    optimizer = AdamW(modules.parameters(), lr=1e-4)
    return Contender(task, problem, modules, optimizer, lambda: prepare()()[:, :3], prepare)


def diffusers_prior(task: Task) -> Contender:
    """diffusers' PriorTransformer, which computes the whole sequence at each step."""
    from diffusers import PriorTransformer, UnCLIPScheduler

    problem = Problem.sample(task)
    network = PriorTransformer(
        num_attention_heads=task.heads,
        attention_head_dim=task.width // task.heads,
        num_layers=task.layers,
        embedding_dim=task.embedding_dim,
        num_embeddings=task.tokens,
    ).to(task.device)
    run = task.compiled(network)

    def predict(given: Problem = problem) -> Tensor:
        text = (given.text_embedding, given.text_states, given.text_mask)
        return run(given.x_t, given.t, *text).predicted_image_embedding

    def guided(problem: Problem) -> Tensor:
        """Sample like UnCLIPPipeline; both halves of the guidance are one batch."""
        both = Problem(*(torch.cat([tensor, tensor]) for tensor in problem))
        scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        )
        scheduler.set_timesteps(task.sample_steps, device=task.device)
        z, timesteps = torch.randn_like(problem.x_t), scheduler.timesteps
        for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
            uncond, cond = predict(both._replace(x_t=torch.cat([z, z]), t=t)).chunk(2)
            output = uncond + GUIDANCE_SCALE * (cond - uncond)
            z = scheduler.step(output, t, z, prev_timestep=previous).prev_sample
        return z

    optimizer = AdamW(network.parameters(), lr=1e-4)
    return Contender(task, problem, network, optimizer, predict, lambda: predict, guided)


def diffusers_unet(task: Task) -> nn.Module:
    """Build the U-Net of diffusers' unCLIP upsamplers, without attention."""
    from diffusers import UNet2DModel

    levels = len(task.multipliers)
    return UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=[task.channels * multiplier for multiplier in task.multipliers],
        layers_per_block=task.blocks,
        down_block_types=["ResnetDownsampleBlock2D"] * levels,
        up_block_types=["ResnetUpsampleBlock2D"] * levels,
        resnet_time_scale_shift="scale_shift",
        add_attention=False,
    )


def diffusers_upsampler(task: Task) -> Contender:
    """diffusers' upsampler in channels_last."""
    problem = Problem.sample(task)
    with torch.device(task.device):
        network = diffusers_unet(task).to(memory_format=torch.channels_last)
    run = task.compiled(network)
    x_t = torch.cat([problem.x_t, problem.concat], dim=1).to(memory_format=torch.channels_last)

    def predict() -> Tensor:
        return run(x_t, problem.t).sample

    optimizer = AdamW(network.parameters(), lr=1e-4)
    return Contender(task, problem, network, optimizer, predict, lambda: predict)


def dalle2_decoder(task: Task) -> Contender:
    """DALLE2-pytorch's Unet, of 30.8 M parameters (ours has 31.0 M)."""
    from dalle2_pytorch.dalle2_pytorch import Unet
    from dalle2_pytorch.optimizer import get_optimizer

    problem = Problem.sample(task)
    network = Unet(
        dim=task.channels + 8,
        cond_dim=task.context_width // 4,
        image_embed_dim=task.embedding_dim,
        text_embed_dim=task.embedding_dim,
        dim_mults=task.multipliers,
        num_resnet_blocks=task.blocks,
        self_attn=tuple(k in task.attention_levels for k in range(len(task.multipliers))),
        max_text_len=task.tokens,
        cond_on_text_encodings=True,
        cond_on_image_embeds=True,
        channels_out=6,
    ).to(task.device)
    run = task.compiled(network)

    def evaluate() -> Tensor:
        embeddings = {"image_embed": problem.image_embedding, "text_encodings": _masked(problem)}
        return run(problem.x_t, problem.t, **embeddings)

    optimizer = get_optimizer(network.parameters())
    predict, prepare = (lambda: evaluate()[:, :3]), (lambda: evaluate)
    return Contender(task, problem, network, optimizer, predict, prepare)


def dalle2_prior(task: Task) -> Contender:
    """DALLE2-pytorch's DiffusionPriorNetwork, as wide as the embeddings: 21.3 M parameters."""
    from dalle2_pytorch.dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
    from dalle2_pytorch.optimizer import get_optimizer

    problem, dim = Problem.sample(task), task.embedding_dim
    network = DiffusionPriorNetwork(dim=dim, max_text_len=task.tokens, depth=2).to(task.device)
    run = task.compiled(network)
    diffusion = DiffusionPrior(network, image_embed_dim=dim, sample_timesteps=task.sample_steps)
    diffusion.to(task.device)

    def text(given: Problem) -> dict[str, Tensor]:
        return {"text_embed": given.text_embedding, "text_encodings": _masked(given)}

    def predict() -> Tensor:
        return run(problem.x_t, problem.t, **text(problem))

    def guided(problem: Problem) -> Tensor:
        """Sample; the two halves of the guidance are computed one after the other."""
        steps = task.sample_steps + 1  # makes `sample_steps` evaluations
        options = {"cond_scale": GUIDANCE_SCALE, "timesteps": steps}
        return diffusion.p_sample_loop(problem.x_t.shape, text_cond=text(problem), **options)

    optimizer = get_optimizer(network.parameters())
    return Contender(task, problem, network, optimizer, predict, lambda: predict, guided)


def _masked(problem: Problem) -> Tensor:
    """Return text states with zeros for padding, from which DALLE2-pytorch derives its mask."""
    return problem.text_states * problem.text_mask[..., None]


# stage → contender → its package and the function that builds it; ours is first
CONTENDERS = {
    "prior": {
        "unclip": ("unclip", ours.prior),
        "diffusers": ("diffusers", diffusers_prior),
        "DALLE2-pytorch": ("dalle2_pytorch", dalle2_prior),
    },
    "decoder": {
        "unclip": ("unclip", ours.unet),
        "diffusers": ("diffusers", diffusers_decoder),
        "diffusers, channels_last": ("diffusers", partial(diffusers_decoder, channels_last=True)),
        "DALLE2-pytorch": ("dalle2_pytorch", dalle2_decoder),
    },
}
CONTENDERS["clip"] = {"unclip": ("unclip", ours.clip)}  # it is open_clip's own network
for upsampler in ("upsampler_256", "upsampler_1024"):
    peer = ("diffusers", diffusers_upsampler)
    CONTENDERS[upsampler] = {"unclip": ("unclip", ours.unet), "diffusers, channels_last": peer}
