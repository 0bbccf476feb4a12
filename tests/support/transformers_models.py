"""Small models of the transformers library with random weights."""

from __future__ import annotations

import open_clip
import tokenizers
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


def word_tokenizer(padding):
    """A number for each word; that of padding is given."""
    words = ["a", "photo", "of", "cat", "the", "in"]
    numbers = {"[PAD]": padding, "[CLS]": 2, "[UNK]": 3}
    numbers |= {word: 4 + number for number, word in enumerate(words)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


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


_BERT = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}


def random_relative(name, dtype=torch.float32, **vision):
    """A small model of a class that took over CLIP's vision tower, by the name of the class."""
    vision = {**VISION, **vision}
    prefix = name.removesuffix("Model")
    text, options = TEXT, {"projection_dim": 16}
    if name == "ChineseCLIPModel":
        text = {**_BERT, "max_position_embeddings": 20, "vocab_size": 50, "pad_token_id": 0}
    elif name == "AltCLIPModel":
        text = {**_BERT, "max_position_embeddings": 20, "vocab_size": 50, "project_dim": 16}
        text["pad_token_id"] = 1
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=vision, text_config=text, **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(getattr(transformers, name)(config)).to(dtype)


def random_siglip2(dtype=torch.float32, **vision):
    vision = {key: value for key, value in {**VISION, **vision}.items() if key != "image_size"}
    config = transformers.Siglip2Config(
        vision_config={**vision, "num_patches": 16},
        text_config={**TEXT, "hidden_size": 24, "projection_size": 24, "vocab_size": 49408},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(transformers.Siglip2Model(config)).to(dtype)
