import json
import os
import pickle
import resource
import struct
import time
from functools import partial

import pytest
import tiny_bundle
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unclip.bundle import build, load_embedder, load_stage, read_metadata, save_stage
from unclip.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage

CLASSES = {
    "clip": ClipStage,
    "prior": PriorStage,
    "decoder": DecoderStage,
    "upsampler_256": UpsamplerStage,
}
refused = partial(pytest.raises, ValueError)


def save(path, stage, name, **keywords):
    keywords = {"recipe": tiny_bundle.recipe(name), "clip_fingerprint": "00ff", **keywords}
    save_stage(path, stage, steps=7, **keywords)
    return path


@pytest.fixture
def prior(tmp_path):
    return save(tmp_path / "prior.safetensors", tiny_bundle.stage("prior"), "prior")


def rewrite(path, tensors=None, **texts):
    """Replace a file's tensors or metadata, as somebody else could."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kept = load_file(path) if tensors is None else tensors
    save_file(kept, path, metadata={**metadata, **texts})


def rewrite_recipe(path, change, name="prior"):
    recipe = tiny_bundle.recipe(name)
    change(recipe)
    rewrite(path, recipe=json.dumps(recipe))


class TestRoundTrip:
    @pytest.mark.parametrize("name", CLASSES)
    def test_every_tensor_comes_back_bit_identical(self, name, tmp_path):
        stage = tiny_bundle.stage(name)
        loaded = load_stage(save(tmp_path / "new" / f"{name}.safetensors", stage, name))
        assert type(loaded) is CLASSES[name]
        assert loaded.name == name and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.state_dict().keys() == stage.state_dict().keys()
        # Tables that are not saved are restored, too.
        tensors = {**stage.state_dict(), **dict(stage.named_buffers())}
        found = {**loaded.state_dict(), **dict(loaded.named_buffers())}
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key

    def test_metadata_comes_back_from_a_file_as_readable_as_any_new_one(self, tmp_path):
        path, ordinary = tmp_path / "p.safetensors", tmp_path / "ordinary"
        extra = {"cosine": 0.7, "data": "emoji"}
        save(path, tiny_bundle.stage("prior"), "prior", extra=extra)
        metadata = read_metadata(path)
        assert (metadata.stage, metadata.steps, metadata.extra) == ("prior", 7, extra)
        assert metadata.recipe == tiny_bundle.recipe("prior")
        assert metadata.clip_fingerprint == "00ff" and len(metadata.fingerprint) == 16
        ordinary.touch()
        assert path.stat().st_mode == ordinary.stat().st_mode

    def test_other_weights_can_be_saved_instead_of_the_stages_own(self, tmp_path):
        stage, path = tiny_bundle.stage("upsampler_256"), tmp_path / "upsampler_256.safetensors"
        averages = {key: torch.full_like(value, 0.5) for key, value in stage.state_dict().items()}
        save(path, stage, "upsampler_256", state_dict=averages, clip_fingerprint=None)
        assert all((value == 0.5).all() for value in load_stage(path).state_dict().values())
        assert read_metadata(path).clip_fingerprint is None

    def test_weights_that_share_memory_or_are_views_are_saved(self, tmp_path):
        stage = tiny_bundle.stage("prior")
        state = stage.state_dict()
        weight = state["network.blocks.0.out.weight"]
        state["network.blocks.0.out.weight"] = weight.t().contiguous().t()
        state["null_text.embedding"] = state["image_scaling.mean"][None]
        path = save(tmp_path / "prior.safetensors", stage, "prior", state_dict=state)
        assert torch.equal(load_stage(path).network.blocks[0].out.weight, weight)

    def test_loading_in_inference_mode_gives_ordinary_tensors(self, prior):
        with torch.inference_mode():
            stage = load_stage(prior)
        tensors = [*stage.state_dict(keep_vars=True).values(), stage.diffusion.alpha_bar]
        assert not any(tensor.is_inference() for tensor in tensors)


def test_a_clip_has_its_own_fingerprint_and_altered_weights_are_refused(tmp_path):
    stage, path = tiny_bundle.stage("clip"), tmp_path / "clip.safetensors"
    embedder = load_embedder(save(path, stage, "clip", clip_fingerprint=None))
    assert embedder.fingerprint == read_metadata(path).clip_fingerprint
    assert embedder.embedding_dim == tiny_bundle.EMBEDDING_DIM
    tensors = load_file(path)
    tensors["model.logit_scale"] += 0.01
    rewrite(path, tensors)
    with refused(match=r"written with the CLIP fingerprint .* but its weights have"):
        load_embedder(path)


class TestWriting:
    def test_an_interrupted_write_and_a_full_disk_keep_the_old_file(self, prior, monkeypatch):
        before, stage = prior.read_bytes(), tiny_bundle.stage("prior")

        def fails(tensors, path, metadata):
            path.write_bytes(before[:100])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("safetensors.torch.save_file", fails)
            save(prior, stage, "prior")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            with pytest.raises(OSError, match=r"cannot write .*(?i:large|space|I/O)"):
                save(prior, stage, "prior")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert prior.read_bytes() == before
        assert os.listdir(prior.parent) == [prior.name]

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"clip_fingerprint": None}, "prior needs its CLIP's fingerprint"),
            ({"recipe": tiny_bundle.recipe("decoder")}, "lacks"),
            ({"recipe": OmegaConf.create(tiny_bundle.recipe("prior"))}, "DictConfig, not a plain"),
            ({"broken": True}, r"not written: network\.query has values that are not finite"),
        ],
    )
    def test_what_cannot_be_loaded_is_not_written(self, keywords, message, tmp_path):
        stage = tiny_bundle.stage("prior")
        if keywords.pop("broken", False):
            stage.network.query.data[0, 0, 3] = float("nan")
        with refused(match=message):
            save(tmp_path / "prior.safetensors", stage, "prior", **keywords)
        assert not os.listdir(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("name", ["clip", "judge", "prior", "upsampler_1024", "x"])
    def test_a_missing_stage_names_the_command_that_trains_it(self, name, tmp_path):
        fix = "check the path" if name == "x" else f"train it .*`python src/train.py stage={name}`"
        with pytest.raises(FileNotFoundError, match=rf"{name}\.safetensors is missing: {fix}"):
            load_stage(tmp_path / f"{name}.safetensors")

    @pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.2, 0.7, 0.9999])
    def test_a_truncated_file_is_refused(self, prior, fraction):
        content = prior.read_bytes()
        prior.write_bytes(content[: int(fraction * len(content))])
        with refused(match=r"prior\.safetensors is truncated or not a safetens"):
            load_stage(prior)

    def test_a_folder_and_a_header_that_claims_100_gigabytes_are_refused(self, prior):
        prior.write_bytes(struct.pack("<Q", 100 * 2**30) + prior.read_bytes()[8:])
        for path in (prior, prior.parent):
            with refused(match="truncated or not a safetensors file"):
                load_stage(path)

    def test_a_pickle_is_never_opened(self, tmp_path):
        marker, path = tmp_path / "marker", tmp_path / "prior.safetensors"

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {marker}",)

        path.write_bytes(pickle.dumps(Payload()))
        torch.save({"weight": Payload()}, path.with_name("clip.safetensors"))
        for file in (path, path.with_name("clip.safetensors")):
            with refused(match="not a safetensors file"):
                load_stage(file)
        assert not marker.exists()

    def test_another_safetensors_file_and_another_stage_are_refused(self, prior):
        with refused(match="holds the stage prior, not a CLIP"):
            load_embedder(prior)
        save_file({"weight": torch.zeros(3)}, prior)
        with refused(match="is a safetensors file but not an unclip stage"):
            load_stage(prior)

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ({"unclip_format": "2"}, "has format 2, but this unclip reads format 1"),
            ({"recipe": "{"}, "has damaged metadata"),
            ({"recipe": "[" * 100_000}, "has damaged metadata"),
            ({"steps": "many"}, "has damaged metadata"),
            ({"extra": "1 2"}, "has damaged metadata"),
        ],
    )
    def test_damaged_metadata_is_refused(self, prior, texts, message):
        rewrite(prior, **texts)
        with refused(match=rf"prior\.safetensors {message}"):
            read_metadata(prior)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"query": None, "positions": None}, r"lacks network\.positions and 1 more"),
            ({"extra": torch.zeros(1)}, r"has an unexpected tensor network\.extra"),
            ({"query": torch.zeros(1, 1, 17)}, r"query is .*but the model's is float \[1, 1, 16"),
            ({"query": torch.zeros(1, 1, 16).long()}, r"is integer .*model's is float \[1, 1, 16"),
        ],
    )
    def test_a_wrong_tensor_is_named(self, prior, changed, message):
        tensors = load_file(prior) | {f"network.{key}": value for key, value in changed.items()}
        rewrite(prior, {key: value for key, value in tensors.items() if value is not None})
        with refused(match=rf"prior\.safetensors.*{message}"):
            load_stage(prior)


class TestHostileRecipes:
    @pytest.mark.parametrize(
        "target",
        [
            *("os.system", "builtins.eval", "unclip.bundle.save_stage", "unclip.clip.load_public"),
            *("unclip.stages.decoder.torch.load", "unclip.stages.ClipStage.embedder"),
            *("unclip.diffusion", "unclip.stages", "unclip.stages..PriorStage", "", 7, None),
        ],
    )
    def test_only_registered_constructors_are_called(self, target, prior, tmp_path):
        network = {"_target_": target, "command": f"touch {tmp_path}/marker"}
        rewrite_recipe(prior, lambda recipe: recipe.update(network=network))
        with refused(match=r"recipe\.network: .* is not something that unclip builds"):
            load_stage(prior)
        assert not (tmp_path / "marker").exists()

    @pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_", "_other_"])
    def test_other_instructions_to_hydra_are_plain_arguments(self, key):
        with refused(match=f"unexpected keyword argument '{key}'"):
            build({**tiny_bundle.recipe("prior"), key: []})

    def test_interpolations_are_not_resolved(self):
        name = "${oc.env:HOME}"
        assert build({**tiny_bundle.recipe("upsampler_256"), "name": name}).name == name

    def test_deeply_nested_lists_are_refused(self, prior):
        recipe = json.dumps({**tiny_bundle.recipe("prior"), "clip_range": "deep"})
        rewrite(prior, recipe=recipe.replace('"deep"', "[" * 900 + "]" * 900))
        with refused(match=r"prior\.safetensors"):
            load_stage(prior)

    @pytest.mark.parametrize("recipe", [None, [], "os.system", {}, {"network": {}}])
    def test_a_recipe_must_be_a_dict_with_a_target(self, recipe):
        with refused(match="a recipe is a dict with a _target_"):
            build(recipe)

    def test_a_recipe_of_another_object_is_refused(self, prior):
        rewrite(prior, recipe='{"_target_": "unclip.diffusion.GaussianDiffusion"}')
        with refused(match="the recipe builds a GaussianDiffusion, not a stage"):
            load_stage(prior)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"width": 10**9}, r"recipe\.network\.width is 1000000000, larger than any"),
            ({"width": 10**5}, r"network.* is float \[64\].*model's is float \[400000\]"),
            ({"embedding_dim": 10**5}, r"is float \[.*model's is float \[.*100000"),
            ({"width": [2**17] * 1000}, r"recipe\.network cannot be built"),
        ],
    )
    def test_sizes_are_refused_before_anything_is_allocated(self, size, message, prior):
        rewrite_recipe(prior, lambda recipe: recipe["network"].update(size))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        with refused(match=message):
            load_stage(prior)
        assert time.process_time() - start < 20
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 500 * 1024  # KiB; a single such layer would have taken 40 GB

    @pytest.mark.parametrize(
        ("name", "key"), [("prior", "layers"), ("decoder", "blocks"), ("clip", "text_layers")]
    )
    def test_a_huge_number_of_layers_is_refused_quickly(self, name, key, tmp_path):
        path = save(tmp_path / f"{name}.safetensors", tiny_bundle.stage(name), name)
        rewrite_recipe(path, lambda one: one.get("network", one).update({key: 10**5}), name)
        start = time.process_time()
        with refused(match=r"safetensors: .* many more parameters than the file"):
            load_stage(path)
        assert time.process_time() - start < 10

    def test_a_constructors_error_names_the_part_of_the_recipe(self, prior):
        recipe = tiny_bundle.recipe("prior")
        recipe["diffusion"]["schedule"] = "square"
        with refused(match=r"recipe\.diffusion cannot be built: schedule is 'square'"):
            build(recipe)
        rewrite_recipe(prior, lambda recipe: recipe.update(candidate=3))
        with refused(match=r"prior\.safetensors: .* unexpected .*'candidate'"):
            load_stage(prior)
