"""torch.compile without a graph break or a second graph, and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.nn import functional

import fsa
from fsa import FSAConfig, hosts
from tests.support.accuracy import relative_error
from tests.support.compilers import needs_cpp
from tests.support.towers import random_inputs, random_tower

pytestmark = pytest.mark.compile
CONFIG = FSAConfig()
# (images, height, width, classes): the third is the grid the towers were made for, in which
# positions need no resizing; the last has 360 patches, from where on products go to oneDNN.
SIZES = [(2, 40, 48, 5), (3, 56, 24, 7), (2, 32, 32, 9), (4, 160, 144, 5)]
# The same for Inductor. Its patterns compare sizes that have nothing to do with each other, and
# what is equal by chance at first, torch 2.6 wants to be always equal, as the proxy model's 48
# patches would be to twice the tower's width.
INDUCTOR_SIZES = [(2, 40, 88, 5), *SIZES[1:]]
# (images, patches, classes), with N, C and both of them changing.
OP_SIZES = [(2, 30, 5), (2, 41, 5), (3, 41, 8), (2, 300, 21)]


inductor = (needs_cpp, pytest.mark.slow)
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=inductor)]


@pytest.fixture(autouse=True)
def one_graph():
    """Any second graph is an error; "eager" runs the traced graph as it is, which is quick."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def compiled(function, backend="eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def logits(B, N, C):
    generator = torch.Generator().manual_seed(N)
    return torch.randn(B, N, C, generator=generator), torch.randn(B, 1, C, generator=generator)


def values(B, N, H=3, d=8):
    generator = torch.Generator().manual_seed(N)
    value = torch.randn(B, H, N, d, generator=generator)
    feedback = torch.randn(B, N, N, generator=generator).softmax(dim=-1)
    attention = torch.randn(B, H, N, N, generator=generator).softmax(dim=-1)
    return value, feedback, attention


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_feedback_op(backend):
    run = compiled(fsa.feedback_attention, backend)
    for sizes in OP_SIZES:
        arguments = logits(*sizes)
        assert torch.equal(run(*arguments), fsa.feedback_attention(*arguments))


@pytest.mark.parametrize("kind", ["shared", "per head", "callable"])
def test_the_adaptation_op(kind):
    def adapt(value, feedback, attention):
        if kind == "callable":
            return fsa.adapt(value, feedback, lambda x: attention @ x)
        return fsa.adapt(value, feedback, attention)

    run = compiled(adapt)
    for B, N, _ in OP_SIZES:
        value, feedback, attention = values(B, N)
        if kind == "shared":
            attention = attention[:, 0]
        expected = adapt(value, feedback, attention)
        assert relative_error(run(value, feedback, attention), expected) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_proxy_op(backend):
    run = compiled(fsa.proxy_attention, backend)
    for B, N, C in OP_SIZES:
        features, value = torch.randn(B, N, C), torch.randn(B, N, 24)
        assert torch.equal(run(features, value), fsa.proxy_attention(features, value))


def host_inputs(host, B, height, width, C, dtype=torch.float32):
    images, text, features = random_inputs(B, height, width, C, dtype)
    return images, text, features if host.needs_vfm else None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("maskclip", CONFIG),
        ("sclip", CONFIG),
        ("clearclip", CONFIG),
        ("clearclip", None),
        ("proxyclip", CONFIG),
        ("naclip", CONFIG),
        ("segearth", CONFIG),
        ("pearl", CONFIG),
    ],
    ids=lambda value: value if isinstance(value, str) else "FSA" if value else "without FSA",
)
def test_a_host(name, config):
    host = hosts.build(name, random_tower(layers=2))
    run = compiled(host)
    for sizes in SIZES:
        images, text, features = host_inputs(host, *sizes)
        result = run(images, text, vfm_features=features, config=config)
        expected = host(images, text, vfm_features=features, config=config)
        assert relative_error(result, expected) < 1e-5


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clearclip", "proxyclip"])
def test_a_host_in_cpp(name):
    # Inductor rounds in its own way. Of half a million decisions of pruning one lay within that of
    # the threshold, and a decision moves all patches of its image; the op is not Inductor's.
    config = FSAConfig(pruning=None)
    host = hosts.build(name, random_tower(layers=2))
    run = compiled(host, "inductor")
    for sizes in INDUCTOR_SIZES:
        images, text, features = host_inputs(host, *sizes)
        result = run(images, text, vfm_features=features, config=config)
        expected = host(images, text, vfm_features=features, config=config)
        assert relative_error(result, expected) < 1e-5


def test_a_host_in_half_precision():
    host = hosts.build("clearclip", random_tower(layers=2).bfloat16())
    run = compiled(host)
    for sizes in SIZES:
        images, text, _ = host_inputs(host, *sizes, dtype=torch.bfloat16)
        expected = host(images, text, config=CONFIG)
        result = run(images, text, config=CONFIG)
        assert result.dtype == torch.bfloat16
        # Products are rounded to half precision there, which eager on the CPU spares.
        assert relative_error(result, expected) < 0.05


def test_a_host_of_a_users_function():
    def values_alike(block):
        unit = functional.normalize(block.value[:, :, block.prefix_tokens :], dim=-1)
        return (unit @ unit.transpose(2, 3) * 5).softmax(dim=-1)

    host = hosts.build(values_alike, random_tower(layers=2))
    run = compiled(host)
    for sizes in SIZES:
        images, text, _ = host_inputs(host, *sizes)
        expected = host(images, text, config=CONFIG)
        assert relative_error(run(images, text, config=CONFIG), expected) < 1e-5


@pytest.mark.parametrize(
    ("backend", "host"),
    [
        ("eager", "proxyclip"),
        # The default host: C++ of ProxyCLIP's takes twice as long, and is tested above.
        pytest.param("inductor", "clearclip", marks=inductor),
    ],
)
def test_the_segmentor(backend, host):
    segmentor = fsa.load_segmentor(host=host)
    run = compiled(segmentor.forward, backend)
    # The first is not square: PyTorch takes sizes that are equal at first to be always equal.
    for B, height, width, C in ((2, 64, 112, 5), (3, 96, 96, 7), (2, 224, 224, 7)):
        generator = torch.Generator().manual_seed(C)
        windows = torch.randn(B, 3, height, width, generator=generator)
        width_of_text = segmentor.host.tower.output_dim
        text = functional.normalize(torch.randn(C, width_of_text, generator=generator), dim=-1)
        result = run(windows, text)
        assert result.shape == (B, C, height // 16, width // 16)
        assert relative_error(result, segmentor.forward(windows, text)) < 1e-5


# --------------------------------------------------------------------------------------------------
# torch.export


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 exports nothing whose batch varies freely"
)
def test_a_host_with_feedback_is_exported_and_saved(tmp_path):
    host = hosts.build("proxyclip", random_tower(layers=2))
    images, text, features = host_inputs(host, *SIZES[0])
    batch = Dim("batch", min=2)
    sizes = {
        "images": {0: batch, 2: 8 * Dim("rows", min=2), 3: 8 * Dim("columns", min=2)},
        "text_features": {0: Dim("classes", min=2)},
        "vfm_features": {0: batch, 2: Dim("vfm_rows"), 3: Dim("vfm_columns")},
        "config": [],  # A constant, without sizes.
    }
    options = {"vfm_features": features, "config": CONFIG}
    program = torch.export.export(host, (images, text), options, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "host.pt2")
    again = torch.export.load(tmp_path / "host.pt2").module()
    for case in SIZES:
        images, text, features = host_inputs(host, *case)
        expected = host(images, text, vfm_features=features, config=CONFIG)
        result = again(images, text, vfm_features=features, config=CONFIG)
        assert relative_error(result, expected) < 1e-5
