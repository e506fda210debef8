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
from tiny_protocol import (
    COUNT,
    METRICS,
    PROTOCOL,
    context_of,
    measure,
    settings_of,
    values,
)
from tiny_shards import write_shards

from unclip.bundle import load_embedder
from unclip.cascade import Cascade
from unclip.evaluation.features import ClipNetwork, Inception, weights_of
from unclip.evaluation.measurement import Measurement, Result, mean_score, run
from unclip.evaluation.metrics import Frechet
from unclip.evaluation.report import collect, write_samples


@pytest.fixture(scope="module")
def evaluated(tiny_model, squares, tmp_path_factory):
    """A context and what all metrics found."""
    context = context_of(tiny_model, squares, tmp_path_factory.mktemp("evaluated"))
    return context, measure(context)


def report_of(context, found, model="models/tiny", metrics=METRICS):
    return collect(found, metrics, context, model=model, seconds=1.0)


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
    results = report_of(context, found).results
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


def test_the_manifest_has_every_images_prompt_and_seed(evaluated):
    folder = evaluated[0].folder
    lines = list(map(json.loads, (folder.path / "manifest.jsonl").read_text().splitlines()))
    assert [line["seed"] for line in lines] == list(range(COUNT))
    for line in lines:
        assert line.keys() == {"id", "prompt", "seed"}
        with Image.open(folder.path / f"{line['id']}.png") as image:
            assert image.format == "PNG" and image.size == (64, 64)


def test_samples_csv_has_a_row_for_every_image(evaluated, tmp_path):
    context, found = evaluated
    write_samples(report_of(context, found), tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COUNT and rows[3]["seed"] == "3"
    mean = sum(float(row["clip_score_judge"]) for row in rows) / COUNT
    assert mean == pytest.approx(values(found)["clip_score_judge"], rel=1e-4)
    assert {"precision_patches", "r_precision_judge"} <= rows[0].keys()


def test_numbers_do_not_depend_on_the_batch_size(tiny_model, squares, tmp_path):
    contexts = [
        context_of(tiny_model, squares, tmp_path / str(n), settings=settings_of(batch_size=n))
        for n in (3, 8)
    ]
    found = [measure(context) for context in contexts]
    first, second = (each.folder.load(range(COUNT), PROTOCOL).int() for each in contexts)
    assert (first - second).abs().max() <= 1
    assert contexts[0].folder.path.name == contexts[1].folder.path.name
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-3, abs=1e-3)


def test_a_folder_of_images_gets_the_same_numbers_as_the_bundle(
    evaluated, tiny_model, squares, tmp_path
):
    ours, found = evaluated
    theirs = context_of(tiny_model, squares, tmp_path, images=ours.folder.path)
    again = measure(theirs)
    assert values(again) == values(found)
    results = report_of(theirs, again).results
    assert results["key"] == report_of(ours, found).results["key"] and results["model"] is None


def test_a_folder_without_a_manifest_gets_the_numbers_that_need_no_captions(
    evaluated, tiny_model, squares, tmp_path
):
    ours, found = evaluated
    strange = shutil.copytree(ours.folder.path, tmp_path / "strange")
    (strange / "settings.json").unlink()
    (strange / "manifest.jsonl").unlink()
    again = measure(context_of(tiny_model, squares, tmp_path, images=strange))
    assert values(again)["fd_patches"] == pytest.approx(values(found)["fd_patches"])
    assert again.not_available.keys() == {"clip_score", "retrieval"}
    assert "manifest.jsonl" in again.not_available["clip_score"]


def test_images_with_known_ids_but_other_captions_have_no_real_images(
    evaluated, tiny_model, squares, tmp_path
):
    """Keys of emoji scenes are the same in every split."""
    ours, found = evaluated
    other = shutil.copytree(ours.folder.path, tmp_path / "other")
    (other / "settings.json").unlink()
    manifest = other / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("square", "circle"))
    again = measure(context_of(tiny_model, squares, tmp_path, images=other))
    assert found.scores["clip_score_judge"].baseline is not None
    assert again.scores["clip_score_judge"].baseline is None


def test_images_of_another_protocol_or_other_data_are_refused(
    evaluated, tiny_model, squares, tmp_path
):
    folder = evaluated[0].folder.path
    other = replace(PROTOCOL, split="val")
    context = context_of(tiny_model, squares, tmp_path, protocol=other, images=folder)
    with pytest.raises(ValueError, match="another protocol"):
        measure(context)
    elsewhere = write_shards(tmp_path / "x", splits=("val", "test_seen"), images=COUNT)
    with pytest.raises(ValueError, match="another data"):
        measure(context_of(tiny_model, elsewhere, tmp_path, images=folder))


def test_missing_data_are_an_error(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="test_seen"):
        measure(context_of(tiny_model, tmp_path / "nowhere", tmp_path))


def test_features_of_real_images_are_cached_until_the_data_or_the_crop_change(tiny_model, tmp_path):
    data = write_shards(tmp_path / "data", splits=("val", "test_seen"), images=24)

    def evaluate(**changes):
        return values(measure(context_of(tiny_model, data, tmp_path, **changes)))

    first = evaluate()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.safetensors")}
    assert evaluate() == first
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.safetensors")} == kept
    evaluate(protocol=replace(PROTOCOL, crop="none"))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 * len(kept)
    for shard in (data / "val" / "64").glob("*.tar"):
        os.utime(shard, (time.time() + 9, time.time() + 9))
    evaluate()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 * len(kept) + 2
    next(iter(kept)).write_bytes(b"truncated")
    assert evaluate() == first


def test_a_metric_without_its_weights_says_what_to_download_and_the_rest_is_measured(
    tiny_model, squares, tmp_path
):
    path = tmp_path / "absent.pth"
    networks = {"inception": lambda: Inception(weights=path)}
    context = context_of(tiny_model, squares, tmp_path, networks=networks)
    found = measure(context, METRICS | {"fid": Frechet(network="inception")})
    assert "curl" in found.not_available["fid"] and str(path) in found.not_available["fid"]
    assert "fd_patches" in values(found)


def test_the_models_own_clip_never_judges(evaluated, tiny_model, squares, tmp_path):
    own = {"judge": lambda: ClipNetwork(load_embedder(tiny_model / "clip.safetensors"), "judge")}
    for generated in (None, evaluated[0].folder.path):  # nor a folder that says who sampled it
        context = context_of(tiny_model, squares, tmp_path, networks=own, images=generated)
        found = measure(context, {"clip_score": METRICS["clip_score"]})
        assert "model's own" in found.not_available["clip_score"] and not found.scores
        with pytest.raises(ValueError, match="model's own"):
            _ = context.judge


def test_an_unknown_network_is_an_error(tiny_model, squares, tmp_path):
    context = context_of(tiny_model, squares, tmp_path)
    with pytest.raises(ValueError, match="'inceptoin'; there are patches, judge"):
        run({"x": Frechet(network="inceptoin")}, context)


def test_a_damaged_image_of_a_folder_is_an_error(tiny_model, squares, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG broken")
    context = context_of(tiny_model, squares, tmp_path, images=tmp_path / "images")
    with pytest.raises(ValueError, match=r"a\.png"):
        measure(context)


class KnownShare(Measurement):
    """A measurement of the images themselves."""

    def __call__(self, context):
        images = context.folder.load(range(len(context.folder.rows)), context.protocol)
        captions = [context.source.items[item].captions[0] for item in context.items]
        assert len(images) == len(context.prompts) and captions == context.prompts
        rows = torch.tensor([float("red" in text) for text in context.prompts])
        return Result({"share": mean_score(rows, seed=0)})


def test_a_new_measurement_sees_images_captions_and_metadata(tiny_model, squares, tmp_path):
    found = run({"known": KnownShare()}, context_of(tiny_model, squares, tmp_path))
    assert values(found) == {"share": 6 / 20}  # of the first shard, half


class Lacking(Measurement):
    """A measurement whose file is missing, or whose bundle lacks a stage."""

    stages = ("clip",)

    def __call__(self, context):
        raise FileNotFoundError("words.txt is missing")


class NeedsUnknownStage(Lacking):
    stages = ("clip", "upsampler_4096")


def test_a_measurement_that_lacks_something_is_listed_with_the_reason(
    evaluated, tiny_model, squares, tmp_path
):
    chosen = {"lacking": Lacking(), "stage": NeedsUnknownStage(), "frechet": METRICS["frechet"]}
    found = run(chosen, context_of(tiny_model, squares, tmp_path))
    assert found.not_available["lacking"] == "words.txt is missing"
    assert "upsampler_4096.safetensors is missing" in found.not_available["stage"]
    assert "fd_patches" in values(found)
    folder = context_of(tiny_model, squares, tmp_path, images=evaluated[0].folder.path)
    assert "model=" in run({"lacking": Lacking()}, folder).not_available["lacking"]


class NeedsPrior(Measurement):
    """A measurement of the prior that is chosen."""

    stages = ("prior",)

    def __call__(self, context):
        return Result(values={"prior": {"rows": len(context.predicted("val"))}})


def test_a_measurement_of_the_prior_needs_the_one_that_is_chosen(tiny_model, squares, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "prior.safetensors").unlink()
    for prior in ("ar", "none"):
        context = context_of(model, squares, tmp_path, settings=settings_of(prior=prior))
        assert run({"x": NeedsPrior()}, context).results["x"].values == {"prior": {"rows": 24}}
    found = run({"x": NeedsPrior()}, context_of(model, squares, tmp_path))
    assert "train.py stage=prior" in found.not_available["x"]


def test_a_bundle_without_a_prior_loses_only_the_protocols_numbers(tiny_model, squares, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "prior.safetensors").unlink()
    context = context_of(model, squares, tmp_path)
    found = measure(context, {"frechet": METRICS["frechet"], "lacking": Lacking()})
    assert "train.py stage=prior" in found.not_available["frechet"]
    results = report_of(context, found, metrics=METRICS).results
    assert results["key"] is None and results["n"] == 0 and results["generated"] is None
    assert len(context.split_features("patches", "real", "test_seen")) == 24
    with pytest.raises(FileNotFoundError, match="stage=prior"):
        context.generated("test_seen")


def test_the_protocols_images_are_not_sampled_twice(tiny_model, squares, tmp_path):
    """Images and features of a split come from the protocol if its captions are the same."""
    context = context_of(tiny_model, squares, tmp_path, counts={"test_seen": 12, "val": 10})
    measure(context, {"frechet": METRICS["frechet"]})
    context.sampling.decode = context.sampling.predict = None  # would fail
    assert torch.equal(context.generated("test_seen"), context.folder.load(range(12), PROTOCOL))
    for kind, split in (("generated", "test_seen"), ("real", "test_seen"), ("real", "val")):
        reused = context.split_features("patches", kind, split)
        images = context.real(split).images if kind == "real" else context.generated(split)
        assert torch.equal(reused, context.features_of("patches", (kind, split, 0), images))


def test_another_split_is_sampled_from_the_priors_embeddings(tiny_model, squares, tmp_path):
    context = context_of(tiny_model, squares, tmp_path, counts={"val": 3})
    images = context.generated("val")
    z, captions = context.predicted("val"), context.real("val").captions
    assert torch.equal(images, context.sampling.decode(z, captions)) and len(images) == 3


def test_samples_are_kept_in_a_folder_of_their_own(tiny_model, squares, tmp_path):
    context = context_of(tiny_model, squares, tmp_path)
    images, folder = context.samples("signs", ["a red square", "a blue square"], 64)
    assert images.shape == (2, 3, 64, 64) and folder.parent == tmp_path / "samples"
    context.sampling.text_to_image = None
    assert torch.equal(context.samples("signs", ["a red square", "a blue square"], 64)[0], images)
