"""One list of claims that every backend of the ops answers to.

The backends are PyTorch on the CPU and the Triton kernels, which run on the GPU where there is one
and in Triton's interpreter elsewhere. Every claim is about what a caller gets, never about how it
is computed; results are judged by `tests.support.accuracy`. Whatever the backends allocate is
filled with NaN first, so that an entry nobody wrote fails.

The interpreter takes a tenth of a second for a handful of patches. It gets smaller inputs, each
computed once for all tests, and most of its sizes are marked slow.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fsa
from fsa import FSAConfig, InputError, reference
from fsa.ops.library import op_options
from fsa_kernels import Adaptations
from tests.support.accuracy import (
    CERTAIN_SIMILARITY_MARGIN,
    OP_VECTORS,
    RELATIVE_ERROR,
    assert_conforms,
    exact_similarities,
    judge,
    relative_error,
    segment_logits,
    vector,
)
from tests.support.backends import BACKENDS, ON_GPU, Backend
from tests.support.forms import FORMS, form_id
from tests.support.poison import poisoned_allocations

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# What pruning does with a row does not depend on scaling.
PRUNINGS = FORMS[::2]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> Backend:
    return Backend(request.param)


@pytest.fixture(autouse=True)
def _poisoned(request):
    """Not where an op is traced by opcheck, which looks at the allocations itself."""
    if "opcheck" in request.node.name:
        yield
        return
    with poisoned_allocations():
        yield


def types_of_backends(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Every backend with every type of input that it takes, or with those of some types."""
    pairs = [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name in BACKENDS
        for dtype in dtypes or DTYPES
        if dtype in Backend(name).dtypes
    ]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, indirect=["backend"])


every_type = types_of_backends()


def slow_in_the_interpreter() -> list:
    """The backends, for what takes Triton's interpreter long."""
    return [
        pytest.param(name, marks=() if name == "torch" or ON_GPU else pytest.mark.slow)
        for name in BACKENDS
    ]


def test_allocations_are_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()
    assert torch.empty(2, dtype=torch.int32).eq(-(2**31)).all()


# --------------------------------------------------------------------------------------------------
# Agreement with the definition in float64

SIZES = [
    (B, N, C) for N in (1, 2, 3, 63, 64, 65) for C in (1, 2, 21, 150, 171, 847) for B in (1, 3)
]
# Every N and every C and both B once or more: what the interpreter is asked by default.
SIZES_FOR_THE_INTERPRETER = [
    (1, 1, 1),
    (3, 1, 21),
    (1, 2, 2),
    (3, 2, 171),
    (3, 3, 21),
    (1, 3, 847),
    (1, 63, 2),
    (1, 63, 150),
    (1, 64, 21),
    (1, 65, 1),
    (3, 65, 21),
]
LARGE_SIZES = [
    (3, 196, 1),
    (1, 196, 21),
    (1, 196, 171),
    (3, 196, 847),
    (1, 441, 60),
    (1, 1024, 21),
    (3, 1024, 171),
    (1, 1764, 2),
    (1, 1764, 171),
    (1, 1764, 847),
]
# A definition of N x N x C entries takes the CPU tens of seconds from here on.
QUICK_ENTRIES = 50e6


def sizes_of_backends() -> list:
    parameters = []
    for name in BACKENDS:
        interpreted = name == "triton" and not ON_GPU
        # The interpreter takes minutes for more than one image of a small grid.
        for B, N, C in SIZES + (LARGE_SIZES[:3] if interpreted else LARGE_SIZES):
            quick = B * N * N * C < QUICK_ENTRIES
            if interpreted:
                quick = (B, N, C) in SIZES_FOR_THE_INTERPRETER
            marks = () if quick else pytest.mark.slow
            parameters.append(pytest.param(name, B, N, C, marks=marks, id=f"{name}-B{B}-N{N}-C{C}"))
    return parameters


@pytest.mark.parametrize(("backend", "B", "N", "C"), sizes_of_backends(), indirect=["backend"])
def test_every_size_agrees_with_the_definition(backend, B, N, C):
    logits, uniform = (tensor.float() for tensor in segment_logits(N, C, B=B))
    assert_conforms(backend.attention(logits, uniform), logits, uniform)


@types_of_backends(torch.float64, torch.float32)
@pytest.mark.parametrize("name", OP_VECTORS)
def test_the_published_vectors_come_out(backend, name, dtype):
    data = vector(name)
    config = FSAConfig(beta=float(data["beta"]), confidence=float(data["confidence"]))
    logits, uniform = data["patch_logits"].to(dtype), data["uniform_logits"].to(dtype)
    feedback = backend.attention(logits, uniform, config)
    S = 1 / (1 + data["kl"])
    judged = judge(feedback, S, config)
    assert judged.unexplained == 0
    # beta = 4.5 with two classes amplifies rounding most: no worse than twice the definition
    # computed in the same type.
    plain = judge(reference.feedback_attention(logits, uniform, config), S, config)
    assert judged.error < max(RELATIVE_ERROR[dtype], 2 * plain.error)
    allowed = max(RELATIVE_ERROR[dtype], 2 * plain.error)
    assert relative_error(feedback, data["feedback_attention"]) < allowed
    value, attention = data["value"].to(dtype), data["attention"].to(dtype)
    adapted = fsa.adapt(value, feedback, attention, config=config).transpose(1, 2).flatten(2)
    assert relative_error(adapted, data["adapted_value"]) < allowed


@pytest.mark.parametrize("uniform", ["no uniform logits", "one row an image", "a row a patch"])
@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_every_form_agrees_with_the_definition(backend, config, uniform):
    N = 20 if backend.is_interpreted else 40
    # The widest type of the backend, in which a wrong formula has nowhere to hide.
    widest = backend.dtypes[0]
    logits, rows = (tensor.to(widest) for tensor in segment_logits(N, 9, B=3))
    if uniform == "a row a patch":
        rows = torch.randn(3, N, 9, generator=torch.Generator().manual_seed(2)).to(widest)
    elif uniform == "no uniform logits":
        rows = None
    if backend.is_interpreted:  # Images are held to the definition by their own tests.
        logits, rows = logits[:1], None if rows is None else rows[:1]
    assert_conforms(backend.attention(logits, rows, config), logits, rows, config)


@every_type
def test_every_type_is_computed_in_float32_or_better(backend, dtype):
    N = 65 if backend.is_interpreted else 144
    logits, uniform = (tensor.to(dtype) for tensor in segment_logits(N, 21))
    feedback = backend.attention(logits, uniform)
    assert feedback.dtype == dtype
    assert_conforms(feedback, logits, uniform)


@every_type
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_the_result_has_the_type_asked_for(backend, dtype, wanted):
    logits, _ = segment_logits(6, 4)
    logits = logits.to(dtype)
    if wanted not in backend.dtypes:
        with pytest.raises(InputError, match=r"dtype=torch\.float64 is not accepted"):
            backend.attention(logits, dtype=wanted)
        return
    feedback = backend.attention(logits, dtype=wanted)
    assert feedback.dtype == wanted
    assert_conforms(feedback, logits, tolerance=max(RELATIVE_ERROR[wanted], arithmetic(dtype)))


def arithmetic(dtype: torch.dtype) -> float:
    """The relative error of results computed from inputs of a type, before they are rounded."""
    return RELATIVE_ERROR[torch.float64 if dtype == torch.float64 else torch.float32]


def test_exact_precision_is_exact_and_fast_precision_is_near(backend):
    logits, uniform = (tensor.float() for tensor in segment_logits(65, 60))
    exact, fast = (
        backend.attention(logits, uniform, FSAConfig(precision=precision))
        for precision in ("exact", "fast")
    )
    assert_conforms(exact, logits, uniform)
    definition = reference.feedback_attention(logits.double(), uniform.double())
    if backend.name == "torch":
        # It has one precision, the exact one.
        assert torch.equal(exact, fast)
    else:
        assert RELATIVE_ERROR[torch.float32] < relative_error(fast, definition) < 0.2


def test_ten_thousand_classes(backend):
    logits = segment_logits(3 if backend.is_interpreted else 64, 10_000)[0].float()
    assert_conforms(backend.attention(logits), logits)


@pytest.mark.parametrize("confidence", [1e-6, 0.05, 0.45, 0.9, 0.999999, 1.0])
def test_every_confidence_keeps_the_longest_prefix_that_fits(backend, confidence):
    logits, uniform = (tensor.float() for tensor in segment_logits(30, 9))
    config = FSAConfig(confidence=confidence)
    feedback = backend.attention(logits, uniform, config)
    assert_conforms(feedback, logits, uniform, config)
    assert (feedback > 0).any(dim=-1).all()
    if confidence == 1:
        assert (feedback > 0).all()


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_rows_sum_to_one(backend, config):
    logits, uniform = (tensor.float() for tensor in segment_logits(20, 9, B=3))
    if backend.is_interpreted:
        logits, uniform = logits[:1], uniform[:1]
    feedback = backend.attention(logits, uniform, config)
    assert (feedback >= 0).all()
    assert (feedback.sum(dim=-1) - 1).abs().max() < 1e-5


def test_the_judge_sees_a_wrong_decision(backend):
    logits, uniform = (tensor.float() for tensor in segment_logits(30, 9))
    feedback = backend.attention(logits, uniform)
    S = exact_similarities(logits, uniform)
    assert judge(feedback, S).unexplained == 0
    kept = feedback[0, 3].nonzero()[:, 0]
    # The most similar one that is neither the patch itself nor near the cut.
    feedback[0, 3, kept[S[0, 3, kept].argsort(descending=True)[1]]] = 0
    assert judge(feedback, S).unexplained == 1


# --------------------------------------------------------------------------------------------------
# Ties, and values that are hard to tell apart


def choices_of_classes(N: int, kinds: int) -> Tensor:
    """Logits (1,N,4), float64, of patches that choose one class, or two with equal probability.

    Probabilities are 0, 1/2 and 1 to the bit. A similarity is then a sum of two terms at most, so
    patches of one kind are equally similar to the bit, in whatever order a product adds its terms.
    No sums of two different terms are equal: those would be only within rounding.
    """
    logits = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    membership = torch.randint(kinds, (N,), generator=torch.Generator().manual_seed(1))
    # exp(-2000) is 0 in every type.
    return 2000 * logits[membership][None].double()


@types_of_backends(torch.float64, torch.float32)
@pytest.mark.parametrize("kinds", [1, 2, 3, 5])
@pytest.mark.parametrize("config", PRUNINGS, ids=form_id)
def test_equal_similarities_are_kept_lowest_index_first(backend, dtype, config, kinds):
    logits = choices_of_classes(31 if backend.is_interpreted else 60, kinds).to(dtype)
    exact = reference.feedback_attention(logits.double(), None, config)
    # Weights of e^(-19) are nothing in half precision, and nothing is what is not kept.
    feedback = backend.attention(logits, None, config, dtype=torch.float32)
    assert torch.equal(feedback > 0, exact > 0)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("confidence", [0.2, 0.45, 0.6, 0.8])
@pytest.mark.parametrize("upper", [1, 10, 30])
def test_a_row_of_two_values_is_cut_inside_either_of_them(backend, upper, confidence):
    """The number that fits is known: each of the `upper` patches weighs e, the others e^S."""
    N = 31
    logits = torch.zeros(1, N, 2)
    similar = torch.randperm(N, generator=torch.Generator().manual_seed(upper))[:upper]
    logits[0, :, 0] = 2000
    logits[0, similar, 0], logits[0, similar, 1] = 0, 2000
    config = FSAConfig(confidence=confidence, scaling=False)
    feedback = backend.attention(logits, None, config)
    # KL = log(1 + 1e-10) - log(1e-10) between patches of the two kinds.
    weights = torch.full((N,), math.exp(1 / (1 + math.log(1e10))), dtype=torch.float64)
    weights[:upper] = math.e
    mass = (weights / weights.sum()).cumsum(dim=0)
    count = max(1, int((mass <= confidence).sum()))
    row = feedback[0, similar[0]] > 0
    order = torch.cat(
        [similar.sort().values, torch.tensor([j for j in range(N) if j not in similar])]
    )
    assert torch.equal(row.nonzero()[:, 0], order[:count].sort().values)


def test_similarities_one_rounding_step_apart_are_counted_right(backend):
    """All similarities of a row lie between 1 and a few steps of 6e-8 below it.

    Which of them are kept is a matter of rounding, but not how many: 18 of 41 weigh 0.439, and one
    more would weigh 0.463.
    """
    noise = torch.randn(1, 41, 6, generator=torch.Generator().manual_seed(0))
    logits = 4e-4 * noise
    S = exact_similarities(logits)
    assert 1e-7 < 1 - S.min() < 2e-6
    feedback = backend.attention(logits)
    assert ((feedback > 0).sum(dim=-1) == 18).all()
    torch.testing.assert_close(feedback[feedback > 0], torch.full((41 * 18,), 1 / 18))
    assert_conforms(feedback, logits)


def test_patches_that_are_all_alike_attend_by_index(backend):
    # Equal confidences of 0.1: four fit under 0.45, the lowest indices.
    expected = torch.tensor([0.25] * 4 + [0.0] * 6).expand(1, 10, 10)
    torch.testing.assert_close(backend.attention(torch.zeros(1, 10, 3)), expected)


def test_one_class_makes_all_patches_alike(backend):
    logits = torch.randn(1, 10, 1, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([0.25] * 4 + [0.0] * 6).expand(1, 10, 10)
    torch.testing.assert_close(backend.attention(logits), expected)


@every_type
@pytest.mark.parametrize("value", [0.0, 1.0, -60_000.0, 60_000.0, 1e-7, 6e-8])
def test_constant_logits_are_uniform_whatever_the_constant(backend, value, dtype):
    logits = torch.full((1, 5, 4), value, dtype=dtype)
    # Equal confidences of 0.2: two fit under 0.45.
    expected = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=dtype).expand(1, 5, 5)
    assert torch.equal(backend.attention(logits), expected)


@every_type
@pytest.mark.parametrize("config", PRUNINGS, ids=form_id)
def test_one_patch_attends_to_itself(backend, dtype, config):
    for C in (1, 3):
        logits = torch.full((2, 1, C), 7.0, dtype=dtype)
        expected = torch.ones(2, 1, 1, dtype=dtype)
        assert torch.equal(backend.attention(logits, None, config), expected)


# --------------------------------------------------------------------------------------------------
# Values at the end of what numbers can hold


@every_type
@pytest.mark.parametrize("N", [6, 12])
def test_one_hot_logits_at_the_end_of_half_precision(backend, dtype, N):
    logits = torch.full((1, N, 3), -60_000.0, dtype=dtype)
    logits[0, torch.arange(N), torch.arange(N) % 3] = 60_000.0
    feedback = backend.attention(logits)
    assert_conforms(feedback, logits)
    if N == 6:
        # Confidences: e, e, and four times e^(1/24): two of a kind make up 0.56, so one is kept.
        kept = torch.arange(6) == (torch.arange(6) % 3)[:, None]
        assert torch.equal(feedback[0] > 0, kept)


@pytest.mark.parametrize("gap", [6, 10, 14, 20])
def test_certain_predictions(backend, gap):
    generator = torch.Generator().manual_seed(gap)
    logits = torch.randn(1, 60, 20, generator=generator)
    logits[0, torch.arange(60), torch.randint(20, (60,), generator=generator)] += gap
    assert_conforms(backend.attention(logits), logits, similarity_margin=CERTAIN_SIMILARITY_MARGIN)


def test_denormals_count_as_what_they_are(backend):
    alike = backend.attention(torch.zeros(1, 6, 3))
    logits = segment_logits(6, 3)[0].float()
    denormal = logits * torch.finfo(torch.float32).smallest_normal / 64
    half = (logits * 2**-20).half()
    assert (denormal != 0).any()
    assert (half != 0).any()
    # Differences that small are lost in exp(), as they are among ordinary numbers.
    torch.testing.assert_close(backend.attention(denormal), alike)
    # These are within float32's rounding of 1: which two of six are kept is rounding, too.
    feedback = backend.attention(half)
    assert (feedback.count_nonzero(dim=-1) == 2).all()
    torch.testing.assert_close(feedback[feedback > 0], torch.full((12,), 0.5).half())


@pytest.mark.parametrize("beta", [0.0, 80.0])
def test_the_steepest_scaling_stays_finite(backend, beta):
    logits = segment_logits(6, 4)[0].float()
    feedback = backend.attention(logits, config=FSAConfig(beta=beta))
    assert feedback.isfinite().all()
    assert (feedback.sum(dim=-1) - 1).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# NaN and inf

NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_nan_and_inf_are_refused_on_the_cpu(backend, value):
    if backend.device == "cuda":
        pytest.skip("on a GPU looking would synchronise; the rules below hold there")

    def spoilt(*shape):
        tensor = torch.rand(shape)
        tensor.view(-1)[-1] = value
        return tensor

    good, name = torch.rand(2, 4, 3), backend.name
    calls = {
        "patch_logits": lambda: fsa.feedback_attention(spoilt(2, 4, 3), backend=name),
        "uniform_logits": lambda: fsa.feedback_attention(good, spoilt(2, 1, 3), backend=name),
        "features": lambda: fsa.proxy_attention(spoilt(2, 4, 3), good, backend=name),
        "value": lambda: fsa.proxy_attention(good, spoilt(2, 4, 3), backend=name),
    }
    for argument, call in calls.items():
        with pytest.raises(InputError, match=f"{argument} holds NaN or inf"):
            call()


@pytest.mark.parametrize("config", PRUNINGS, ids=form_id)
def test_a_broken_patch_gets_a_row_of_nan_and_no_other_row_keeps_it(backend, config):
    """What holds where nobody looks for NaN, on a GPU: asked of the backends themselves."""
    N = 9 if backend.is_interpreted else 30
    logits = segment_logits(N, 5, B=4)[0].float()
    broken = logits.clone()
    # The first patch is one of those that the centre may be taken from. The last image is whole.
    for image, (patch, value) in enumerate(zip((0, 4, N - 1), NOT_FINITE, strict=True)):
        broken[image, patch, 2] = value
    feedback = backend.unchecked_attention(broken, config)
    whole = backend.unchecked_attention(logits, config)
    assert torch.equal(feedback[3], whole[3])
    for image, patch in enumerate((0, 4, N - 1)):
        others = torch.arange(N) != patch
        assert feedback[image, patch].isnan().all()
        assert (feedback[image, others, patch] == 0).all()
        assert feedback[image, others].isfinite().all()
        assert (feedback[image, others].sum(dim=-1) - 1).abs().max() < 1e-5
        if config.pruning != "ratio":  # A ratio counts the broken patch into N.
            remaining = feedback[image : image + 1, others][:, :, others]
            assert_conforms(remaining, logits[image : image + 1, others], None, config)


def test_an_image_of_nothing_but_nan_leaves_the_others_alone(backend):
    logits = segment_logits(5, 4, B=2)[0].float()
    broken = logits.clone()
    broken[0] = math.nan
    feedback = backend.unchecked_attention(broken)
    assert feedback[0].isnan().all()
    assert_conforms(feedback[1:], logits[1:])


# --------------------------------------------------------------------------------------------------
# Memory: strides, blocks, repetition

LAYOUTS = ["transposed", "sliced", "misaligned", "one image repeated"]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (B,N,C) with other strides or another alignment, on the same device."""
    B, N, C = tensor.shape
    if layout == "transposed":
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "sliced":
        room = tensor.new_full((2 * B, 3 * N, 2 * C + 1), float("nan"))
        room[1::2, 2::3, 1::2] = tensor
        return room[1::2, 2::3, 1::2]
    if layout == "misaligned":
        room = tensor.new_full((tensor.numel() + 1,), float("nan"))
        room[1:] = tensor.flatten()
        return room[1:].view(B, N, C)
    return tensor[:1].expand(B, N, C)


# By elements of four bytes and of two.
@types_of_backends(torch.float32, torch.float16)
@pytest.mark.parametrize("rows", [1, 12], ids=["one uniform row", "a uniform row a patch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment_change_nothing(backend, dtype, layout, rows):
    # Moved first and sliced after: what is copied to a device comes out contiguous.
    logits = backend.put(segment_logits(12, 14, B=2)[0].to(dtype))
    generator = torch.Generator().manual_seed(2)
    uniform = backend.put(torch.randn(2, rows, 14, generator=generator).to(dtype))
    given = [laid_out(tensor, layout) for tensor in (logits, uniform)]
    assert given[0].stride() != logits.stride() or given[0].storage_offset() == 1
    feedback = backend.attention(*given)
    assert_conforms(feedback, given[0].cpu(), given[1].cpu())
    straight = backend.attention(*(tensor.contiguous() for tensor in given))
    if backend.device == "cpu":
        # On a GPU the compiler adds in another order where rows are not next to each other.
        assert torch.equal(feedback, straight)


def test_overlapping_strides_change_nothing(backend):
    memory = backend.put(torch.randn(200, generator=torch.Generator().manual_seed(0)))
    for strides in [(0, 0, 0), (7, 3, 1), (1, 1, 1), (2, 0, 3)]:
        logits = torch.as_strided(memory, (2, 9, 5), strides)
        feedback = backend.attention(logits)
        assert_conforms(feedback, logits.cpu())


def test_every_image_stands_alone(backend):
    logits, uniform = (tensor.float() for tensor in segment_logits(20, 6, B=3))
    # The others are of another size altogether, and would show in anything shared.
    logits[1] *= 30
    uniform[2] -= 500
    together = backend.attention(logits, uniform)
    features = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    features[1] *= 1000
    attended = backend.proxy_attention(features, logits)
    for b in range(3):
        one = slice(b, b + 1)
        by_itself = backend.attention(logits[one], uniform[one])
        assert relative_error(together[one], by_itself) < RELATIVE_ERROR[torch.float32]
        by_itself = backend.proxy_attention(features[one], logits[one])
        assert relative_error(attended[one], by_itself) < RELATIVE_ERROR[torch.float32]


def test_permuting_the_patches_permutes_the_result(backend):
    logits, uniform = (tensor.float() for tensor in segment_logits(30, 9))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = backend.attention(logits[:, order], uniform)
    straight = backend.attention(logits, uniform)[:, order][:, :, order]
    assert relative_error(permuted, straight) < RELATIVE_ERROR[torch.float32]


@types_of_backends(*DTYPES[1:])
def test_the_same_input_gives_the_same_bits(backend, dtype):
    sizes = [(1, 9, 3)] if backend.is_interpreted else [(2, 65, 21), (1, 441, 60), (3, 196, 1)]
    for B, N, C in sizes:
        logits, uniform = (tensor.to(dtype) for tensor in segment_logits(N, C, B=B))
        features, columns = backend.put(logits), backend.put(logits.flip(-1).contiguous())
        value = columns[:, None].expand(B, 2, N, C)
        runs = []
        for number in range(3):
            # Memory that is used again is not clean, and is not always the same.
            litter = backend.put(torch.full((1 + number, N, N), float("nan"), dtype=dtype))
            del litter
            feedback = backend.attention(logits, uniform, again=True)
            adapted = fsa.adapt(value, backend.put(feedback), backend.put(feedback))
            attended = fsa.proxy_attention(features, columns, backend=backend.name)
            runs.append((feedback, adapted, attended))
        for run in runs[1:]:
            assert all(torch.equal(one, two) for one, two in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_every_form_repeats_its_ties(backend, config):
    # Equal patches, whose order an unstable sort would change each time.
    distinct = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(1))
    logits = distinct[:, torch.arange(17 if backend.is_interpreted else 300) % 5]
    first = backend.attention(logits, None, config)
    assert torch.equal(first, backend.attention(logits, None, config, again=True))
    assert_conforms(first, logits, None, config)
    if backend.name == "triton":
        # Its product rounds equal columns in the same way, which a BLAS need not do.
        exact = reference.feedback_attention(logits.double(), None, config)
        assert torch.equal(first > 0, exact > 0)


@types_of_backends(*DTYPES[1:])
def test_applied_feedback_is_feedback_times_the_columns(backend, dtype):
    """`apply_feedback` keeps no N x N matrix; a broken patch gets a row of NaN there too."""
    N = 24
    logits, uniform = (tensor.float() for tensor in segment_logits(N, 9, B=2))
    logits[1, 0, 3] = math.nan
    columns = torch.randn(2, N, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = [backend.put(tensor) for tensor in (logits, uniform)]
    options = op_options(FSAConfig())
    applied = backend.module.apply_feedback(*inputs, None, backend.put(columns), options=options)
    whole = backend.module.feedback_attention(*inputs, options=options, dtype=dtype)
    assert applied.dtype == dtype
    assert applied[1, 0].isnan().all()
    expected = (whole.double() @ backend.put(columns).double()).cpu()
    for finite in ((0, slice(None)), (1, slice(1, None))):
        assert relative_error(applied[finite].cpu(), expected[finite]) < RELATIVE_ERROR[dtype]


# --------------------------------------------------------------------------------------------------
# Features and texts in the place of logits


def features_and_texts(
    N: int, C: int, E: int, uniform: int, dtype: torch.dtype, B: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Features (B,N,E) as CLIP's, most of whose length is the same for all, near their texts; how
    many rows of them under uniform attention, 0, 1 or N; and texts (C,E)."""
    generator = torch.Generator().manual_seed(N + C)
    texts = functional.normalize(torch.randn(C, E, generator=generator), dim=-1)
    mixed = texts[torch.randint(C, (B, N), generator=generator)]
    noise, shared = (torch.randn(*size, E, generator=generator) for size in ((B, N), (1, 1)))
    shared = 2 * shared / shared.norm()
    features = shared + 0.4 * mixed + 0.3 * noise / E**0.5
    rows = shared + 0.2 * torch.randn(B, uniform, E, generator=generator) / E**0.5
    return features.to(dtype), rows.to(dtype) if uniform else None, texts


def logits_of(
    features: Tensor, uniform: Tensor | None, texts: Tensor, config: FSAConfig
) -> list[Tensor | None]:
    """The logits of the definition, in float64."""
    cosines = [
        None if tensor is None else functional.normalize(tensor.double(), dim=-1) @ texts.double().T
        for tensor in (features, uniform)
    ]
    scales = (config.logit_scale, config.uniform_logit_scale)
    return [None if c is None else scale * c for c, scale in zip(cosines, scales, strict=True)]


# The last one has more classes than registers hold.
FEATURE_SIZES = [(1, 1, 3), (33, 21, 70), (20, 70, 128), (5, 300, 40)]
UNIFORM_ROWS = ["none", "one", "each"]


def features_of_backends() -> list:
    parameters = []
    for name in BACKENDS:
        for i, size in enumerate(FEATURE_SIZES):
            for j, rows in enumerate(UNIFORM_ROWS):
                for k, dtype in enumerate(DTYPES[1:]):
                    # Every pair of a size, a kind of uniform rows and a type once.
                    quick = name == "torch" or ON_GPU or (i + j + k) % 3 == 0
                    marks = () if quick else pytest.mark.slow
                    number = "x".join(map(str, size))
                    parameters.append(
                        pytest.param(
                            name,
                            size,
                            rows,
                            dtype,
                            marks=marks,
                            id=f"{name}-{number}-{rows}-{str(dtype).removeprefix('torch.')}",
                        )
                    )
    return parameters


@pytest.mark.parametrize(
    ("backend", "size", "rows", "dtype"), features_of_backends(), indirect=["backend"]
)
def test_features_and_texts_agree_with_the_definition(backend, size, rows, dtype):
    N, C, E = size
    features, uniform, texts = features_and_texts(
        N, C, E, {"none": 0, "one": 1, "each": N}[rows], dtype
    )
    # Texts in the type of the features too, whose rounding is part of the input then.
    for config, given in (
        (FSAConfig(), texts),
        (FSAConfig(similarity="cosine", logit_scale=11.0), texts.to(dtype)),
    ):
        feedback = backend.attention(features, uniform, config, texts=given, dtype=torch.float32)
        assert_conforms(feedback, *logits_of(features, uniform, given, config), config)


def test_features_and_texts_are_taken_with_their_strides(backend):
    tensors = features_and_texts(20, 7, 24, 20, torch.float32)
    features, uniform, texts = (backend.put(tensor) for tensor in tensors)
    apart = [
        tensor.mT.contiguous().mT.repeat_interleave(2, dim=-2)[..., ::2, :]
        for tensor in (features, uniform, texts)
    ]
    feedback = backend.attention(*apart[:2], texts=apart[2])
    assert_conforms(feedback, *logits_of(*tensors, FSAConfig()))
    if backend.device == "cpu":
        assert torch.equal(feedback, backend.attention(features, uniform, texts=texts))


@pytest.mark.parametrize("where", ["a patch", "its uniform row"])
def test_a_broken_feature_gives_a_row_of_nan_and_no_other_row_keeps_it(backend, where):
    features, uniform, texts = features_and_texts(15, 5, 16, 15, torch.float32)
    spoilt = features if where == "a patch" else uniform
    # Patch 0 is one of those that the centre is taken from.
    spoilt[0, 0, 3] = math.nan
    feedback = backend.module.feedback_attention(
        *(backend.put(tensor) for tensor in (features, uniform, texts)),
        options=op_options(FSAConfig()),
        dtype=torch.float32,
    ).cpu()
    assert feedback[0, 0].isnan().all()
    assert (feedback[0, 1:, 0] == 0).all()
    logits = logits_of(features[:, 1:], uniform[:, 1:], texts, FSAConfig())
    assert_conforms(feedback[:, 1:, 1:], *logits)


# --------------------------------------------------------------------------------------------------
# ProxyCLIP's attention, and what a step takes of values


@every_type
@pytest.mark.parametrize(
    ("N", "F", "D"),
    [(1, 3, 5), (2, 16, 16), (65, 40, 300), (33, 130, 1300), (100, 64, 96)],
)
def test_proxy_attention_agrees_with_the_definition(backend, dtype, N, F, D):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(2, N, F, generator=generator) + 0.2).to(dtype)
    value = torch.randn(2, N, D, generator=generator).to(dtype)
    attended = backend.proxy_attention(features, value)
    exact = reference.proxy_attention(features.double(), value.double())
    assert attended.dtype == dtype
    # Half types may round unit features before their product, so a pair at the threshold may fall
    # on its other side: no worse than twice the definition computed in the same type.
    plain = reference.proxy_attention(features, value)
    allowed = max(RELATIVE_ERROR[dtype], 2 * relative_error(plain, exact))
    assert relative_error(attended, exact) < allowed


@pytest.mark.parametrize("backend", slow_in_the_interpreter(), indirect=True)
def test_proxy_attention_of_very_many_patches(backend):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2100, 3, generator=generator) + 0.5
    value = torch.randn(1, 2100, 4, generator=generator)
    exact = reference.proxy_attention(features.double(), value.double())
    attended = backend.proxy_attention(features, value)
    assert relative_error(attended, exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_proxy_attention_takes_strides_as_they_are(backend, layout):
    generator = torch.Generator().manual_seed(0)
    features = laid_out(backend.put(torch.randn(2, 20, 40, generator=generator)), layout)
    value = laid_out(backend.put(torch.randn(2, 20, 16, generator=generator)), layout)
    attended = backend.proxy_attention(features, value)
    exact = reference.proxy_attention(features.cpu().double(), value.cpu().double())
    assert relative_error(attended, exact) < RELATIVE_ERROR[torch.float32]


@every_type
def test_proxy_patches_with_nothing_above_the_threshold_attend_to_themselves(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 5, 3, generator=generator).to(dtype)
    # All alike: 1 lies under 1.2 times the mean, for every pair.
    assert torch.equal(backend.proxy_attention(torch.ones(2, 5, 4).to(dtype), value), value)
    # One image of the two; and one row of an image, the outlier, has only itself above.
    mixed = torch.ones(2, 5, 4)
    mixed[1] = torch.randn(5, 4, generator=generator)
    attended = backend.proxy_attention(mixed.to(dtype), value)
    assert torch.equal(attended[0], value[0])
    exact = reference.proxy_attention(mixed[1:].to(dtype).double(), value[1:].double())
    assert relative_error(attended[1:], exact) < 2 * RELATIVE_ERROR[dtype]
    # No direction at all: every cosine is 0, and so is the threshold.
    nothing = backend.proxy_attention(torch.zeros(2, 5, 4).to(dtype), value)
    mean = value.double().mean(dim=1, keepdim=True).expand_as(nothing)
    torch.testing.assert_close(nothing.double(), mean, rtol=1e-2, atol=1e-2)


def test_a_broken_image_leaves_the_proxy_attention_of_others_alone(backend):
    features = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    value = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    features[0, 3, 3] = math.nan
    options = {"shift": 1.2} | ({"gain": 3.0, "stored": True} if backend.name == "triton" else {})
    state = backend.module.proxy_prepare(backend.put(features), **options)
    attended = backend.module.proxy_apply(state, backend.put(value), gain=3.0).cpu()
    exact = reference.proxy_attention(features[1:].double(), value[1:].double())
    assert relative_error(attended[1:], exact) < RELATIVE_ERROR[torch.float32]


TERMS = [
    ("after", "before", "only"),
    ("after", "before"),
    ("before", "only"),
    ("after", "only"),
    ("after",),
    ("before",),
    ("only",),
]


def adaptations_of(terms: tuple[str, ...]) -> Adaptations:
    return Adaptations(**{name: name in terms for name in ("after", "before", "only")})


def columns_of(attended: Tensor, value: Tensor, terms: tuple[str, ...]) -> Tensor:
    """(B,N,K): what A_f is multiplied with, the "after" and "only" terms first, for their mean."""
    sides = [
        [attended] * ("after" in terms) + [value] * ("only" in terms),
        [value] * ("before" in terms),
    ]
    return torch.cat([sum(side) for side in sides if side], dim=-1) / len(terms)


HEAD_SIZES = [(21, 20, 5), (1, 1, 16), (40, 33, 40)]


def heads_of_backends() -> list:
    parameters = []
    for name in BACKENDS:
        for i, size in enumerate(HEAD_SIZES):
            for j, terms in enumerate(TERMS):
                for k, dtype in enumerate(Backend(name).dtypes):
                    # Every pair of a size, terms and a type once.
                    quick = name == "torch" or ON_GPU or (i + j + k) % 3 == 0
                    parameters.append(
                        pytest.param(
                            name,
                            size,
                            terms,
                            dtype,
                            marks=() if quick else pytest.mark.slow,
                            id=f"{name}-{'x'.join(map(str, size))}-{'+'.join(terms)}-"
                            + str(dtype).removeprefix("torch."),
                        )
                    )
    return parameters


@pytest.mark.parametrize(
    ("backend", "size", "terms", "dtype"), heads_of_backends(), indirect=["backend"]
)
def test_heads_are_gathered_as_a_step_takes_them(backend, size, terms, dtype):
    L, N, d = size
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, L, 3, d, generator=generator).to(dtype)
    attended = torch.randn(2, 3, N, d, generator=generator).to(dtype)
    side_by_side = value.flatten(2).double(), attended.transpose(1, 2).flatten(2).double()
    mean = side_by_side[0].mean(dim=1, keepdim=True)
    exact = torch.cat([side_by_side[1], mean], dim=1)
    columns = columns_of(side_by_side[1], side_by_side[0][:, -N:], terms)
    heads = backend.put(value).transpose(1, 2)
    for given in (heads, heads.contiguous()):
        result = backend.module.gather(given, backend.put(attended), adaptations_of(terms))
        assert all(tensor.dtype == dtype for tensor in result)
        assert relative_error(result[0].cpu(), exact) < RELATIVE_ERROR[dtype]
        assert relative_error(result[1].cpu(), columns) < RELATIVE_ERROR[dtype]


@every_type
def test_the_proxy_gathers_and_adds_what_a_step_takes(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(2, 33, 12, generator=generator) + 0.5).to(dtype)
    value, add = (torch.randn(2, 33, 20, generator=generator).to(dtype) for _ in range(2))
    attended = reference.proxy_attention(features.double(), value.double())
    plain = reference.proxy_attention(features, value)
    allowed = max(RELATIVE_ERROR[dtype], 2 * relative_error(plain, attended))
    options = {"shift": 1.2} | ({"gain": 3.0, "stored": True} if backend.name == "triton" else {})
    state = backend.module.proxy_prepare(backend.put(features), **options)
    given = backend.put(value)
    added = backend.module.proxy_apply(state, given, gain=3.0, add=backend.put(add)).cpu()
    assert relative_error(added, attended + add.double()) < allowed
    for terms in TERMS:
        gathered, columns = backend.module.proxy_gather(
            state, given, adaptations_of(terms), gain=3.0
        )
        assert relative_error(gathered[:, :-1].cpu(), attended) < allowed
        mean = value.double().mean(dim=1)
        assert relative_error(gathered[:, -1].cpu(), mean) < RELATIVE_ERROR[dtype]
        expected = columns_of(attended, value.double(), terms)
        assert relative_error(columns.cpu(), expected) < allowed


# --------------------------------------------------------------------------------------------------
# The ops as torch.library has them


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, UNIFORM = sample(2, 6, 4), sample(2, 1, 4, seed=1)
TEXTS = functional.normalize(sample(7, 4, seed=7), dim=-1)
VALUE = sample(2, 3, 6, 8)
FEEDBACK = sample(2, 6, 6).softmax(dim=-1)
ATTENTION = sample(2, 3, 6, 6).softmax(dim=-1)
PUBLISHED = (3.0, 0.45, 20.0, 35.0, "kl", "confidence", 0.4, 0.5, True, "exact")
COSINE = (3.0, 0.45, 20.0, 35.0, "cosine", None, 0.4, 0.5, False, "fast")
# Every op that the library registers, for every backend that it takes by name, with inputs in
# float32 and half precision and of strides that are no contiguous tensor's. In the place of a
# proxy's state stand the arguments of `proxy_prepare` that make it.
OP_INPUTS = {
    "feedback_attention": {
        "torch": [
            (LOGITS, UNIFORM, None, *PUBLISHED, torch.float32),
            (LOGITS.half(), None, None, *PUBLISHED, torch.float16),
            (LOGITS.transpose(1, 2), LOGITS.mT, None, *PUBLISHED, torch.bfloat16),
            (LOGITS, UNIFORM, None, *COSINE, torch.half),
            (LOGITS, UNIFORM, TEXTS, *PUBLISHED, torch.float32),
        ],
        "triton": [
            (LOGITS, UNIFORM, None, *PUBLISHED, torch.float32),
            (LOGITS, UNIFORM, None, *PUBLISHED, torch.float16),
            (LOGITS.half(), None, TEXTS, *PUBLISHED, torch.float16),
        ],
    },
    "apply_feedback": {
        "torch": [
            (LOGITS, UNIFORM, None, LOGITS, *PUBLISHED),
            (LOGITS, LOGITS, None, LOGITS, *PUBLISHED),
            (LOGITS, None, None, LOGITS.half(), *PUBLISHED),
            (LOGITS, None, TEXTS, LOGITS[..., ::2], *PUBLISHED),
        ],
        "triton": [(LOGITS, UNIFORM, None, LOGITS.half(), *PUBLISHED)],
    },
    "adapt": {
        "": [
            (VALUE, FEEDBACK, ATTENTION, None, True, True, True),
            (VALUE, FEEDBACK, ATTENTION[:, 0], VALUE, False, True, True),
            (VALUE.half(), FEEDBACK.half(), ATTENTION.half(), None, True, False, False),
            (VALUE[..., ::2], FEEDBACK.mT, ATTENTION.mT, None, False, False, True),
        ],
    },
    "gather": {
        "torch": [
            (VALUE, VALUE[:, :, 2:], True, True, True),
            (VALUE.half(), VALUE[..., 1:, :].half(), False, True, False),
        ],
        "triton": [(VALUE, VALUE[:, :, 1:], True, False, True)],
    },
    "proxy_prepare": {
        "torch": [
            (LOGITS, 1.2, 3.0, False),
            (LOGITS[:, ::2].half(), 0.5, 1.0, False),
            (LOGITS.mT, 1.2, 3.0, False),
        ],
        "triton": [(LOGITS, 1.2, 3.0, False), (LOGITS.half(), 1.2, 3.0, True)],
    },
    "proxy_apply": {
        "torch": [
            ((LOGITS, 1.2, 3.0, False), LOGITS, None, 3.0),
            ((LOGITS, 1.2, 3.0, False), LOGITS[..., :3].half(), LOGITS[..., :3], 1.0),
        ],
        "triton": [((LOGITS, 1.2, 3.0, True), LOGITS, LOGITS, 3.0)],
    },
    "proxy_gather": {
        "torch": [
            ((LOGITS, 1.2, 3.0, False), LOGITS, 3.0, True, True, True),
            ((LOGITS, 1.2, 3.0, False), LOGITS[..., :3].half(), 3.0, False, True, False),
        ],
        "triton": [((LOGITS, 1.2, 3.0, True), LOGITS, 3.0, True, False, True)],
    },
}


def test_no_op_is_left_out_of_opcheck():
    registered = {
        name.partition(".")[0].removeprefix("fsa::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fsa::")
    }
    assert registered == set(OP_INPUTS)


@pytest.mark.parametrize(
    ("name", "backend_name", "number"),
    [
        (name, backend_name, number)
        for name, cases in OP_INPUTS.items()
        for backend_name in cases
        if backend_name in ("", *BACKENDS)
        for number in range(len(cases[backend_name]))
    ],
)
def test_opcheck_finds_nothing(name, backend_name, number):
    arguments = list(OP_INPUTS[name][backend_name][number])
    device = Backend(backend_name).device
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    if isinstance(arguments[0], tuple):
        features, *rest = arguments[0]
        state = torch.ops.fsa.proxy_prepare(features.to(device), *rest, backend_name)
        arguments[:1] = state
    if backend_name:
        arguments.append(backend_name)
    torch.library.opcheck(getattr(torch.ops.fsa, name), tuple(arguments))
