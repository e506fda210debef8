"""Captions, and a textbook causal transformer to compare both priors' networks with."""

import torch
from torch import Tensor

TEXT = {"embedding_dim": 8, "text_width": 12, "context_length": 5}


def two_captions() -> dict[str, Tensor]:
    """Return the text tensors of captions with 3 and 5 tokens."""
    return {
        "text_states": torch.randn(2, 5, 12),
        "text_mask": torch.arange(5)[None] < torch.tensor([[3], [5]]),
        "text_embedding": torch.randn(2, 8),
    }


def run_plainly(net, caption: dict[str, Tensor], others: list[Tensor]) -> Tensor:
    """Run a network's blocks on [text, z_t, *others] in one pass, with explicit softmax."""
    text = net.text_in(caption["text_states"])
    x = torch.cat([text, net.text_embedding_in(caption["text_embedding"])[:, None], *others], dim=1)
    batch, length, width = x.shape
    assert length == net.positions.shape[1]
    x = x + net.positions
    seen = torch.cat([caption["text_mask"], torch.ones(batch, length - 5).bool()], dim=1)
    allowed = torch.ones(length, length).tril().bool() & seen[:, None]
    for block in net.blocks:
        q, k, v = block.qkv(block.norm_attention(x)).chunk(3, dim=2)
        q, k, v = (part.reshape(batch, length, 2, width // 2).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / (width // 2) ** 0.5
        weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
        x = x + block.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        x = x + block.mlp(block.norm_mlp(x))
    return net.out(net.norm_out(x))
