"""Trains the embedded model: image-level contrastive loss on composed scenes, no mask ever seen.

    python -m fsa.tiny.train --pictographs DIR --out RUN_DIR

DIR is what `python -m fsa.tiny.pictographs` and `python -m fsa.tiny.paint` wrote. A step shows
crops with one object or two, or scenes of one size, drawn from the seed. What is smaller than the
full size is placed on a random part of the positional grid. The same command goes on where a
stopped run was; RUN_DIR holds the checkpoint, the curve (curve.csv) and, at the end,
tiny.safetensors with its checksum. Training needs torch 2.9, which has Muon.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fsa.tiny import CONFIG
from fsa.tiny.captions import caption
from fsa.tiny.pictographs import DRAWN, PAINTED, TRAIN_STYLES
from fsa.tiny.plan import LAST_TEMPERATURE, VIEWS, Plan, View
from fsa.tiny.scenes import Composer, Sprites

_CHECKPOINT = "checkpoint.pt"
_BARE = 0.05
_STYLES = (*TRAIN_STYLES, DRAWN, PAINTED)


class SceneBatches(Dataset):
    """The batch of each step: images (B,3,S,S) uint8 and tokens (B,L), L as the longest caption.

    Args:
        first: the step of the first batch.
    """

    def __init__(self, sprites: Sprites, plan: Plan, first: int) -> None:
        self.composers = {
            view.size: Composer(
                sprites,
                (view.size, view.size),
                seed=plan.seed,
                object_sizes=view.object_sizes,
                most_objects=view.most_objects,
                bare=_BARE,
                augment=True,
            )
            for view in plan.views
        }
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=CONFIG["text_cfg"]["context_length"]
        )
        self.plan = plan
        self.first = first

    def __len__(self) -> int:
        return self.plan.steps - self.first

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        step = self.first + number
        view = self.plan.view(step)
        # Every step has scenes of its own: none is seen twice.
        start = step * max(view.batch for view in self.plan.views)
        indices = range(start, start + view.batch)
        scenes = self.composers[view.size].compose(indices)
        sentences = [
            caption(objects, textures, np.random.default_rng((self.plan.seed, index, 1)))
            for index, objects, textures in zip(
                indices, scenes.objects, scenes.textures, strict=True
            )
        ]
        tokens = self.tokenizer(sentences)
        return scenes.pictures, tokens[:, : int((tokens != 0).sum(dim=1).max())]


def normalise(images: Tensor) -> Tensor:
    """uint8 (B,3,S,S) -> float32, with CLIP's mean and deviation."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=images.device)[:, None, None]
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD, device=images.device)[:, None, None]
    return (images.float() / 255 - mean) / deviation


def encode_scene(
    model: CLIP, images: Tensor, generator: torch.Generator, part: int = 0, parts: int = 1
) -> Tensor:
    """Unit features (B,E) of scenes (B,3,S,S) placed on a random part of the positional grid.

    The same as the image tower computes, by plain products: for so few tokens they are twice as
    fast as its convolution and its attention.

    Args:
        generator: of the place and of the parts.
        part, parts: of `parts` random parts of each scene's patches, the one to look at.
    """
    visual = model.visual
    side = visual.patch_size[0]
    patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    rows, columns = patches.shape[2], patches.shape[4]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    whole_rows, whole_columns = visual.grid_size
    top = int(torch.randint(whole_rows - rows + 1, (), generator=generator))
    left = int(torch.randint(whole_columns - columns + 1, (), generator=generator))
    positions = visual.positional_embedding[1:].unflatten(0, visual.grid_size)
    positions = positions[top : top + rows, left : left + columns].flatten(0, 1)[None]
    if parts > 1:
        chosen = deal(patches.shape[1], len(patches), generator, parts)[part].to(images.device)
        patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))
        positions = positions[0][chosen]

    tokens = functional.linear(patches, visual.conv1.weight.flatten(1)) + positions
    first = visual.class_embedding + visual.positional_embedding[0]
    tokens = torch.cat([first.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], dim=1)
    tokens = visual.ln_pre(tokens)
    for block in visual.transformer.resblocks:
        tokens = tokens + _attended(block.attn, block.ln_1(tokens))
        tokens = tokens + block.mlp(block.ln_2(tokens))
    pooled, _ = visual._pool(tokens)
    return functional.normalize(pooled @ visual.proj, dim=-1)


def deal(patches: int, scenes: int, generator: torch.Generator, parts: int) -> tuple[Tensor, ...]:
    """The patches of every scene, dealt at random into parts: each (B,K), places on the grid."""
    order = torch.rand((scenes, patches), generator=generator).argsort(dim=1)
    return order.tensor_split(parts, dim=1)


def _attended(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Self-attention of tokens (B,N,D)."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    joint = functional.linear(tokens, weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = joint.permute(2, 0, 3, 1, 4)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(dim=-1)
    heads = weights.to(value.dtype) @ value
    return attention.out_proj(heads.transpose(1, 2).flatten(2))


def encode_captions(model: CLIP, tokens: Tensor) -> Tensor:
    """Unit features (B,E) of captions (B,L), which need not fill the context."""
    length = tokens.shape[1]
    embedded = model.token_embedding(tokens) + model.positional_embedding[:length]
    states = model.transformer(embedded, attn_mask=model.attn_mask[:length, :length])
    # The end of a text is its token of the highest number.
    ends = model.ln_final(states)[torch.arange(len(tokens)), tokens.argmax(dim=-1)]
    return functional.normalize(ends @ model.text_projection, dim=-1)


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, temperature: float, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """CLIP's: cross-entropy of pictures against texts and of texts against pictures.

    Args:
        image_features, text_features: (B,E), of unit length.
        groups: equal parts of the batch, each with a loss of its own.

    Returns:
        The loss, and the share of the pictures whose own text is the nearest.
    """
    images, texts = (f.float().unflatten(0, (groups, -1)) for f in (image_features, text_features))
    logits = temperature * images @ texts.transpose(1, 2)
    target = torch.arange(logits.shape[1], device=logits.device).expand(groups, -1)
    across = functional.cross_entropy(logits.transpose(1, 2), target)
    across = across + functional.cross_entropy(logits, target)
    return across / 2, (logits.argmax(dim=2) == target).float().mean()


class Optimizers:
    """Muon for the matrices of the towers' blocks and AdamW for all other weights."""

    def __init__(self, model: CLIP, plan: Plan) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in trained.items() if ".resblocks." in n and p.ndim == 2]
        known = {id(p) for p in matrices}
        others = [p for p in trained.values() if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in others if p.ndim < 2]},
        ]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, weight_decay=0.0)
        muon = torch.optim.Muon(
            matrices, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.both = (adamw, muon)

    def step(self, rate: float) -> None:
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.both]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.both, states, strict=True):
            optimizer.load_state_dict(state)


def train(
    sprites: Sprites,
    out: Path,
    plan: Plan,
    device: torch.device,
    *,
    start: Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains, or goes on training, and returns the file of the weights.

    Args:
        start: weights to start from in the place of random ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    model = CLIP(**CONFIG).to(device).train()
    if start is not None:
        model.load_state_dict(load_file(start))
    model.logit_scale.requires_grad_(False).fill_(math.log(LAST_TEMPERATURE))
    if plan.freeze_text:
        model.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
    optimizers = Optimizers(model, plan)
    step = 0
    if (out / _CHECKPOINT).exists():
        saved = torch.load(out / _CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        step = saved["step"]

    batches = SceneBatches(sprites, plan, first=step)
    # Scenes on a GPU are made by this process, which holds it.
    workers = plan.workers if sprites.device.type == "cpu" else 0
    with tqdm(total=plan.steps, initial=step, disable=not progress, unit="step") as bar:
        for images, tokens in DataLoader(batches, batch_size=None, num_workers=workers):
            loss, accuracy = _update(
                model, optimizers, images.to(device), tokens.to(device), plan, step
            )
            step += 1
            bar.update()
            if step % 25 == 0:
                _log(out, step, loss, accuracy, plan, plan.view(step - 1))
                bar.set_postfix(loss=f"{loss:.3f}", matched=f"{accuracy:.0%}")
            if step % plan.save_every == 0 or step == plan.steps:
                _save(out, model, optimizers, step)
    return export(model, out)


def _update(
    model: CLIP, optimizers: Optimizers, images: Tensor, tokens: Tensor, plan: Plan, step: int
) -> tuple[float, float]:
    view = plan.view(step)
    images = normalise(images)
    text_features = None
    for part in range(view.parts):
        placement = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        # For so few tokens plain products are several times faster than the fused attention's.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(images.device.type, dtype=torch.bfloat16),
        ):
            image_features = encode_scene(model, images, placement, part, view.parts)
            if text_features is None or not plan.freeze_text:
                text_features = encode_captions(model, tokens)
        loss, accuracy = contrastive_loss(
            image_features, text_features, plan.temperature(step), view.groups
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(plan.rate(step))
    return float(loss.detach()), float(accuracy)


def _log(out: Path, step: int, loss: float, accuracy: float, plan: Plan, view: View) -> None:
    file = out / "curve.csv"
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            header = ["step", "unix_time", "size", "loss", "batch_accuracy", "learning_rate"]
            writer.writerow(header)
        rate = f"{plan.rate(step):.2e}"
        writer.writerow([step, int(time.time()), view.size, f"{loss:.4f}", f"{accuracy:.4f}", rate])


def _save(out: Path, model: CLIP, optimizers: Optimizers, step: int) -> None:
    state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "step": step}
    temporary = out / f"{_CHECKPOINT}.part"
    torch.save(state, temporary)
    temporary.replace(out / _CHECKPOINT)


def export(model: CLIP, out: Path) -> Path:
    """Writes tiny.safetensors in half precision, and tiny.sha256 beside it."""
    file = out / "tiny.safetensors"
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_suffix(".sha256").write_text(f"{digest}  {file.name}\n")
    return file


def main() -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=plan.steps)
    parser.add_argument(
        "--shares",
        type=float,
        nargs=len(VIEWS),
        default=plan.shares,
        help=f"of the steps for pictures of {', '.join(str(v.size) for v in VIEWS)} pixels",
    )
    parser.add_argument(
        "--whole", type=float, default=plan.whole, help="share of the steps with all patches"
    )
    parser.add_argument(
        "--whole-shares",
        type=float,
        nargs=len(VIEWS),
        default=plan.whole_shares,
        help="of those steps, for the same sizes",
    )
    parser.add_argument(
        "--decay", type=float, default=plan.decay, help="share of the steps whose rate falls"
    )
    parser.add_argument("--styles", nargs="+", default=_STYLES, help="of the pictographs")
    parser.add_argument(
        "--painted",
        type=float,
        default=0.5,
        help="share of the objects that are drawings painted anew",
    )
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate)
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument(
        "--start", type=Path, help="weights to start from, safetensors; the temperature stays high"
    )
    parser.add_argument("--freeze-text", action="store_true", help="leave the text tower as it is")
    parser.add_argument("--workers", type=int, default=plan.workers)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    plan = Plan(
        steps=arguments.steps,
        shares=tuple(arguments.shares),
        whole=arguments.whole,
        whole_shares=tuple(arguments.whole_shares),
        decay=arguments.decay,
        learning_rate=arguments.learning_rate,
        first_temperature=LAST_TEMPERATURE if arguments.start else plan.first_temperature,
        freeze_text=arguments.freeze_text,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    device = torch.device(arguments.device)
    sprites = Sprites(arguments.pictographs, arguments.styles, device, arguments.painted)
    print(train(sprites, arguments.out, plan, device, start=arguments.start))


if __name__ == "__main__":
    main()
