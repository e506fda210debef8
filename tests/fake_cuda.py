"""Run by test_fake_cuda.py: stages on CUDA tensors without data, of a PyTorch without CUDA.

FakeTensorMode gives every operation the shapes, dtypes, strides and devices that it has on a GPU.
Each `Trace` lists where the CPU would wait for the GPU, where an operation mixes devices (it
raises), and which convolutions get inputs that are not in channels_last. The backward pass is the
one thing that cannot run.
"""

import unclip  # isort: skip

import ctypes
import json
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import tiny_bundle
import torch
from tiny_bundle import CONTEXT_LENGTH, EMBEDDING_DIM, TEXT_WIDTH
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unclip.evaluation.features import ClipNetwork, EfficientNetLite0
from unclip.training.callbacks.checkpoint import NonFiniteGuard
from unclip.training.callbacks.ema import EMA
from unclip.training.modules import StageModule
from unclip.training.optim import Muon

aten = torch.ops.aten
HERE = Path(__file__).parent
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten.equal.default, aten._unique2.default, aten.unique_dim.default),
}
ROWS, GPU = 4, torch.device("cuda:0")


def channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


class Trace(TorchDispatchMode):
    """Record what a GPU would wait for, and how the convolutions' inputs are stored."""

    def __init__(self):
        super().__init__()
        self.waits, self.contiguous = [], []
        self.found = {"waits": self.waits, "convolutions": 0, "contiguous": self.contiguous}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masks = args[1] if func is aten.index.Tensor else ()
        if any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.waits.append(f"boolean index {where()}")
            return args[0].new_empty(1, *args[0].shape[1:])
        if func in WAITING and any(tensor.is_cuda for tensor in inputs):
            self.waits.append(f"{func} {where()}")
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.convolution.default and args[0].is_cuda:
            self.found["convolutions"] += 1
            if not channels_last(args[0]):
                self.contiguous.append(where())
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = inputs[-1] if func is aten.copy_.default else inputs[0]
            if source.is_cuda != out.is_cuda and not kwargs.get("non_blocking", len(args) > 2):
                self.waits.append(f"copy to {out.device} {where()}")
        return out


def where() -> str:
    """Return the line of unclip that is running."""
    frames = traceback.extract_stack()
    own = [frame for frame in frames if "/unclip/" in frame.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "tests"


class WithoutGenerators(TorchFunctionMode):
    """Random numbers of the default generator need a GPU: their tensors stay empty."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn_like:
            return torch.empty_like(args[0])
        if func is torch.rand and "generator" not in kwargs:
            return torch.empty(*args, **kwargs)
        if func is torch.randperm:
            return torch.empty(*args, dtype=torch.int64, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


class Attention(torch.autograd.Function):
    """Fused attention, which has no kernel here."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q.new_empty(*q.shape[:-1], v.shape[-1])


def attention(q, k, v, attn_mask=None, *_, **__):
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (part.to(torch.get_autocast_dtype("cuda")) for part in (q, k, v))
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    assert attn_mask is None or attn_mask.device == q.device
    return Attention.apply(q, k, v)


def pretend() -> None:
    """Let PyTorch believe that there is a GPU where it asks."""
    ctypes.CDLL(sys.argv[1])
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch._C._conv_determine_backend_memory_format = lambda x, weight, _: (
        torch.channels_last
        if channels_last(x) or channels_last(weight)
        else torch.contiguous_format
    )
    nn.functional.scaled_dot_product_attention = attention


def move(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace parameters and buffers by those on the GPU; parameters also by those of a dtype."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty_like(old, device=GPU, dtype=dtype)
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for table in (part._buffers, getattr(part, "_tables", {})):
            for name, old in table.items():
                table[name] = None if old is None else torch.empty_like(old, device=GPU)
    return module


def stages() -> dict:
    """Return the stages, some also with what the paper uses and the tiny recipes do not."""
    learned = {"variance": "learned_range", "prediction": "eps"}
    ddpm = {"_target_": "unclip.diffusion.ddpm", "_partial_": True, "steps": 3}
    unipc = {"_target_": "unclip.diffusion.unipc", "_partial_": True, "steps": 4}
    encoder = {
        "_target_": "unclip.networks.TextTransformer",
        **{"vocabulary_size": 600, "context_length": CONTEXT_LENGTH},
        **{"width": TEXT_WIDTH, "layers": 2, "heads": 2},
    }
    made = {name: tiny_bundle.recipe(name) for name in (*tiny_bundle.NAMES, "prior_ar")}
    made["decoder_paper"] = tiny_bundle.recipe("decoder") | {
        **{"text_encoder": encoder, "sampler": ddpm},
        "diffusion": {"_target_": "unclip.diffusion.GaussianDiffusion", **learned},
    }
    made["decoder_paper"]["network"] |= {"out_channels": 6, "multipliers": [1, 2], "dropout": 0.1}
    made["prior"] |= {"sampler": unipc, "linear_baseline": True}
    made["prior_paper"] = made["prior"] | {
        **{"text_encoder": encoder, "sampler": ddpm, "scaling": "paper"},
        "diffusion": {
            "_target_": "unclip.diffusion.GaussianDiffusion",
            **{"prediction": "x0", "variance": "analytic"},
        },
    }
    made["upsampler_karlo"] = tiny_bundle.recipe("upsampler_256") | {"sampler": ddpm}
    made["upsampler_karlo"]["last_network"] = made["upsampler_karlo"]["network"]
    return {name: unclip.bundle.build(recipe) for name, recipe in made.items()}


def batch(stage) -> dict:
    """Return a batch of a loader, with CLIP's features, on the GPU; captions stay texts."""
    side = 64 if hasattr(stage, "network") else 16
    made = partial(torch.empty, device=GPU)
    batch = {
        "key": [f"key {k}" for k in range(ROWS)],
        "caption": [f"caption {k}" for k in range(ROWS)],
        "image": made(ROWS, 3, side, side, dtype=torch.uint8),
        "image_embedding": made(ROWS, EMBEDDING_DIM),
        "text_embedding": made(ROWS, EMBEDDING_DIM),
        "text_states": made(ROWS, CONTEXT_LENGTH, TEXT_WIDTH),
        "text_mask": made(ROWS, CONTEXT_LENGTH, dtype=torch.bool),
        "tokens": made(ROWS, CONTEXT_LENGTH, dtype=torch.int64),
    }
    if hasattr(stage, "scale"):
        batch["low_res"] = made(ROWS, 3, side // 4, side // 4, dtype=torch.uint8)
    return batch


def train(stage) -> dict:
    """Trace an unlogged step, except its backward pass."""
    settings = {"lr": 1e-3, "muon_lr": 1e-3, "momentum": 0.9, "betas": (0.9, 0.99)}
    optimizer = partial(Muon, **settings, weight_decay=0.0, muon_weight_decay=0.0)
    embedder = EMBEDDER if stage.needs_clip else None
    module = StageModule(
        stage, recipe={}, optimizer=optimizer, schedule=lambda *_: 1.0, embedder=embedder
    )
    move(module)._device = GPU
    module._trainer = trainer = SimpleNamespace(
        **{"log_every_n_steps": 20, "global_step": 1, "world_size": 1, "max_steps": 100},
        **{"accumulate_grad_batches": 1, "precision_plugin": None, "loggers": []},
        strategy=SimpleNamespace(root_device=GPU),
    )
    ema, guard = EMA(), NonFiniteGuard("none")
    ema.on_fit_start(trainer, module)
    (step,) = [module.configure_optimizers()["optimizer"]]
    if stage.name == "clip":
        stage._read = stage.vocabulary, stage.vocabulary._version  # read once in a run
    with Trace() as trace:
        processed = module.preprocess(batch(stage))
        guard.on_train_batch_start(trainer, module, processed, 0)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = module.training_step(processed, 0)
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        guard.on_before_optimizer_step(trainer, module)
        module.on_before_optimizer_step(step)
        module.configure_gradient_clipping(step, 1.0)
        step.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer)
    tensors = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    return trace.found | {
        "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "averages": list({str(average.dtype) for average in ema.weights.values()}),
        "devices": list({str(tensor.device) for tensor in tensors.values()}),
        "loss": str(loss.dtype),
    }


def sample(stage) -> dict:
    """Trace a sample in float16, as `Cascade` takes it."""
    stage.eval().requires_grad_(False)
    for name, child in stage.named_children():
        if name in ("network", "last_network", "text_encoder"):
            move(child, torch.float16)
    generators = [torch.Generator().manual_seed(k) for k in range(ROWS)]
    with torch.no_grad(), Trace() as trace:
        inputs = batch(stage)
        if "low_res" in inputs:
            inputs["low_res"] = inputs["low_res"].float()
        out = stage.sample(stage.condition(inputs), generators=generators)
    return trace.found | {"out": f"{out.dtype} {out.device}"}


def features() -> dict:
    """Trace CLIP's features in float16, and the networks of the evaluation."""
    images = torch.empty(ROWS, 3, 64, 64, dtype=torch.uint8, device=GPU)
    move(EMBEDDER.model, torch.float16)
    calls = {
        "text": lambda: EMBEDDER.text(["a cat", "a dog"]).text_states,
        "image": lambda: ClipNetwork(EMBEDDER, "judge")(images),
        "effnet_lite0": lambda: move(EFFICIENTNET)(images),
    }
    traces = {}
    for name, call in calls.items():
        with Trace() as trace:
            out = call()
        traces[f"features {name}"] = trace.found | {"out": f"{out.dtype} {out.device}"}
    return traces


pretend()
EMBEDDER = unclip.bundle.build(tiny_bundle.recipe("clip")).embedder()
EFFICIENTNET = EfficientNetLite0()


def main() -> None:
    """Print the traces as JSON."""
    traces, made = {}, stages()
    for stage in made.values():
        if hasattr(stage, "diffusion"):
            stage.diffusion.cpu_alpha_bar  # noqa: B018 (read while it has numbers)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutGenerators():
        move(EMBEDDER.model)
        for name, stage in made.items():
            traces[f"train {name}"] = train(stage.train())
            if stage.name != "clip":
                traces[f"sample {name}"] = sample(stage)
        traces |= features()
    print(json.dumps(traces))


if __name__ == "__main__":
    main()
