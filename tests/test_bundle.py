import json
import os
import pickle
import resource
import stat
import struct
import time

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


def save(path, stage, name, **keywords):
    keywords = {"recipe": tiny_bundle.recipe(name), "clip_fingerprint": "00ff", **keywords}
    save_stage(path, stage, steps=7, **keywords)


@pytest.fixture
def prior(tmp_path):
    path = tmp_path / "prior.safetensors"
    save(path, tiny_bundle.stage("prior"), "prior")
    return path


def rewrite(path, tensors=None, **texts):
    """Replace a file's tensors or metadata, as somebody else could."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kept = load_file(path) if tensors is None else tensors
    save_file(kept, path, metadata={**metadata, **texts})


def rewrite_recipe(path, change):
    recipe = tiny_bundle.recipe("prior")
    change(recipe)
    rewrite(path, recipe=json.dumps(recipe))


class TestRoundTrip:
    @pytest.mark.parametrize("name", CLASSES)
    def test_every_tensor_comes_back_bit_identical(self, name, tmp_path):
        stage = tiny_bundle.stage(name)
        path = tmp_path / "new" / f"{name}.safetensors"
        save(path, stage, name)
        loaded = load_stage(path)
        assert type(loaded) is CLASSES[name]
        assert loaded.name == name
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.state_dict().keys() == stage.state_dict().keys()
        for key, tensor in stage.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key
        # Tables that are not saved are restored, too.
        for (key, buffer), (_, original) in zip(
            loaded.named_buffers(), stage.named_buffers(), strict=True
        ):
            assert buffer.dtype == original.dtype and torch.equal(buffer, original), key

    def test_metadata_comes_back(self, tmp_path):
        path = tmp_path / "prior.safetensors"
        save(path, tiny_bundle.stage("prior"), "prior", extra={"cosine": 0.7, "data": "emoji"})
        metadata = read_metadata(path)
        assert metadata.stage == "prior"
        assert metadata.recipe == tiny_bundle.recipe("prior")
        assert metadata.steps == 7
        assert metadata.clip_fingerprint == "00ff"
        assert metadata.extra == {"cosine": 0.7, "data": "emoji"}
        assert len(metadata.fingerprint) == 16

    def test_other_weights_can_be_saved_instead_of_the_stages_own(self, tmp_path):
        stage = tiny_bundle.stage("upsampler_256")
        averages = {key: torch.full_like(value, 0.5) for key, value in stage.state_dict().items()}
        path = tmp_path / "upsampler_256.safetensors"
        save(path, stage, "upsampler_256", state_dict=averages, clip_fingerprint=None)
        assert all((value == 0.5).all() for value in load_stage(path).state_dict().values())
        assert read_metadata(path).clip_fingerprint is None

    def test_weights_that_share_memory_or_are_views_are_saved(self, tmp_path):
        stage = tiny_bundle.stage("prior")
        state = stage.state_dict()
        weight = state["network.blocks.0.out.weight"]
        state["network.blocks.0.out.weight"] = weight.t().contiguous().t()
        state["null_text.embedding"] = state["image_scaling.mean"][None]
        path = tmp_path / "prior.safetensors"
        save(path, stage, "prior", state_dict=state)
        assert torch.equal(load_stage(path).network.blocks[0].out.weight, weight)

    def test_loading_in_inference_mode_gives_ordinary_tensors(self, prior):
        with torch.inference_mode():
            stage = load_stage(prior)
        assert not any(
            tensor.is_inference() for tensor in stage.state_dict(keep_vars=True).values()
        )
        assert not stage.diffusion.alpha_bar.is_inference()

    def test_the_file_is_as_readable_as_any_new_file(self, prior, tmp_path):
        ordinary = tmp_path / "ordinary"
        ordinary.touch()
        assert stat.S_IMODE(prior.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


class TestClip:
    @pytest.fixture
    def clip(self, tmp_path):
        path = tmp_path / "clip.safetensors"
        save(path, tiny_bundle.stage("clip"), "clip", clip_fingerprint=None)
        return path

    def test_its_own_fingerprint_is_written(self, clip):
        embedder = load_embedder(clip)
        assert embedder.fingerprint == read_metadata(clip).clip_fingerprint
        assert embedder.embedding_dim == tiny_bundle.EMBEDDING_DIM

    def test_altered_weights_are_refused(self, clip):
        tensors = load_file(clip)
        tensors["model.logit_scale"] += 0.01
        rewrite(clip, tensors)
        with pytest.raises(
            ValueError, match=r"written with the CLIP fingerprint .* but its weights have"
        ):
            load_embedder(clip)

    def test_another_stage_is_not_an_embedder(self, prior):
        with pytest.raises(ValueError, match="holds the stage prior, not a CLIP"):
            load_embedder(prior)


class TestWriting:
    def test_an_interrupted_write_keeps_the_old_file(self, prior, monkeypatch):
        before = prior.read_bytes()

        def fails(tensors, path, metadata):
            path.write_bytes(before[:100])
            raise KeyboardInterrupt

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(KeyboardInterrupt):
            save(prior, tiny_bundle.stage("prior"), "prior")
        assert prior.read_bytes() == before
        assert os.listdir(prior.parent) == [prior.name]

    def test_a_full_disk_keeps_the_old_file(self, prior):
        before = prior.read_bytes()
        stage = tiny_bundle.stage("prior")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            with pytest.raises(OSError, match=r"cannot write .*(?i:large|space|I/O)"):
                save(prior, stage, "prior")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert prior.read_bytes() == before
        assert os.listdir(prior.parent) == [prior.name]

    def test_weights_that_are_not_finite_are_refused(self, tmp_path):
        stage = tiny_bundle.stage("prior")
        stage.network.query.data[0, 0, 3] = float("nan")
        with pytest.raises(ValueError, match=r"not written: network\.query has values that"):
            save(tmp_path / "prior.safetensors", stage, "prior")
        assert not os.listdir(tmp_path)

    def test_a_stage_that_needs_clip_must_name_it(self, tmp_path):
        with pytest.raises(ValueError, match="prior needs its CLIP's fingerprint"):
            save(
                tmp_path / "p.safetensors",
                tiny_bundle.stage("prior"),
                "prior",
                clip_fingerprint=None,
            )

    def test_a_recipe_of_another_stage_is_refused(self, tmp_path):
        recipe = tiny_bundle.recipe("decoder")
        with pytest.raises(ValueError, match="lacks"):
            save(tmp_path / "p.safetensors", tiny_bundle.stage("prior"), "prior", recipe=recipe)
        assert not os.listdir(tmp_path)

    def test_a_recipe_that_is_not_plain_is_refused(self, tmp_path):
        recipe = OmegaConf.create(tiny_bundle.recipe("prior"))
        with pytest.raises(ValueError, match="is a DictConfig, not a plain value"):
            save(tmp_path / "p.safetensors", tiny_bundle.stage("prior"), "prior", recipe=recipe)


class TestDamage:
    @pytest.mark.parametrize("name", ["clip", "judge", "prior", "upsampler_1024"])
    def test_a_missing_stage_names_the_command_that_trains_it(self, name, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"`python src/train.py stage={name}`"):
            load_stage(tmp_path / f"{name}.safetensors")

    def test_a_missing_file_of_another_name_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"x\.safetensors is missing: check the path"):
            read_metadata(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.2, 0.7, 0.9999])
    def test_a_truncated_file_is_refused(self, prior, fraction):
        content = prior.read_bytes()
        prior.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(ValueError, match=r"prior\.safetensors is truncated or not a safetens"):
            load_stage(prior)

    def test_a_header_that_claims_100_gigabytes_is_refused(self, prior):
        prior.write_bytes(struct.pack("<Q", 100 * 2**30) + prior.read_bytes()[8:])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_stage(prior)

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_stage(tmp_path)

    def test_a_pickle_is_never_opened(self, tmp_path):
        marker = tmp_path / "marker"

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {marker}",)

        for write in (
            lambda path: path.write_bytes(pickle.dumps(Payload())),
            lambda path: torch.save({"weight": Payload()}, path),
        ):
            path = tmp_path / "prior.safetensors"
            write(path)
            with pytest.raises(ValueError, match="not a safetensors file"):
                load_stage(path)
        assert not marker.exists()

    def test_another_safetensors_file_is_refused(self, tmp_path):
        path = tmp_path / "other.safetensors"
        save_file({"weight": torch.zeros(3)}, path)
        with pytest.raises(ValueError, match="is a safetensors file but not an unclip stage"):
            load_stage(path)

    def test_another_format_is_refused(self, prior):
        rewrite(prior, unclip_format="2")
        with pytest.raises(
            ValueError, match="has format 2, but this version of unclip reads format 1"
        ):
            load_stage(prior)

    @pytest.mark.parametrize(
        "texts",
        [
            {"recipe": "{"},
            {"recipe": "[" * 100_000},
            {"steps": "many"},
            {"extra": "1 2"},
        ],
    )
    def test_damaged_metadata_is_refused(self, prior, texts):
        rewrite(prior, **texts)
        with pytest.raises(ValueError, match=r"prior\.safetensors has damaged metadata"):
            read_metadata(prior)

    def test_a_missing_tensor_is_named(self, prior):
        tensors = load_file(prior)
        del tensors["network.query"], tensors["network.positions"]
        rewrite(prior, tensors)
        with pytest.raises(ValueError, match=r"prior.* lacks network\.positions and 1 more"):
            load_stage(prior)

    def test_an_unexpected_tensor_is_named(self, prior):
        rewrite(prior, {**load_file(prior), "network.extra": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"prior.* has an unexpected tensor network\.extra"):
            load_stage(prior)

    @pytest.mark.parametrize("tensor", [torch.zeros(1, 1, 17), torch.zeros(1, 1, 16).long()])
    def test_a_tensor_of_another_shape_or_kind_is_named(self, prior, tensor):
        rewrite(prior, {**load_file(prior), "network.query": tensor})
        with pytest.raises(ValueError, match=r"query is .*but the model's is float \[1, 1, 16\]"):
            load_stage(prior)


class TestHostileRecipes:
    @pytest.mark.parametrize(
        "target",
        [
            "os.system",
            "builtins.eval",
            "unclip.bundle.os.system",
            "unclip.bundle.save_stage",
            "unclip.clip.load_public",
            "unclip.stages.clip.load_public",
            "unclip.stages.clip.build_clip",
            "unclip.stages.clip.copy.deepcopy",
            "unclip.stages.base.nn.Linear",
            "unclip.stages.base.torch",
            "unclip.stages.decoder.torch.load",
            "unclip.stages.decoder.DecoderStage",
            "unclip.diffusion.randn",
            "unclip.stages.ClipStage.embedder",
            "unclip.stages.PriorStage.__init__",
            "unclip.stages.clip._captions",
            "unclip.diffusion.schedule.SCHEDULES",
            "unclip.diffusion",
            "unclip.networks.missing",
            "unclip.stages",
            "unclip.stages.",
            "unclip.stages..PriorStage",
            "unclip_stages.PriorStage",
            "",
            7,
            None,
        ],
    )
    def test_only_registered_constructors_are_called(self, target, prior, tmp_path):
        def change(recipe):
            recipe["network"] = {"_target_": target, "command": f"touch {tmp_path}/marker"}

        rewrite_recipe(prior, change)
        with pytest.raises(
            ValueError, match=r"recipe\.network: .* is not something that unclip builds"
        ):
            load_stage(prior)
        assert not (tmp_path / "marker").exists()

    @pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_", "_other_"])
    def test_other_instructions_to_hydra_are_plain_arguments(self, key):
        with pytest.raises(ValueError, match=f"unexpected keyword argument '{key}'"):
            build({**tiny_bundle.recipe("prior"), key: []})

    def test_interpolations_are_not_resolved(self):
        assert build({**tiny_bundle.recipe("upsampler_256"), "name": "${oc.env:HOME}"}).name == (
            "${oc.env:HOME}"
        )

    def test_deeply_nested_lists_are_refused(self, prior):
        recipe = json.dumps({**tiny_bundle.recipe("prior"), "clip_range": "deep"})
        rewrite(prior, recipe=recipe.replace('"deep"', "[" * 900 + "]" * 900))
        with pytest.raises(ValueError, match=r"prior\.safetensors"):
            load_stage(prior)

    @pytest.mark.parametrize("recipe", [None, [], "os.system", {}, {"network": {}}])
    def test_a_recipe_must_be_a_dict_with_a_target(self, recipe):
        with pytest.raises(ValueError, match="a recipe is a dict with a _target_"):
            build(recipe)

    def test_a_recipe_of_another_object_is_refused(self, prior):
        rewrite(prior, recipe='{"_target_": "unclip.diffusion.GaussianDiffusion"}')
        with pytest.raises(ValueError, match="the recipe builds a GaussianDiffusion, not a stage"):
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
        with pytest.raises(ValueError, match=message):
            load_stage(prior)
        assert time.process_time() - start < 20
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 500 * 1024  # KiB; a single such layer would have taken 40 GB

    @pytest.mark.parametrize(
        ("name", "key"), [("prior", "layers"), ("decoder", "blocks"), ("clip", "text_layers")]
    )
    def test_a_huge_number_of_layers_is_refused_quickly(self, name, key, tmp_path):
        path = tmp_path / f"{name}.safetensors"
        save(path, tiny_bundle.stage(name), name)
        recipe = tiny_bundle.recipe(name)
        recipe.get("network", recipe)[key] = 10**5
        rewrite(path, recipe=json.dumps(recipe))
        start = time.process_time()
        with pytest.raises(ValueError, match=r"safetensors: .* many more parameters than the file"):
            load_stage(path)
        assert time.process_time() - start < 10

    def test_the_arguments_of_a_constructor_are_its_schema(self, prior):
        rewrite_recipe(prior, lambda recipe: recipe.update(candidate=3))
        with pytest.raises(ValueError, match=r"prior\.safetensors: .* unexpected .*'candidate'"):
            load_stage(prior)

    def test_a_constructors_error_names_the_part_of_the_recipe(self):
        recipe = tiny_bundle.recipe("prior")
        recipe["diffusion"]["schedule"] = "square"
        with pytest.raises(
            ValueError, match=r"recipe\.diffusion cannot be built: schedule is 'square'"
        ):
            build(recipe)
