"""Run by test_ranks.py: count what FSDP transfers in one training step of two ranks."""

import unclip  # isort: skip # noqa: F401

import json
import sys
from inspect import signature
from pathlib import Path

import tiny_bundle
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

from unclip import bundle
from unclip.training.sharding import full_state_dict, shard

LAYERS = 6


def build(name):
    recipe = tiny_bundle.recipe(name)
    if "layers" in recipe["network"]:
        recipe["network"] |= {"layers": LAYERS, "width": 32}
    torch.manual_seed(0)
    stage = bundle.build(recipe)
    for parameter in stage.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return stage.train()


def step(stage, name, bf16, phases=None):
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = stage.loss(tiny_bundle.batch(name))["loss"]
    if phases is not None:
        phases.append("backward")
    loss.backward()
    return loss.item()


def accumulate(stage, plain, name, bf16):
    """Return the relative error of the gradient after a second batch of the same step."""
    for module in (stage, plain):
        step(module, name, bf16)
    pairs = zip(stage.parameters(), plain.parameters(), strict=True)
    pairs = [(p.grad.full_tensor(), q.grad) for p, q in pairs if q.grad is not None]
    norm = torch.nn.utils.get_total_norm
    return (norm([ours - its for ours, its in pairs]) / norm([its for _, its in pairs])).item()


def count(name, bf16):
    """Return the elements gathered per parameter, and the dtypes of the transfers."""
    plain = build(name)
    expected = step(plain, name, bf16)
    stage, phases, sent = build(name), ["forward"], []
    shard(stage, init_device_mesh("cpu", (2,)), bf16=bf16)
    gather, reduce = groups.foreach_all_gather, groups.foreach_reduce

    def spy_gather(parameters, *args, **kwargs):
        result = gather(parameters, *args, **kwargs)
        size = sum(parameter._orig_size.numel() for parameter in parameters)
        sent.append((phases[-1], size, str(result.all_gather_output.dtype)))
        return result

    def spy_reduce(*args, **kwargs):
        given = signature(reduce).bind(*args, **kwargs).arguments
        size = sum(gradient.numel() for gradient in given["unsharded_grads"])
        sent.append(("reduce", size, str(given["reduce_dtype"] or given["orig_dtype"])))
        return reduce(*args, **kwargs)

    groups.foreach_all_gather, groups.foreach_reduce = spy_gather, spy_reduce
    loss = step(stage, name, bf16, phases)
    groups.foreach_all_gather, groups.foreach_reduce = gather, reduce
    whole = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    found = {"loss": loss, "expected": expected, "error": accumulate(stage, plain, name, bf16)}
    for phase in ("forward", "backward", "reduce"):
        parts = [(size, dtype) for kind, size, dtype in sent if kind == phase]
        found[phase] = sum(size for size, _ in parts) / whole
        found[f"{phase} dtypes"] = sorted({dtype for _, dtype in parts})
    found["saved"] = sorted({str(t.dtype) for t in full_state_dict(stage, keep=True).values()})
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    counts = {
        f"{name} {'bf16' if bf16 else 'float32'}": count(name, bf16)
        for name in ("prior", "decoder", "upsampler_256")
        for bf16 in (False, True)
    }
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
