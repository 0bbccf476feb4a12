"""Small CLIP and SigLIP models of the transformers library with random weights."""

from __future__ import annotations

import open_clip
import torch
import transformers

VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def tokenizer():
    """CLIP's own, from open_clip's copy of its vocabulary."""
    simple = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): number for piece, number in simple.encoder.items()}
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges])


def random_clip(dtype=torch.float32, **vision):
    config = transformers.CLIPConfig(
        vision_config={**VISION, **vision}, text_config=TEXT, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(transformers.CLIPModel(config)).to(dtype)


def random_siglip(dtype=torch.float32, **vision):
    config = transformers.SiglipConfig(
        vision_config={**VISION, **vision},
        text_config={**TEXT, "hidden_size": 24, "vocab_size": 49408},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(transformers.SiglipModel(config)).to(dtype)


def spread(model):
    """Weights of a size at which every part matters: as initialised most are next to nothing."""
    for name, parameter in model.named_parameters():
        if "logit" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)
