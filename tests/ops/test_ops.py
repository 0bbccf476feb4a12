"""The public boundary: checks, choice of backend, registration."""

from __future__ import annotations

import pytest
import torch

import fsa
import fsa_kernels
from fsa import FSAConfig, InputError, ops
from fsa.ops import torch_backend

LOGITS = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
VALUE = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
SQUARE = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0],), "patch_logits must be a tensor"),
        ((torch.randn(6, 4),), r"patch_logits must be \(B, N, C\); it has shape \(6, 4\)"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64),), "patch_logits has dtype torch.int64"),
        ((torch.randn(1, 0, 3),), "patch_logits is empty"),
        ((torch.randn(1, 5, 0),), "patch_logits is empty"),
        ((LOGITS, torch.randn(2, 2, 4)), r"uniform_logits has shape \(2, 2, 4\)"),
        ((LOGITS, torch.randn(2, 1, 5)), r"it must be \(2, 1, 4\) or \(2, 6, 4\)"),
        ((LOGITS, torch.randn(1, 1, 4)), "uniform_logits has shape"),
        ((LOGITS, torch.randn(2, 1, 4).double()), "uniform_logits has dtype"),
        ((LOGITS, torch.randn(2, 1, 4, device="meta")), "uniform_logits has device meta"),
        ((LOGITS.clone().fill_(float("nan")),), "patch_logits holds NaN or inf"),
        ((LOGITS.clone().fill_(float("inf")),), "patch_logits holds NaN or inf"),
        ((LOGITS, torch.full((2, 1, 4), float("-inf"))), "uniform_logits holds NaN or inf"),
        ((LOGITS.clone().requires_grad_(),), "no_grad"),
    ],
)
def test_bad_logits_are_refused_in_words(arguments, message):
    with pytest.raises(InputError, match=message):
        fsa.feedback_attention(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": VALUE[0]}, r"value must be \(B, H, N, d\)"),
        ({"feedback": SQUARE[:, :5]}, r"feedback has shape \(2, 5, 6\)"),
        ({"feedback": SQUARE.half()}, "feedback has dtype torch.float16"),
        ({"attention": SQUARE[:1]}, r"attention has shape \(1, 6, 6\)"),
        ({"attention": SQUARE[:, None]}, r"it must be \(2, 3, 6, 6\)"),
        ({"attention": SQUARE[0]}, "attention must be"),
        ({"attention": 3}, "attention must be a tensor, a callable or None, not int"),
        ({"attended": VALUE[..., :2]}, "attended has shape"),
        ({"config": {"beta": 3}}, "config must be an FSAConfig or None, not dict"),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
    ],
)
def test_bad_arguments_of_adapt_are_refused_in_words(changes, message):
    arguments = {"value": VALUE, "feedback": SQUARE, "attention": SQUARE, **changes}
    with pytest.raises(InputError, match=message):
        fsa.adapt(**arguments)


@pytest.mark.parametrize(
    ("features", "value", "message"),
    [
        (torch.randn(1, 5, 3), torch.randn(1, 6, 3), "must agree"),
        (torch.randn(5, 3), torch.randn(1, 5, 3), r"features must be \(B, N, F\)"),
        (torch.randn(1, 5, 3).half(), torch.randn(1, 5, 3), "features has dtype"),
        (torch.full((1, 5, 3), float("nan")), torch.randn(1, 5, 3), "features holds NaN"),
    ],
)
def test_bad_arguments_of_proxy_attention_are_refused_in_words(features, value, message):
    with pytest.raises(InputError, match=message):
        fsa.proxy_attention(features, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_adapt(value):
    def spoilt(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    calls = {
        "feedback": lambda: fsa.adapt(VALUE, spoilt(SQUARE), SQUARE),
        "attention": lambda: fsa.adapt(VALUE, SQUARE, spoilt(SQUARE)),
        "attended": lambda: fsa.adapt(VALUE, SQUARE, SQUARE, attended=spoilt(VALUE)),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match=f"{name} holds NaN or inf"):
            call()
    for attention in (SQUARE, lambda x: x):
        with pytest.raises(InputError, match="value holds NaN or inf"):
            fsa.adapt(spoilt(VALUE), SQUARE, attention)


def test_inputs_that_require_grad_are_taken_under_no_grad():
    logits = LOGITS.clone().requires_grad_()
    with torch.no_grad():
        assert not fsa.feedback_attention(logits).requires_grad


def test_full_confidence_is_no_pruning():
    everything = fsa.feedback_attention(LOGITS, config=FSAConfig(confidence=1.0))
    assert torch.equal(everything, fsa.feedback_attention(LOGITS, config=FSAConfig(pruning=None)))
    assert (everything > 0).all()


def test_explain_says_what_runs_and_why():
    explanation = fsa.explain(LOGITS)
    assert explanation.backend == "torch"
    assert "CPU" in str(explanation)
    assert fsa.explain(LOGITS, backend="torch").reason == "asked for by name"
    assert fsa.explain(device="cpu", dtype=torch.float16).backend == "torch"
    with pytest.raises(InputError, match="not known"):
        fsa.explain(LOGITS, backend="numpy")


def test_triton_on_the_cpu_without_its_interpreter_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(fsa_kernels, "interpreting", lambda: False)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        fsa.feedback_attention(LOGITS, backend="triton")


def test_without_triton_the_reason_is_said_and_torch_works(monkeypatch):
    monkeypatch.setattr(fsa_kernels, "available", lambda: False)
    with pytest.raises(InputError, match="triton is not installed"):
        fsa.feedback_attention(LOGITS, backend="triton")
    assert fsa.feedback_attention(LOGITS).shape == (2, 6, 6)


def test_float64_is_not_for_triton():
    with pytest.raises(InputError, match="float64"):
        fsa.feedback_attention(LOGITS.double(), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_type_asked_for(dtype):
    wide = fsa.feedback_attention(LOGITS, dtype=torch.float64)
    feedback = fsa.feedback_attention(LOGITS, dtype=dtype)
    assert feedback.dtype == dtype
    assert torch.equal(feedback, wide.to(dtype))


def test_a_result_of_no_float_type_is_refused():
    with pytest.raises(InputError, match=r"dtype=torch.int32 is not accepted"):
        fsa.feedback_attention(LOGITS, dtype=torch.int32)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "stored"])
@pytest.mark.parametrize("attention", ["shared", "per head", "callable"])
@pytest.mark.parametrize("adaptations", [("after", "before", "only"), ("only",)], ids="+".join)
def test_a_step_is_both_ops(stream, attention, adaptations, monkeypatch):
    monkeypatch.setattr(torch_backend, "_STRIP_ENTRIES", 4 * 6)
    config = FSAConfig(adaptations=adaptations)
    uniform = torch.randn(2, 1, 4)
    matrix = SQUARE if attention == "shared" else SQUARE[:, None].repeat(1, 3, 1, 1)
    given = (lambda x: matrix @ x) if attention == "callable" else matrix
    step = fsa.feedback_step(VALUE, LOGITS, uniform, given, config=config, stream=stream)
    feedback = fsa.feedback_attention(LOGITS, uniform, config=config)
    both = fsa.adapt(VALUE, feedback, matrix, config=config)
    torch.testing.assert_close(step, both)


def test_a_large_step_streams_by_itself(monkeypatch):
    streamed = []
    apply_feedback = torch_backend.apply_feedback

    def recording(*arguments, **options):
        streamed.append(arguments)
        return apply_feedback(*arguments, **options)

    monkeypatch.setattr(torch_backend, "apply_feedback", recording)
    # Of 2 x 6 x 6 entries.
    monkeypatch.setattr("fsa.ops.functional._STORED_BYTES", 4 * 2 * 6 * 6)
    fsa.feedback_step(VALUE, LOGITS, None, SQUARE)
    assert not streamed
    monkeypatch.setattr("fsa.ops.functional._STORED_BYTES", 4 * 2 * 6 * 6 - 1)
    fsa.feedback_step(VALUE, LOGITS, None, SQUARE)
    assert streamed


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "stored"])
def test_no_attention_is_the_identity(stream):
    step = fsa.feedback_step(VALUE, LOGITS, None, None, stream=stream)
    with_identity = fsa.feedback_step(VALUE, LOGITS, None, lambda x: x, stream=stream)
    torch.testing.assert_close(step, with_identity)


@pytest.mark.parametrize(
    ("value", "logits", "attention", "words"),
    [
        (VALUE, LOGITS[:, :5], SQUARE, "images, patches and device must agree"),
        (VALUE, LOGITS[0], SQUARE, r"patch_logits must be \(B, N, C\)"),
        (VALUE, LOGITS, SQUARE[:, :5], "attention has shape"),
        (VALUE, LOGITS, 3, "attention must be a tensor, a callable or None"),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "stored"])
def test_a_step_refuses_what_does_not_fit(value, logits, attention, words, stream):
    with pytest.raises(InputError, match=words):
        fsa.feedback_step(value, logits, None, attention, stream=stream)


# --------------------------------------------------------------------------------------------------
# Features in place of logits, and ProxyCLIP's attention in a step

TEXTS = torch.nn.functional.normalize(
    torch.randn(5, 4, generator=torch.Generator().manual_seed(3)), dim=-1
)


@pytest.mark.parametrize("rows", [1, 6])
def test_features_and_texts_are_their_logits(rows):
    config = FSAConfig(logit_scale=7.0, uniform_logit_scale=9.0)
    uniform = torch.randn(2, rows, 4)
    unit = torch.nn.functional.normalize
    logits = (7 * unit(LOGITS, dim=-1) @ TEXTS.T, 9 * unit(uniform, dim=-1) @ TEXTS.T)
    feedback = fsa.feedback_attention(LOGITS, uniform, text_features=TEXTS, config=config)
    torch.testing.assert_close(feedback, fsa.feedback_attention(*logits, config=config))
    for stream in (True, False):
        step = fsa.feedback_step(
            VALUE, LOGITS, uniform, SQUARE, text_features=TEXTS, config=config, stream=stream
        )
        expected = fsa.feedback_step(VALUE, *logits, SQUARE, config=config)
        torch.testing.assert_close(step, expected)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (TEXTS[:, :3], r"text_features has shape \(5, 3\)"),
        (TEXTS[0], r"text_features must be \(C, E\)"),
        (TEXTS.to("meta"), "width and device must agree"),
        (TEXTS * float("nan"), "text_features holds NaN"),
        ([1.0], "text_features must be a tensor"),
    ],
)
def test_bad_texts_are_refused_in_words(texts, message):
    with pytest.raises(InputError, match=message):
        fsa.feedback_attention(LOGITS, text_features=texts)


def test_a_prepared_proxy_attention_is_applied_again_and_again():
    values = [torch.randn(2, 6, width) for width in (5, 8)]
    attention = fsa.ProxyAttention(LOGITS, shift=1.1, gain=2.0)
    for value in values:
        expected = fsa.proxy_attention(LOGITS, value, shift=1.1, gain=2.0)
        assert torch.equal(attention(value), expected)
        assert torch.equal(attention(value, add=value), expected + value)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "by blocks"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "adaptations", [("after", "before", "only"), ("before",), ("after", "only")], ids="+".join
)
def test_a_step_of_the_proxy_is_a_step_with_its_attention(
    adaptations, backend, stored, monkeypatch
):
    monkeypatch.setattr("fsa.ops.steps._STORED_BYTES", 1 << 29 if stored else 0)
    config = FSAConfig(adaptations=adaptations)
    attention = fsa.ProxyAttention(LOGITS, backend=backend)
    step = ops.ProxyStep(attention, VALUE, config)
    assert step.gathered.shape == (2, 3, 7, 5)
    torch.testing.assert_close(step.gathered[:, :, :-1], step(VALUE))
    torch.testing.assert_close(step.gathered[:, :, -1], VALUE.mean(dim=2))
    adapted = fsa.feedback_step(
        VALUE, LOGITS, None, None, step=step, config=config, backend=backend
    )
    expected = fsa.feedback_step(VALUE, LOGITS, None, lambda x: step(x), config=config)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
