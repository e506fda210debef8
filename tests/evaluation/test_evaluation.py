"""A whole evaluation of a tiny bundle: the numbers are the same whoever sampled the images."""

import csv
import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_evaluation import COUNT, METRICS, PROTOCOL, context_of, part_of, settings_of, values
from tiny_shards import write_shards

from unclip.bundle import load_embedder
from unclip.cascade import Cascade
from unclip.evaluation.features import ClipNetwork, Inception, weights_of
from unclip.evaluation.generation import ImageFolder, Sampling
from unclip.evaluation.measurement import Measurement, Result, mean_score, run
from unclip.evaluation.metrics import Frechet
from unclip.evaluation.report import collect, write_samples


@pytest.fixture(scope="module")
def evaluated(tiny_model, squares, tmp_path_factory):
    """A context and what all metrics found."""
    context = context_of(tiny_model, squares, tmp_path_factory.mktemp("evaluated"))
    return context, run(METRICS, context)


@pytest.fixture
def make(tiny_model, squares, tmp_path):
    """Return a function that makes a context, of the tiny bundle if nothing else is given."""

    def make(model=tiny_model, data=squares, out=tmp_path, **changes):
        return context_of(model, data, out, **changes)

    return make


def results_of(context, found):
    return collect(found, METRICS, context, model="models/tiny", seconds=1.0).results


def test_results_have_everything_that_the_numbers_depend_on(evaluated, tiny_model):
    context, found = evaluated
    judge = load_embedder(tiny_model / "judge.safetensors").fingerprint
    assert values(found).keys() == {
        "fd_patches",
        "kid_patches",
        *(f"{word}_patches" for word in ("precision", "recall", "density", "coverage")),
        "clip_score_judge",
        "r_precision_judge",
    }
    results = results_of(context, found)
    assert results["n"] == COUNT and results["n_reference"] == 24
    assert results["key"].startswith("tiny-64-n20-")
    assert results["scores"]["fd_patches"]["n_real"] == COUNT  # all of the other split
    for score in results["scores"].values():
        assert score["n"] == COUNT and score["real"] is not None and score["interval"]
    made = results["made_with"]
    assert made["stages"].keys() == {"clip", "prior", "decoder"}
    assert made["clip"] == weights_of(Cascade.load(tiny_model).embedder)
    assert made["sampling"] == {
        "prior": {"sampler": "ddim", "steps": 2, "eta": 1.0, "guidance_scale": 1.5},
        "decoder": {"sampler": "ddim", "steps": 2, "eta": 1.0, "guidance_scale": 2.0},
    }
    assert results["networks"] == {"patches": "1", "judge": judge}
    assert results["scores"]["fd_patches"]["about"]["network"] == "1"
    assert results["scores"]["clip_score_judge"]["about"]["network"] == judge
    assert results["settings"]["frechet"] == {"network": "patches", "resamples": 10}


def test_the_manifest_and_samples_csv_have_a_row_for_every_image(evaluated, tmp_path):
    context, found = evaluated
    folder = context.folder.path
    lines = list(map(json.loads, (folder / "manifest.jsonl").read_text().splitlines()))
    assert [line["seed"] for line in lines] == list(range(COUNT))
    for line in lines:
        assert line.keys() == {"id", "prompt", "seed"}
        with Image.open(folder / f"{line['id']}.png") as image:
            assert image.format == "PNG" and image.size == (64, 64)
    report = collect(found, METRICS, context, model=None, seconds=1.0)
    write_samples(report, tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COUNT and rows[3]["seed"] == "3"
    mean = sum(float(row["clip_score_judge"]) for row in rows) / COUNT
    assert mean == pytest.approx(values(found)["clip_score_judge"], rel=1e-4)
    assert {"precision_patches", "r_precision_judge"} <= rows[0].keys()


def test_numbers_do_not_depend_on_the_batch_size(make, tmp_path):
    contexts = [make(out=tmp_path / str(n), settings=settings_of(batch_size=n)) for n in (3, 8)]
    found = [run(METRICS, context) for context in contexts]
    first, second = (each.folder.load(range(COUNT), PROTOCOL).int() for each in contexts)
    assert (first - second).abs().max() <= 1
    assert contexts[0].folder.path.name == contexts[1].folder.path.name
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-3, abs=1e-3)


@pytest.fixture
def folder_context(evaluated, make, tmp_path):
    """A function that copies the images without some files, and returns a context of the copy."""

    def copy(*without):
        ignore = shutil.ignore_patterns(*without)
        folder = shutil.copytree(evaluated[0].folder.path, tmp_path / "copy", ignore=ignore)
        return make(images=folder)

    return copy


def test_a_folder_of_images_gets_the_same_numbers_as_the_bundle(evaluated, folder_context):
    theirs = folder_context()
    again = run(METRICS, theirs)
    assert values(again) == values(evaluated[1])
    results = results_of(theirs, again)
    assert results["key"] == results_of(*evaluated)["key"] and results["model"] is None


def test_a_folder_without_a_manifest_gets_the_numbers_that_need_no_captions(
    evaluated, folder_context
):
    again = run(METRICS, folder_context("settings.json", "manifest.jsonl"))
    assert values(again)["fd_patches"] == pytest.approx(values(evaluated[1])["fd_patches"])
    assert again.not_available.keys() == {"clip_score", "retrieval"}
    assert "manifest.jsonl" in again.not_available["clip_score"]


def test_images_with_known_ids_but_other_captions_have_no_real_images(evaluated, folder_context):
    """Keys of emoji scenes are the same in every split."""
    context = folder_context("settings.json")
    manifest = context.given.path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("square", "circle"))
    context.given = ImageFolder.read(manifest.parent)
    again = run(METRICS, context)
    assert evaluated[1].scores["clip_score_judge"].baseline is not None
    assert again.scores["clip_score_judge"].baseline is None


def test_images_of_another_protocol_or_of_other_data_are_refused(evaluated, make, tmp_path):
    elsewhere = write_shards(tmp_path / "x", splits=("val", "test_seen"), images=COUNT)
    changes = {"protocol": replace(PROTOCOL, split="val"), "data": elsewhere}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"another {name}"):
            run(METRICS, make(images=evaluated[0].folder.path, **{name: value}))


def test_features_of_real_images_are_cached_until_the_data_or_the_crop_change(make, tmp_path):
    data = write_shards(tmp_path / "data", splits=("val", "test_seen"), images=24)

    def evaluate(**changes):
        found = values(run({"frechet": METRICS["frechet"]}, make(data=data, **changes)))
        files = (tmp_path / "cache").glob("*.safetensors")
        return found, {file: file.stat().st_mtime_ns for file in files}

    first = evaluate()
    assert evaluate() == first and len(first[1]) == 2
    assert len(evaluate(protocol=replace(PROTOCOL, crop="none"))[1]) == 4
    for shard in (data / "val" / "64").glob("*.tar"):
        os.utime(shard, (time.time() + 9, time.time() + 9))
    numbers, files = evaluate()
    assert len(files) == 5
    for file in files:
        file.write_bytes(b"truncated")
    assert numbers == evaluate()[0] == first[0]


def test_the_models_own_clip_never_judges(evaluated, tiny_model, make):
    own = {"judge": lambda: ClipNetwork(load_embedder(tiny_model / "clip.safetensors"), "judge")}
    for generated in (None, evaluated[0].folder.path):  # nor a folder that says who sampled it
        context = make(networks=own, images=generated)
        found = run({"clip_score": METRICS["clip_score"]}, context)
        assert "model's own" in found.not_available["clip_score"] and not found.scores
        with pytest.raises(ValueError, match="model's own"):
            _ = context.judge


def test_unknown_networks_missing_data_and_damaged_images_are_errors(make, tmp_path):
    with pytest.raises(ValueError, match="'inceptoin'; there are patches, effnet"):
        run({"x": Frechet(network="inceptoin")}, make())
    with pytest.raises(FileNotFoundError, match="test_seen"):
        run(METRICS, make(data=tmp_path / "nowhere"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"a\.png"):
        run(METRICS, make(images=tmp_path / "images"))


class KnownShare(Measurement):
    """A measurement of the images themselves."""

    def __call__(self, context):
        images = context.folder.load(range(len(context.folder.rows)), context.protocol)
        captions = [context.source.items[item].captions[0] for item in context.items]
        assert len(images) == len(context.prompts) and captions == context.prompts
        rows = torch.tensor([float("red" in text) for text in context.prompts])
        return Result({"share": mean_score(rows, seed=0)})


def test_a_new_measurement_sees_images_captions_and_metadata(make):
    found = run({"known": KnownShare()}, make())
    assert values(found) == {"share": 6 / 20}  # of the first shard, half


class Lacking(Measurement):
    """A measurement whose file is missing, or whose bundle lacks a stage."""

    stages = ("clip",)

    def __call__(self, context):
        raise FileNotFoundError("words.txt is missing")


class NeedsUnknownStage(Lacking):
    stages = ("clip", "upsampler_4096")


def test_a_measurement_that_lacks_something_is_listed_with_the_reason(
    make, tmp_path, folder_context
):
    networks = {"inception": lambda: Inception(weights=tmp_path / "absent.pth")}
    chosen = {"lacking": Lacking(), "stage": NeedsUnknownStage(), "frechet": METRICS["frechet"]}
    found = run({**chosen, "fid": Frechet(network="inception")}, make(networks=networks))
    assert found.not_available["lacking"] == "words.txt is missing"
    assert "upsampler_4096.safetensors is missing" in found.not_available["stage"]
    assert "curl" in found.not_available["fid"] and "absent.pth" in found.not_available["fid"]
    assert "fd_patches" in values(found)
    assert "model=" in run({"lacking": Lacking()}, folder_context()).not_available["lacking"]


class NeedsPrior(Measurement):
    """A measurement of the prior that is chosen."""

    stages = ("prior",)

    def __call__(self, context):
        return Result(values={"prior": {"rows": len(context.predicted("val"))}})


@pytest.fixture
def without_prior(tiny_model, tmp_path):
    return part_of(tiny_model, tmp_path / "model", "clip", "prior_ar", "decoder", "judge")


def test_a_measurement_of_the_prior_needs_the_one_that_is_chosen(without_prior, make):
    for prior in ("ar", "none"):
        context = make(without_prior, settings=settings_of(prior=prior))
        assert run({"x": NeedsPrior()}, context).results["x"].values == {"prior": {"rows": 24}}
    found = run({"x": NeedsPrior()}, make(without_prior))
    assert "train.py stage=prior" in found.not_available["x"]


def test_a_bundle_without_a_prior_loses_only_the_protocols_numbers(without_prior, make):
    context = make(without_prior)
    found = run({"frechet": METRICS["frechet"], "lacking": Lacking()}, context)
    assert "train.py stage=prior" in found.not_available["frechet"]
    results = results_of(context, found)
    assert results["key"] is None and results["n"] == 0 and results["generated"] is None
    assert len(context.split_features("patches", "real", "test_seen")) == 24
    with pytest.raises(FileNotFoundError, match="stage=prior"):
        context.generated("test_seen")


def test_the_protocols_images_are_not_sampled_twice(make):
    """Images and features of a split come from the protocol if its captions are the same."""
    context = make(counts={"test_seen": 12, "val": 10})
    run({"frechet": METRICS["frechet"]}, context)
    context.sampling.decode = context.sampling.predict = None  # would fail
    assert torch.equal(context.generated("test_seen"), context.folder.load(range(12), PROTOCOL))
    for kind, split in (("generated", "test_seen"), ("real", "test_seen"), ("real", "val")):
        reused = context.split_features("patches", kind, split)
        images = context.real(split).images if kind == "real" else context.generated(split)
        assert torch.equal(reused, context.features_of("patches", (kind, split, 0), images))


def test_another_split_is_sampled_from_the_priors_embeddings(make):
    context = make(counts={"val": 3})
    images = context.generated("val")
    z, captions = context.predicted("val"), context.real("val").captions
    assert torch.equal(images, context.sampling.decode(z, captions)) and len(images) == 3


def test_samples_are_kept_in_a_folder_of_their_own(make, tmp_path, monkeypatch):
    context, signs = make(), ("signs", ["a red square", "a blue square"], 64)
    images, folder = context.samples(*signs)
    assert images.shape == (2, 3, 64, 64) and folder.parent == tmp_path / "samples"
    monkeypatch.setattr(Sampling, "text_to_image", None)
    assert torch.equal(context.samples(*signs)[0], images)
