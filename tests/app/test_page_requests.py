"""The requests of the page, without Gradio or a browser: what they make, store and refuse."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_bundle
from PIL import Image

import sample
from cli.page import EDITS, MAX_CELLS, MAX_IMAGES, MAX_TEXT, Page
from cli.page_session import FILES, MAX_PIXELS, Session, Stopped
from unclip.images import open_image, save_png
from unclip.provenance import read_image_metadata

PROMPT = "a dog"
LOADING = {"dtype": "float32", "device": "cpu", "offload": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def page(model):
    page = Page(Namespace(model=model, **LOADING))
    yield page
    page.close()
    assert not page.folder.exists()


@pytest.fixture
def session(page, request):
    yield page.session(request.node.name)
    page.forget(request.node.name)


def silent(stage, step, steps):
    pass


def create(page, session, progress=silent, **controls):
    defaults = {"prompt": PROMPT, "count": 2, "seed": 3, "size": 64, "prior": "diffusion"}
    return list(page.create(session, progress, **defaults | controls))


def edit(page, session, operation, image, **controls):
    defaults = {"second": None, "painting": None, "size": 64, "seed": 1, "decoder_steps": 3}
    controls = {**defaults, "image": image, **controls}
    return next(page.edit(session, silent, operation=operation, **controls))


def again(path, model, tmp_path, capsys):
    """Reproduce an image with sample.py and return what it says."""
    folder = ["--model", str(model), "--out", str(tmp_path), "--device", "cpu"]
    assert sample.main(["again", str(path), *folder]) == 0
    return capsys.readouterr().err


def test_images_are_made_stage_by_stage_and_sample_py_makes_the_same(
    page, session, model, tmp_path, capsys
):
    shown = create(page, session, size=1024, prior_steps=3, guidance=3.0)
    assert [open_image(images[0][0]).width for images in shown] == [64, 256, 1024]
    assert [caption for _, caption in shown[-1]] == ["seed 3", "seed 4"]
    for images in shown:
        for path, _ in images:
            assert "the same, pixel for pixel" in again(path, model, tmp_path, capsys)


def test_the_best_of_several_candidates_are_shown(page, session, model, tmp_path, capsys):
    [images] = create(page, session, count=6)
    scores = page.cascade.clip_scores([path for path, _ in images], [PROMPT] * 6)
    expected = [f"seed {3 + row}" for row in scores.argsort(descending=True)[:2].tolist()]
    [images] = create(page, session, count=2, best_of=3)
    assert [caption for _, caption in images] == expected
    assert "the same, pixel for pixel" in again(images[0][0], model, tmp_path, capsys)
    _, restored, _ = page.restore(session, images[0][0])
    assert (f"seed {restored['seed']}", restored["best_of"]) == (expected[0], 1)


def test_the_metadata_are_those_of_sample_py(page, session, model, tmp_path):
    [[(path, _)]] = create(page, session, count=1)
    arguments = ["--seed", "3", "--size", "64", "--model", str(model), "--out", str(tmp_path)]
    assert sample.main([PROMPT, *arguments]) == 0
    assert read_image_metadata(path) == read_image_metadata(tmp_path / path.name)


@pytest.mark.parametrize("operation", EDITS)
def test_every_edit_is_reproduced_by_sample_py(
    operation, page, session, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    [images] = create(page, session)
    layer = Image.new("RGBA", (64, 64))
    layer.paste("white", (10, 10, 30, 30))
    first, second = (path for path, _ in images)
    made = edit(
        page,
        session,
        operation,
        first,
        second=second,
        painting={"layers": [layer]},
        source="a dog",
        target="a cat",
        prompt="a cat" if operation == "Inpaint" else "",
        count=2,
        frames=3,
        strength=0.4,
        margin=0.25,
        eta=0.5,
        noise="fixed",
    )
    assert made.archive.is_file()
    assert (made.gif is not None) == (operation in ("Interpolate", "Text edit"))
    for path, _ in made.images:
        assert "the same, pixel for pixel" in again(path, model, tmp_path, capsys)
    assert session.images[: len(made.images)] == [path for path, _ in made.images]


def test_an_image_restores_its_controls(page, session):
    controls = {"seed": 5, "count": 3, "prior": "none", "guidance": 2.5, "decoder_steps": 4}
    [images] = create(page, session, **controls)
    command, restored, notes = page.restore(session, images[1][0])
    assert (command, notes) == ("text", [])
    assert restored.items() >= {"prompt": PROMPT, "size": 64, **controls}.items()


def test_an_edit_restores_its_controls(page, session):
    [[(image, _)]] = create(page, session, count=1)
    made = edit(page, session, "Outpaint", image, margin=0.5, prompt="", count=1)
    command, restored, notes = page.restore(session, made.images[0][0])
    assert (command, notes) == ("inpaint", [])
    expected = {"image": str(image), "margin": 0.5, "seed": 1, "prompt": None}
    assert restored.items() >= expected.items()
    Image.new("RGB", (8, 8)).save(image)
    _, restored, notes = page.restore(session, made.images[0][0])
    assert restored["image"] is None
    assert notes == [f"choose the input again, which is not in a PNG: {image.name}"]


def test_an_image_of_another_bundle_is_restored_with_a_note(page, session, tmp_path):
    [[(path, _)]] = create(page, session, count=1)
    metadata = read_image_metadata(path) | {"bundle": '{"clip": "another"}'}
    other = save_png(Image.new("RGB", (8, 8)), tmp_path / "other.png", metadata)
    _, _, [note] = page.restore(session, other)
    assert "another bundle made this image" in note


@pytest.mark.parametrize("settings", ["[]", "{", '{"steps": 3}', '{"steps": {}, "size": "big"}'])
def test_damaged_metadata_are_refused(settings, page, session, tmp_path):
    text = {"index": "0", "command": "text", "settings": settings, "bundle": "{}", "batch": "[]"}
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "damaged.png", text)
    with pytest.raises(ValueError, match=r"damaged.png has damaged metadata"):
        page.restore(session, path)


def test_another_png_has_no_settings(page, session, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"other.png has no settings"):
        page.restore(session, tmp_path / "other.png")


def test_the_sheet_of_a_comparison_grows_cell_by_cell(page, session):
    grid = {"columns": "guidance", "column_values": "1, 3", "rows": "prior"}
    sheets = list(
        page.compare(
            session, silent, prompt=PROMPT, seed=2, size=64, row_values="diffusion, none", **grid
        )
    )
    assert len(set(sheets)) == 4 == len(session.images)
    captions = read_image_metadata(sheets[-1])["captions"].splitlines()
    assert captions[1] == "guidance 3 · prior diffusion"
    settings = json.loads(read_image_metadata(session.images[0])["settings"])
    assert (settings["prior"], settings["guidance"]) == ("none", 3.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": "guidance"}, "the same setting"),
        ({"row_values": "a dog"}, "give a number"),
        ({"row_values": ""}, "give a number"),
        ({"row_values": "9" + ",1" * MAX_CELLS}, f"at most {MAX_CELLS}"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(changed, message, page, session):
    grid = {"columns": "guidance", "column_values": "1", "rows": "seed", "row_values": "1"}
    request = page.compare(session, silent, prompt=PROMPT, seed=2, size=64, **grid | changed)
    with pytest.raises(ValueError, match=message):
        list(request)


def test_look_inside_decodes_components_and_the_inputs_of_the_decoder(page, session):
    *_, inputs = page.importance(session, silent, prompt=PROMPT, seed=1, size=64)
    assert [caption for _, caption in inputs] == ["caption only", "caption + z_t", "caption + z_i"]
    assert len({open_image(path).tobytes() for path, _ in inputs}) == 3
    [components] = page.components(session, silent, image=inputs[0][0], seed=1, size=64)
    assert [caption for _, caption in components][1:] == [
        "1 component",
        "2 components",
        "4 components",
        "8 components",
    ]


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"prompt": " "}, "a prompt is blank: describe the image"),
        ({"prompt": ""}, "a prompt is blank: describe the image"),
        ({"prompt": "a" * (MAX_TEXT + 1)}, "a text is too long"),
        ({"count": MAX_IMAGES + 1}, "count is 17"),
        ({"count": 0}, "count=0: it must be at least 1"),
        ({"decoder_steps": 1000}, "decoder steps is 1000"),
        ({"decoder_steps": 0}, "decoder steps is 0"),
        ({"best_of": 9}, "best of is 9"),
        ({"count": "many"}, "count is 'many': give a number"),
        ({"prompt": ["a dog"]}, r"prompt is \['a dog'\]: give text"),
        ({"guidance": float("nan")}, "guidance=nan: it must be finite"),
        ({"size": 100}, "size is 100; it can be 64, 256, 1024"),
        ({"prior": "magic"}, "prior is 'magic'"),
        ({"prior": "ar"}, r"prior_ar.safetensors is missing: train it with"),
    ],
)
def test_a_request_out_of_bounds_is_refused(controls, message, page, session):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create(page, session, **controls)
    assert create(page, session)


@pytest.mark.parametrize(
    ("operation", "controls", "message"),
    [
        ("Variations", {"image": None}, "no image: upload one"),
        ("Interpolate", {}, "no image: upload one"),
        ("Text edit", {"target": " "}, "the new text is blank"),
        ("Inpaint", {"painting": {"layers": []}}, "the mask marks no pixel"),
        ("Inpaint", {"painting": {"layers": [Image.new("RGBA", (9, 9))]}}, "the mask marks no"),
    ],
)
def test_an_edit_without_its_inputs_is_refused(operation, controls, message, page, session):
    [[(image, _)]] = create(page, session, count=1)
    with pytest.raises(ValueError, match=message):
        edit(page, session, operation, **{"image": image, **controls})


def test_an_image_that_cannot_be_read_is_refused(page, session, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    with pytest.raises(ValueError, match=r"private.png: it was not uploaded"):
        edit(page, session, "Reconstruct", tmp_path / "private.png")
    (page.folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"cannot read the image broken.png: corrupt image"):
        edit(page, session, "Reconstruct", page.folder / "broken.png")
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(page.folder / "large.png")
    with pytest.raises(ValueError, match=r"cannot read the image large.png: image too large"):
        edit(page, session, "Reconstruct", page.folder / "large.png")


def test_a_request_stops_within_a_step_and_the_next_one_works(page, session, request):
    evaluations, calls = [], []
    middle = page.cascade.stage("decoder").network.middle[0]
    request.addfinalizer(middle.register_forward_hook(lambda *_: calls.append(1)).remove)

    def stop_later(stage, step, steps):
        evaluations.append(stage)
        if len(evaluations) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        create(page, session, stop_later, size=256, decoder_steps=50, prior="none")
    assert len(calls) == 3
    assert create(page, session)


def test_warnings_are_passed_on(page, session):
    messages = []
    request = page.create(session, silent, prompt="a long " * 30, count=1, seed=0, size=64)
    assert len(list(page.compute(silent, request, messages.append))) == 1
    assert "a prompt is too long for this CLIP; cut off" in messages[0]


def test_sessions_are_apart_and_their_files_are_limited(page):
    one, other = page.session("one"), page.session("other")
    create(page, one)
    assert one.folder != other.folder
    assert not other.images
    for number in range(FILES + 20):
        (one.folder / f"{number}.txt").touch()
    create(page, one, seed=9)
    assert len(list(one.folder.iterdir())) == FILES
    page.forget("one")
    assert one.stopped
    assert not one.folder.exists()


def test_an_upload_is_copied_under_a_name_of_its_own(tmp_path):
    session = Session(tmp_path / "session")
    session.folder.mkdir()
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / folder / "image.png")
    paths = [session.take(tmp_path / folder / "image.png") for folder in "abab"]
    assert [path.name for path in paths] == ["image.png", "image-2.png"] * 2
    assert open_image(paths[1]).getpixel((0, 0)) == (0, 0, 255)
    assert session.take(paths[1]) == paths[1]
    assert isinstance(paths[0], Path)
