"""An evaluation whose model makes NaN gives no number."""

from __future__ import annotations

import pytest
import torch

import fsa
from fsa.errors import NotFiniteError
from fsa.evaluation import datasets, protocol, runner
from tests.support import evaluation_data


@pytest.mark.parametrize("feedback", [True, False])
def test_nan_is_an_error_that_names_pictures_and_checkpoint(feedback, tmp_path):
    root = evaluation_data.folder(tmp_path / "data", pictures=2)
    dataset = datasets.open_dataset("folder", root)
    segmentor = fsa.load_segmentor(feedback=feedback, device="cpu")
    with torch.no_grad():
        segmentor.loaded.model.visual.ln_post.bias.fill_(float("nan"))
    settings = protocol.preset(protocol.family_of("clearclip", "tiny"), "folder")
    name = dataset.samples[0].name
    with pytest.raises(NotFiniteError, match=rf"{name}.*: tiny with the weights embedded makes"):
        runner.evaluate(
            segmentor, dataset, settings, tmp_path / "out", workers=0, quiet=True, window_batch=2
        )
    assert not (tmp_path / "out" / "result.json").exists()
