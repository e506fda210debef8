"""The page in a real browser, with a tiny bundle: `python src/app.py`."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny_bundle
from PIL import Image

import app
import sample
from unclip.images import open_image
from unclip.provenance import read_image_metadata

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[app]'")
expect = playwright.expect
CHROMIUM = Path("/usr/bin/chromium")
WAIT = 30_000  # milliseconds
PROMPT = "a dog"
NAMELESS = """() => [...document.querySelectorAll("input, textarea, button")].filter(one =>
    one.checkVisibility() && !(one.ariaLabel || one.title || one.innerText?.trim()
        || [...(one.labels ?? [])].some(label => label.innerText.trim()))).map(one => one.outerHTML)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def address(model):
    """Serve the page from a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, app.__file__, "--model", str(model), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    assert line.startswith("Open http://127.0.0.1"), line
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Return a function that opens the page as a new user; check the console and all requests."""
    contexts, problems = [], []

    def note(message):
        if message.type == "error":
            problems.append(message.text)

    def check(request):
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append(request.url)

    def visit(width=1440, height=1000):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        user = contexts[-1].new_page()
        user.set_default_timeout(WAIT)
        user.on("console", note)
        user.on("pageerror", lambda error: problems.append(str(error)))
        user.on("request", check)
        user.goto(address)
        expect(start(user, "Generate")).to_be_visible()
        return user

    yield visit
    for context in contexts:
        context.close()
    assert not problems


def start(user, label):
    return user.get_by_role("button", name=label, exact=True)


def finish(user, label, text="s · seed"):
    """Wait until a request has ended, with a text in its status line."""
    expect(user.locator(".prose.status:visible", has_text=text)).to_be_visible()
    expect(start(user, label)).to_be_visible()


def generate(user, prompt=PROMPT, size="64"):
    user.get_by_label("Prompt").first.fill(prompt)
    user.locator(f"input[type=radio][value='{size}']:visible").check()
    start(user, "Generate").click()
    finish(user, "Generate")


def shown(user):
    return user.locator(".images img:visible")


def drop(target, path):
    """Drop a file on an element of the page."""
    dropped = target.evaluate_handle(
        """(target, [name, text]) => {
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], name, {type: "image/png"}));
            return dropped;
        }""",
        [path.name, base64.b64encode(path.read_bytes()).decode()],
    )
    target.dispatch_event("drop", {"dataTransfer": dropped})


def download(image, path):
    """Store an image of the page, as the browser receives it."""
    url = image.get_attribute("src")
    path.write_bytes(urllib.request.urlopen(url).read())
    return path


def test_an_example_is_one_click_away_and_sample_py_reproduces_its_image(
    visit, model, tmp_path, capsys
):
    user = visit()
    user.get_by_text("a red heart on a white background", exact=True).or_(
        user.get_by_text("a corgi wearing", exact=False)
    ).first.click()
    finish(user, "Generate")
    expect(shown(user)).to_have_count(4)
    path = download(shown(user).nth(1), tmp_path / "image.png")
    assert open_image(path).width == 1024
    folder = ["--model", str(model), "--out", str(tmp_path / "again"), "--device", "cpu"]
    assert sample.main(["again", str(path), *folder]) == 0
    assert "the same, pixel for pixel" in capsys.readouterr().err


def test_stop_ends_a_request_and_the_next_one_works(visit):
    user = visit()
    user.get_by_role("tab", name="Compare").click()
    user.get_by_label("Values of the columns").fill("1, 2, 3, 4, 5")
    user.get_by_label("Values of the rows").fill("96, 97, 98, 99, 100")
    start(user, "Compare").click()
    expect(start(user, "Stop")).to_be_visible()
    user.get_by_label("Prompt").locator("visible=true").press("Enter")
    expect(user.get_by_text("your last request is still running")).to_be_visible()
    start(user, "Stop").click()
    finish(user, "Compare", "stopped; finished images are kept")
    user.get_by_label("Values of the columns").fill("1, 2")
    user.get_by_label("Values of the rows").fill("2, 3")
    start(user, "Compare").click()
    finish(user, "Compare")
    expect(user.locator(".results img:visible")).to_have_count(1)


def test_a_result_is_edited_with_the_brush(visit):
    user = visit()
    generate(user)
    user.get_by_role("button", name="Edit the selected image").click()
    user.get_by_label("Inpaint").check()
    user.locator("input[type=radio][value='64']:visible").check()
    canvas = user.locator("canvas:visible").first
    canvas.scroll_into_view_if_needed()
    start(user, "Edit").click()
    finish(user, "Edit", "the mask marks no pixel")
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    user.mouse.move(x - 30, y)
    user.mouse.down()
    user.mouse.move(x + 30, y, steps=10)
    user.mouse.up()
    start(user, "Edit").click()
    finish(user, "Edit")
    expect(shown(user)).to_have_count(4)
    expect(user.locator(".strip img")).to_have_count(8)


def test_a_png_dropped_on_the_page_restores_the_settings_that_made_it(visit, tmp_path):
    user = visit()
    generate(user, "a cat")
    path = download(shown(user).first, tmp_path / "cat.png")
    seed = read_image_metadata(path)["seed"]
    other = visit()
    other.get_by_role("button", name="Advanced").click()  # its empty numbers stay empty
    drop(other.get_by_label("Prompt").first, path)
    expect(other.get_by_label("Prompt").first).to_have_value("a cat")
    expect(other.get_by_label("Seed").first).to_have_value(seed)
    expect(other.get_by_label("New seed each time").first).not_to_be_checked()
    start(other, "Generate").click()
    finish(other, "Generate")
    again = download(shown(other).first, tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()
    path.write_text("no image")
    drop(other.get_by_label("Prompt").first, path)
    expect(other.get_by_text("cat.png has no settings")).to_be_visible()


def test_two_users_do_not_see_each_others_images(visit):
    first, second = visit(), visit()
    generate(first)
    for user in (first, second):
        user.get_by_role("tab", name="Edit").click()
    expect(first.locator(".strip img")).to_have_count(4)
    expect(second.locator(".strip img")).to_have_count(0)


def test_errors_are_shown_and_the_next_request_works(visit, tmp_path):
    user = visit()
    start(user, "Generate").click()
    finish(user, "Generate", "a prompt is blank: describe the image")
    generate(user, "a dog and a cat " * 10)
    expect(user.get_by_text("a prompt is too long for this CLIP; cut off")).to_be_visible()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    user.get_by_role("tab", name="Edit").click()
    user.locator("input[type=file]:not([accept='.png'])").first.set_input_files(
        tmp_path / "broken.png"
    )
    expect(
        user.get_by_role("button", name="Remove Image").or_(user.get_by_label("Clear"))
    ).to_be_visible()
    start(user, "Edit").click()
    finish(user, "Edit", "cannot read the image broken.png: corrupt image")
    user.get_by_role("tab", name="Create").click()
    generate(user)


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_and_every_control_has_a_name(width, visit):
    user = visit(width)
    expect(user.locator(".block.status").first).to_be_hidden()  # it would be an empty band
    generate(user)
    container = user.locator(".gradio-container")
    assert user.locator(".block.header").bounding_box()["height"] < 150
    for tab in ("Create", "Edit", "Compare", "Look inside"):
        user.get_by_role("tab", name=tab).click()
        assert user.evaluate("document.documentElement.scrollWidth") <= width
        assert container.bounding_box()["width"] == min(width, 1320)
        assert user.evaluate(NAMELESS) == []
        expect(user.get_by_label("Old text")).to_be_hidden()  # Edit starts with variations


def test_the_page_works_by_keyboard(visit):
    user = visit()
    user.get_by_label("Prompt").first.focus()
    assert user.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    user.keyboard.type(PROMPT)
    fresh = user.get_by_label("New seed each time").first
    expect(fresh).to_be_checked()
    user.get_by_label("Seed", exact=True).first.fill("7")
    expect(fresh).not_to_be_checked()
    user.get_by_label("Prompt").first.press("Enter")
    finish(user, "Generate")
    expect(shown(user)).to_have_count(4)
    expect(user.get_by_label("Seed", exact=True).first).to_have_value("7")


def test_programs_use_the_same_requests_and_limits(address, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False, download_files=tmp_path)
    paths = client.predict(PROMPT, count=2, seed=7, size=64, api_name="/text_to_image")
    assert [read_image_metadata(Path(path))["seed"] for path in paths] == ["7", "8"]
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/text_to_image"]
    with pytest.raises(AppError, match="a prompt is blank"):
        client.predict(" ", size=64, api_name="/text_to_image")
    with pytest.raises(AppError, match="count is 'many': give a number"):
        client.predict(PROMPT, count="many", api_name="/text_to_image")


def test_only_own_files_are_served_and_uploads_are_limited(address, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for path in (tmp_path / "private.png", Path(app.__file__), Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = part + b"0" * 21 * 2**20 + b"\r\n--x--\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, header)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request)


def test_a_full_queue_is_reported(visit, address):
    from gradio_client import Client

    user, client = visit(), Client(address, verbose=False)
    long = {"count": 8, "prior_steps": 100, "decoder_steps": 100, "size": 64}
    jobs = [client.submit(PROMPT, **long, api_name="/text_to_image") for _ in range(10)]
    time.sleep(1)
    start(user, "Generate").click()
    expect(user.get_by_text("requests are waiting already")).to_be_visible()
    for job in jobs:
        job.cancel()


@pytest.mark.parametrize("arguments", [["--share"], ["--model", "no/bundle"]])
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    try:
        status = app.main(arguments)
    except SystemExit as error:
        status = error.code
    errors = capsys.readouterr().err
    assert status == 2
    assert arguments[-1] in errors and errors.count("\n") == 1
