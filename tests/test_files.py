import ast
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unclip.files import (
    decode_text,
    parse_json,
    read_bytes,
    read_json_lines,
    read_text,
    split_lines,
    write_tensors,
)


@pytest.mark.parametrize(
    "content",
    [
        "a café 🐱".encode(),
        b"\xef\xbb\xbf" + "a café 🐱".encode(),
        "a café 🐱".encode("utf-16"),
        b"\xfe\xff" + "a café 🐱".encode("utf-16-be"),
    ],
)
def test_utf_8_and_marked_utf_16_are_read(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == "a café 🐱"


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"caf\xe9", 3),
        (b"\xef\xbb\xbfcaf\xe9", 6),
        (b"ab\0c", 2),
        ("aé\0".encode("utf-16"), 6),
        ("ab".encode("utf-16-le"), 1),  # no byte order mark
        ("a".encode("utf-32"), 2),
        (b"\xff\xfeab\x00", 4),  # half a character
        (b"a\xed\xa0\x80", 1),  # a surrogate is not UTF-8
        (b"\x89PNG\r\n", 0),
    ],
)
def test_other_bytes_are_refused_with_file_and_offset(content, offset):
    with pytest.raises(ValueError, match=rf"^some\.txt: byte {offset} "):
        decode_text(content, "some.txt")


def test_lone_surrogates_are_replaced_and_nuls_in_json_removed():
    text = "a\ud83db".encode("utf-16", "surrogatepass")
    assert decode_text(text, "x") == "a\ufffdb"
    source = rb'{"a\ud83d": ["cut \ud83d", "nul \u0000x", "\ud83d\ude00", 5, null]}'
    assert parse_json(source, "x") == {"a\ufffd": ["cut \ufffd", "nul x", "😀", 5, None]}
    assert parse_json(rb'"\\u0000"', "x") == r"\u0000"


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"9" * 9999, b"\xff"])
def test_what_is_not_json_is_refused_by_name(content):
    with pytest.raises(ValueError, match=r"^some\.json"):
        parse_json(content, "some.json")


def test_lines_end_only_at_line_feeds(tmp_path):
    text = "one\u2028two\x85\x0b\x0c\x1cthree\rfour\r\nfive\n\nsix\n"
    assert split_lines(text) == ["one\u2028two\x85\x0b\x0c\x1cthree\rfour", "five", "", "six"]
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert list(read_json_lines(path)) == rows
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON"):
        list(read_json_lines(path))


@pytest.mark.timeout(10)
def test_files_without_end_and_oversize_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is not a file"):
        read_bytes(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"12345")
    assert read_bytes(tmp_path / "big", 5) == b"12345"
    with pytest.raises(ValueError, match="big has 5 bytes, the limit is 4"):
        read_bytes(tmp_path / "big", 4)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


READERS = {"unclip/files.py", "unclip/images.py"}
EXCEPTIONS = {
    "unclip/provenance.py": "reads the text of a PNG",
    "unclip/emoji/render.py": "keeps the transparency of its own renders",
    "hydra_plugins/unclip_sweeps/jobs.py": "must not import torch",
    "cli/sample_again.py": "opens the PNG whose text it has read",
    "cli/sample_output.py": "reads the comment of a GIF",
    "unclip/evaluation/tables.py": "opens images that this evaluation saved",
    "unclip/training/callbacks/logs.py": "reads and continues its own metrics.csv",
}


def reads_otherwise(call: ast.Call) -> bool:
    """Whether a call reads a text file or an image, or splits lines as `str.splitlines` does."""
    source = ast.unparse(call.func)
    if source in ("os.open", "tarfile.open", "zipfile.ZipFile.open", "webbrowser.open"):
        return False
    if source == "open" or source.endswith(".open"):
        if source.startswith("Image"):
            return True
        values = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        nodes = [node for value in values for node in ast.walk(value)]
        modes = [node.value for node in nodes if isinstance(node, ast.Constant)]
        return not any(set(str(mode)) & set("bwax") for mode in modes)
    if source.endswith(".splitlines"):
        return "error" not in source
    return source.endswith(".read_text") or source == "json.load"


def test_text_and_images_are_read_in_one_way():
    root = Path(__file__).parents[1] / "src"
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found[name] = [f"{name}:{call.lineno}" for call in calls if reads_otherwise(call)]
    assert all(found[name] for name in EXCEPTIONS)
    allowed = READERS | EXCEPTIONS.keys()
    others = [name for name in found if name not in allowed]
    assert [place for name in others for place in found[name]] == []


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    metadata = {f"key {n}": f'"é\\\n\x01 {n}' for n in range(12)}
    written = set()
    for n in range(4):
        write_tensors(tmp_path / str(n), tensors, metadata)
        written.add((tmp_path / str(n)).read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"])
