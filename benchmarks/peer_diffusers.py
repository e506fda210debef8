"""diffusers' unCLIP U-Net and prior, sampled as its UnCLIPPipeline does."""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contender import Contender
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from setting import DecoderSize, PriorSize, Problem, Setting
from torch import Tensor, nn


class Decoder(Contender):
    """UNet2DConditionModel of SimpleCrossAttn blocks behind UnCLIPTextProjModel."""

    memory_format = torch.contiguous_format

    def __init__(self, size: DecoderSize, setting: Setting):
        problem = Problem.draw(size, setting.device)
        modules = nn.ModuleDict({"unet": unet(size), "projection": projection(size)})
        modules = modules.to(setting.device, memory_format=self.memory_format)
        optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4)
        super().__init__(modules, optimizer, problem, setting)
        self.unet = setting.compiled(modules["unet"])
        self.x_t = problem.x_t.to(memory_format=self.memory_format)
        self.guidance_scale = size.guidance_scale

    def _project(self, problem: Problem, guided: bool = False) -> dict[str, Tensor]:
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

    def predict(self) -> Tensor:
        """The noise."""
        projected = self._project(self.problem)
        return self.unet(self.x_t, self.problem.t, **projected).sample[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """The projections, which the pipeline computes once a prompt."""
        projected = self._project(self.problem)
        return lambda: self.unet(self.x_t, self.problem.t, **projected).sample

    def draw(self, problem: Problem) -> Tensor:
        """Both halves of the guidance in one batch."""
        projected = self._project(problem, guided=True)
        scheduler = UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon")
        scheduler.set_timesteps(self.setting.sample_steps, device=self.setting.device)
        x = torch.randn_like(problem.x_t).to(memory_format=self.memory_format)
        for t, then in _pairs(scheduler.timesteps):
            output = self.unet(torch.cat([x, x]), t, **projected).sample
            uncond, cond = output.chunk(2)
            eps = uncond[:, :3] + self.guidance_scale * (cond[:, :3] - uncond[:, :3])
            output = torch.cat([eps, cond[:, 3:]], dim=1)
            x = scheduler.step(output, t, x, prev_timestep=then).prev_sample
        return x


class ChannelsLastDecoder(Decoder):
    """The same as its users may set it up: with channels last in memory."""

    measures = ("step", "sample")
    memory_format = torch.channels_last


class Prior(Contender):
    """PriorTransformer."""

    def __init__(self, size: PriorSize, setting: Setting):
        problem = Problem.draw(size, setting.device)
        network = PriorTransformer(
            num_attention_heads=size.heads,
            attention_head_dim=size.width // size.heads,
            num_layers=size.layers,
            embedding_dim=size.embedding_dim,
            num_embeddings=size.tokens,
        ).to(setting.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        super().__init__(network, optimizer, problem, setting)
        self.network = setting.compiled(network)
        self.guidance_scale = size.guidance_scale

    def predict(self) -> Tensor:
        """The clean embedding."""
        return self._evaluate(self.problem.x_t, self.problem.t, self.problem)

    def _evaluate(self, x_t: Tensor, t: Tensor, problem: Problem) -> Tensor:
        return self.network(
            x_t,
            t,
            proj_embedding=problem.text_embedding,
            encoder_hidden_states=problem.text_states,
            attention_mask=problem.text_mask,
        ).predicted_image_embedding

    def prepare(self) -> Callable[[], Tensor]:
        """Nothing: the whole sequence is computed at each step."""
        return self.predict

    def draw(self, problem: Problem) -> Tensor:
        """Both halves of the guidance in one batch."""
        rows = {name: value for name, value in vars(problem).items() if name != "generators"}
        both = Problem(**{name: torch.cat([value, value]) for name, value in rows.items()})
        scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        )
        scheduler.set_timesteps(self.setting.sample_steps, device=self.setting.device)
        z = torch.randn_like(problem.x_t)
        for t, then in _pairs(scheduler.timesteps):
            uncond, cond = self._evaluate(torch.cat([z, z]), t, both).chunk(2)
            output = uncond + self.guidance_scale * (cond - uncond)
            z = scheduler.step(output, t, z, prev_timestep=then).prev_sample
        return z


def unet(size: DecoderSize) -> UNet2DConditionModel:
    """The layout of ADM and GLIDE in diffusers' blocks."""
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
    """How embeddings and caption reach that U-Net."""
    return UnCLIPTextProjModel(
        clip_embeddings_dim=size.embedding_dim,
        time_embed_dim=4 * size.channels,
        cross_attention_dim=size.context_width,
    )


def _pairs(timesteps: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Each timestep with the next one, None after the last."""
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))
