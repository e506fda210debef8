from unittest.mock import Mock

import pytest
import tiny_bundle
import torch
from PIL import Image

from unclip.images import fit, open_mask, square_mask, to_tensor

STEPS = {"steps": {"decoder": 3}}
FAST = {"size": 64, **STEPS}


def image(seed, width=70, height=64):
    pixels = torch.randint(0, 255, (3, 4, 5), generator=torch.Generator().manual_seed(seed))
    flat = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
    return flat.resize((width, height), Image.Resampling.BICUBIC)


class TestLatents:
    def test_an_image_of_any_type_has_the_same_latents(self, tiny, tmp_path):
        pil = image(0)
        pil.save(tmp_path / "a.png")
        given = [pil, tmp_path / "a.png", str(tmp_path / "a.png"), to_tensor(pil)]
        z, noise = tiny.invert(given, **STEPS)
        assert z.shape == (4, tiny_bundle.EMBEDDING_DIM)
        assert noise.shape == (4, 3, 64, 64)
        assert all(torch.equal(row, z[0]) for row in z)
        assert all(torch.equal(row, noise[0]) for row in noise)

    def test_clip_embeds_the_central_square_at_its_own_resolution(self, tiny):
        wide = image(0, 100, 60)
        square = to_tensor(wide.crop((20, 0, 80, 60)))
        assert torch.equal(tiny.embed([wide])[0], tiny.embedder.image(square[None])[0])

    def test_rendering_the_latents_is_the_reconstruction_in_every_size(self, tiny):
        latents = tiny.invert([image(0)], **STEPS)
        rendered = tiny.render(latents, seeds=[0], **FAST)
        back = tiny.reconstruct([image(0)], **STEPS)
        assert torch.equal(rendered.images[64], back.images[64])
        assert [image.shape[-1] for image in back.images.values()] == [64, 256, 1024]


class TestEdits:
    def test_variations_differ_by_their_seeds_and_without_eta_are_the_reconstruction(self, tiny):
        made = tiny.vary(image(0), 3, seed=4, **FAST)
        assert made.image_embedding.shape == (3, tiny_bundle.EMBEDDING_DIM)
        assert not torch.equal(made.images[64][0], made.images[64][1])
        assert torch.equal(made.images[64][1:2], tiny.vary(image(0), 1, seed=5, **FAST).images[64])
        same = tiny.vary(image(0), 2, eta=0.0, **FAST).images[64]
        scale = tiny.stage("decoder").guidance_scale
        back = tiny.reconstruct([image(0)], guidance_scale=scale, **FAST).images[64]
        assert torch.equal(same, back.expand(2, -1, -1, -1))

    def test_the_ends_of_an_interpolation_are_the_reconstructions(self, tiny):
        ends = [image(0), image(1)]
        made = tiny.interpolate(*ends, 3, **FAST)
        back = tiny.reconstruct(ends, **FAST).images[64]
        assert torch.equal(made.images[64][0], back[0])
        assert (made.images[64][2].int() - back[1].int()).abs().max() <= 1
        norms = made.image_embedding.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(3))

    def test_with_fixed_noise_only_the_embedding_matters(self, tiny):
        made = tiny.interpolate(image(0), image(0), 2, noise="fixed", seed=3, **FAST)
        assert torch.equal(*made.images[64])
        decoded = tiny.decode(tiny.embed([image(0)]), None, seeds=[3], **FAST)
        assert torch.equal(made.images[64][:1], decoded.images[64])

    def test_three_images_are_mixed_by_weights(self, tiny):
        images = [image(0), image(1), image(2)]
        made = tiny.mix(images, [[0, 1, 0], [1, 1, 1]], **FAST)
        back = tiny.reconstruct(images[1:2], **FAST).images[64]
        assert (made.images[64][:1].int() - back.int()).abs().max() <= 1
        assert not torch.equal(*made.images[64])

    def test_the_first_frame_of_a_text_diff_is_the_reconstruction_to_the_bit(self, tiny):
        made = tiny.text_diff(image(0), "a cat", "a tiger", frames=3, **FAST)
        back = tiny.reconstruct([image(0)], **FAST)
        assert torch.equal(made.images[64][:1], back.images[64])
        assert torch.equal(made.image_embedding[:1], back.image_embedding)

    def test_a_text_diff_moves_the_embedding_by_its_angle(self, tiny):
        made = tiny.text_diff(image(0), "", "a tiger", strength=0.5, frames=3, **FAST)
        z = made.image_embedding.double()
        to, since = tiny.embedder.text(["a tiger", ""]).text_embedding.double()
        towards = torch.nn.functional.normalize(to - since, dim=0)
        angles = torch.arccos((z @ z[0]).clamp(max=1))
        whole = torch.arccos(z[0] @ towards)
        expected = whole * torch.tensor([0, 0.25, 0.5], dtype=torch.float64)
        torch.testing.assert_close(angles, expected, atol=1e-3, rtol=0)
        only = tiny.text_diff(image(0), "", "a tiger", strength=0.5, frames=1, **FAST)
        assert torch.equal(only.image_embedding[0], made.image_embedding[-1])

    def test_all_components_give_the_whole_embedding(self, tiny):
        examples = tiny.embed([image(seed) for seed in range(40)])
        dimensions = [1, tiny_bundle.EMBEDDING_DIM]
        made = tiny.pca_reconstruct(image(3), dimensions, examples, **FAST)
        torch.testing.assert_close(made.image_embedding[1], examples[3], atol=1e-4, rtol=0)
        assert (made.image_embedding[0] - examples[3]).norm() > 1e-3


class TestInpainting:
    def test_known_pixels_are_kept_in_every_size_up_to_the_image_s_own(self, tiny):
        pil, mask = image(0, 300, 260), Image.new("L", (300, 260))
        mask.paste(255, (100, 50, 180, 140))
        made = tiny.inpaint(pil, mask, "a dog", 2, steps={"decoder": 3}, size=256)
        marked = open_mask(mask, pil.size)
        for size in (64, 256):
            hole = square_mask(marked, size)
            known = to_tensor(fit(pil, size))
            assert 0 < hole.sum() < 0.2 * size**2
            for row in made.images[size]:
                assert torch.equal(row[~hole.expand(3, -1, -1)], known[~hole.expand(3, -1, -1)])
        assert not torch.equal(*made.images[64])

    def test_the_embedding_is_the_prompt_s_or_without_one_the_image_s(self, tiny):
        mask = torch.zeros(64, 70, dtype=torch.bool)
        mask[:32] = True
        made = [tiny.inpaint(image(0), mask, p, **FAST) for p in (None, "a dog", "a cat")]
        assert torch.equal(made[0].image_embedding, tiny.embed([image(0)]))
        assert torch.equal(made[1].image_embedding, tiny.prior(["a dog"], seeds=[0], batch_size=1))
        images = [part.images[64] for part in made]
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])

    def test_outpainting_puts_the_image_into_the_middle(self, tiny):
        white = Image.new("RGB", (128, 128), "white")  # no other color is mixed into it
        for pil in (image(0, 32, 32), white):
            made = tiny.outpaint(pil, "a dog", margin=0.5, **FAST).images[64][0]
            assert torch.equal(made[:, 16:48, 16:48], to_tensor(pil.resize((32, 32))))
            assert made[:, :16].float().std() > 1

    def test_an_inpainted_image_does_not_depend_on_the_count(self, tiny):
        mask, progress = torch.ones(64, 70, dtype=torch.bool), Mock()
        options = {"progress": progress, **FAST}
        one, two = (tiny.inpaint(image(0), mask, "a dog", count, **options) for count in (1, 2))
        assert torch.equal(two.image_embedding[:1], one.image_embedding)
        assert torch.equal(two.images[64][:1], one.images[64])
        progress.assert_any_call("prior", 4, 4)  # two steps twice: they do not share a batch


class TestMissingInputs:
    def test_the_decoder_works_without_caption_or_embedding(self, tiny):
        z = tiny.embed([image(0)])
        given = (z, ["a dog"]), (z, None), (z, [""]), (None, ["a dog"])
        made = [tiny.decode(*each, seeds=[0], **FAST) for each in given]
        both, no_caption, empty_caption, no_embedding = (one.images[64] for one in made)
        pairs = (both, no_caption), (both, no_embedding), (no_caption, empty_caption)
        assert not any(torch.equal(*pair) for pair in pairs)
        assert made[3].image_embedding is None


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda c: c.interpolate(image(0), image(1), 0, **FAST), "frames is 0"),
            (lambda c: c.interpolate(image(0), image(1), noise="no", **FAST), "noise is 'no'"),
            (lambda c: c.mix([image(0)] * 2, [[1, 1]], noise="fixd", **FAST), "noise is 'fixd'"),
            (lambda c: c.mix([image(0)] * 3, [[1, 1]], **FAST), "one for each of 3 points"),
            (lambda c: c.mix([image(0)] * 2, [], **FAST), "weights are empty"),
            (lambda c: c.mix([image(0)] * 2, [[1, 1], [2, -1]], **FAST), "one for each of 2 poi"),
            (lambda c: c.outpaint(image(0), margin=-0.1, **FAST), "margin is -0.1"),
            (lambda c: c.text_diff(image(0), "a dog", "a dog", **FAST), "same embedding"),
            (lambda c: c.vary(image(0), 0, **FAST), "at least one seed"),
            (lambda c: c.vary(image(0), size=128), "size is 128"),
            (lambda c: c.vary(torch.zeros(2, 2, 2, 2)), r"not \[2, 2, 2, 2\]"),
            (lambda c: c.inpaint(image(0), Image.new("L", (70, 64)), **FAST), "marks no pixel"),
        ],
    )
    def test_invalid_arguments_are_refused(self, tiny, call, message):
        with pytest.raises(ValueError, match=message):
            call(tiny)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda c: c.vary(image(0), guidance_scal=2), "guidance_scal"),
            (lambda c: c.render(c.invert([image(0)], **STEPS), seeds=[0], seed=1), "seed"),
            (lambda c: c.invert([image(0)], size=64), "size"),
            (lambda c: c.prior(["a dog"], seeds=[0], size=64), "size"),
        ],
    )
    def test_an_argument_that_a_method_does_not_take_is_refused(self, tiny, call, message):
        with pytest.raises(TypeError, match=message):
            call(tiny)


def test_clip_never_resizes_by_more_than_cuda_can(tiny, monkeypatch):
    """CUDA's kernel fails above a factor of about 47, as from 3,024 pixels to 64."""
    embed, side = Mock(return_value=torch.zeros(1, 8)), tiny.embedder.image_size
    monkeypatch.setattr(tiny.embedder, "image", embed)
    tiny.embed([Image.new("RGB", (60 * side, 50 * side)), Image.new("RGB", (3 * side, side))])
    assert [call.args[0].shape[-1] for call in embed.call_args_list] == [32 * side, side]
