"""The doctor finds errors and suggests a fix for each."""

import unclip  # isort: skip # noqa: F401

import json
import re

import pytest
import tiny_bundle
from tiny_shards import write_shards

import doctor
from unclip.files import sha256_of


def states(findings):
    return [finding.state for finding in findings]


@pytest.fixture
def data_set(tmp_path):
    root = write_shards(tmp_path / "data" / "mine", sizes=(64, 256))
    sums = {path.relative_to(root).as_posix(): sha256_of(path) for path in root.rglob("*.tar")}
    (root / "dataset.json").write_text(json.dumps({"sha256": sums}))
    return root


def test_this_environment_is_ok():
    assert "error" not in states([*doctor.check_environment(), *doctor.check_packages()])


def test_missing_and_wrong_packages_are_named(monkeypatch):
    real = doctor.version

    def version(name):
        if name in ("resvg-py", "hydra-core"):
            raise doctor.PackageNotFoundError(name)
        return "2.6.2" if name == "lightning" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    required, *extras = doctor.check_packages()
    assert required.state == "error" and required.fix == "make setup"
    assert "hydra-core is missing" in required.message
    assert re.search(r"lightning is 2\.6\.2, not .*>=2\.6\.6", required.message)
    (extra,) = (finding for finding in extras if "resvg-py" in finding.message)
    assert extra.state == "info" and "'.[emoji]'" in extra.fix


def test_missing_packages_end_the_checks(monkeypatch, capsys):
    broken = doctor.Finding("error", "hydra-core is missing", "make setup")
    monkeypatch.setattr(doctor, "check_packages", lambda: iter([broken]))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["packages", "  error  hydra-core is missing", "         fix: make setup"]


def test_a_whole_data_set_is_counted(data_set):
    found = list(doctor.check_data(data_set.parent))
    assert states(found) == ["ok"] * 4
    assert found[0].message == "mine/train/256: 24 samples"


def test_a_missing_or_changed_shard_is_an_error(data_set):
    (data_set / "train" / "256" / "00001.tar").unlink()
    shard = data_set / "val" / "64" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    errors = [f for f in doctor.check_data(data_set.parent) if f.state == "error"]
    messages = {
        "train/256/00001.tar is missing",
        "val/64/00000.tar has a wrong checksum: remove it",
    }
    assert {error.message.removeprefix("mine: ") for error in errors} == messages
    assert all("prepare.py" in error.fix for error in errors)


def test_a_damaged_shard_is_an_error(data_set):
    (data_set / "dataset.json").unlink()
    path = next(data_set.glob("train/*/*.tar"))
    path.write_bytes(path.read_bytes()[:-12_000])
    errors = [one for one in doctor.check_data(data_set.parent) if one.state == "error"]
    assert len(errors) == 1 and path.name in errors[0].message and "lost" in errors[0].message


def test_an_unfinished_data_set_is_an_error(data_set):
    (data_set / "building.json").touch()
    (error,) = doctor.check_data(data_set.parent)
    assert error.state == "error" and "not finished" in error.message


@pytest.mark.parametrize("check", [doctor.check_data, doctor.check_bundles])
def test_an_empty_folder_is_no_error(check, tmp_path):
    assert states(check(tmp_path)) == ["info"]


def test_a_bundle_is_ok_until_a_bit_is_flipped(tmp_path):
    path = tiny_bundle.write(tmp_path / "mine") / "prior.safetensors"
    (found,) = doctor.check_bundles(tmp_path)
    assert found == ("ok", f"mine: {', '.join(sorted(tiny_bundle.NAMES))}", "")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    (error,) = doctor.check_bundles(tmp_path)
    assert error.state == "error" and "prior.safetensors" in error.message and error.fix


def test_an_unreadable_bundle_fails_the_command(tmp_path, capsys):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "decoder.safetensors").write_bytes(b"not tensors at all")
    words = ["--models", str(tmp_path / "models"), "--data", str(tmp_path)]
    assert doctor.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (number for number, line in enumerate(lines) if line.startswith("  error"))
    assert "decoder.safetensors" in lines[line] and lines[line + 1].lstrip().startswith("fix: ")
