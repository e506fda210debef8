"""A tiny public CLIP: a model that open_clip knows by name, and a file of its weights."""

import json

import open_clip
from safetensors.torch import save_file

NAME = "tiny-test"
SETTINGS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def register(folder, monkeypatch):
    """Make open_clip know the model during a test, and return random weights."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    (folder / f"{NAME}.json").write_text(json.dumps(SETTINGS))
    open_clip.add_model_config(folder / f"{NAME}.json")
    return open_clip.create_model(NAME, load_weights=False).state_dict()


def write_weights(folder, monkeypatch):
    """Write a file of weights as the hub has them, and return its path."""
    path = folder / "open_clip_model.safetensors"
    save_file(register(folder, monkeypatch), path)
    return path
