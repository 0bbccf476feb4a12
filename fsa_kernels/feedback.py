"""Class predictions -> feedback attention A_f, in three launches.

    isolate or predict   P and L each as two halves, and h
    similarity           S, in float32
    select               A_f, over the memory of S

A_f takes the place of S row by row, so 4 B an entry are kept and no more: in half precision its
rows lie twice their length apart. `apply_feedback` does the last two launches for a block of rows
at a time and multiplies each block at once, so it keeps no N x N matrix at all.

A patch with logits that are not finite gets a row of NaN; no other row keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsa_kernels import launch
from fsa_kernels.isolate import isolate
from fsa_kernels.options import Options
from fsa_kernels.predict import predict
from fsa_kernels.select import select
from fsa_kernels.similarity import similarity

# Workspace of `apply_feedback` for similarities, in bytes, and the rows of an image that it must
# hold: whole tiles of the similarity kernel.
_BLOCK_BYTES = 24 << 20
_BLOCK_ROWS = 128


def feedback_attention(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None = None,
    *,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """A_f (B,N,N), with `launch.result_strides`.

    Args:
        patches: logits (B,N,C), scaled; or with texts, features (B,N,E) of any length. float16,
            bfloat16 or float32; any strides.
        uniform: the same under uniform attention, (B,1,C) or (B,N,C), or with E; or None.
        text_features: (C,E) of unit length, or None.
        options: how A_f is made.
        dtype: of A_f: float16, bfloat16 or float32.

    Takes 4 B N^2 bytes, the result among them, and (8 C + 4) B N besides; from features, 8 C B N
    more before A_f is begun, and twice that where each patch has a uniform row of its own.
    """
    feedback = Feedback(patches, uniform, text_features, options)
    return feedback.rows(0, patches.shape[1], dtype)


def apply_feedback(
    patches: Tensor,
    uniform: Tensor | None,
    text_features: Tensor | None,
    columns: Tensor,
    *,
    options: Options,
) -> Tensor:
    """A_f times columns (B,N,K), by blocks of rows; no N x N matrix is kept.

    Args:
        patches, uniform, text_features, options: as `feedback_attention` takes them.
        columns: (B,N,K) float16, bfloat16 or float32; A_f is rounded to their type.

    Takes what `feedback_attention` takes, but for A_f: the result (B,N,K), and for similarities
    24 MiB or 128 rows of each image, whichever is more.
    """
    B, N, _ = patches.shape
    feedback = Feedback(patches, uniform, text_features, options)
    count = _BLOCK_BYTES // (B * launch.padded_row(N) * torch.float32.itemsize)
    count = max(_BLOCK_ROWS, count // _BLOCK_ROWS * _BLOCK_ROWS)
    out = torch.empty((B, N, columns.shape[-1]), dtype=columns.dtype, device=columns.device)
    for first in range(0, N, count):
        rows = feedback.rows(first, min(count, N - first), columns.dtype)
        torch.bmm(rows, columns, out=out[:, first : first + count])
    return out


class Feedback:
    """A_f of some images, whole or by blocks of rows; the first launch is done at once.

    Args:
        patches, uniform, text_features, options: as `feedback_attention` takes them.
    """

    def __init__(
        self,
        patches: Tensor,
        uniform: Tensor | None,
        text_features: Tensor | None,
        options: Options,
    ) -> None:
        self.options = options
        if text_features is None:
            self.operands = isolate(patches, uniform, cosine=options.cosine)
        else:
            self.operands = predict(
                patches,
                uniform,
                text_features,
                scale=options.logit_scale,
                uniform_scale=options.uniform_logit_scale,
                cosine=options.cosine,
            )

    def rows(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `first + count` of A_f, (B,count,N) in `dtype`, in two launches."""
        options = self.options
        exact = options.precision == "exact"
        S = similarity(self.operands, first, count, cosine=options.cosine, exact=exact)
        return select(S, self.operands.h, first, options, dtype)
