"""The Triton kernels against the definition: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig, hosts, reference
from fsa.ops import torch_backend
from tests.support.accuracy import (
    OP_VECTORS,
    RELATIVE_ERROR,
    relative_error,
    segment_logits,
    unexplained_decisions,
    vector,
)
from tests.support.forms import FORMS, form_id
from tests.support.towers import inputs_of, random_tower

if not fsa_kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter is slow: what is large for it is left to the GPU.
SIZES = [1, 2, 3, 63, 64, 65] + ([196, 441, 1024, 1764] if DEVICE == "cuda" else [])
CLASSES = [1, 2, 21, 171] + ([847, 10000] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory is full of NaN, so that an entry that no kernel writes fails."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.dtype.is_floating_point else tensor

    def poisoned_like(tensor, size, **options):
        options = {"dtype": tensor.dtype, "device": tensor.device} | options
        return poisoned(size, **options)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)


def attention_of(logits, uniform=None, config=None):
    """A_f by the kernels, back on the CPU."""
    logits = logits.to(DEVICE)
    uniform = None if uniform is None else uniform.to(DEVICE)
    return fsa.feedback_attention(logits, uniform, config=config, backend="triton").cpu()


@pytest.mark.parametrize("name", OP_VECTORS)
def test_the_published_vectors_come_out(name):
    data = vector(name)
    config = FSAConfig(beta=float(data["beta"]), confidence=float(data["confidence"]))
    logits, uniform = data["patch_logits"].float(), data["uniform_logits"].float()
    feedback = attention_of(logits, uniform, config)
    plain = reference.feedback_attention(logits, uniform, config)
    allowed = max(
        RELATIVE_ERROR[torch.float32], 2 * relative_error(plain, data["feedback_attention"])
    )
    assert relative_error(feedback, data["feedback_attention"]) < allowed
    assert unexplained_decisions(feedback > 0, 1 / (1 + data["kl"]), config) == 0


@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("N", SIZES)
def test_every_size_agrees_with_the_definition(N, C):
    logits, uniform = (tensor.float() for tensor in segment_logits(N, C, B=2))
    # The definition holds a tensor N x N x C; beyond what the interpreter runs, the PyTorch backend
    # in float64 stands for it, which has its own tests against the definition.
    if N * N * C > 2**22:
        wide = (logits.double().to(DEVICE), uniform.double().to(DEVICE))
        exact = fsa.feedback_attention(*wide, backend="torch").cpu()
    else:
        exact = reference.feedback_attention(logits.double(), uniform.double())
    feedback = attention_of(logits, uniform)
    # A patch on the other side of the threshold by rounding changes all of its row: such rows are
    # judged by whether the decision is explained, the others by their error.
    same = ((feedback > 0) == (exact > 0)).all(dim=-1)
    assert relative_error(feedback[same], exact[same]) < RELATIVE_ERROR[torch.float32]
    for b, rows in enumerate(~same):
        if rows.any():
            similarities = similarities_of(logits[b : b + 1].double(), uniform[b : b + 1].double())
            kept = feedback[b, rows] > 0
            assert unexplained_decisions(kept[None], similarities[None, rows], FSAConfig()) == 0


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_every_form_agrees_with_the_definition(config):
    logits, uniform = (tensor.float() for tensor in segment_logits(40, 9))
    exact = reference.feedback_attention(logits.double(), uniform.double(), config)
    feedback = attention_of(logits, uniform, config)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0, 4.5, 5.7, 8.0])
def test_the_error_grows_with_beta_no_faster_than_is_said(beta):
    # Predictions so alike that most similarities lie near 1, where the scaling is steepest.
    logits, uniform = (0.15 * tensor.float() for tensor in segment_logits(40, 21))
    config = FSAConfig(beta=beta)
    exact = reference.feedback_attention(logits.double(), uniform.double(), config)
    allowed = 2e-6 + 2e-7 * math.exp(beta) * (1 + beta)
    assert relative_error(attention_of(logits, uniform, config), exact) < allowed


@pytest.mark.parametrize("config", FORMS, ids=form_id)
def test_ties_are_kept_lowest_index_first(config):
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(1, 5, 3, generator=generator)
    logits = distinct[:, torch.randint(5, (60,), generator=generator)]
    exact = reference.feedback_attention(logits.double(), None, config)
    feedback = attention_of(logits, config=config)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float32]
    assert torch.equal(feedback > 0, exact > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_computed_as_exactly_as_float32(dtype):
    logits, uniform = (tensor.to(dtype) for tensor in segment_logits(100, 21))
    exact = reference.feedback_attention(logits.double(), uniform.double())
    feedback = attention_of(logits, uniform)
    assert feedback.dtype == dtype
    assert relative_error(feedback, exact) < RELATIVE_ERROR[dtype]


def test_exact_is_more_exact_than_fast():
    logits, uniform = (tensor.float() for tensor in segment_logits(100, 60))
    exact = reference.feedback_attention(logits.double(), uniform.double())
    errors = [
        relative_error(attention_of(logits, uniform, FSAConfig(precision=precision)), exact)
        for precision in ("exact", "fast")
    ]
    assert errors[0] < RELATIVE_ERROR[torch.float32] < errors[1] < 0.2


@pytest.mark.parametrize("per_patch", [False, True])
def test_uniform_logits_and_strides_are_taken_as_they_are(per_patch):
    logits, uniform = (tensor.float().to(DEVICE) for tensor in segment_logits(50, 14, B=2))
    if per_patch:
        generator = torch.Generator().manual_seed(2)
        uniform = torch.randn(2, 50, 14, generator=generator).to(DEVICE)
    # Moved before they are sliced: moving a slice makes it contiguous.
    uniform = uniform[:, :: 1 + per_patch, ::2]
    sliced = logits[:, ::2, ::2]
    transposed = logits.mT.contiguous().mT[:, ::2, ::2]
    assert not sliced.is_contiguous()
    assert transposed.stride() != sliced.stride()
    straight = attention_of(sliced.contiguous(), uniform.contiguous())
    for given in (sliced, transposed):
        again = attention_of(given, uniform)
        if fsa_kernels.interpreting():
            assert torch.equal(again, straight)
        else:
            # Another layout of registers adds in another order.
            assert relative_error(again, straight) < RELATIVE_ERROR[torch.float32]


def test_all_equal_rows_attend_by_index():
    expected = torch.tensor([0.25] * 4 + [0.0] * 6).expand(1, 10, 10)
    torch.testing.assert_close(attention_of(torch.zeros(1, 10, 3)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_hot_and_enormous_logits_stay_finite(dtype):
    logits = torch.full((1, 12, 5), -60000.0)
    logits[0, torch.arange(12), torch.arange(12) % 5] = 60000.0
    exact = reference.feedback_attention(logits.double())
    assert relative_error(attention_of(logits.to(dtype)), exact) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", FORMS[::2], ids=form_id)
def test_a_broken_row_gives_nan_and_touches_no_other(value, config):
    logits, _ = segment_logits(30, 5)
    broken = logits.float().clone()
    # Patch 0 is one of those that the centre is taken from.
    broken[0, 0, 2] = value
    feedback = fsa_kernels.feedback_attention(
        broken.to(DEVICE),
        None,
        dtype=torch.float32,
        beta=config.beta,
        confidence=config.confidence,
        similarity=config.similarity,
        pruning=config.pruning,
        ratio=config.ratio,
        threshold=config.threshold,
        scaling=config.scaling,
    ).cpu()
    assert feedback[0, 0].isnan().all()
    assert (feedback[0, 1:, 0] == 0).all()
    if config.pruning != "ratio":  # A ratio counts the broken patch into N.
        without = reference.feedback_attention(logits[:, 1:], None, config)
        assert relative_error(feedback[:, 1:, 1:], without) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("broken", [[0], [15], [0, 15]], ids=str)
def test_patches_that_the_centre_is_taken_from_may_be_broken(broken):
    # Patches 0 and N // 2 are.
    logits, _ = segment_logits(30, 5)
    given = logits.float().clone()
    given[0, broken, 1] = math.nan
    feedback = fsa_kernels.feedback_attention(
        given.to(DEVICE), None, dtype=torch.float32, beta=3.0, confidence=0.45
    ).cpu()
    left = [patch for patch in range(30) if patch not in broken]
    without = reference.feedback_attention(logits[:, left])
    assert feedback[0, broken].isnan().all()
    assert relative_error(feedback[0, left][:, left], without[0]) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("config", FORMS[::2], ids=form_id)
def test_rows_too_long_for_registers_are_searched_the_same_way(config, monkeypatch):
    from fsa_kernels import launch

    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(1, 5, 3, generator=generator)
    logits = distinct[:, torch.randint(5, (60,), generator=generator)]
    exact = reference.feedback_attention(logits.double(), None, config)
    monkeypatch.setattr(launch, "LONGEST_ROW_IN_REGISTERS", 0)
    monkeypatch.setattr(launch, "select_long", lambda: launch.Launch({"BLOCK_N": 32}, 1))
    feedback = attention_of(logits, config=config)
    assert relative_error(feedback, exact) < RELATIVE_ERROR[torch.float32]
    assert torch.equal(feedback > 0, exact > 0)


@pytest.fixture
def search_steps(monkeypatch):
    """Of rows in so many registers, how many steps the search for each row's threshold takes.

    Without those of the search on every eighth entry, which comes first where there is one.
    """
    from fsa_kernels import select

    if not fsa_kernels.interpreting():
        pytest.skip("steps are counted in Triton's interpreter")
    search, pivot, steps = select._search, select._pivot, []

    def of_rows(BLOCK_N):
        def counting_search(S, *arguments):
            steps.append(0)
            threshold = search(S, *arguments)
            if S.numel < BLOCK_N:
                steps.pop()
            return threshold

        def counting_pivot(*arguments):
            steps[-1] += 1
            return pivot(*arguments)

        monkeypatch.setattr(select, "_search", counting_search)
        monkeypatch.setattr(select, "_pivot", counting_pivot)
        return steps

    return of_rows


def select_rows(similarities, config, *, dtype=torch.float32):
    """A_f of rows of similarities (rows,N) by the kernel alone; NaN where nothing was written."""
    from fsa_kernels import launch, select

    rows, N = similarities.shape
    S = torch.full((1, rows, launch.padded_row(N)), -math.inf)
    S[0, :, :N] = similarities
    names = ("beta", "scaling", "pruning", "confidence", "ratio", "threshold")
    options = {name: getattr(config, name) for name in names}
    h = torch.zeros(1, N, device=DEVICE)
    return select.select(S.to(DEVICE), h, 0, dtype, **options)[0].cpu()


def similarities_of(logits, uniform, every=1):
    """Every so many rows of the similarities (N,N) of one image, by one product."""
    probabilities = reference.isolated_probabilities(logits, uniform)[0]
    logarithms = (probabilities + 1e-10).log()
    h = (probabilities * logarithms).sum(dim=-1, keepdim=True)
    divergence = (h - probabilities @ logarithms.T).clamp(min=0)
    return 1 / (1 + divergence[::every])


@pytest.mark.parametrize(
    ("N", "C", "rows", "mean", "most"), [(196, 21, 98, 5.0, 9), (1764, 171, 84, 5.5, 10)]
)
def test_the_search_takes_few_steps(N, C, rows, mean, most, search_steps):
    # Bisection takes 9.3 steps at 196 patches, and 12 at most.
    steps = search_steps(1 << (N - 1).bit_length())
    similarities = similarities_of(*segment_logits(N, C), every=N // rows)
    select_rows(similarities.float(), FSAConfig())
    assert len(steps) == rows
    assert sum(steps) / rows < mean
    assert max(steps) <= most


def kept_of_a_row(similarities, confidence):
    """What is kept of one row of similarities."""
    return select_rows(similarities[None], FSAConfig(confidence=confidence, scaling=False))[0] > 0


def test_the_search_ends_where_similarities_double_one_by_one(search_steps):
    steps = search_steps(64)
    similarities = 2.0 ** -torch.arange(60)
    confidence = similarities.double().softmax(dim=0).cumsum(dim=0)
    assert torch.equal(kept_of_a_row(similarities, 0.45), confidence <= 0.45)
    assert len(steps) == 1
    assert steps[0] <= 30


def test_the_search_is_quick_where_the_mass_is_least_even(search_steps):
    # Nearly all of it at the top, and the threshold among the few below, which interpolation alone
    # passes one by one: in 21 steps.
    steps = search_steps(512)
    similarities = torch.cat([torch.linspace(1, 0.999, 412), torch.linspace(0.6, 0, 100)])
    confidence = similarities.double().softmax(dim=0).cumsum(dim=0)
    assert torch.equal(kept_of_a_row(similarities, 0.9183), confidence <= 0.9183)
    assert len(steps) == 1
    assert steps[0] <= 12


@pytest.fixture(params=[False, True], ids=["in registers", "in pieces"])
def long_rows(request, monkeypatch):
    """Rows that are held in registers, and rows that come in pieces of 64."""
    from fsa_kernels import launch

    if request.param:
        monkeypatch.setattr(launch, "LONGEST_ROW_IN_REGISTERS", 0)
        monkeypatch.setattr(launch, "select_long", lambda: launch.Launch({"BLOCK_N": 64}, 1))
    return request.param


@pytest.mark.parametrize("pruning", ["confidence", "ratio"])
@pytest.mark.parametrize("N", [40, 300])
def test_similarities_one_rounding_step_apart_are_told_apart(N, pruning, long_rows):
    generator = torch.Generator().manual_seed(N)
    steps = torch.randperm(N, generator=generator).int()
    similarities = (torch.tensor(0.7).view(torch.int32) + steps).view(torch.float32)
    config = FSAConfig(pruning=pruning, ratio=0.45, confidence=0.45)
    kept = select_rows(similarities[None], config)[0] > 0
    # All weights are the same but for the last bits, so both keep 45% of the row.
    count = math.floor(0.45 * N)
    assert kept.sum() in ((count, count - 1) if pruning == "confidence" else (count,))
    assert similarities[kept].min() > similarities[~kept].max()


@pytest.mark.parametrize("config", FORMS[:4], ids=form_id)
@pytest.mark.parametrize("N", [40, 300])
def test_rows_of_two_values_keep_ties_lowest_index_first(N, config, long_rows):
    generator = torch.Generator().manual_seed(N)
    few, many = (torch.rand(2, N, generator=generator) < share for share in (0.2, 0.7))
    rows = torch.cat([torch.where(high, 0.9, 0.3) for high in (few, many)])
    exact = reference.kept_patches(rows.double()[None], config)[0]
    assert 0 < exact.sum() < exact.numel()
    feedback = select_rows(rows, config)
    assert torch.equal(feedback > 0, exact)


@pytest.mark.parametrize("long_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_rows_applied_are_the_whole_applied(dtype, long_rows, monkeypatch):
    from fsa_kernels import feedback, launch

    monkeypatch.setattr(feedback, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(feedback, "_BLOCK_ROWS", 16)
    if long_rows:
        monkeypatch.setattr(launch, "LONGEST_ROW_IN_REGISTERS", 0)
        monkeypatch.setattr(launch, "select_long", lambda: launch.Launch({"BLOCK_N": 16}, 1))
    # Two blocks of rows, the second of them short; the first patch is broken.
    N = 24
    logits, uniform = (tensor.float() for tensor in segment_logits(N, 9, B=2))
    logits[1, 0, 3] = math.nan
    columns = torch.randn(2, N, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"beta": 3.0, "confidence": 0.45}
    inputs = [tensor.to(DEVICE) for tensor in (logits, uniform)]
    applied = fsa_kernels.apply_feedback(*inputs, None, columns.to(DEVICE), **options)
    whole = fsa_kernels.feedback_attention(*inputs, dtype=dtype, **options)
    assert applied.dtype == dtype
    assert applied[1, 0].isnan().all()
    expected = (whole.double() @ columns.to(DEVICE).double()).cpu()
    error = relative_error(applied[0], expected[0]) + relative_error(
        applied[1, 1:], expected[1, 1:]
    )
    assert error < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bytes_an_entry_are_kept(dtype):
    N = 64
    logits = torch.zeros(2, N, 3, dtype=dtype, device=DEVICE)
    feedback = fsa.feedback_attention(logits, backend="triton")
    assert feedback.untyped_storage().nbytes() == 4 * 2 * N * N


def test_the_same_input_gives_the_same_bits():
    logits, uniform = (tensor.float() for tensor in segment_logits(64, 9, B=2))
    assert torch.equal(attention_of(logits, uniform), attention_of(logits, uniform))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "F", "D"), [(1, 3, 5), (2, 16, 16), (65, 40, 300), (33, 130, 1300), (100, 64, 96)]
)
def test_proxy_attention_agrees_with_the_definition(N, F, D, dtype):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(2, N, F, generator=generator) + 0.2).to(dtype)
    value = torch.randn(2, N, D, generator=generator).to(dtype)
    attended = fsa.proxy_attention(features.to(DEVICE), value.to(DEVICE), backend="triton").cpu()
    exact = reference.proxy_attention(features.double(), value.double())
    assert attended.dtype == dtype
    # Half types round unit features before their product, so a pair at the threshold may fall on
    # its other side: no worse than twice the definition computed in the same type.
    plain = reference.proxy_attention(features, value)
    allowed = max(RELATIVE_ERROR[dtype], 2 * relative_error(plain, exact))
    assert relative_error(attended, exact) < allowed


def test_proxy_patches_with_nothing_above_the_threshold_attend_to_themselves():
    value = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0))
    features = torch.ones(1, 40, 3)
    attended = fsa.proxy_attention(features.to(DEVICE), value.to(DEVICE), backend="triton")
    assert torch.equal(attended.cpu(), value)


def test_proxy_attention_takes_strides_as_they_are():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 20, 40, generator=generator).transpose(1, 2)
    value = torch.randn(2, 80, 48, generator=generator)[:, ::2, ::3]
    attended = fsa.proxy_attention(features.to(DEVICE), value.to(DEVICE), backend="triton").cpu()
    exact = reference.proxy_attention(features.double(), value.double())
    assert relative_error(attended, exact) < RELATIVE_ERROR[torch.float32]


def test_a_broken_image_leaves_the_others_alone():
    features = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    value = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    features[0, 3, 3] = math.nan
    state = fsa_kernels.proxy_prepare(features.to(DEVICE), shift=1.2, gain=3.0, stored=True)
    attended = fsa_kernels.proxy_apply(state, value.to(DEVICE), gain=3.0).cpu()
    alone = reference.proxy_attention(features[1:].double(), value[1:].double())
    assert relative_error(attended[1:], alone) < RELATIVE_ERROR[torch.float32]


def features_and_texts(N, C, E, uniform, dtype, B=2):
    """Features as CLIP's, most of whose length is the same for all, near their texts, and how many
    rows of them under uniform attention: 0, 1 or N."""
    generator = torch.Generator().manual_seed(N + C)
    texts = torch.nn.functional.normalize(torch.randn(C, E, generator=generator), dim=-1)
    mixed = texts[torch.randint(C, (B, N), generator=generator)]
    noise, shared = (torch.randn(*size, E, generator=generator) for size in ((B, N), (1, 1)))
    shared = 2 * shared / shared.norm()
    features = shared + 0.4 * mixed + 0.3 * noise / E**0.5
    rows = shared + 0.2 * torch.randn(B, uniform, E, generator=generator) / E**0.5
    return features.to(dtype), rows.to(dtype) if uniform else None, texts


def logits_of(features, uniform, texts, config):
    """The logits of the definition, in float64."""
    cosines = [
        None
        if tensor is None
        else torch.nn.functional.normalize(tensor.double(), dim=-1) @ texts.double().T
        for tensor in (features, uniform)
    ]
    scales = (config.logit_scale, config.uniform_logit_scale)
    return [None if c is None else scale * c for c, scale in zip(cosines, scales, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uniform", ["none", "one", "each"])
@pytest.mark.parametrize(("N", "C", "E"), [(1, 1, 3), (33, 21, 70), (20, 70, 128)])
def test_features_and_texts_agree_with_the_definition(N, C, E, uniform, dtype):
    rows = {"none": 0, "one": 1, "each": N}[uniform]
    features, uniform, texts = features_and_texts(N, C, E, rows, dtype)
    for config in (FSAConfig(), FSAConfig(similarity="cosine", logit_scale=11.0)):
        exact = reference.feedback_attention(
            *logits_of(features, uniform, texts, config), config=config
        )
        # Texts in the type of the features too, whose rounding is part of the input then.
        for given in (texts, texts.to(dtype)):
            if given.dtype != torch.float32:
                exact = reference.feedback_attention(
                    *logits_of(features, uniform, given, config), config=config
                )
            feedback = fsa.feedback_attention(
                features.to(DEVICE),
                None if uniform is None else uniform.to(DEVICE),
                text_features=given.to(DEVICE),
                config=config,
                dtype=torch.float32,
                backend="triton",
            )
            assert relative_error(feedback.cpu(), exact) < RELATIVE_ERROR[torch.float32]


def test_features_and_texts_are_taken_with_their_strides():
    features, uniform, texts = features_and_texts(20, 7, 24, 20, torch.float32)
    straight = fsa.feedback_attention(
        features.to(DEVICE), uniform.to(DEVICE), text_features=texts.to(DEVICE), backend="triton"
    )
    apart = [
        tensor.to(DEVICE).mT.contiguous().mT.repeat_interleave(2, dim=-2)[..., ::2, :]
        for tensor in (features, uniform, texts)
    ]
    again = fsa.feedback_attention(*apart[:2], text_features=apart[2], backend="triton")
    assert torch.equal(straight, again)


@pytest.mark.parametrize("where", ["a patch", "its uniform row"])
def test_a_broken_feature_gives_a_row_of_nan_and_touches_no_other(where):
    features, uniform, texts = features_and_texts(30, 5, 16, 30, torch.float32)
    spoilt = features if where == "a patch" else uniform
    # Patch 0 is one of those that the centre is taken from.
    spoilt[0, 0, 3] = math.nan
    feedback = fsa_kernels.feedback_attention(
        *(tensor.to(DEVICE) for tensor in (features, uniform, texts)),
        dtype=torch.float32,
        beta=3.0,
        confidence=0.45,
        logit_scale=20.0,
        uniform_logit_scale=35.0,
    ).cpu()
    assert feedback[0, 0].isnan().all()
    assert (feedback[0, 1:, 0] == 0).all()
    logits = logits_of(features[:, 1:], uniform[:, 1:], texts, FSAConfig())
    without = reference.feedback_attention(*logits)
    assert relative_error(feedback[0, 1:, 1:], without[0]) < RELATIVE_ERROR[torch.float32]


TERMS = [
    ("after", "before", "only"),
    ("after", "before"),
    ("before", "only"),
    ("after", "only"),
    ("after",),
    ("before",),
    ("only",),
]


@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "N", "d"), [(21, 20, 5), (1, 1, 16), (40, 33, 40)])
def test_heads_are_gathered_as_a_step_takes_them(L, N, d, dtype, terms):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, L, 3, d, generator=generator).to(dtype).transpose(1, 2)
    attended = torch.randn(2, 3, N, d, generator=generator).to(dtype)
    wanted = {name: name in terms for name in ("after", "before", "only")}
    for given in (value, value.contiguous()):
        gathered, columns = fsa_kernels.gather(
            given.to(DEVICE), attended.to(DEVICE), scale=0.5, **wanted
        )
        exact = torch_backend.gather(value.double(), attended.double(), scale=0.5, **wanted)
        assert gathered.dtype == columns.dtype == dtype
        assert relative_error(gathered.cpu(), exact[0]) < RELATIVE_ERROR[dtype]
        assert relative_error(columns.cpu(), exact[1]) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_proxy_gathers_and_adds_what_a_step_takes(dtype, stored, monkeypatch):
    from fsa_kernels import proxy

    monkeypatch.setattr(proxy, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(proxy, "_BLOCK_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(2, 33, 12, generator=generator) + 0.5).to(dtype)
    value, add = (torch.randn(2, 33, 20, generator=generator).to(dtype) for _ in range(2))
    attended = reference.proxy_attention(features.double(), value.double())
    plain = reference.proxy_attention(features, value)
    allowed = max(RELATIVE_ERROR[dtype], 2 * relative_error(plain, attended))
    state = fsa_kernels.proxy_prepare(features.to(DEVICE), shift=1.2, gain=3.0, stored=stored)
    given = value.to(DEVICE)
    added = fsa_kernels.proxy_apply(state, given, gain=3.0, add=add.to(DEVICE)).cpu()
    assert relative_error(added, attended + add.double()) < allowed
    for terms in TERMS:
        gathered, columns = fsa_kernels.proxy_gather(
            state,
            given,
            gain=3.0,
            scale=0.5,
            **{name: name in terms for name in ("after", "before", "only")},
        )
        assert relative_error(gathered[:, :-1].cpu(), attended) < allowed
        mean = value.double().mean(dim=1)
        assert relative_error(gathered[:, -1].cpu(), mean) < RELATIVE_ERROR[dtype]
        sides = [
            sum(side)
            for side in (
                [attended] * ("after" in terms) + [value.double()] * ("only" in terms),
                [value.double()] * ("before" in terms),
            )
            if side
        ]
        assert relative_error(columns.cpu(), 0.5 * torch.cat(sides, dim=-1)) < allowed


def test_the_sums_of_very_long_rows_come_in_pieces():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2100, 3, generator=generator) + 0.5
    value = torch.randn(1, 2100, 4, generator=generator)
    attended = fsa.proxy_attention(features.to(DEVICE), value.to(DEVICE), backend="triton").cpu()
    exact = reference.proxy_attention(features.double(), value.double())
    assert relative_error(attended, exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("name", hosts.names())
@pytest.mark.parametrize("iterations", [1, 2])
def test_every_host_runs_by_the_kernels(name, iterations):
    (images, text), options = inputs_of(name)
    visual = random_tower().to(DEVICE)
    options = {key: None if x is None else x.to(DEVICE) for key, x in options.items()}
    config = FSAConfig(iterations=iterations)
    by_kernels, by_torch = (
        hosts.build(name, visual, backend=backend).features(
            images.to(DEVICE), text.to(DEVICE), config=config, **options
        )
        for backend in ("triton", "torch")
    )
    assert relative_error(by_kernels, by_torch) < 5e-5
