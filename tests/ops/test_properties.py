"""What holds for every input: shapes, strides, types and scales drawn by hypothesis.

Each property is asked of the definition, of the PyTorch path and, on a GPU, of the Triton kernels.
Triton's interpreter takes a tenth of a second for a handful of patches: there the kernels get a few
small examples, and all properties on each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fsa
import fsa_kernels
from fsa import FSAConfig, reference
from fsa.ops import torch_backend
from fsa.ops.library import op_options
from tests.support.accuracy import (
    CERTAIN_SIMILARITY_MARGIN as SIMILARITY_MARGIN,
)
from tests.support.accuracy import (
    DECISION_MARGIN,
    RELATIVE_ERROR,
    assert_conforms,
    exact_similarities,
    relative_error,
)
from tests.support.forms import FORMS

ON_GPU = torch.cuda.is_available() and fsa_kernels.available()
BACKENDS = ["reference", "torch", *(["triton"] if ON_GPU else [])]
KERNELS_RUN_ON = "cuda" if ON_GPU else "cpu"


def attention_of(
    backend: str, logits: Tensor, uniform: Tensor | None = None, config: FSAConfig | None = None
) -> Tensor:
    """A_f (B,N,N) by one of the backends, on the CPU."""
    config = config or FSAConfig()
    if backend == "reference":
        return reference.feedback_attention(logits, uniform, config)
    device = KERNELS_RUN_ON if backend == "triton" else "cpu"
    uniform = None if uniform is None else uniform.to(device)
    return fsa.feedback_attention(logits.to(device), uniform, config=config, backend=backend).cpu()


def clear_of_the_threshold(S: Tensor, confidence: float) -> bool:
    """Whether no pruning decision lies within rounding: of the mass, or of the order."""
    if S.shape[-1] == 1:
        return True
    ordered = S.sort(dim=-1, descending=True).values
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    if ((mass - confidence).abs() < 2 * DECISION_MARGIN).any():
        return False
    count = (mass <= confidence).sum(dim=-1, keepdim=True).clamp(1, S.shape[-1] - 1)
    gap = ordered.gather(-1, count - 1) - ordered.gather(-1, count)
    return bool((gap > SIMILARITY_MARGIN).all())


def dtypes(backend: str) -> list[torch.dtype]:
    if backend == "reference":  # Its arithmetic is in the type of its input.
        return [torch.float64, torch.float32]
    halves = [torch.float32, torch.float16, torch.bfloat16]
    return halves if backend == "triton" else [torch.float64, *halves]


@st.composite
def inputs(draw, backend: str, most_patches: int = 24):
    """(patch logits, uniform logits or None): patches of a few segments, equal ones among them."""
    B, N, C = draw(st.integers(1, 3)), draw(st.integers(1, most_patches)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(dtypes(backend)))
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 20.0]))
    noise = draw(st.sampled_from([0.0, 0.1, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    centres = torch.randn(draw(st.integers(1, 5)), C, generator=generator, dtype=torch.float64)
    membership = torch.randint(len(centres), (B, N), generator=generator)
    jitter = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    logits = (scale * (centres[membership] + noise * jitter)).to(dtype)
    rows = draw(st.sampled_from([None, 1, N]))
    if rows is None:
        return logits, None
    return logits, torch.randn(B, rows, C, generator=generator, dtype=torch.float64).to(dtype)


def assert_rows_sum_to_one(feedback: Tensor) -> None:
    assert (feedback >= 0).all()
    sums = feedback.double().sum(dim=-1)
    assert (sums - 1).abs().max() < RELATIVE_ERROR[feedback.dtype]


def assert_longest_prefix_that_fits(kept: Tensor, S: Tensor, confidence: float) -> None:
    least_kept = S.masked_fill(~kept, 2).amin(dim=-1)
    most_dropped = S.masked_fill(kept, -1).amax(dim=-1)
    assert (least_kept >= most_dropped - SIMILARITY_MARGIN).all(), "not a prefix of the order"
    shares = S.softmax(dim=-1)
    mass = (shares * kept).sum(dim=-1)
    only_one = kept.sum(dim=-1) == 1
    assert (only_one | (mass <= confidence + DECISION_MARGIN)).all(), "more than fits"
    following = shares.masked_fill(kept, -1).amax(dim=-1)
    whole = kept.all(dim=-1)
    assert (whole | (mass + following > confidence - DECISION_MARGIN)).all(), "less than fits"


def assert_same_are_kept(feedback: Tensor, exact: Tensor) -> None:
    """But for weights that the result's type cannot hold."""
    assert not ((feedback > 0) & (exact == 0)).any()
    assert not ((feedback == 0) & (exact > torch.finfo(feedback.dtype).tiny)).any()


def shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), config=st.sampled_from(FORMS))
def test_rows_sum_to_one(backend, data, config):
    logits, uniform = data.draw(inputs(backend))
    feedback = attention_of(backend, logits, uniform, config)
    assert feedback.shape == (logits.shape[0], logits.shape[1], logits.shape[1])
    assert feedback.dtype == logits.dtype
    assert_rows_sum_to_one(feedback)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), confidence=st.floats(0.01, 0.99))
def test_what_is_kept_is_the_longest_prefix_that_fits(backend, data, confidence):
    logits, uniform = data.draw(inputs(backend))
    # Scaled, what is kept but unlike can fall below the smallest number in half precision.
    config = FSAConfig(confidence=confidence, scaling=False)
    kept = attention_of(backend, logits, uniform, config) > 0
    assert_longest_prefix_that_fits(kept, exact_similarities(logits, uniform), confidence)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), config=st.sampled_from(FORMS))
def test_the_first_is_always_kept(backend, data, config):
    config = config.replace(confidence=1e-6, ratio=1e-6, threshold=1.0)
    logits, uniform = data.draw(inputs(backend))
    feedback = attention_of(backend, logits, uniform, config)
    S = exact_similarities(logits, uniform, config)
    # Asked of what is kept, not of the largest weight: two weights may be the same in half
    # precision where their similarities are not.
    most_kept = S.masked_fill(feedback == 0, -1).amax(dim=-1)
    assert (most_kept >= S.amax(dim=-1) - SIMILARITY_MARGIN).all()
    if config.pruning in ("confidence", "ratio"):
        assert torch.equal((feedback > 0).sum(dim=-1), torch.ones(feedback.shape[:2]).long())
        assert (feedback.amax(dim=-1) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_permuting_patches_permutes_the_result(backend, data, seed):
    logits, _ = data.draw(inputs(backend))
    assume(clear_of_the_threshold(exact_similarities(logits), FSAConfig().confidence))
    order = shuffled(logits.shape[1], seed)
    feedback = attention_of(backend, logits)[:, order][:, :, order]
    assert (
        relative_error(attention_of(backend, logits[:, order]), feedback)
        < (RELATIVE_ERROR[logits.dtype])
    )


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_every_image_stands_alone(backend, data):
    logits, uniform = data.draw(inputs(backend))
    S = exact_similarities(logits, uniform)
    assume(clear_of_the_threshold(S, FSAConfig().confidence))
    together = attention_of(backend, logits, uniform)
    for b in range(len(logits)):
        one = slice(b, b + 1)
        by_itself = attention_of(backend, logits[one], None if uniform is None else uniform[one])
        assert relative_error(together[one], by_itself) < RELATIVE_ERROR[logits.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), config=st.sampled_from(FORMS), seed=st.integers(0, 2**20))
def test_equal_patches_get_equal_results(backend, data, config, seed):
    logits, _ = data.draw(inputs(backend, most_patches=4))
    choice = torch.randint(logits.shape[1], (16,), generator=torch.Generator().manual_seed(seed))
    logits = logits[:, choice]
    S = exact_similarities(logits, None, config)
    assume(clear_but_for_equals(S, config))
    feedback = attention_of(backend, logits, None, config)
    # Which patches the definition cannot tell apart: those chosen twice, and those equal by chance.
    rows, columns = ((x[:, :, None] == x[:, None]).all(dim=-1) for x in (S, S.mT))
    alike = rows & columns
    first = alike.int().argmax(dim=-1, keepdim=True).expand_as(S)
    # How much each row gives to the likes of each patch, and to how many of them it does.
    given, kept = ((x @ alike.double()) for x in (feedback.double(), (feedback > 0).double()))
    assert torch.equal(kept.gather(1, first), kept)
    assert relative_error(given.gather(1, first), given) < RELATIVE_ERROR[logits.dtype]
    for b in range(len(S)):
        for likes in alike[b].unique(dim=0):
            columns = feedback[b, :, likes]
            weight = columns.amax(dim=-1, keepdim=True).expand_as(columns)
            error = (columns - weight).masked_fill(columns == 0, 0)
            assert (error.abs() <= RELATIVE_ERROR[logits.dtype] * weight).all()
            if backend != "torch":
                # Among equals the lowest index is kept first, and the kept ones weigh the same to
                # the bit. Not by a BLAS: it rounds equal columns of a product differently, those
                # at the end of a block of columns by other instructions than the rest, so that
                # equal patches are equally similar only within rounding. The rule itself is asked
                # for below.
                is_kept = columns > 0
                assert torch.equal(is_kept, is_kept.int().cummin(dim=-1).values.bool())
                assert ((columns == weight) | ~is_kept).all()


def clear_but_for_equals(S: Tensor, config: FSAConfig) -> bool:
    """Whether no decision lies within rounding, except between patches that are equal."""
    N = S.shape[-1]
    if config.pruning is None or N == 1:
        return True
    if config.pruning == "threshold":
        return bool(((S - config.threshold).abs() > SIMILARITY_MARGIN).all())
    ordered = S.sort(dim=-1, descending=True).values
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    if config.pruning == "confidence":
        if ((mass - config.confidence).abs() < 2 * DECISION_MARGIN).any():
            return False
        count = (mass <= config.confidence).sum(dim=-1, keepdim=True).clamp(1, N - 1)
    else:
        count = max(1, min(int(config.ratio * N), N - 1))
        count = torch.full_like(S[..., :1], count, dtype=torch.int64)
    gap = ordered.gather(-1, count - 1) - ordered.gather(-1, count)
    return bool(((gap == 0) | (gap > SIMILARITY_MARGIN)).all())


@given(
    data=st.data(),
    N=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    config=st.sampled_from(FORMS),
    confidence=st.floats(0.01, 0.99),
)
def test_equal_similarities_are_kept_lowest_index_first(data, N, dtype, config, confidence):
    """The rule of selection by the PyTorch path, on similarities that are equal to the bit."""
    config = config.replace(confidence=confidence, ratio=confidence, threshold=confidence)
    values = data.draw(
        st.lists(st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]), min_size=N, max_size=N)
    )
    S = torch.tensor(values, dtype=dtype)[None]
    assume(clear_but_for_equals(S.double(), config))
    scores = S.clone()
    torch_backend._drop(scores, S.clone(), op_options(config))
    kept = scores.softmax(dim=-1) > 0
    assert torch.equal(kept, reference.kept_patches(S.double(), config))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_beta_to_zero_is_no_scaling_and_p_to_one_is_no_pruning(backend, data):
    logits, uniform = data.draw(inputs(backend))
    allowed = RELATIVE_ERROR[logits.dtype]
    for pruning in ("confidence", None):
        limit = attention_of(backend, logits, uniform, FSAConfig(beta=1e-14, pruning=pruning))
        plain = attention_of(backend, logits, uniform, FSAConfig(scaling=False, pruning=pruning))
        assert relative_error(limit, plain) < allowed
    plain = FSAConfig(scaling=False)
    everything = attention_of(backend, logits, uniform, plain.replace(pruning=None))
    assert (everything > 0).all()
    for confidence in (1.0, 1 - 1e-9):
        nearly = attention_of(backend, logits, uniform, plain.replace(confidence=confidence))
        # Just below 1 the least similar patch of a row does not fit any more.
        fewest = logits.shape[1] - (confidence < 1)
        assert ((nearly > 0).sum(dim=-1) >= max(1, fewest)).all()
        if confidence == 1:
            assert relative_error(nearly, everything) < allowed


def clear_of_every_decision(S: Tensor, config: FSAConfig) -> bool:
    """The same for each kind of pruning."""
    if config.pruning == "confidence":
        return clear_of_the_threshold(S, config.confidence)
    if config.pruning == "threshold":
        return bool(((S - config.threshold).abs() > SIMILARITY_MARGIN).all())
    N = S.shape[-1]
    count = max(1, int(config.ratio * N))
    if config.pruning is None or count == N:
        return True
    ordered = S.sort(dim=-1, descending=True).values
    return bool((ordered[..., count - 1] - ordered[..., count] > SIMILARITY_MARGIN).all())


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(data=st.data(), config=st.sampled_from(FORMS))
def test_backends_agree_with_the_definition(backend, data, config):
    logits, uniform = data.draw(inputs(backend))
    assume(clear_of_every_decision(exact_similarities(logits, uniform, config), config))
    feedback = attention_of(backend, logits, uniform, config)
    exact = reference.feedback_attention(
        logits.double(), None if uniform is None else uniform.double(), config
    )
    assert relative_error(feedback, exact) < RELATIVE_ERROR[logits.dtype]
    assert_same_are_kept(feedback, exact)


@pytest.mark.skipif(
    ON_GPU or not fsa_kernels.interpreting(), reason="the kernels run on the GPU, in full"
)
# A failure is told as it was drawn: making it smaller would take the interpreter minutes.
@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data(), config=st.sampled_from(FORMS), seed=st.integers(0, 2**20))
def test_the_kernels_hold_to_all_of_it_in_the_interpreter(data, config, seed):
    logits, uniform = data.draw(inputs("triton", most_patches=6))
    S = exact_similarities(logits, uniform, config)
    assume(clear_of_every_decision(S, config))
    feedback = attention_of("triton", logits, uniform, config)
    exact = reference.feedback_attention(
        logits.double(), None if uniform is None else uniform.double(), config
    )
    allowed = RELATIVE_ERROR[logits.dtype]
    assert relative_error(feedback, exact) < allowed
    assert_same_are_kept(feedback, exact)
    assert_rows_sum_to_one(feedback)
    if config.pruning == "confidence" and not config.scaling:
        assert_longest_prefix_that_fits(feedback > 0, S, config.confidence)
    # The last image by itself, its patches in another order and its memory in another layout.
    order = shuffled(logits.shape[1], seed)
    other = laid_out(logits[-1:, order], "sliced")
    if uniform is not None:
        uniform = uniform[-1:] if uniform.shape[1] == 1 else uniform[-1:, order]
    by_itself = attention_of("triton", other, uniform, config)
    assert relative_error(by_itself, feedback[-1:, order][:, :, order]) < allowed


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (B,N,C) with other strides."""
    B, N, C = tensor.shape
    if layout == "transposed":
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "sliced":
        room = tensor.new_full((2 * B, 3 * N, 2 * C + 1), float("nan"))
        room[1::2, 2::3, 1::2] = tensor
        return room[1::2, 2::3, 1::2]
    return tensor


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(data=st.data(), layout=st.sampled_from(["transposed", "sliced"]))
def test_strides_change_nothing(backend, data, layout):
    logits, uniform = data.draw(inputs(backend))
    if backend == "triton":
        assume(clear_of_the_threshold(exact_similarities(logits, uniform), FSAConfig().confidence))
        # Moved first: what is copied to a device comes out contiguous.
        logits, uniform = logits.cuda(), None if uniform is None else uniform.cuda()
    straight = attention_of(backend, logits, uniform)
    other = None if uniform is None else laid_out(uniform, layout)
    feedback = attention_of(backend, laid_out(logits, layout), other)
    assert relative_error(feedback, straight) < RELATIVE_ERROR[logits.dtype]
    if backend != "triton":
        # On the CPU the same numbers are added in the same order. On a GPU the compiler may order
        # them otherwise where rows are not next to each other.
        assert torch.equal(feedback, straight)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 20),
    C=st.integers(1, 9),
    strides=st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 3)),
)
def test_overlapping_strides_change_nothing(backend, B, N, C, strides):
    memory = torch.randn(200, generator=torch.Generator().manual_seed(B * N + C))
    if backend == "triton":
        memory = memory.cuda()
    logits = torch.as_strided(memory, (B, N, C), strides)
    feedback = attention_of(backend, logits)
    if backend != "triton":  # As above.
        assert torch.equal(feedback, attention_of(backend, logits.contiguous()))
    assert_conforms(feedback, logits.cpu(), similarity_margin=SIMILARITY_MARGIN)


@st.composite
def proxy_inputs(draw):
    """(features, value), float32, features away from zero."""
    B, N = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    F, D = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    features = torch.randn(B, N, F, generator=generator) + draw(st.sampled_from([0.0, 0.3]))
    features *= draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return features, torch.randn(B, N, D, generator=generator)


def proxy_of(backend: str, features: Tensor, value: Tensor) -> Tensor:
    device = KERNELS_RUN_ON if backend == "triton" else "cpu"
    return fsa.proxy_attention(features.to(device), value.to(device), backend=backend).cpu()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_proxy_attention_agrees_permutes_and_keeps_images_apart(backend, data, seed):
    features, value = data.draw(proxy_inputs())
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    affinity = unit @ unit.transpose(1, 2)
    level = 1.2 * affinity.mean(dim=(1, 2), keepdim=True)
    # A pair at the threshold is kept or masked by rounding.
    assume(((affinity - level).abs() > 1e-5).all())
    attended = proxy_of(backend, features, value)
    exact = reference.proxy_attention(features.double(), value.double())
    allowed = RELATIVE_ERROR[torch.float32]
    assert relative_error(attended, exact) < allowed
    order = shuffled(value.shape[1], seed)
    permuted = proxy_of(backend, features[:, order], value[:, order])
    assert relative_error(permuted, attended[:, order]) < allowed
    by_itself = proxy_of(backend, features[-1:], value[-1:])
    assert relative_error(attended[-1:], by_itself) < allowed
    scaled = proxy_of(backend, features * 4, value)
    assert relative_error(scaled, attended) < allowed
