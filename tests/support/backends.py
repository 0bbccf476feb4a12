"""The backends of the ops, for tests that hold all of them to the same claims."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

import fsa
import fsa_kernels
from fsa.config import FSAConfig
from fsa.ops import torch_backend
from fsa.ops.library import op_options

ON_GPU = torch.cuda.is_available() and fsa_kernels.available()
BACKENDS = ["torch", *(["triton"] if fsa_kernels.available() else [])]


@dataclass
class Backend:
    """One backend: PyTorch on the CPU, or Triton's kernels on the GPU or in Triton's interpreter.

    Args:
        name: as the ops take it.
    """

    name: str
    _results: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> str:
        return "cuda" if self.name == "triton" and ON_GPU else "cpu"

    @property
    def is_interpreted(self) -> bool:
        """Whether a call takes a tenth of a second and more for a handful of patches."""
        return self.name == "triton" and not ON_GPU

    @property
    def dtypes(self) -> list[torch.dtype]:
        halves = [torch.float32, torch.float16, torch.bfloat16]
        return halves if self.name == "triton" else [torch.float64, *halves]

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the backend's device; what has strides of its own must be made after."""
        return tensor.to(self.device)

    def attention(
        self,
        logits: Tensor,
        uniform: Tensor | None = None,
        config: FSAConfig | None = None,
        *,
        texts: Tensor | None = None,
        dtype: torch.dtype | None = None,
        again: bool = False,
    ) -> Tensor:
        """A_f (B,N,N), on the CPU; the same inputs are computed once for all tests.

        Args:
            again: compute it once more.
        """
        key = _digest(logits, uniform, texts, config, dtype)
        if again or key not in self._results:
            logits, uniform, texts = (
                None if tensor is None else self.put(tensor) for tensor in (logits, uniform, texts)
            )
            self._results[key] = fsa.feedback_attention(
                logits,
                uniform,
                text_features=texts,
                config=config,
                dtype=dtype,
                backend=self.name,
            ).cpu()
        return self._results[key].clone()

    def unchecked_attention(self, logits: Tensor, config: FSAConfig | None = None) -> Tensor:
        """A_f in float32 of inputs that nobody looks at, as on a GPU; on the CPU."""
        options = op_options(config or FSAConfig())
        feedback = self.module.feedback_attention(
            self.put(logits), None, options=options, dtype=torch.float32
        )
        return feedback.cpu()

    def proxy_attention(self, features: Tensor, value: Tensor) -> Tensor:
        """ProxyCLIP's attention applied to values (B,N,D), on the CPU."""
        return fsa.proxy_attention(self.put(features), self.put(value), backend=self.name).cpu()

    @property
    def module(self) -> ModuleType:
        """The backend's own functions, whose inputs are trusted."""
        return fsa_kernels if self.name == "triton" else torch_backend


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((part.dtype, tuple(part.shape), part.stride())).encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
