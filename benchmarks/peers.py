"""The peers of our networks: those of diffusers, which is imported where it is used."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contender import GUIDANCE_SCALE, Contender, Problem, Task, our_clip, our_prior, our_unet
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


def diffusers_decoder(task: Task) -> Contender:
    """diffusers' unCLIP U-Net in channels_last."""
    problem = Problem.sample(task)
    x_t = problem.x_t.to(memory_format=torch.channels_last)
    with torch.device(task.device):
        modules = diffusers_modules(task).to(memory_format=torch.channels_last)
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


def diffusers_upsampler(task: Task) -> Contender:
    """Build the U-Net of diffusers' unCLIP upsamplers, without attention, in channels_last."""
    from diffusers import UNet2DModel

    problem, levels = Problem.sample(task), len(task.multipliers)
    with torch.device(task.device):
        network = UNet2DModel(
            in_channels=6,
            out_channels=3,
            block_out_channels=[task.channels * multiplier for multiplier in task.multipliers],
            layers_per_block=task.blocks,
            down_block_types=["ResnetDownsampleBlock2D"] * levels,
            up_block_types=["ResnetUpsampleBlock2D"] * levels,
            resnet_time_scale_shift="scale_shift",
            add_attention=False,
        ).to(memory_format=torch.channels_last)
    run = task.compiled(network)
    x_t = torch.cat([problem.x_t, problem.concat], dim=1).to(memory_format=torch.channels_last)

    def predict() -> Tensor:
        return run(x_t, problem.t).sample

    optimizer = AdamW(network.parameters(), lr=1e-4)
    return Contender(task, problem, network, optimizer, predict, lambda: predict)


# stage → contender → the function that builds it; ours is first
CONTENDERS = {
    "clip": {"unclip": our_clip},  # it is open_clip's own network
    "prior": {"unclip": our_prior, "diffusers": diffusers_prior},
    "decoder": {"unclip": our_unet, "diffusers, channels_last": diffusers_decoder},
}
for upsampler in ("upsampler_256", "upsampler_1024"):
    CONTENDERS[upsampler] = {"unclip": our_unet, "diffusers, channels_last": diffusers_upsampler}
