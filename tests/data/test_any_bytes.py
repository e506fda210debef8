"""Any bytes give a sample or a named reason, never another exception, a hang or silent loss.

EXAMPLES sets the number of examples of each property.
"""

import json
import os
import shutil
import tarfile
from unittest import mock

import pytest
from make_shards import READER, encoded, write_shards
from PIL import Image

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from unclip.data.bad_samples import BadSample  # noqa: E402
from unclip.data.prepare.listing import read_coco_captions, read_folder  # noqa: E402
from unclip.data.reader import MAX_CAPTION_LENGTH, decode_captions, decode_image, decode_metadata  # noqa: E402
from unclip.data.shards import Shard, count_samples, open_shards, read_positions  # noqa: E402
from unclip.files import decode_text, parse_json, split_lines  # noqa: E402

examples = settings(
    max_examples=int(os.environ.get("EXAMPLES", 200)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ANY = st.characters(codec=None)  # also lone surrogates
MARKS = st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
TEXT = (
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | st.text(ANY, max_size=100).map(lambda text: text.encode("utf-16", "surrogatepass"))
    | st.tuples(MARKS, st.binary()).map(b"".join)
)
KEYS = st.sampled_from(["captions", "caption", "text", "images", "annotations", "id", "image_id"])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY, max_size=20)
JSON = st.recursive(
    ATOMS,
    lambda one: st.lists(one, max_size=4) | st.dictionaries(KEYS, one, max_size=4),
    max_leaves=10,
)
JSON_TEXT = TEXT | JSON.map(json.dumps).map(str.encode)


def changed(content: bytes, flips: list[tuple[int, int]], cut: int | None) -> bytes:
    """Flip bits of some bytes and cut the end off."""
    result = bytearray(content)
    for position, mask in flips:
        result[position % len(result)] ^= mask
    return bytes(result if cut is None else result[: cut % (len(result) + 1)])


FLIPS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=3)
CUT = st.none() | st.integers(0, 2**20)


@examples
@given(TEXT)
def test_any_text(content):
    try:
        text = decode_text(content, "name")
    except ValueError as error:
        assert str(error).startswith("name: byte ")
    else:
        assert "\0" not in text
        text.encode("utf-8")
        assert "\n".join(split_lines(text)) == text.replace("\r\n", "\n").removesuffix("\n")


@examples
@given(JSON_TEXT)
def test_any_json(content):
    try:
        value = parse_json(content, "name")
    except ValueError as error:
        assert str(error).startswith("name")
    else:
        assert r"\u0000" not in json.dumps(value).replace(r"\\", "")
        json.dumps(value, ensure_ascii=False).encode("utf-8")


@examples
@given(st.none() | JSON_TEXT, st.none() | TEXT)
def test_any_captions(json_member, text):
    members = {"json": json_member, "txt": text}
    try:
        captions = decode_captions(members, decode_metadata(members))
    except BadSample as bad:
        assert bad.kind
    else:
        assert captions
        for caption in captions:
            assert caption == " ".join(caption.split()) and 0 < len(caption) <= MAX_CAPTION_LENGTH
            caption.encode("utf-8")


def images() -> list[bytes]:
    noise = Image.effect_noise((24, 20), 60)
    color = Image.merge("RGB", (noise, noise.transpose(Image.Transpose.ROTATE_180), noise))
    exif = Image.Exif()
    exif[0x0112] = 6
    film = {"save_all": True, "append_images": [noise.convert("RGB")]}
    return [
        *(encoded(color, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")),
        *(encoded(color, kind, **film) for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO")),
        encoded(color, "BMP"),
        encoded(color.convert("CMYK"), "JPEG"),
        encoded(color.quantize(8), "PNG", transparency=0),
        encoded(color.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        encoded(noise.convert("F"), "TIFF"),
    ]


SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"II*\0")
SIGNATURES += (b"BM" + bytes(12) + b"\x28\0\0\0", b"\0\0\0\x1cftypavif", b"MM\0*", b"")


@examples
@given(
    st.builds(changed, st.sampled_from(images()), FLIPS, CUT)
    | st.tuples(st.sampled_from(SIGNATURES), st.binary(max_size=300)).map(b"".join)
)
def test_any_image(content):
    try:
        image = decode_image(content, minimum_size=1)
    except BadSample as bad:
        kinds = ("not an image", "other format", "corrupt image", "image too large")
        assert bad.kind in kinds and bad.detail
    else:
        assert image.mode == "RGB" and image.info == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "a.png").write_bytes(images()[0])
    return folder


@examples
@given(
    JSON_TEXT,
    st.sampled_from(["a.txt", "a.json", "metadata.csv", "metadata.jsonl"]),
    st.sampled_from([b"", b"file_name,text\na.png,", b'{"file_name": "a.png"', b'{"text": "a"']),
)
def test_any_caption_file(folder, content, name, start):
    (folder / name).write_bytes(start + content)
    try:
        listing = read_folder(folder)
    except ValueError as error:
        assert str(folder / name) in str(error)
    else:
        assert len(listing.records) == 1 or listing.rejected[-1].reason
    finally:
        (folder / name).unlink()


@examples
@given(JSON)
def test_any_coco_captions(folder, content):
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps(content))
    try:
        read_coco_captions(file)
    except ValueError as error:
        assert str(file) in str(error)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Four samples with long names, which need further headers, in a tar of each format."""
    plain = write_shards(tmp_path_factory.mktemp("shards"), [4]) / "00000.tar"
    shards = [plain]
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT), start=1):
        path = plain.with_name(f"{number:05}.tar")
        with tarfile.open(plain) as source, tarfile.open(path, "w", format=kind) as target:
            for member in source.getmembers():
                content = source.extractfile(member)
                member.name = "x" * 150 + "/" + member.name
                target.addfile(member, content)
        shards.append(path)
    return [path.read_bytes() for path in shards]


def usable(path, samples: int) -> tuple[int, int]:
    """Read a shard with a reader; the numbers of good samples and of reported defects."""
    report, good = mock.Mock(), 0
    rows = list(read_positions([Shard(path, samples)], range(samples), report=report))
    assert [position for position, _ in rows] == list(range(samples))
    for _, raw in rows:
        try:
            READER(raw, epoch=0)
            good += 1
        except BadSample as defect:
            assert defect.kind
    return good, samples - good + report.call_count


@examples
@given(st.integers(0, 2), FLIPS, CUT)
def test_any_damage_to_a_shard_is_reported(tmp_path_factory, shard, number, flips, cut):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "00000.tar"
    path.write_bytes(changed(shard[number], flips, cut))
    try:
        (opened,) = open_shards(folder)
    except ValueError as error:
        assert str(path) in str(error)
        with pytest.raises(ValueError, match=r"00000\.tar"):
            usable(path, 4)
    else:
        damage = count_samples(path).damage
        assert (folder / "index.json").read_text().strip() == "{}" or not damage
        good, reported = usable(path, opened.samples)
        assert good >= 4 or damage or reported
        good, reported = usable(path, max(4, opened.samples))  # the count from before the damage
        assert good >= 4 or reported
    shutil.rmtree(folder)


@examples
@given(st.binary(max_size=3000))
def test_any_file_as_a_shard(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "00000.tar").write_bytes(content)
    try:
        assert open_shards(folder)
    except ValueError as error:
        assert str(folder / "00000.tar") in str(error)
    shutil.rmtree(folder)
