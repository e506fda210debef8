"""GLIDE's U-Net with its own blocks and unclip's conditioning (GLIDE conditions by a transformer)."""

from collections.abc import Callable

import torch
from contender import Contender, DecoderSize, Setting
from glide_text2im.nn import timestep_embedding
from glide_text2im.unet import UNetModel
from torch import Tensor, nn

from unclip.networks.unet import Conditioning


class Decoder(Contender):
    """UNetModel with context tokens; GLIDE has no training code, so the optimizer is AdamW."""

    measures = ("step", "train")

    def __init__(self, size: DecoderSize, setting: Setting):
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
        modules = nn.ModuleDict({"unet": unet, "conditioning": conditioning})
        super().__init__(
            modules, size, setting, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4)
        )
        self.run = setting.compiled(self._run)

    def predict(self) -> Tensor:
        return self.prepare()()[:, :3]

    def prepare(self) -> Callable[[], Tensor]:
        """Compute the conditioning."""
        problem = self.problem
        addition, context, _ = self.modules["conditioning"](
            problem.image_embedding,
            problem.text_embedding,
            problem.text_states,
            problem.text_mask,
        )
        return lambda: self.run(problem.x_t, problem.t, addition, context.transpose(1, 2))

    def _run(self, x_t: Tensor, t: Tensor, addition: Tensor, context: Tensor) -> Tensor:
        """Visit the blocks in the order of GLIDE's Text2ImUNet; GLIDE masks no tokens."""
        unet, skips, h = self.modules["unet"], [], x_t
        embedding = unet.time_embed(timestep_embedding(t, unet.model_channels)) + addition
        for block in unet.input_blocks:
            h = block(h, embedding, context)
            skips.append(h)
        h = unet.middle_block(h, embedding, context)
        for block in unet.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding, context)
        return unet.out(h)
