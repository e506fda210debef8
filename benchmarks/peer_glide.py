"""GLIDE's U-Net, its blocks as shipped, behind unclip's conditioning (its own is a transformer)."""

from collections.abc import Callable

import torch
from contender import Contender
from glide_text2im.nn import timestep_embedding
from glide_text2im.unet import UNetModel
from setting import DecoderSize, Problem, Setting
from torch import Tensor, nn

from unclip.networks.unet import Conditioning


class Decoder(Contender):
    """UNetModel over context tokens; GLIDE has no training code, so AdamW is PyTorch's default."""

    measures = ("train", "step")

    def __init__(self, size: DecoderSize, setting: Setting):
        problem = Problem.draw(size, setting.device)
        unet = UNetModel(
            in_channels=3,
            model_channels=size.channels,
            out_channels=6,
            num_res_blocks=size.blocks,
            attention_resolutions=tuple(2**level for level in size.attention_levels),
            channel_mult=size.multipliers,
            num_head_channels=size.head_width,
            use_scale_shift_norm=True,
            resblock_updown=True,
            encoder_channels=size.context_width,
        )
        conditioning = Conditioning(
            image_embedding=size.embedding_dim,
            text_states=size.embedding_dim,
            context_width=size.context_width,
            embedding_width=4 * size.channels,
        )
        modules = nn.ModuleDict({"unet": unet, "conditioning": conditioning}).to(setting.device)
        optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4)
        super().__init__(modules, optimizer, problem, setting)
        self.run = setting.compiled(self._run)

    def _run(self, x_t: Tensor, t: Tensor, addition: Tensor, context: Tensor) -> Tensor:
        """As GLIDE's Text2ImUNet goes through the blocks; it masks no tokens."""
        unet, skips, h = self.modules["unet"], [], x_t
        embedding = unet.time_embed(timestep_embedding(t, unet.model_channels)) + addition
        for block in unet.input_blocks:
            h = block(h, embedding, context)
            skips.append(h)
        h = unet.middle_block(h, embedding, context)
        for block in unet.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding, context)
        return unet.out(h)

    def _condition(self) -> tuple[Tensor, Tensor]:
        problem = self.problem
        addition, context, _ = self.modules["conditioning"](
            problem.image_embedding,
            problem.text_embedding,
            problem.text_states,
            problem.text_mask,
        )
        return addition, context.transpose(1, 2)

    def predict(self) -> Tensor:
        """The noise."""
        return self.run(self.problem.x_t, self.problem.t, *self._condition())[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """The conditioning."""
        conditions = self._condition()
        return lambda: self.run(self.problem.x_t, self.problem.t, *conditions)
