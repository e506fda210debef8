"""What every contender of a benchmark is given: the machine's setting, and the problem's size."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unclip.training.trainer import resolve_precision


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how all contenders run.

    Attributes:
        device: "cpu" or "cuda".
        precision: "32-true" or "bf16-mixed"; bf16 only where the hardware has it.
        compile: whether the networks are compiled.
        threads: of each process, on a CPU.
        sample_steps: evaluations of a whole sample.
    """

    device: str
    precision: str
    compile: bool
    threads: int
    sample_steps: int

    @classmethod
    def of_this_machine(
        cls,
        *,
        device: str | None,
        precision: str,
        compile: bool | None,
        threads: int,
        sample_steps: int,
    ) -> "Setting":
        """A GPU, and compiled networks, where there is one; precision "auto" as in training."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        precision = resolve_precision(precision, "cpu" if device == "cpu" else "gpu")
        return cls(
            device=device,
            precision=precision,
            compile=device == "cuda" if compile is None else compile,
            threads=threads,
            sample_steps=sample_steps,
        )

    def autocast(self) -> AbstractContextManager:
        """The precision as a context."""
        bf16 = self.precision == "bf16-mixed"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16)

    def compiled(self, function: Callable) -> Callable:
        """The function or module, compiled if contenders are."""
        return torch.compile(function) if self.compile else function


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """A 64 px decoder's U-Net: 31 M parameters, 22 GFLOP an image."""

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_width: int = 64
    context_width: int = 512
    embedding_dim: int = 768
    tokens: int = 77
    image_size: int = 64
    batch: int = 4
    guidance_scale: float = 3.0


@dataclass(frozen=True, kw_only=True)
class PriorSize:
    """A prior's transformer: 21 M parameters over 77 text tokens and four more."""

    width: int = 512
    layers: int = 6
    heads: int = 8
    embedding_dim: int = 768
    tokens: int = 77
    batch: int = 16
    noises: int = 4
    guidance_scale: float = 3.0


DECODER, PRIOR = DecoderSize(), PriorSize()
QUICK_DECODER = DecoderSize(
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    head_width=32,
    context_width=48,
    embedding_dim=32,
    tokens=8,
    image_size=16,
    batch=2,
)
QUICK_PRIOR = PriorSize(width=32, layers=2, heads=2, embedding_dim=32, tokens=8, batch=2, noises=2)


@dataclass(frozen=True)
class Problem:
    """Random inputs and targets of one stage, the same for all contenders."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    text_states: Tensor
    text_mask: Tensor
    text_embedding: Tensor
    image_embedding: Tensor
    generators: list[torch.Generator] = field(default_factory=list)

    @classmethod
    def draw(cls, size: DecoderSize | PriorSize, device: str) -> "Problem":
        """Noisy images or embeddings, timesteps, and captions of different lengths."""
        torch.manual_seed(0)
        batch, dim = size.batch, size.embedding_dim
        shape = (3, size.image_size, size.image_size) if isinstance(size, DecoderSize) else (dim,)
        lengths = torch.randint(3, size.tokens + 1, (batch, 1))
        on = {"device": device}
        return cls(
            x_t=torch.randn(batch, *shape).to(**on),
            target=torch.randn(batch, *shape).to(**on),
            t=torch.randint(0, 1000, (batch,)).to(**on),
            text_states=torch.randn(batch, size.tokens, dim).to(**on),
            text_mask=(torch.arange(size.tokens) < lengths).to(**on),
            text_embedding=torch.randn(batch, dim).to(**on),
            image_embedding=torch.randn(batch, dim).to(**on),
            generators=[torch.Generator().manual_seed(k) for k in range(batch)],
        )

    def first(self) -> "Problem":
        """The same of one prompt, as a whole sample is timed."""
        rows = {name: value[:1] for name, value in vars(self).items()}
        return Problem(**rows)
