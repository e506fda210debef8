"""diffusers' unCLIP U-Net and prior, sampled as in its UnCLIPPipeline."""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contender import GUIDANCE_SCALE, Contender, DecoderSize, PriorSize, Problem, Setting
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn


def unet(size: DecoderSize) -> UNet2DConditionModel:
    """Build the U-Net of ADM and GLIDE from diffusers' blocks."""
    attends = [level in size.attention_levels for level in range(len(size.multipliers))]
    down = ["SimpleCrossAttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends]
    up = ["SimpleCrossAttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in attends]
    return UNet2DConditionModel(
        sample_size=size.image_size,
        in_channels=3,
        out_channels=6,
        block_out_channels=[size.channels * multiplier for multiplier in size.multipliers],
        layers_per_block=size.blocks,
        down_block_types=down,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=up[::-1],
        cross_attention_dim=size.context_width,
        attention_head_dim=size.head_width,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )


def projection(size: DecoderSize) -> UnCLIPTextProjModel:
    """Build the layers that pass embeddings and caption to the U-Net."""
    return UnCLIPTextProjModel(
        clip_embeddings_dim=size.embedding_dim,
        time_embed_dim=4 * size.channels,
        cross_attention_dim=size.context_width,
    )


def _adamw(modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(modules.parameters(), lr=1e-4)


class Decoder(Contender):
    """UNet2DConditionModel with SimpleCrossAttn blocks and UnCLIPTextProjModel."""

    def __init__(self, size: DecoderSize, setting: Setting):
        modules = nn.ModuleDict({"unet": unet(size), "projection": projection(size)})
        super().__init__(modules, size, setting, _adamw)
        self.unet = setting.compiled(self.modules["unet"])

    def predict(self) -> Tensor:
        return self.prepare()()[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Compute the projections, as the pipeline does once per prompt."""
        projected = self._project(self.problem)
        return lambda: self.unet(self.problem.x_t, self.problem.t, **projected).sample

    def guided(self, problem: Problem) -> Tensor:
        projected = self._project(problem, guided=True)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            uncond, cond = self.unet(torch.cat([x, x]), t, **projected).sample.chunk(2)
            eps = uncond[:, :3] + GUIDANCE_SCALE * (cond[:, :3] - uncond[:, :3])
            return torch.cat([eps, cond[:, 3:]], dim=1)

        noise = torch.randn_like(problem.x_t).to(memory_format=self.memory_format)
        return _sample(denoise, noise, self.setting, variance_type="learned_range")

    def _project(self, problem: Problem, *, guided: bool = False) -> dict[str, Tensor]:
        text = (problem.text_embedding, problem.text_states, problem.text_mask)
        if guided:
            text = tuple(torch.cat([part, part]) for part in text)
        context, embedding = self.modules["projection"](
            image_embeddings=problem.image_embedding,
            prompt_embeds=text[0],
            text_encoder_hidden_states=text[1],
            do_classifier_free_guidance=guided,
        )
        mask = F.pad(text[2], (4, 0), value=True)
        return {
            "encoder_hidden_states": context,
            "class_labels": embedding,
            "attention_mask": mask,
        }


class ChannelsLastDecoder(Decoder):
    """The same in channels_last, as its users can set it up for sampling."""

    measures = ("step", "sample")
    memory_format = torch.channels_last


class Prior(Contender):
    """PriorTransformer; the whole sequence is computed at each step."""

    def __init__(self, size: PriorSize, setting: Setting):
        network = PriorTransformer(
            num_attention_heads=size.heads,
            attention_head_dim=size.width // size.heads,
            num_layers=size.layers,
            embedding_dim=size.embedding_dim,
            num_embeddings=size.tokens,
        )
        super().__init__(network, size, setting, _adamw)
        self.network = setting.compiled(self.modules)

    def predict(self) -> Tensor:
        return self._run(self.problem.x_t, self.problem.t, self.problem)

    def guided(self, problem: Problem) -> Tensor:
        both = Problem(*(torch.cat([tensor, tensor]) for tensor in problem))

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            uncond, cond = self._run(torch.cat([z, z]), t, both).chunk(2)
            return uncond + GUIDANCE_SCALE * (cond - uncond)

        options = {"variance_type": "fixed_small_log", "prediction_type": "sample"}
        noise = torch.randn_like(problem.x_t)
        return _sample(denoise, noise, self.setting, **options, clip_sample_range=10.0)

    def _run(self, x_t: Tensor, t: Tensor, problem: Problem) -> Tensor:
        return self.network(
            x_t,
            t,
            proj_embedding=problem.text_embedding,
            encoder_hidden_states=problem.text_states,
            attention_mask=problem.text_mask,
        ).predicted_image_embedding


def _sample(denoise: Callable, x: Tensor, setting: Setting, **options) -> Tensor:
    """Run UnCLIPScheduler; both halves of the guidance are one batch."""
    scheduler = UnCLIPScheduler(**options)
    scheduler.set_timesteps(setting.sample_steps, device=setting.device)
    for t, previous in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        x = scheduler.step(denoise(x, t), t, x, prev_timestep=previous).prev_sample
    return x
