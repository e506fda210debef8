"""Karlo's original checkpoints: their names, and their rows grouped by head."""

import re
import shutil

import pytest
import torch
from stage_files import assert_same_stage
from torch.autograd.functional import vjp
from torch.nn import functional as F

from unclip import bundle
from unclip.interop import convert_karlo
from unclip.interop.karlo import LAYOUTS

PRIOR, DECODER, UPSAMPLER, STATISTICS = (
    "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "improved-sr-ckpt-step=1.2M.ckpt",
    "ViT-L-14_stats.th",
)
OTHER = {"state_dict": {"other.weight": torch.zeros(1)}}


def karlo_shape(name, ours):
    """Shape of Karlo's tensor that has the elements of ours."""
    if re.search(r"blocks?\..*(qkv|encoder_kv|proj_out)\.weight", name) and "c_qkv" not in name:
        return [*ours.shape, 1]  # a 1D convolution of length one
    return {"cf_param": ours.shape[-1:], "clip_mean": (1, -1), "clip_std": (1, -1)}.get(
        name, ours.shape
    )


def in_karlos_names(models, name):
    """Load a stage and return it with its tensors in Karlo's names.

    A join only rearranges elements. So it is an orthogonal matrix, and its transpose, the
    vector-Jacobian product, is its inverse.
    """
    stage = bundle.load_stage(bundle.stage_file(models, name))
    state, components = stage.state_dict(), {}
    for component, matches in LAYOUTS[name](stage, "karlo").items():
        components[component] = {}
        for match in matches:
            (theirs,), ours = match.theirs, state[match.ours]
            zeros = torch.zeros(ours.shape).reshape(karlo_shape(theirs, ours))
            ours = ours.reshape(match.join(zeros).shape)
            components[component][theirs] = vjp(match.join, zeros, ours)[1].contiguous()
    return stage, components


@pytest.fixture(scope="module")
def files(karlo, tmp_path_factory):
    """The files of Karlo's release, with the tiny networks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    prior = in_karlos_names(karlo.models, "prior")[1]["prior"]
    statistics = tuple(prior.pop(f"clip_{name}")[0].clone() for name in ("mean", "std"))
    torch.save(statistics, folder / STATISTICS)
    decoder = in_karlos_names(karlo.models, "decoder")[1]
    upsampler = in_karlos_names(karlo.models, "upsampler_256")[1]
    first, last = upsampler["super_res_first"], upsampler["super_res_last"]
    for file, modules in (
        (PRIOR, {"model": prior}),
        (DECODER, {"model": decoder["decoder"] | decoder["text_proj"]}),
        (UPSAMPLER, {"model_first_steps": first, "model_last_step": last}),
    ):
        state = {f"{m}.{k}": v for m, tensors in modules.items() for k, v in tensors.items()}
        torch.save({"state_dict": state}, folder / file)
    return folder


def test_checkpoints_make_the_same_bundle(karlo, files, tmp_path):
    convert_karlo(files, tmp_path, karlo.recipes, clip=karlo.folder)
    for name in LAYOUTS:
        assert_same_stage(tmp_path, karlo.models, name)


def test_names_and_shapes_of_the_release(files):
    """Spot-check against the names of the published state dicts, not against our own tables."""
    decoder = torch.load(files / DECODER)["state_dict"]
    for key, shape in {
        "model.cf_param": [16],
        "model.clip_tok_proj.weight": [96, 16],
        "model.input_blocks.0.0.weight": [8, 3, 3, 3],
        "model.input_blocks.2.0.in_layers.2.weight": [8, 8, 3, 3],  # a downsampler
        "model.input_blocks.5.1.qkv.weight": [72, 24, 1],
        "model.input_blocks.5.1.encoder_kv.weight": [48, 24, 1],
        "model.middle_block.1.proj_out.weight": [24, 24, 1],
        "model.middle_block.2.emb_layers.1.weight": [48, 32],
        "model.output_blocks.1.2.in_layers.2.weight": [24, 24, 3, 3],  # an upsampler
        "model.output_blocks.3.1.in_layers.2.weight": [16, 16, 3, 3],
        "model.output_blocks.5.0.skip_connection.weight": [8, 16, 1, 1],
        "model.time_embed.2.weight": [32, 32],
        "model.out.2.weight": [6, 8, 3, 3],
    }.items():
        assert list(decoder[key].shape) == shape, key
    upsampler = torch.load(files / UPSAMPLER)["state_dict"]
    assert "model_last_step.middle_block.1.in_layers.0.weight" in upsampler  # no attention between
    assert "model_first_steps.output_blocks.1.1.in_layers.0.weight" in upsampler
    prior = torch.load(files / PRIOR)["state_dict"]
    assert list(prior["model.transformer.resblocks.1.attn.c_qkv.weight"].shape) == [48, 16]
    assert list(prior["model.prd_emb"].shape) == [1, 1, 16]


def test_rows_are_grouped_by_head_in_the_unet(karlo):
    """Check that our block computes OpenAI's attention over grouped rows."""
    stage, parts = in_karlos_names(karlo.models, "decoder")
    block, theirs = stage.network.down[2].attention[0], parts["decoder"]
    x, context = torch.randn(2, 24, 4, 4), torch.randn(2, 5, 24)
    expected = block(x, block.encode_context(context, None))

    def layer(name, value):
        prefix = f"input_blocks.5.1.{name}"
        return F.conv1d(value, theirs[f"{prefix}.weight"], theirs[f"{prefix}.bias"])

    norm = [theirs[f"input_blocks.5.1.norm.{leaf}"] for leaf in ("weight", "bias")]
    tokens = F.group_norm(x, 4, *norm).flatten(2)
    qkv = layer("qkv", tokens).reshape(2 * 2, 3 * 12, 16)  # samples and heads, then q, k, v
    q, k, v = qkv.split(12, dim=1)
    context_k, context_v = layer("encoder_kv", context.mT).reshape(4, 2 * 12, 5).split(12, dim=1)
    k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
    weights = torch.softmax(q.mT @ k / 12**0.5, dim=-1)
    attended = (v @ weights.mT).reshape(2, 24, 16)
    ours = x + layer("proj_out", attended).reshape(x.shape)
    torch.testing.assert_close(ours, expected)


def test_rows_are_grouped_by_head_in_the_prior(karlo):
    stage, parts = in_karlos_names(karlo.models, "prior")
    block, theirs = stage.network.blocks[1], parts["prior"]
    x = torch.randn(2, 7, 16)
    prefix = "transformer.resblocks.1.attn.c_qkv"
    rows = F.linear(block.norm_attention(x), theirs[f"{prefix}.weight"], theirs[f"{prefix}.bias"])
    grouped = rows.reshape(2, 7, 2, 24).split(8, dim=3)  # heads, then q, k, v
    for ours, expected in zip(block.project(x), grouped, strict=True):
        torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_checkpoints_need_a_clip(karlo, files, tmp_path):
    with pytest.raises(FileNotFoundError, match="--clip"):
        convert_karlo(files, tmp_path / "out", karlo.recipes)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        (STATISTICS, None, FileNotFoundError, r"exactly one \*stats\.th, but has none"),
        (STATISTICS, OTHER, ValueError, "mean and a standard deviation"),
        (UPSAMPLER, OTHER, ValueError, r"1\.2M\.ckpt is not Karlo's: .* model_first_steps\."),
    ],
)
def test_a_missing_or_foreign_file_is_named(karlo, files, tmp_path, file, content, error, message):
    folder = shutil.copytree(files, tmp_path / "copy")
    (folder / file).unlink()
    if content is not None:
        torch.save(content, folder / file)
    with pytest.raises(error, match=message):
        convert_karlo(folder, tmp_path / "out", karlo.recipes, clip=karlo.folder)
