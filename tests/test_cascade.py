import itertools
import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import tiny_bundle
import torch

from unclip import bundle, open_bundle
from unclip.cascade import Cascade
from unclip.sampling_run import generator
from unclip.text_to_image import PRIORS

PROMPTS = ["a red apple", "a dog above a cat", "two stars"]


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """Copy the bundle for a test that damages it."""
    return shutil.copytree(tiny_folder, tmp_path / "models" / "copied")


def replace_stage(folder, name, **changes):
    """Write another stage, of a changed recipe, into a bundle."""
    recipe, clip = tiny_bundle.recipe(name) | changes, folder / "clip.safetensors"
    fingerprint = bundle.read_metadata(clip).clip_fingerprint
    stage, about = bundle.build(recipe), {"steps": 1, "clip_fingerprint": fingerprint}
    bundle.save_stage(folder / f"{name}.safetensors", stage, recipe=recipe, **about)


def assert_close(images, others):
    """Check that the images are equal, except that few pixels differ by one of 256 levels."""
    assert images.keys() == others.keys()
    for size, image in images.items():
        difference = (image.int() - others[size].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


class TestTextToImage:
    def test_all_sizes_are_returned(self, tiny):
        made = tiny.text_to_image(PROMPTS[:1], seeds=[0])
        assert made.image_embedding.shape == (1, tiny_bundle.EMBEDDING_DIM)
        assert not made.image_embedding.requires_grad
        assert list(made.images) == [64, 256, 1024]
        for size, image in made.images.items():
            assert image.shape == (1, 3, size, size)
            assert image.dtype == torch.uint8
            assert image.float().std() > 1

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_images_do_not_depend_on_the_batch_size(self, tiny, batch_size):
        whole = tiny.text_to_image(PROMPTS, seeds=[3, 1, 2], size=256)
        parts = tiny.text_to_image(PROMPTS, seeds=[3, 1, 2], size=256, batch_size=batch_size)
        torch.testing.assert_close(whole.image_embedding, parts.image_embedding)
        assert_close(whole.images, parts.images)

    def test_images_do_not_depend_on_the_rest_of_the_batch(self, tiny):
        prompts, seeds = [*PROMPTS, PROMPTS[0]], [5, 9, 5, 9]
        among, again = (
            tiny.text_to_image(prompts, seeds=seeds, size=64).images[64] for _ in range(2)
        )
        for row in range(3):
            alone = tiny.text_to_image([prompts[row]], seeds=[seeds[row]], size=64)
            assert_close(alone.images, {64: among[row : row + 1]})
        assert not torch.equal(among[0], among[3])
        assert torch.equal(among, again)

    def test_the_global_generator_is_not_used(self, tiny):
        made = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            made.append(tiny.text_to_image(PROMPTS[:1], seeds=[0], size=64).images[64])
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*made)

    def test_each_stage_and_seed_has_its_own_fixed_generator(self):
        named = itertools.product((0, 1, -1, 10**30), ("prior", "decoder"))
        seeds = [generator(*one).initial_seed() for one in named]
        assert len(set(seeds)) == len(seeds)
        # sha256("0 prior"), first eight bytes: a later version must give the same images.
        assert seeds[0] == 10591161104273443195

    def test_guidance_and_steps_reach_their_stages(self, tiny):
        def embedding_and_image(**settings):
            made = tiny.text_to_image(PROMPTS[:1], seeds=[0], size=64, **settings)
            return made.image_embedding, made.images[64]

        embedding, image = embedding_and_image()
        for settings in ({"prior_guidance_scale": 4.0}, {"steps": {"prior": 5}}):
            assert not torch.equal(embedding_and_image(**settings)[0], embedding)
        for settings in ({"guidance_scale": 4.0}, {"steps": {"decoder": 5}}):
            other_embedding, other_image = embedding_and_image(**settings)
            assert torch.equal(other_embedding, embedding)
            assert not torch.equal(other_image, image)


class TestParts:
    def test_text_to_image_is_prior_then_decode_then_upsample(self, tiny):
        whole = tiny.text_to_image(PROMPTS, seeds=[0, 1, 2], size=256)
        embedding = tiny.prior(PROMPTS, seeds=[0, 1, 2])
        assert torch.equal(embedding, whole.image_embedding)
        decoded = tiny.decode(embedding, PROMPTS, seeds=[0, 1, 2], size=64)
        assert torch.equal(decoded.images[64], whole.images[64])
        # An upsampler starts from exactly the pixels that are returned.
        enlarged = tiny.upsample(decoded.images[64], seeds=[0, 1, 2], size=256)
        assert torch.equal(enlarged[256], whole.images[256])

    def test_clip_encodes_each_prompt_once(self, tiny, monkeypatch):
        text = Mock(side_effect=tiny.embedder.text)
        monkeypatch.setattr(tiny.embedder, "text", text)
        tiny.text_to_image(PROMPTS, seeds=[0, 1, 2], size=64, batch_size=2)
        assert [one for call in text.call_args_list for one in call.args[0]] == PROMPTS

    def test_progress_counts_the_steps_of_all_batches(self, tiny):
        calls = []
        options = {"batch_size": 2, "progress": lambda *call: calls.append(call)}
        tiny.text_to_image(PROMPTS, seeds=[0, 1, 2], size=256, steps={"decoder": 3}, **options)
        counts = {"prior": 4, "decoder": 6, "upsampler_256": 4}
        assert calls == [(name, k + 1, n) for name, n in counts.items() for k in range(n)]

    def test_stages_are_loaded_when_they_are_first_used(self, tiny_folder, monkeypatch):
        load = Mock(side_effect=bundle.load_stage)
        monkeypatch.setattr(open_bundle, "load_stage", load)
        lazy = Cascade.load(tiny_folder, device="cpu")
        assert not load.called
        for _ in range(2):
            lazy.text_to_image(PROMPTS[:1], seeds=[0], size=64)
            assert [call.args[0].stem for call in load.call_args_list] == ["prior", "decoder"]

    def test_another_embedder_replaces_the_bundle_s_clip(self, copied):
        embedder = bundle.load_embedder(copied / "clip.safetensors")
        (copied / "clip.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="stage=clip"):
            Cascade.load(copied, device="cpu").prior(["a dog"], seeds=[0])
        joined = Cascade.load(copied, device="cpu", embedder=embedder)
        assert joined.prior(["a dog"], seeds=[0]).shape == (1, tiny_bundle.EMBEDDING_DIM)


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    """Write a bundle with both priors; the diffusion prior has a linear map."""
    names = ("clip", "prior_ar", "decoder")
    folder = tiny_bundle.write(tmp_path_factory.mktemp("models") / "priors", names=names)
    replace_stage(folder, "prior", linear_baseline=True)
    cascade = Cascade.load(folder, device="cpu")
    torch.nn.init.normal_(cascade.stage("prior").linear.weight)
    return cascade


class TestPriors:
    @pytest.mark.parametrize("prior", list(PRIORS))
    def test_each_prior_gives_unit_vectors_that_the_decoder_starts_from(self, priors, prior):
        settings = {"seeds": [0, 1, 2], "prior": prior, "batch_size": 2}
        embedding = priors.prior(PROMPTS, **settings)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
        made = priors.text_to_image(PROMPTS, size=64, **settings)
        torch.testing.assert_close(made.image_embedding, embedding)
        other = priors.prior(PROMPTS, **{**settings, "seeds": [3, 4, 5]})
        assert torch.equal(other, embedding) == (prior in ("linear", "none"))

    def test_the_priors_none_and_linear_are_the_text_embedding_and_its_linear_map(self, priors):
        text, stage = priors.embedder.text(PROMPTS).text_embedding, priors.stage("prior")
        expected = {"none": text, "linear": stage.linear(stage.text_scaling(text))}
        for prior, z in expected.items():
            torch.testing.assert_close(priors.prior(PROMPTS, seeds=[0, 1, 2], prior=prior), z)

    def test_the_autoregressive_prior_accepts_guidance_but_no_steps(self, priors):
        settings = {"seeds": [0, 1, 2], "prior": "ar"}
        embedding = priors.prior(PROMPTS, **settings)
        guided = priors.prior(PROMPTS, guidance_scale=5.0, **settings)
        assert not torch.equal(guided, embedding)
        with pytest.raises(ValueError, match="prior_ar takes no steps"):
            priors.prior(PROMPTS, steps={"prior_ar": 3}, **settings)

    def test_a_prior_needs_only_its_own_stage(self, tiny):
        with pytest.raises(FileNotFoundError, match=r"prior_ar.*stage=prior_ar`"):
            tiny.prior(["a dog"], seeds=[0], prior="ar")
        with pytest.raises(ValueError, match="has no linear map: train it again"):
            tiny.prior(["a dog"], seeds=[0], prior="linear")
        with pytest.raises(ValueError, match="prior is 'karlo'; it can be diffusion, ar, linear"):
            tiny.prior(["a dog"], seeds=[0], prior="karlo")


class TestErrors:
    def test_the_warning_about_a_long_prompt_has_the_text_that_was_cut(self, tiny):
        prompt = "apple " * 20 + "under a purple moon"
        with pytest.warns(UserWarning, match=r"too long .*: '.*under a purple moon'") as said:
            tiny.text_to_image([prompt], seeds=[0], size=64)
        assert len(said) == 1
        assert tiny.embedder.tokenizer.cut(prompt) in str(said[0].message)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"prompts": "a dog"}, "prompts is a string: give a list"),
            ({"prompts": ["\n\t"]}, "a prompt is blank"),
            ({"seeds": [0, 1]}, "caption has 1 rows, but there are 2 seeds"),
            ({"prompts": [], "seeds": []}, "at least one seed"),
            ({"size": 128}, "size is 128; it can be 64, 256, 1024"),
            ({"batch_size": 0}, "batch_size of 1 or more"),
            ({"steps": {"upsampler": 3}}, "steps names 'upsampler'; it can name prior, prior_ar"),
            ({"steps": {"prior": 2000}}, "steps is 2000"),
        ],
    )
    def test_invalid_arguments_are_refused(self, tiny, settings, message):
        settings = {"prompts": ["a dog"], "seeds": [0], "size": 64, **settings}
        with pytest.raises(ValueError, match=message):
            tiny.text_to_image(settings.pop("prompts"), **settings)

    def test_embeddings_without_seeds_and_unknown_stages_are_refused(self, tiny):
        with pytest.raises(ValueError, match="image_embedding has 2 rows, but there are 1 seeds"):
            tiny.decode(torch.zeros(2, 8), ["a dog"], seeds=[0], size=64)
        with pytest.raises(ValueError, match="there is no stage 'upsampler_4096'"):
            tiny.stage("upsampler_4096")

    @pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler_256"])
    def test_a_missing_stage_is_reported_before_sampling(self, copied, name):
        (copied / f"{name}.safetensors").unlink()
        partial = Cascade.load(copied, device="cpu")
        calls = []
        with pytest.raises(FileNotFoundError, match=f"{name}.*`python src/train.py stage={name}`"):
            partial.text_to_image(["a dog"], seeds=[0], progress=lambda *call: calls.append(call))
        assert not calls

    def test_a_stage_of_another_clip_is_refused(self, copied):
        stage, recipe = tiny_bundle.stage("prior"), tiny_bundle.recipe("prior")
        about = {"recipe": recipe, "steps": 1, "clip_fingerprint": "0123456789abcdef"}
        bundle.save_stage(copied / "prior.safetensors", stage, **about)
        with pytest.raises(ValueError) as error:
            Cascade.load(copied)
        for words in (
            "prior.safetensors was trained with CLIP 0123456789abcdef",
            bundle.read_metadata(copied / "clip.safetensors").clip_fingerprint,
            *("`python src/train.py stage=prior`", "restore the clip.safetensors"),
        ):
            assert words in str(error.value)

    def test_a_file_with_another_stage_s_name_is_refused(self, copied):
        shutil.copy(copied / "decoder.safetensors", copied / "prior.safetensors")
        with pytest.raises(ValueError, match=r"prior\.safetensors holds the stage decoder"):
            Cascade.load(copied)

    def test_a_decoder_of_another_size_is_refused(self, copied):
        replace_stage(copied, "decoder", image_size=32)
        with pytest.raises(ValueError, match="has image_size 32; a cascade needs 64"):
            Cascade.load(copied, device="cpu").text_to_image(["a dog"], seeds=[0], size=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "excluded"),
    [
        ("unclip.cascade", {"lightning", "pytorch_lightning", "wandb"}),
        ("unclip", {"open_clip", "hydra", "torchvision"}),
        ("sample", {"torch", "unclip"}),  # so that `sample.py --help` is quick
    ],
)
def test_an_import_does_not_load_slow_libraries(module, excluded):
    program = (
        f"import json, sys, {module}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    assert not excluded & set(json.loads(done.stdout))
