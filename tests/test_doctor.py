"""The doctor finds what is wrong, and names what mends it."""

import unclip  # isort: skip # noqa: F401

import json
import re
import shutil

import pytest
from tiny_shards import write_shards

import doctor


def states(findings):
    return [finding.state for finding in findings]


def test_this_machine_and_its_packages_are_fit():
    assert "unfit" not in states([*doctor.look_at_machine(), *doctor.look_at_packages()])


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    real = doctor.version

    def version(name):
        if name in ("resvg-py", "hydra-core"):
            raise doctor.PackageNotFoundError(name)
        return "2.6.2" if name == "lightning" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    found = list(doctor.look_at_packages())
    needed = found[0]
    assert needed.state == "unfit" and needed.mend == "make setup"
    assert "hydra-core" in needed.what and re.search(
        r"lightning 2\.6\.2, not .*>=2\.6\.6", needed.what
    )
    (extra,) = (finding for finding in found if "resvg-py" in finding.what)
    assert extra.state == "note" and "'.[emoji]'" in extra.mend


def test_data_that_is_whole_and_data_that_is_not(tmp_path):
    whole = write_shards(tmp_path / "whole", sizes=(64, 256))
    shards = {path.relative_to(whole).as_posix(): "" for path in whole.rglob("*.tar")}
    (whole / "dataset.json").write_text(json.dumps({"sha256": shards}))
    found = list(doctor.look_at_data(tmp_path))
    assert states(found) == ["fit", "fit"]
    assert found[0].what == "whole train: 24 at 64 px · 24 at 256 px"
    (whole / "train" / "256" / "00001.tar").unlink()
    (gone,) = doctor.look_at_data(tmp_path)
    assert gone.state == "unfit" and "train/256/00001.tar" in gone.what and gone.mend
    shutil.rmtree(whole)
    (write_shards(tmp_path / "cut") / "building.json").touch()
    (unfinished,) = doctor.look_at_data(tmp_path)
    assert unfinished.state == "unfit" and "unfinished" in unfinished.what
    (none,) = doctor.look_at_data(tmp_path / "nowhere")
    assert none.state == "note"


def test_a_broken_bundle_is_named(tmp_path, capsys):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "decoder.safetensors").write_bytes(b"not tensors at all")
    words = ["--models", str(tmp_path / "models"), "--data", str(tmp_path)]
    assert doctor.main(words) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "✗" in line)
    assert "decoder" in line and "train decoder again" in line


@pytest.mark.parametrize("bundle", ["missing"])
def test_no_bundle_is_no_fault(tmp_path, bundle):
    assert states(doctor.look_at_bundles(tmp_path, bundle)) == ["note"]
