"""Stages: network × diffusion × conditioning. Nothing of training, files or configs."""

from unclip.stages.base import DiffusionStage, Stage
from unclip.stages.clip import ClipStage
from unclip.stages.decoder import DecoderStage
from unclip.stages.prior import PriorStage
from unclip.stages.prior_ar import AutoregressivePriorStage
from unclip.stages.upsampler import UpsamplerStage

__all__ = [
    "AutoregressivePriorStage",
    "ClipStage",
    "DecoderStage",
    "DiffusionStage",
    "PriorStage",
    "Stage",
    "UpsamplerStage",
]
