"""The two phases on a tiny bundle: whoever makes the pictures, the numbers are the same."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny_bundle
import torch
from PIL import Image
from tiny_shards import write_shards
from torch import nn

from unclip import bundle
from unclip.bundle import load_embedder
from unclip.cascade import Cascade
from unclip.evaluation.evaluation import Evaluation
from unclip.evaluation.features import resized
from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.generation import generate
from unclip.evaluation.metrics import ClipScore, Frechet, Kernel, Manifold, RetrievalPrecision
from unclip.evaluation.networks import ClipNetwork, judge, weights_of
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.ranks import Ranks, joined, start_ranks
from unclip.evaluation.sampling import Sampling, Settings
from unclip.evaluation.scores import Metric, mean_score
from unclip.evaluation.sources import open_source

COUNT = 20
PROTOCOL = Protocol(
    name="tiny",
    format="shards",
    split="test_seen",
    captions="first",
    count=COUNT,
    resolution=64,
    reference="val",
    network="patches",
)


class Patches(nn.Module):
    """The picture at 4 × 4 pixels."""

    name, num_features, fingerprint = "patches", 48, "1"

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return resized(images, 4).flatten(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_shards(root, splits=("val", "test_seen"), images=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")
    bundle.save_stage(
        folder / "judge.safetensors",
        tiny_bundle.stage("clip"),
        recipe=tiny_bundle.recipe("clip"),
        steps=5,
        clip_fingerprint=None,
    )
    return folder


@pytest.fixture
def evaluation(model, tmp_path):
    return Evaluation(
        protocol=PROTOCOL,
        metrics={
            "frechet": Frechet(network="patches"),
            "kernel": Kernel(network="patches", subsets=10),
            "manifold": Manifold(network="patches"),
            "clip_score": ClipScore(network="judge"),
            "retrieval": RetrievalPrecision(network="judge"),
            "left_out": None,
        },
        networks={"patches": Patches, "judge": lambda: judge(file=model / "judge.safetensors")},
        settings=Settings(batch_size=4, progress=False),
        cache=tmp_path / "cache",
        device="cpu",
    )


def judge_of(model):
    return load_embedder(model / "judge.safetensors").fingerprint


def values(outcome):
    return {name: score.value for name, score in outcome.scored.scores.items()}


def test_an_evaluation_says_all_that_its_numbers_rest_on(evaluation, model, data, tmp_path):
    outcome = evaluation(data=data, out=tmp_path, model=model)
    assert values(outcome).keys() == {
        "fd_patches",
        "kid_patches",
        *(f"{word}_patches" for word in ("precision", "recall", "density", "coverage")),
        "clip_score_judge",
        "r_precision_judge",
    }
    results = outcome.results
    assert results["n"] == COUNT and results["n_reference"] == 24
    assert results["key"].startswith("tiny-64-n20-")
    assert results["scores"]["fd_patches"]["n_real"] == COUNT  # of the other split, all of them
    for score in results["scores"].values():
        assert score["n"] == COUNT and score["real"] is not None and score["interval"]
    made = results["made_with"]
    assert made["stages"].keys() == {"clip", "prior", "decoder"}
    assert made["clip"] == weights_of(Cascade.load(model).embedder)
    assert made["sampling"] == {
        "prior": {"sampler": "ddim", "steps": 2, "eta": 1.0, "guidance_scale": 1.5},
        "decoder": {"sampler": "ddim", "steps": 2, "eta": 1.0, "guidance_scale": 2.0},
    }
    assert results["networks"] == {"patches": "1", "judge": judge_of(model)}
    assert results["scores"]["fd_patches"]["about"]["network"] == "1"
    assert results["scores"]["clip_score_judge"]["about"]["network"] == judge_of(model)
    lines = [
        json.loads(line)
        for line in (outcome.folder.path / "manifest.jsonl").read_text().splitlines()
    ]
    assert [line["seed"] for line in lines] == list(range(COUNT))
    assert lines[0].keys() == {"id", "prompt", "seed"}
    for line in lines:
        with Image.open(outcome.folder.path / f"{line['id']}.png") as picture:
            assert picture.format == "PNG" and picture.size == (64, 64)


def test_numbers_do_not_depend_on_the_batch_size(evaluation, model, data, tmp_path):
    found = []
    for size in (3, 8):
        settings = Settings(batch_size=size, progress=False)
        run = replace(evaluation, settings=settings)
        found.append(run(data=data, out=tmp_path / str(size), model=model))
    first, second = (outcome.folder.load(range(COUNT), PROTOCOL).int() for outcome in found)
    assert (first - second).abs().max() <= 1
    assert found[0].folder.path.name == found[1].folder.path.name
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-3, abs=1e-3)


def test_a_folder_is_scored_at_any_time_and_by_anybody(evaluation, model, data, tmp_path):
    ours = evaluation(data=data, out=tmp_path, model=model)
    again = evaluation(data=data, out=tmp_path, generated=ours.folder.path)
    assert values(again) == values(ours)
    assert again.results["key"] == ours.results["key"] and again.results["model"] is None
    (ours.folder.path / "settings.json").unlink()
    (ours.folder.path / "manifest.jsonl").unlink()
    strange = evaluation(data=data, out=tmp_path, generated=ours.folder.path)
    assert strange.scored.scores["fd_patches"].value == pytest.approx(values(ours)["fd_patches"])
    assert strange.scored.not_available.keys() == {"clip_score", "retrieval"}
    assert "manifest.jsonl" in strange.scored.not_available["clip_score"]


def test_pictures_of_another_size_or_format_are_brought_to_the_protocols(tmp_path):
    Image.effect_noise((96, 80), 50).save(tmp_path / "b.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.webp", lossless=True)
    folder = PictureFolder.read(tmp_path)
    assert [row.id for row in folder.rows] == ["a", "b"] and folder.prompts is None
    assert folder.load(range(2), PROTOCOL).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("manifest", "error", "words"),
    [
        ('{"id": "a"}', ValueError, "line 1"),
        ("no json", ValueError, "line 1"),
        ('{"id": "missing", "prompt": "x"}', FileNotFoundError, "missing"),
        ('{"id": "a", "file": "/etc/passwd", "prompt": "x"}', FileNotFoundError, "passwd"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_named(tmp_path, manifest, error, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "manifest.jsonl").write_text(manifest)
    with pytest.raises(error, match=words):
        PictureFolder.read(tmp_path)


def test_no_pictures_and_damaged_ones_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        PictureFolder.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no picture"):
        PictureFolder.read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"a\.png"):
        PictureFolder.read(tmp_path).load([0], PROTOCOL)


def prompts_of(data):
    return PROTOCOL.draw(open_source(data, "test_seen", PROTOCOL).items)


def test_other_recipes_have_a_folder_of_their_own(model, data, tmp_path):
    """Equal weights, converted anew with other steps; what is given by hand is its own choice."""
    again = tmp_path / "again"
    shutil.copytree(model, again)
    recipe = tiny_bundle.recipe("decoder")
    recipe["sampler"]["steps"] = 3
    clip = bundle.read_metadata(model / "clip.safetensors").clip_fingerprint
    stage = bundle.load_stage(model / "decoder.safetensors")
    bundle.save_stage(
        again / "decoder.safetensors", stage, recipe=recipe, steps=3, clip_fingerprint=clip
    )
    cascades = [Cascade.load(folder, device="cpu") for folder in (model, again)]
    fingerprints = [cascade.metadata["decoder"].fingerprint for cascade in cascades]
    assert fingerprints[0] == fingerprints[1]
    few, settings = prompts_of(data)[:2], Settings(progress=False)
    folders = [generate(each, few, PROTOCOL, settings, tmp_path, data="x") for each in cascades]
    assert folders[0].path != folders[1].path
    assert [f.settings["sampling"]["decoder"]["steps"] for f in folders] == [2, 3]
    own = Settings(progress=False, guidance_scale=2.0, steps={"decoder": 2})
    same = generate(cascades[0], few, PROTOCOL, own, tmp_path, data="x")
    assert same.path == folders[0].path


def test_a_kill_loses_at_most_one_batch(model, data, tmp_path):
    """A process is killed between two pictures of its third batch; the next one goes on there."""
    cascade, prompts = Cascade.load(model, device="cpu"), prompts_of(data)
    settings = Settings(batch_size=4, progress=False)

    def run(out, kill=False):
        if kill:
            write, written = PictureFolder.write, []

            def last(folder, k, image):
                if len(written) == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                written.append(k)
                write(folder, k, image)

            PictureFolder.write = last
        return generate(cascade, prompts, PROTOCOL, settings, out, data="x")

    child = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path / "a", True))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a").rglob("*.png"))) == 10

    drawn, text_to_image = [], Sampling.text_to_image

    def counted(self, captions, *, size, first):
        drawn.extend(range(first, first + len(captions)))
        return text_to_image(self, captions, size=size, first=first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampling, "text_to_image", counted)
        resumed = run(tmp_path / "a")
    assert drawn == list(range(8, COUNT))  # the third batch again, whole
    whole = run(tmp_path / "b")
    assert torch.equal(*(f.load(range(COUNT), PROTOCOL) for f in (resumed, whole)))


def test_a_picture_that_was_cut_off_is_made_again(model, data, tmp_path):
    cascade, settings = Cascade.load(model, device="cpu"), Settings(batch_size=4, progress=False)
    made = generate(cascade, prompts_of(data), PROTOCOL, settings, tmp_path, data="x")
    before = made.rows[5].path.read_bytes()
    made.rows[5].path.write_bytes(before[: len(before) // 2])
    generate(cascade, prompts_of(data), PROTOCOL, settings, tmp_path, data="x")
    assert made.rows[5].path.read_bytes() == before


def test_other_settings_have_a_folder_of_their_own(model, data, tmp_path):
    cascade, prompts = Cascade.load(model, device="cpu"), prompts_of(data)
    few = prompts[:2]
    for settings in (
        Settings(progress=False),
        Settings(progress=False, guidance_scale=3.0),
        Settings(progress=False, seed=1),
        Settings(progress=False, steps={"decoder": 1}),
    ):
        generate(cascade, few, PROTOCOL, settings, tmp_path, data="x")
    generate(cascade, few, PROTOCOL, Settings(progress=False), tmp_path, data="other")
    generate(cascade, few, PROTOCOL, Settings(progress=False, batch_size=1), tmp_path, data="x")
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ValueError, match="another out="):
        generate(cascade, prompts, PROTOCOL, Settings(progress=False), tmp_path, data="x")


def test_the_resolution_leaves_larger_upsamplers_outside(model, data, tmp_path, monkeypatch):
    cascade = Cascade.load(model, device="cpu")
    protocol = replace(PROTOCOL, resolution=256, count=2)
    settings = Settings(progress=False)
    folder = generate(cascade, prompts_of(data)[:2], protocol, settings, tmp_path, data="x")
    assert folder.load(range(2), protocol).shape == (2, 3, 256, 256)
    assert folder.settings["stages"].keys() == {"clip", "prior", "decoder", "upsampler_256"}


def _rank(rank, port, evaluation, model, data, out):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    assert joined() == joined() == Ranks(rank, 2)
    outcome = evaluation(data=data, out=out, model=model, ranks=joined())
    assert (outcome is None) == (rank == 1)
    if outcome is not None:
        (out / "values.json").write_text(json.dumps(values(outcome)))


@pytest.mark.slow
def test_two_ranks_find_what_one_does(evaluation, model, data, tmp_path):
    alone = evaluation(data=data, out=tmp_path / "one", model=model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    fork = multiprocessing.get_context("fork")
    together = replace(evaluation, cache=tmp_path / "other cache")
    children = [
        fork.Process(target=_rank, args=(rank, port, together, model, data, tmp_path / "two"))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert json.loads((tmp_path / "two" / "values.json").read_text()) == values(alone)
    for row in alone.folder.rows:
        twin = next((tmp_path / "two").rglob(row.path.name))
        assert twin.read_bytes() == row.path.read_bytes()


def test_blocks_are_the_same_whoever_takes_them():
    alone = Ranks().blocks(23, 4)
    shared = [block for rank in range(3) for block in Ranks(rank, 3).blocks(23, 4)]
    assert sorted(shared, key=lambda block: block.start) == alone
    assert sum(map(len, alone)) == 23


def test_real_features_are_kept_and_a_change_of_the_data_is_seen(
    evaluation, model, tmp_path, monkeypatch
):
    data = write_shards(tmp_path / "data", splits=("val", "test_seen"), images=24)
    outcome = evaluation(data=data, out=tmp_path, model=model)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    again = evaluation(data=data, out=tmp_path, model=model)
    assert values(again) == values(outcome)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()} == kept
    other = replace(PROTOCOL, crop="none")
    replace(evaluation, protocol=other)(data=data, out=tmp_path, model=model)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(kept)
    for shard in (data / "val" / "64").glob("*.tar"):
        os.utime(shard, (time.time() + 9, time.time() + 9))
    evaluation(data=data, out=tmp_path, model=model)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(kept) + 2
    next(iter(kept)).write_bytes(b"cut off")
    assert values(evaluation(data=data, out=tmp_path, model=model)) == values(outcome)


def test_a_metric_without_its_weights_says_what_to_fetch_and_the_rest_is_measured(
    evaluation, model, data, tmp_path
):
    from unclip.evaluation.networks import Inception

    run = replace(
        evaluation,
        metrics=evaluation.metrics | {"fid": Frechet(network="inception")},
        networks=evaluation.networks
        | {"inception": lambda: Inception(weights=tmp_path / "absent.pth")},
    )
    outcome = run(data=data, out=tmp_path, model=model)
    assert "curl" in outcome.results["not_available"]["fid"]
    assert str(tmp_path / "absent.pth") in outcome.results["not_available"]["fid"]
    assert "fd_patches" in values(outcome)


def test_the_models_own_clip_never_judges(evaluation, model, data, tmp_path):
    own = {"judge": lambda: ClipNetwork(load_embedder(model / "clip.safetensors"), "judge")}
    run = replace(evaluation, networks=evaluation.networks | own)
    with pytest.raises(ValueError, match="model's own"):
        run(data=data, out=tmp_path, model=model)
    folder = next(path.parent for path in tmp_path.rglob("settings.json"))
    with pytest.raises(ValueError, match="model's own"):  # nor of a folder that says who made it
        run(data=data, out=tmp_path, generated=folder)


def test_a_network_that_nobody_builds_is_named(evaluation, model, data, tmp_path):
    run = replace(evaluation, metrics={"x": Frechet(network="inceptoin")})
    with pytest.raises(ValueError, match="'inceptoin'; there are patches, judge"):
        run(data=data, out=tmp_path, model=model)


def test_a_sweep_draws_the_same_captions_and_noise_at_every_point(model, data, tmp_path):
    """At one step without guidance nothing differs, so that only guidance moves the numbers."""
    cascade, prompts = Cascade.load(model, device="cpu"), prompts_of(data)
    settings = [Settings(progress=False, guidance_scale=scale) for scale in (1.0, 1.0 + 1e-9)]
    folders = [
        generate(cascade, prompts[:4], PROTOCOL, each, tmp_path, data="x") for each in settings
    ]
    first, second = (folder.load(range(4), PROTOCOL).int() for folder in folders)
    assert folders[0].path != folders[1].path and (first - second).abs().max() <= 1
    assert [row.prompt for row in folders[0].rows] == [row.prompt for row in folders[1].rows]


def test_a_line_for_every_picture(evaluation, model, data, tmp_path):
    from unclip.evaluation.publish import write_samples

    outcome = evaluation(data=data, out=tmp_path, model=model)
    write_samples(outcome, tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COUNT and rows[3]["seed"] == "3"
    mean = sum(float(row["clip_score_judge"]) for row in rows) / COUNT
    assert mean == pytest.approx(values(outcome)["clip_score_judge"], rel=1e-4)
    assert {"precision_patches", "r_precision_judge"} <= rows[0].keys()


class Count(Metric):
    """A measure of the pictures themselves, as a probe would be."""

    needs_prompts = True

    def __call__(self, evidence):
        images = evidence.pictures.load(range(evidence.pictures.count))
        assert len(images) == len(evidence.prompts) == len(evidence.about)
        asked = [about.get("tag") for about in evidence.about]
        right = torch.tensor([float(tag == "known") for tag in asked])
        return {"share": mean_score(right, seed=0, better="higher")}


def test_a_metric_of_its_own_sees_pictures_prompts_and_what_is_known_of_them(
    evaluation, model, tmp_path
):
    lines = [{"prompt": f"a red square {k}", "tag": "known" if k else "other"} for k in range(4)]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, lines)))
    protocol = replace(
        PROTOCOL, format="prompts", split="probe", reference="probe", repeats=2, count=4
    )
    run = replace(evaluation, protocol=protocol, metrics=evaluation.metrics | {"count": Count()})
    outcome = run(data=tmp_path, out=tmp_path, model=model)
    assert values(outcome)["share"] == 6 / 8
    assert outcome.results["scores"]["clip_score_judge"]["n"] == 8
    assert outcome.scored.not_available.keys() == {"frechet", "kernel", "manifold"}
    pictures = outcome.folder.load(range(2), protocol)
    assert not torch.equal(pictures[0], pictures[1])  # each repeat has noise of its own


class Lacking(Metric):
    """A measure by a file that is not there."""

    def __call__(self, evidence):
        raise FileNotFoundError("detector.safetensors is missing")


def test_a_metric_that_lacks_a_file_is_left_out(evaluation, model, data, tmp_path):
    run = replace(evaluation, metrics={"lacking": Lacking(), **evaluation.metrics})
    outcome = run(data=data, out=tmp_path, model=model)
    assert outcome.scored.not_available == {"lacking": "detector.safetensors is missing"}
    assert "fd_patches" in values(outcome)


def test_pictures_of_the_same_ids_but_other_words_have_no_real_ones(
    evaluation, model, data, tmp_path
):
    """Keys of emoji are the same in every split."""
    ours = evaluation(data=data, out=tmp_path, model=model)
    (ours.folder.path / "settings.json").unlink()
    manifest = ours.folder.path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("square", "circle"))
    other = evaluation(data=data, out=tmp_path, generated=ours.folder.path)
    assert ours.results["scores"]["clip_score_judge"]["real"] is not None
    assert other.results["scores"]["clip_score_judge"]["real"] is None


def test_pictures_that_were_made_for_something_else_are_refused(evaluation, model, data, tmp_path):
    folder = evaluation(data=data, out=tmp_path, model=model).folder.path
    other = replace(evaluation, protocol=replace(PROTOCOL, split="val"))
    with pytest.raises(ValueError, match="another protocol"):
        other(data=data, out=tmp_path, generated=folder)
    splits = ("val", "test_seen")
    elsewhere = write_shards(tmp_path / "elsewhere", splits=splits, images=COUNT)
    with pytest.raises(ValueError, match="another data"):
        evaluation(data=elsewhere, out=tmp_path, generated=folder)


def test_what_prompts_ask_for_is_part_of_their_fingerprint(tmp_path):
    protocol = replace(PROTOCOL, format="prompts")
    found = []
    for count in (1, 1, 2):
        (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "dogs", "count": count}))
        found.append(open_source(tmp_path, "x", protocol).fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_ranks_meet_once_for_all_jobs_of_a_sweep(tmp_path):
    """torchrun's store brings no processes together a second time."""
    script = tmp_path / "jobs.py"
    script.write_text(
        "import unclip\n"
        "from unclip.evaluation.ranks import joined\n"
        "for job in range(3):\n"
        "    ranks = joined()\n"
        "    found = ranks.gather((job, ranks.rank))\n"
        "    assert found == ([(job, 0), (job, 1)] if ranks.first else None)\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("3", 3), ("auto", 4)])
def test_several_devices_start_the_program_again_through_torchrun(monkeypatch, devices, count):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["src/evaluate.py", "-m", "guidance=1,2"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_ranks(devices)
    (words,) = started
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[3:] == ["--standalone", f"--nproc-per-node={count}", *sys.argv]
    start_ranks(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    start_ranks(devices)  # one of several already
    assert len(started) == 1
