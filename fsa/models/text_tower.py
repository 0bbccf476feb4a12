"""Text towers: on how many tokens they need to run, and what tells their features apart."""

from __future__ import annotations

import copy
import hashlib
from itertools import chain
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer
from torch import Tensor, nn

from fsa.models.transformers import TransformersModel

# Classes of transformers whose text towers are causal and pool at the end-of-text token.
_CAUSAL = ("CLIPModel", "MetaClip2Model", "CLIPSegModel")
# By this token their towers find the end of a text by the largest number instead.
_UNKNOWN_END = 2
# Parts of a model's name that lead to its vision tower.
_VISION = {"visual", "vision_model", "visual_projection"}
_SETTINGS = (bool, int, float, str)


def shortened(model: Any, tokens: Tensor) -> tuple[Any, Tensor]:
    """A model and tokens that give the same text features from fewer tokens.

    In a causal tower no token depends on a later one, and a tower that pools at the end-of-text
    token reads nothing behind it: there all texts are cut to the longest. Other towers, such as
    SigLIP's, which pools the last token, keep the full length.

    Args:
        model: open_clip's, or a `TransformersModel`; it is not changed.
        tokens: (T,L) int64, on the CPU.

    Returns:
        A model that shares the modules and weights of `model`, and tokens (T,l), l <= L.
    """
    ends = _ends_of_text(model, tokens)
    length = tokens.shape[1] if ends is None else int(ends.max()) + 1
    if length >= tokens.shape[1]:
        return model, tokens
    if isinstance(model, CLIP):
        model = _cut_to(model, length)
    elif isinstance(model, CustomTextCLIP):
        text = _cut_to(model.text, length)
        model = copy.copy(model)
        vars(model)["_modules"] = {**vars(model)["_modules"], "text": text}
    return model, tokens[:, :length]


def fingerprint(model: nn.Module) -> str:
    """A hash of all that text features depend on in a model: weights, classes, settings.

    Takes about half a second for a gigabyte of weights.
    """
    whole = hashlib.sha256()
    for name, module in model.named_modules():
        if _of_text(name):
            settings = sorted(
                (key, repr(value))
                for key, value in vars(module).items()
                if isinstance(value, _SETTINGS) and not key.startswith("_") and key != "training"
            )
            whole.update(f"{name} {type(module).__qualname__} {settings}\n".encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if _of_text(name):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            stored = tensor.detach().contiguous().cpu()
            data: Any = stored.flatten().view(torch.uint8).numpy()
            whole.update(data)
    return whole.hexdigest()


def _of_text(name: str) -> bool:
    return _VISION.isdisjoint(name.split("."))


def _ends_of_text(model: Any, tokens: Tensor) -> Tensor | None:
    """The positions (T,) at which the tower pools, or None where it may look beyond them."""
    # Whoever has replaced the method knows what it needs.
    if "encode_text" in vars(model):
        return None
    if isinstance(model, TransformersModel):
        if type(model.model).__name__ not in _CAUSAL:
            return None
        end = model.model.config.text_config.eos_token_id
        if end == _UNKNOWN_END and type(model.model).__name__ != "MetaClip2Model":
            return tokens.argmax(dim=-1)
        return _first(tokens, end)
    if type(model) is CLIP:
        tower, pooling, end = model, model.text_pool_type, _end_of(model, "text_eos_id")
    elif type(model) is CustomTextCLIP and type(model.text) is TextTransformer:
        tower, pooling, end = model.text, model.text.pool_type, _end_of(model.text, "eos_id")
        if tower.cls_emb is not None or tower.use_pad_mask:
            return None
    else:
        return None
    if type(tower.transformer) is not Transformer or not _causal(tower.attn_mask):
        return None
    if pooling == "argmax":
        return tokens.argmax(dim=-1)
    return _first(tokens, end) if pooling == "eos" and end is not None else None


def _end_of(tower: Any, name: str) -> int | None:
    """The token that ends a text; open_clip before 3.1 has no such setting, and no use for one."""
    return getattr(tower, name, None)


def _first(tokens: Tensor, end: int) -> Tensor:
    """Where a token occurs first; 0 where it does not, as the towers have it."""
    return (tokens == end).int().argmax(dim=-1)


def _causal(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((mask[later] == -torch.inf).all())


def _cut_to(tower: Any, length: int) -> Any:
    """A tower with the positions and the mask of shorter texts, and otherwise the same modules.

    A copy, because another thread may be running the tower itself.
    """
    short = copy.copy(tower)
    own = vars(short)
    positions, mask = tower.positional_embedding[:length], tower.attn_mask[:length, :length]
    own["_parameters"] = {**own["_parameters"], "positional_embedding": positions}
    own["_buffers"] = {**own["_buffers"], "attn_mask": mask}
    return short
