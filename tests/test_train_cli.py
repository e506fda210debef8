"""train.py as a user runs it: real processes, tiny stages."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from script import logged
from tiny_shards import write_shards

from unclip.bundle import read_metadata

TIMEOUT = 280
CANARY = "canary-5d0f0c4e9b"  # a secret in the environment
SCRIPT = Path(__file__).parents[1] / "src" / "train.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, models and runs."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder / "data")
    return folder


def command(*words):
    """Returns a command line as keyword arguments of the functions of subprocess."""
    common = "scale=quick data=folder data.root=data data.batch_size=8 trainer.accelerator=cpu"
    words = (sys.executable, str(SCRIPT), *common.split(), *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= dict.fromkeys(("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"), CANARY)
    return {"args": words, "env": environment, "text": True}


def run(place, *words):
    """Runs the script in `place`."""
    return subprocess.run(**command(*words), cwd=place, capture_output=True, timeout=TIMEOUT)


def only(folder, pattern):
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def values(run_folder, name):
    return [float(row[name]) for row in logged(run_folder) if name in row]


UPSTREAM = f"python {SCRIPT} stage=clip scale=quick data=folder data.root=data"
UPSTREAM += " trainer.accelerator=cpu bundle=other"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stage=clip resume=nowhere.ckpt", "resume=nowhere.ckpt: there is no such file"),
        ("stage=clip data.root=???", "data.root has no value: add data.root=VALUE"),
        (
            "stage=decoder",
            f"models/other/clip.safetensors is missing. Train it with `{UPSTREAM}`, or add "
            "upstream=train to train it first",
        ),
    ],
)
def test_a_user_error_is_one_line(place, words, said):
    result = run(place, "bundle=other", *words.split())
    assert result.returncode == 1 and result.stderr.strip() == f"train.py: {said}"


def test_help_starts_in_a_second(place):
    """It imports neither torch nor Lightning."""
    words = command("--help")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(**words, cwd=place, capture_output=True, check=True, timeout=TIMEOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    source = "import sys; import train; assert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", source], cwd=SCRIPT.parent, check=True)


@pytest.fixture(scope="module")
def trained(place):
    """Trains a prior, and first its CLIP."""
    result = run(place, "stage=prior", "upstream=train", "trainer.max_steps=12")
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_upstream_stages_are_trained_first_and_embeddings_are_stored(place, trained):
    clip = read_metadata(place / "models" / "quick" / "clip.safetensors")
    prior = read_metadata(place / "models" / "quick" / "prior.safetensors")
    assert prior.clip_fingerprint == clip.clip_fingerprint
    assert prior.steps == 12
    assert prior.extra["images"] == 12 * 8
    assert {"seconds", "validation/cosine", "validation/cosine_shuffled"} <= prior.extra.keys()
    for split in ("train", "val"):
        stored = (place / "data" / split / "64").glob(f"*.{clip.clip_fingerprint}.safetensors")
        assert len(list(stored)) == 2
    last_line = trained.stdout.strip().splitlines()[-1]
    assert last_line.startswith("prior · 12 steps") and "validation/cosine" in last_line
    folder = only(place, "runs/quick/prior/*")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == prior.recipe
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.slow
def test_two_processes_train_one_decoder(place, trained):
    result = run(
        place,
        *("stage=decoder", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=40"),
        *("trainer.validate_every_steps=40", "optimizer.lr=3e-3", "callbacks.ema.decay=0.5"),
    )
    assert result.returncode == 0, result.stderr
    folder = only(place, "runs/quick/decoder/*")  # both ranks wrote into one
    assert (folder / "train_ddp_process_1.log").exists()
    falling = values(folder, "train/loss")
    assert sum(falling[-3:]) < 0.7 * sum(falling[:3])
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == ["0000000.png", "0000040.png", "captions.txt"]
    assert read_metadata(place / "models" / "quick" / "decoder.safetensors").extra["images"] == 640


def interrupted(place, runs, *words, number, after=0):
    """Sends a run a signal, also its workers, when there is a checkpoint after a step.

    Returns the output, the errors and the exit code of the run, and its folder.
    """
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(**command(*words), **pipes, cwd=place, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT
    while not (saved := list(place.glob(f"{runs}/*/last.ckpt"))) or step_of(saved[0]) <= after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children if number == signal.SIGTERM else ():
        os.kill(int(pid), number)
    os.killpg(process.pid, number)
    return *process.communicate(timeout=TIMEOUT), process.returncode, only(place, f"{runs}/*")


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_decays_and_another_one_is_refused(place):
    runs, words = "runs/decayed/clip", ["stage=clip", "bundle=decayed", "data.workers=2"]
    words += ["trainer.max_steps=100000", "trainer.log_every_n_steps=1", "optimizer.lr=1e-3"]
    words += ["schedule=warmup_stable_decay", "callbacks.checkpoint.every_steps=4"]
    began = 4
    for number in (signal.SIGINT, signal.SIGTERM):
        stop = {"number": number, "after": began + 4}
        out, err, code, folder = interrupted(place, runs, *words, **stop)
        assert code == 128 + number and "Traceback" not in err, err
        resume = f"resume={folder}/last.ckpt"
        assert resume in shlex.split(out.strip().splitlines()[-1])
        began = step_of(folder / "last.ckpt")
    assert not (place / "models" / "decayed" / "clip.safetensors").exists()
    result = run(place, *words, "trainer.max_steps=300", resume)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "trainer.max_steps was 100000, is 300" in result.stderr
    decaying = [*words, "schedule.decay_steps=30", resume]
    *_, code, _ = interrupted(place, runs, *decaying, number=signal.SIGKILL, after=began)
    assert code == -signal.SIGKILL
    assert began < step_of(folder / "last.ckpt") < began + 30
    result = run(place, *decaying)
    assert result.returncode == 0, result.stderr
    assert only(place, f"{runs}/*") == folder
    assert step_of(folder / "stable.ckpt") == began
    assert step_of(folder / "last.ckpt") == began + 30
    assert read_metadata(place / "models" / "decayed" / "clip.safetensors").steps == began + 30
    rates = [rate / 1e-3 for rate in values(folder, "train/learning_rate")]
    assert rates[5 : began + 1] == pytest.approx([1.0] * (began - 4))
    decay = [1 - (step / 30) ** 0.5 for step in range(30)]
    assert rates[began:] == pytest.approx(decay, abs=1e-6)


@pytest.mark.slow
def test_no_key_is_written_anywhere(place, trained):
    """Neither to logs and configurations nor to checkpoints and bundles."""
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
