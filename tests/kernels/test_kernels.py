"""The Triton kernels against the definition: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig, hosts, reference
from fsa.ops.library import op_options
from tests.support.accuracy import (
    RELATIVE_ERROR,
    relative_error,
    segment_logits,
)
from tests.support.forms import FORMS, form_id
from tests.support.towers import inputs_of, random_tower

if not fsa_kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0, 4.5, 5.7, 8.0])
def test_the_error_grows_with_beta_no_faster_than_is_said(beta):
    # Predictions so alike that most similarities lie near 1, where the scaling is steepest.
    logits, uniform = (0.15 * tensor.float() for tensor in segment_logits(40, 21))
    config = FSAConfig(beta=beta)
    exact = reference.feedback_attention(logits.double(), uniform.double(), config)
    allowed = 2e-6 + 2e-7 * math.exp(beta) * (1 + beta)
    assert relative_error(attention_of(logits, uniform, config), exact) < allowed


@pytest.mark.parametrize("broken", [[0], [15], [0, 15]], ids=str)
def test_patches_that_the_centre_is_taken_from_may_be_broken(broken):
    # Patches 0 and N // 2 are.
    logits, _ = segment_logits(30, 5)
    given = logits.float().clone()
    given[0, broken, 1] = math.nan
    feedback = fsa_kernels.feedback_attention(
        given.to(DEVICE), None, options=op_options(FSAConfig()), dtype=torch.float32
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
    h = torch.zeros(1, N, device=DEVICE)
    return select.select(S.to(DEVICE), h, 0, op_options(config), dtype)[0].cpu()


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
@pytest.mark.slow
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
    options = fsa_kernels.Options(beta=3.0, confidence=0.45)
    inputs = [tensor.to(DEVICE) for tensor in (logits, uniform)]
    applied = fsa_kernels.apply_feedback(*inputs, None, columns.to(DEVICE), options=options)
    whole = fsa_kernels.feedback_attention(*inputs, options=options, dtype=dtype)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_the_affinity_give_what_the_stored_matrix_gives(dtype, monkeypatch):
    from fsa_kernels import proxy

    monkeypatch.setattr(proxy, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(proxy, "_BLOCK_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    # Three blocks of rows; the last holds one patch, and the uniform row.
    features = (torch.randn(2, 33, 12, generator=generator) + 0.5).to(DEVICE, dtype)
    value, add = (torch.randn(2, 33, 20, generator=generator).to(DEVICE, dtype) for _ in range(2))

    def results(stored):
        state = fsa_kernels.proxy_prepare(features, shift=1.2, gain=3.0, stored=stored)
        added = fsa_kernels.proxy_apply(state, value, gain=3.0, add=add)
        return added, *fsa_kernels.proxy_gather(state, value, fsa_kernels.Adaptations(), gain=3.0)

    for streamed, stored in zip(results(False), results(True), strict=True):
        assert relative_error(streamed, stored) < RELATIVE_ERROR[dtype]


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
