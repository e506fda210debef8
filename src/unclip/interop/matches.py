"""Which component of diffusers' pipeline holds which tensors of a stage.

In Karlo's style the components' tensors have the names of Karlo's own checkpoints.
"""

from unclip.interop.clip import text_matches, vision_matches
from unclip.interop.layout import FROM_ROW, Match, under
from unclip.interop.prior import transformer_matches
from unclip.interop.unet import Style, conditioning_matches, null_image_match, unet_matches
from unclip.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage

Layout = dict[str, list[Match]]


def clip_matches(stage: ClipStage) -> Layout:
    """Both towers; transformers' encoders keep no logit scale."""
    text = len(stage.model.transformer.resblocks)
    vision = len(stage.model.visual.transformer.resblocks)
    return {
        "text_encoder": under("model", text_matches(text)),
        "image_encoder": under("model", vision_matches(vision)),
    }


def prior_matches(stage: PriorStage, style: Style) -> Layout:
    """The transformer and the statistics of image embeddings."""
    statistics = [
        Match("image_scaling.mean", ("clip_mean",), FROM_ROW),
        Match("image_scaling.std", ("clip_std",), FROM_ROW),
    ]
    return {"prior": under("network", transformer_matches(stage.network, style)) + statistics}


def decoder_matches(stage: DecoderStage, style: Style) -> Layout:
    """The U-Net, and its conditioning with the null image embedding."""
    projections = under("network", conditioning_matches(stage.network, style))
    return {
        "decoder": under("network", unet_matches(stage.network, style)),
        "text_proj": [*projections, null_image_match("null_image_embedding", style)],
    }


def upsampler_matches(stage: UpsamplerStage, style: Style) -> Layout:
    """The network of the first steps and that of the last one, if it is another."""
    own = stage.last_network is not None
    last, name = (stage.last_network, "last_network") if own else (stage.network, "network")
    return {
        "super_res_first": under("network", unet_matches(stage.network, style)),
        "super_res_last": under(name, unet_matches(last, style)),
    }
