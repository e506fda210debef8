"""What a run would take: `python src/plan.py stage=decoder scale=paper trainer.devices=64`.

Nothing is trained and nothing is allocated; conf/plan.yaml has the settings.
"""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from cli.config_check import check_command_line
from unclip import bundle
from unclip.training.plan import StepPlan, example_batch, plan_step

GIB, TERA = 2**30, 1e12


class RunPlan(NamedTuple):
    """A whole run.

    Attributes:
        devices: that train together.
        batch: samples of a step, over all devices.
        steps: of the optimizer.
        images_per_second: over all devices.
        assumed: where that number comes from.
        sample_bytes: read a sample.
    """

    devices: int
    batch: int
    steps: int
    images_per_second: float
    assumed: str
    sample_bytes: float

    @property
    def hours(self) -> float:
        """Of training alone."""
        return self.batch * self.steps / self.images_per_second / 3600


@hydra.main(version_base="1.3", config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Prints the plan of what the command line composes."""
    cfg.run_folder = "none"
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    with torch.device("meta"):
        stage = bundle.build(config["model"])
    step = plan_step(
        stage,
        example_batch(config, stage),
        averaged="ema" in config["callbacks"],
        muon=config["optimizer"]["_target_"].endswith(".Muon"),
    )
    print(describe(config, step, plan_run(config, step)))


def plan_run(config: dict[str, Any], step: StepPlan) -> RunPlan:
    """The run that a configuration says, from the plan of its step."""
    trainer, data = config["trainer"], config["data"]
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else 1
    devices *= trainer.get("num_nodes", 1)
    own = data["batch_size"]
    speed, assumed = config["throughput"], "as given"
    if speed is None:
        speed = devices * config["mfu"] * config["flops"] / (step.training_flops / own)
        assumed = f"{config['flops'] / TERA:.0f} TFLOP/s a device at {config['mfu']:.0%}"
    return RunPlan(
        devices=devices,
        batch=own * devices * trainer["accumulate_grad_batches"],
        steps=round(trainer["max_steps"] * trainer["max_steps_multiplier"]),
        images_per_second=speed,
        assumed=assumed,
        sample_bytes=_sample_bytes(config),
    )


def describe(config: dict[str, Any], step: StepPlan, run: RunPlan) -> str:
    """The plan as a table."""
    own = config["data"]["batch_size"]
    images = run.batch * run.steps
    rows = [
        (f"{config['stage']} at scale {config['scale']}", ""),
        ("parameters", f"{step.parameters:,} ({step.trained:,} trained)"),
        ("FLOPs an image, forward", f"{step.forward_flops / own / 1e9:,.1f} G"),
        ("FLOPs an image, forward and backward", f"{step.training_flops / own / 1e9:,.1f} G"),
        (f"memory of a device, float32, {own} samples", ""),
        ("  weights", _gib(step.weights)),
        ("  gradients", _gib(step.gradients)),
        ("  optimizer", _gib(step.optimizer)),
        ("  averaged weights", _gib(step.average)),
        ("  activations", _gib(step.activations)),
        ("  activations, checkpointed", _gib(step.checkpointed)),
        *_peaks(step, run.devices),
        ("  in bf16-mixed", "activations take about half"),
        ("samples a step", f"{run.batch:,} on {run.devices}"),
        ("steps", f"{run.steps:,} ({images:,} samples)"),
        ("read", f"{images * run.sample_bytes / 1e12:,.2f} TB"),
        ("samples a second", f"{run.images_per_second:,.1f} ({run.assumed})"),
        ("hours", f"{run.hours:,.1f}"),
        ("device-hours", f"{run.hours * run.devices:,.0f}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows)


def _peaks(step: StepPlan, devices: int) -> list[tuple[str, str]]:
    """The step's peak on a device, as it is and by what may make it smaller."""
    rows = [
        ("  peak", _gib(step.peak())),
        ("  peak, checkpointed", _gib(step.peak(checkpointing=True))),
    ]
    if devices > 1:
        both = step.peak(devices=devices, checkpointing=True)
        rows += [
            (f"  peak, sharded over {devices}", _gib(step.peak(devices=devices))),
            ("  peak, sharded and checkpointed", _gib(both)),
        ]
    return rows


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _sample_bytes(config: dict[str, Any]) -> float:
    """What is read of a sample: a picture of common compression, or its stored embedding."""
    data = config["data"]
    if config["sample_bytes"] is not None:
        return config["sample_bytes"]
    if not data.get("load_image", True):
        return 2 * config["clip"]["embedding_dim"]
    side = data.get("shard_size") or data["image_size"]
    return 0.5 * side**2 / data.get("crops_per_image", 1)


if __name__ == "__main__":
    check_command_line("plan")
    main()
