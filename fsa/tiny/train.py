"""Trains the embedded model: image-level contrastive loss on composed scenes, no mask ever seen.

    python -m fsa.tiny.train --pictographs DIR --out RUN_DIR

DIR is what `python -m fsa.tiny.pictographs` wrote. The first steps see crops with one thing or two;
then come small scenes and at last scenes of the full size. What is smaller than the full size is
placed on a random part of the positional grid, and is many times cheaper. The same command goes on
where a stopped run was; RUN_DIR holds the checkpoint, the curve (curve.csv) and, at the end,
tiny.safetensors with its checksum.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fsa.tiny import CONFIG
from fsa.tiny.captions import caption
from fsa.tiny.pictographs import TRAIN_STYLES
from fsa.tiny.scenes import Composer, Sprites
from fsa.tiny.vocabulary import OBJECTS

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one size of scene; sizes in pixels."""

    size: int
    object_sizes: tuple[int, int]
    fewest_objects: int
    most_objects: int
    batch: int


# A batch of crops shows every object once as its first, so that no caption of it fits two crops.
CROP = Phase(size=64, object_sizes=(36, 80), fewest_objects=1, most_objects=2, batch=len(OBJECTS))
SMALL = Phase(size=112, object_sizes=(32, 100), fewest_objects=1, most_objects=3, batch=128)
FULL = Phase(size=224, object_sizes=(40, 170), fewest_objects=1, most_objects=4, batch=64)

_BARE = 0.05
_LAST_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Attributes:
        crop_steps, small_steps, full_steps: steps of each phase.
        learning_rate: at its peak, after `warmup` steps; it then falls as a cosine to 0.
        first_temperature: where the temperature begins; it ends where CLIP's does.
        freeze_text: leaves the text tower as it is, which makes a step a third faster.
        seed: of the weights and of every scene.
    """

    crop_steps: int = 12000
    small_steps: int = 2000
    full_steps: int = 300
    learning_rate: float = 1.5e-3
    warmup: int = 300
    weight_decay: float = 0.05
    first_temperature: float = 14.3
    freeze_text: bool = False
    seed: int = 0
    workers: int = 1
    save_every: int = 250

    @property
    def phases(self) -> tuple[tuple[Phase, int], ...]:
        return (CROP, self.crop_steps), (SMALL, self.small_steps), (FULL, self.full_steps)

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.phases)

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def temperature(self, step: int) -> float:
        """Rises over the first third of the steps to where CLIP's ends.

        The published constants of FSA are for cosines trained there.
        """
        progress = min(1.0, 3 * step / self.steps)
        return self.first_temperature * (_LAST_TEMPERATURE / self.first_temperature) ** progress


class SceneBatches(Dataset):
    """Whole batches: images (B,3,S,S) uint8 and tokens (B,L), L as long as its longest caption."""

    def __init__(self, sprites: Sprites, phase: Phase, seed: int, first: int, count: int) -> None:
        self.composer = Composer(
            sprites,
            (phase.size, phase.size),
            seed=seed,
            object_sizes=phase.object_sizes,
            fewest_objects=phase.fewest_objects,
            most_objects=phase.most_objects,
            bare=_BARE,
            augment=True,
        )
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=CONFIG["text_cfg"]["context_length"]
        )
        self.seed = seed
        self.batch = phase.batch
        self.first = first
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        start = self.first + number * self.batch
        indices = range(start, start + self.batch)
        scenes = self.composer.compose(indices)
        sentences = [
            caption(objects, textures, np.random.default_rng((self.seed, index, 1)))
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


def encode_scene(model: CLIP, images: Tensor, generator: torch.Generator) -> Tensor:
    """Unit features (B,E) of scenes (B,3,S,S) placed on a random part of the positional grid."""
    visual = model.visual
    patches = visual.conv1(images)
    rows, columns = patches.shape[-2:]
    whole_rows, whole_columns = visual.grid_size
    top = int(torch.randint(whole_rows - rows + 1, (), generator=generator))
    left = int(torch.randint(whole_columns - columns + 1, (), generator=generator))
    positions = visual.positional_embedding[1:].unflatten(0, visual.grid_size)
    positions = positions[top : top + rows, left : left + columns].flatten(0, 1)

    tokens = patches.flatten(2).transpose(1, 2) + positions
    first = visual.class_embedding + visual.positional_embedding[0]
    tokens = torch.cat([first.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], dim=1)
    tokens = visual.transformer(visual.ln_pre(tokens))
    pooled, _ = visual._pool(tokens)
    return functional.normalize(pooled @ visual.proj, dim=-1)


def encode_captions(model: CLIP, tokens: Tensor) -> Tensor:
    """Unit features (B,E) of captions (B,L), which need not fill the context."""
    length = tokens.shape[1]
    embedded = model.token_embedding(tokens) + model.positional_embedding[:length]
    states = model.transformer(embedded, attn_mask=model.attn_mask[:length, :length])
    # The end of a text is its token of the highest number.
    ends = model.ln_final(states)[torch.arange(len(tokens)), tokens.argmax(dim=-1)]
    return functional.normalize(ends @ model.text_projection, dim=-1)


def contrastive_loss(image_features: Tensor, text_features: Tensor, temperature: float) -> Tensor:
    """CLIP's: cross-entropy of pictures against texts and of texts against pictures."""
    logits = temperature * image_features.float() @ text_features.float().T
    target = torch.arange(len(logits), device=logits.device)
    across = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    return across / 2


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
    model.logit_scale.requires_grad_(False).fill_(math.log(_LAST_TEMPERATURE))
    if plan.freeze_text:
        model.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
        weight_decay=0.0,
    )
    step = 0
    if (out / _CHECKPOINT).exists():
        saved = torch.load(out / _CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    with tqdm(total=plan.steps, initial=step, disable=not progress, unit="step") as bar:
        first_step = first_scene = 0
        for phase, steps in plan.phases:
            done = min(steps, max(0, step - first_step))
            batches = SceneBatches(
                sprites,
                phase,
                plan.seed,
                # Scene indices go on from phase to phase: none is seen twice.
                first=first_scene + done * phase.batch,
                count=steps - done,
            )
            # Scenes on a GPU are made by this process, which holds it.
            workers = plan.workers if sprites.device.type == "cpu" else 0
            for images, tokens in DataLoader(batches, batch_size=None, num_workers=workers):
                loss, accuracy = _update(
                    model, optimizer, images.to(device), tokens.to(device), plan, step
                )
                step += 1
                bar.update()
                if step % 25 == 0:
                    _log(out, step, loss, accuracy, plan.rate(step))
                    bar.set_postfix(loss=f"{loss:.3f}", matched=f"{accuracy:.0%}")
                if step % plan.save_every == 0 or step == plan.steps:
                    _save(out, model, optimizer, step)
            first_step += steps
            first_scene += steps * phase.batch
    return export(model, out)


def _update(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    tokens: Tensor,
    plan: Plan,
    step: int,
) -> tuple[float, float]:
    for group in optimizer.param_groups:
        group["lr"] = plan.rate(step)
    placement = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    # For so few tokens plain products are several times faster than the fused attention's.
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(images.device.type, dtype=torch.bfloat16),
    ):
        image_features = encode_scene(model, normalise(images), placement)
        text_features = encode_captions(model, tokens)
    loss = contrastive_loss(image_features, text_features, plan.temperature(step))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        best = (image_features.float() @ text_features.float().T).argmax(dim=1)
        accuracy = (best == torch.arange(len(best), device=best.device)).float().mean()
    return float(loss.detach()), float(accuracy)


def _log(out: Path, step: int, loss: float, accuracy: float, rate: float) -> None:
    file = out / "curve.csv"
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(["step", "unix_time", "loss", "batch_accuracy", "learning_rate"])
        writer.writerow([step, int(time.time()), f"{loss:.4f}", f"{accuracy:.4f}", f"{rate:.2e}"])


def _save(out: Path, model: CLIP, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
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
    parser.add_argument("--crop-steps", type=int, default=plan.crop_steps)
    parser.add_argument("--small-steps", type=int, default=plan.small_steps)
    parser.add_argument("--full-steps", type=int, default=plan.full_steps)
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
        crop_steps=arguments.crop_steps,
        small_steps=arguments.small_steps,
        full_steps=arguments.full_steps,
        learning_rate=arguments.learning_rate,
        first_temperature=_LAST_TEMPERATURE if arguments.start else plan.first_temperature,
        freeze_text=arguments.freeze_text,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    device = torch.device(arguments.device)
    sprites = Sprites(arguments.pictographs, TRAIN_STYLES, device)
    print(train(sprites, arguments.out, plan, device, start=arguments.start))


if __name__ == "__main__":
    main()
