"""Evaluation on the field's benchmarks and on any folder of pictures with masks.

`open_dataset` reads a folder layout, `protocol` holds the published settings, `evaluate` computes
one confusion matrix, and `sweep` repeats it for the paper's ablations.

Run beside the published code of FSA, ProxyCLIP, ClearCLIP, SCLIP and NACLIP with the same weights
in float32, the label maps agree but for less than one pixel in ten thousand: pictures are resized
with OpenCV's arithmetic, and positional embeddings as in the published towers. With feedback the
same holds in float64. In float32 more differs where predictions are all but certain: there many
similarities lie within rounding of 1, and rounding decides which of them are kept.

What else differs, does so on purpose:

- Ties. With one class all similarities of FSA are equal, and the published code keeps those that an
  unstable sort puts first; here the lowest patch index comes first, always.
- Batches. The published ProxyCLIP takes the mean of the affinity over all windows of a batch; here
  each window is as it is when computed alone. The published runs have batches of one.
- Patches like no other. Where nothing in a row of the proxy's affinity lies above its threshold,
  the published ProxyCLIP divides zero by zero, and its labels there mean nothing; here the patch
  attends to itself.
- Padding. ProxyCLIP's and FSA's code pads a window to a multiple of 56 pixels, here to whole
  patches. Only pictures more than six times as wide as high have windows that need it.
- ADE20K with 847 and PASCAL Context with 459 classes. Class 255 is counted here, and unlabelled
  pixels are not; see `fsa.evaluation.report`.
"""

from __future__ import annotations

from fsa.lazy import submodules

__getattr__ = submodules(__name__)
