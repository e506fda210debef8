"""Throughput, memory use, profile and progress messages of a run."""

import resource
import sys
import time
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.profiler import profile, schedule
from tqdm import tqdm

from unclip.batch import Batch
from unclip.device import write_report
from unclip.training.cost import forward_flops, peak_flops
from unclip.training.lightning_compat import find_callback, is_logged_step
from unclip.training.modules import StageModule

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WINDOW_SECONDS = 20.0  # of the moving average of images per second


class Throughput(Callback):
    """Log the images per second of training without validation, the MFU and the peak memory.

    The model FLOPs utilization (MFU) relates three times the forward pass of the stage, without the
    frozen CLIP and recomputed blocks, to the FLOP/s of a large matrix product on the same device.
    """

    def __init__(self):
        self.images = 0  # of all ranks; these two count also before a resume
        self.seconds = 0.0
        self.images_per_second = 0.0  # exponential moving average over about 20 seconds
        self._since = 0.0  # 0 while the clock is stopped
        self._flops = 0.0  # of an image
        self._peak_flops = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, *_: Any
    ) -> None:
        """Start the clock at the first batch and after a validation."""
        if not self._flops:
            self._flops = 3 * forward_flops(pl_module.recipe, batch) / len(batch["key"])
            dtype = DTYPES.get(str(trainer.precision), torch.float32)
            self._peak_flops = peak_flops(pl_module.device, dtype)
        self._since = self._since or time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: StageModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        now = time.perf_counter()
        seconds, images = now - self._since, len(batch["key"]) * trainer.world_size
        self._since = now
        self.seconds += seconds
        self.images += images
        weight = min(seconds / min(WINDOW_SECONDS, self.seconds), 1.0)
        self.images_per_second += weight * (images / seconds - self.images_per_second)
        if is_logged_step(trainer, trainer.global_step):
            flops = self._flops * self.images_per_second / trainer.world_size
            values = {
                "images_per_second": self.images_per_second,
                "tflops": flops / 1e12,  # per second and device
                "mfu": flops / self._peak_flops,
                "images": float(self.images),
                "memory_gib": peak_memory(pl_module.device) / 2**30,
            }
            pl_module.log_dict({f"train/{name}": value for name, value in values.items()})

    def on_validation_start(self, *_: Any) -> None:
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


def peak_memory(device: torch.device) -> float:
    """Return the peak memory use so far, of the GPU or of the process, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


class Profile(Callback):
    """Profile some steps of rank 0, after the first ones, which take longer."""

    def __init__(self, steps: int, folder: str | Path):
        self.steps = steps
        self.path = Path(folder) / "profile.json.gz"
        self._profiler: profile | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the schedule of the profiler, which counts batches."""
        batches = self.steps * trainer.accumulate_grad_batches
        self._profiler = profile(
            schedule=schedule(skip_first=5, wait=0, warmup=1, active=batches, repeat=1),
            on_trace_ready=partial(write_report, path=self.path),
        )
        self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Advance the schedule; after the last batch, the report is written."""
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, *_: Any) -> None:
        if self._profiler is not None:
            self._profiler.stop()


class StepProgress(Callback):
    """Progress bar over all steps; prints a line every 30 s when stderr is not a terminal."""

    def __init__(self):
        self._terminal = sys.stderr.isatty()
        self.every_seconds = 0.5 if self._terminal else 30.0  # reading waits for the GPU
        self._bar: tqdm | None = None
        self._next = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Open the bar at the first step, or at the step that the run resumes from."""
        step, steps = trainer.global_step, trainer.max_steps
        self._next = time.monotonic() + self.every_seconds
        if step:
            print(f"{pl_module.name}: resumed after step {step}", file=sys.stderr)
        if self._terminal:
            settings = {"unit": "step", "dynamic_ncols": True}
            self._bar = tqdm(desc=pl_module.name, initial=step, total=steps, **settings)

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        now, step, steps = time.monotonic(), trainer.global_step, trainer.max_steps
        if now < self._next and step != steps:
            return
        self._next = now + self.every_seconds
        shown = {"loss": f"{float(pl_module.last_loss):.4f}"}
        throughput = find_callback(trainer, Throughput)
        if throughput is not None:
            shown["images/s"] = f"{throughput.images_per_second:.1f}"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
            return
        parts = [f"{pl_module.name}: step {step}/{steps}"]
        parts += [f"{name} {value}" for name, value in shown.items()]
        if throughput is not None and step:
            left = timedelta(seconds=(steps - step) * throughput.seconds / step)
            parts.append(f"ends at about {datetime.now() + left:%H:%M:%S}")
        print(" · ".join(parts), file=sys.stderr)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar, so that an error message starts on its own line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end
