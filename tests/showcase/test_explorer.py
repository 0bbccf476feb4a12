"""`fsa explore`: what the page is given, and in a browser what it computes and how it answers."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from fsa import FSAConfig, hosts, load_segmentor, reference, tiny
from fsa.errors import InputError
from fsa.showcase.explorer import explore, gathering, packing
from fsa.showcase.explorer.page import page
from tests.support.browser import Browser, find_browser

SCENE = tiny.demo_scenes()[2]
# 6 x 6 patches, with padding: the picture is no multiple of a patch high.
SMALL = {"short_side": 90, "window": 90, "stride": 45}
COMBINATIONS = [
    {"similarity": similarity, "pruning": pruning, "scaling": scaling, "isolation": isolation}
    for similarity, pruning, scaling, isolation in product(
        ("kl", "cosine"), ("confidence", "ratio", "threshold", None), (True, False), (True, False)
    )
]


@pytest.fixture(scope="module")
def segmentor():
    return load_segmentor("sclip", device="cpu")


@pytest.fixture(scope="module")
def data(segmentor):
    return gathering.gathered(segmentor, SCENE.picture, SCENE.classes, None, SMALL)


@pytest.fixture(scope="module")
def large_page(segmentor, tmp_path_factory):
    file = tmp_path_factory.mktemp("large") / "explore.html"
    sizes = {"window": 336, "stride": 336, "short_side": 336}
    return segmentor.explore(SCENE.picture, SCENE.classes, file, **sizes)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here that the page could be opened in")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def float32(text):
    return np.frombuffer(base64.b64decode(text), "<f4").copy()


def embedded(text):
    """What a page was given, back from its text."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def logits_of(data, isolation=True):
    """Patch and uniform logits in float64 as the definition takes them, from the page's data."""
    count, config = len(data["queries"]), data["config"]
    patches, uniform = (
        torch.from_numpy(float32(data[name]["values"]).reshape(1, -1, count)).double() * scale
        for name, scale in (
            ("cosines", config["logit_scale"]),
            ("uniformCosines", config["uniform_logit_scale"]),
        )
    )
    return patches, uniform if isolation else None


# ---- The file, without a browser


def test_the_command_writes_a_page(run, tmp_path):
    file = tmp_path / "new" / "explore.html"
    options = ["--short-side", "90", "--confidence", "0.3", "--beta", "2", "--patch", "0,0"]
    code, stdout, stderr = run(
        "explore", SCENE.picture, "--classes", "skull; grass, lawn", *options, "--out", file
    )
    assert (code, stderr) == (0, "")
    assert f"wrote {file} (" in stdout
    data = embedded(file.read_text(encoding="utf-8"))
    assert (data["config"]["confidence"], data["config"]["beta"]) == (0.3, 2)
    assert [query["name"] for query in data["queries"]] == ["skull", "grass", "lawn"]
    assert [query["class"] for query in data["queries"]] == [0, 1, 1]
    assert data["patch"] == 0


def test_a_page_of_441_patches_holds_all_it_needs_in_4_megabytes(large_page):
    text = large_page.read_text(encoding="utf-8")
    data = embedded(text)
    assert data["grid"] == [21, 21]
    assert large_page.stat().st_size < 4e6
    for elsewhere in ("http:", "https:", "url(", "@import", "<link", " src=", " href="):
        assert elsewhere not in text.lower()
    assert "default-src 'none'" in text
    # The same with the longest of the published class lists.
    cosines = np.random.default_rng(0).normal(0.2, 0.02, (441, 847)).astype(np.float32)
    packed = packing.packed_cosines(cosines, cosines.size <= gathering._EXACT_PREDICTIONS)
    large = {**data, "cosines": packed, "uniformCosines": packed}
    large["adaptedPredictions"] = packing.packed_rows(gathering._softmax(40 * cosines), False)
    large["queries"] *= 121
    large["classes"] *= 121
    assert len(page(large).encode()) < 4e6


def test_no_name_ends_the_script_or_opens_another(segmentor, tmp_path):
    name = "</script><script>alert(1)</script><!--"
    picture = tmp_path / "<b>&picture.png"
    Image.new("RGB", (40, 30), "green").save(picture)
    file = explore(segmentor, picture, [name, "{{script}}"], tmp_path / "explore.html", **SMALL)
    text = file.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2
    assert "<title>&lt;b&gt;&amp;picture: feedback" in text
    assert [c["name"] for c in embedded(text)["classes"]] == [name, "{{script}}"]


@pytest.mark.parametrize("host", hosts.names())
@pytest.mark.parametrize("isolation", [True, False])
def test_the_page_is_given_what_the_segmentor_computes_with(segmentor, host, isolation):
    config = FSAConfig(isolation=isolation, adaptations=("after", "before"))
    segmentor = segmentor.with_host(host).with_feedback(config)
    sizes = {"short_side": 120, "window": 96, "stride": 48}
    data = gathering.gathered(segmentor, SCENE.picture, SCENE.classes, (3, 6), sizes)
    seen = segmentor.attentions_at(SCENE.picture, SCENE.classes, (3, 6), **sizes)
    assert tuple(data["grid"]) == seen.host.shape
    assert data["patch"] == seen.patch[0] * data["grid"][1] + seen.patch[1]
    feedback = reference.feedback_attention(*logits_of(data, isolation), config)[0]
    # As near as two ways to round the same cosines to float32 are.
    np.testing.assert_allclose(feedback[data["patch"]], seen.feedback.ravel(), atol=1e-5)
    # Isolation can be switched on in the page in either case.
    assert data["uniformCosines"]["rows"] in (1, feedback.shape[0])


def test_without_feedback_there_is_nothing_to_explore(segmentor, tmp_path):
    with pytest.raises(InputError, match="no feedback"):
        segmentor.with_feedback(False).explore(SCENE.picture, ["a"], tmp_path / "explore.html")


def test_what_is_too_large_for_a_page_is_refused(segmentor, tmp_path, monkeypatch):
    file = tmp_path / "explore.html"
    with pytest.raises(InputError, match="43 x 43 = 1849 patches is too large"):
        segmentor.explore(SCENE.picture, ["a"], file, window=688, short_side=688)
    monkeypatch.setattr(gathering, "_MAX_PREDICTIONS", 100)
    with pytest.raises(InputError, match=r"3 class names .* takes at most 2"):
        segmentor.explore(SCENE.picture, ["a", "b", "c"], file, **SMALL)
    with pytest.raises(InputError, match=r"must end in \.html"):
        segmentor.explore(SCENE.picture, ["a"], tmp_path / "explore.png")
    assert not file.exists()


def test_labels_come_back_from_their_runs():
    generator = np.random.default_rng(0)
    for labels in (
        np.zeros((300, 200), np.int32),
        np.full((1, 1), 846),
        generator.integers(0, 300, (7, 5)),
        np.repeat(generator.integers(0, 3, (40, 1)), 500, axis=1),
    ):
        numbers, value, shift = [], 0, 0
        for byte in base64.b64decode(packing.run_lengths(labels)):
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                numbers.append(value)
                value, shift = 0, 0
        np.testing.assert_array_equal(np.repeat(numbers[::2], numbers[1::2]), labels.ravel())


def test_a_small_map_has_the_labels_of_the_large_one():
    labels = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 5, axis=0), 5, axis=1)
    np.testing.assert_array_equal(gathering._shrunk(labels, (4, 3)), np.arange(12).reshape(3, 4))


# ---- The page in a browser


def rows_of(browser, requests):
    """What the page computes for [(patch, changed settings)]: A_f, what is kept, the adapted."""
    wanted = json.dumps([{"patch": patch, "changes": changes} for patch, changes in requests])
    return browser.evaluate(
        f"""{wanted}.map(({{ patch, changes }}) => {{
            const asked = {{ ...computedSettings(), ...changes }};
            const found = feedbackRows.at(patch, asked);
            feedbackRows.fill(asked, Infinity);
            const adapted = adaptedRow(patch, found.row, asked);
            return [found.row, found.kept, adapted].map((row) => Array.from(row));
        }})"""
    )


def show(browser, file, **options):
    """Opens a page and waits until it has drawn the first patch."""
    browser.open(file, **options)
    browser.evaluate(
        """new Promise((done) => {
            const look = () => {
                if (document.getElementById("text-adapted").textContent) done();
                else setTimeout(look, 10);
            };
            look();
        })"""
    )


def opened(browser, tmp_path, data, **options):
    file = tmp_path / "explore.html"
    file.write_text(page(data), encoding="utf-8")
    show(browser, file, **options)
    return file


def text_of(browser, name):
    return browser.evaluate(f"document.getElementById({name!r}).textContent")


def settled(browser):
    browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    return text_of(browser, "status")


def test_the_page_computes_feedback_by_its_definition(browser, segmentor, data, tmp_path):
    opened(browser, tmp_path, data)
    window = segmentor.window_attentions(SCENE.picture, SCENE.classes, **SMALL)
    attention = window.attentions.host[0].double()
    values = [
        {"confidence": 0.45, "ratio": 0.4, "threshold": 0.5, "beta": 3},
        {"confidence": 0.07, "ratio": 0.01, "threshold": 0.9, "beta": 0},
        {"confidence": 1, "ratio": 1, "threshold": 0, "beta": 80},
    ]
    for numbers in values:
        changes = [{**combination, **numbers} for combination in COMBINATIONS]
        patches = range(0, len(attention), 5)
        requests = list(product(patches, changes))
        answers = iter(rows_of(browser, requests))
        expected = {}
        for number, change in enumerate(changes):
            config = FSAConfig(**change)
            patch_logits, uniform = logits_of(data, config.isolation)
            A_f = reference.feedback_attention(patch_logits, uniform, config)[0]
            P = reference.isolated_probabilities(patch_logits, uniform)
            kept = reference.kept_patches(reference.similarity(P, config), config)[0]
            expected[number] = A_f, kept, (A_f @ attention + attention @ A_f + A_f) / 3
        for patch in patches:
            for number, change in enumerate(changes):
                for name, row, whole in zip(
                    ("A_f", "kept", "adapted"), next(answers), expected[number], strict=True
                ):
                    np.testing.assert_allclose(
                        row, whole[patch], atol=1e-4, err_msg=f"{name} {patch} {change}"
                    )
    assert browser.complaints == []


def test_the_page_computes_a_window_of_441_patches(browser, large_page):
    show(browser, large_page)
    patches = (0, 200, 440)
    answers = rows_of(browser, [(patch, {}) for patch in patches])
    logits = logits_of(embedded(large_page.read_text(encoding="utf-8")))
    expected = reference.feedback_attention(*logits)[0]
    for patch, (row, _, _) in zip(patches, answers, strict=True):
        np.testing.assert_allclose(row, expected[patch], atol=1e-6)


@pytest.mark.parametrize("adaptations", [("after",), ("before",), ("only", "before")])
def test_the_page_averages_the_adaptations_that_are_chosen(
    browser, segmentor, data, tmp_path, adaptations
):
    opened(browser, tmp_path, data)
    config = FSAConfig(adaptations=adaptations)
    window = segmentor.window_attentions(SCENE.picture, SCENE.classes, **SMALL)
    attention = window.attentions.host[0].double()
    A_f = reference.feedback_attention(*logits_of(data), config)[0]
    forms = {"after": A_f @ attention, "before": attention @ A_f, "only": A_f}
    expected = sum(forms[name] for name in adaptations) / len(adaptations)
    for patch, (_, _, adapted) in zip(
        (0, 7, 35),
        rows_of(browser, [(p, {"adaptations": adaptations}) for p in (0, 7, 35)]),
        strict=True,
    ):
        np.testing.assert_allclose(adapted, expected[patch], atol=1e-4)


@pytest.mark.parametrize("pruning", ["confidence", "ratio", "threshold"])
def test_the_page_keeps_the_lowest_of_equal_patches(browser, data, tmp_path, pruning):
    count, patches = len(data["queries"]), data["grid"][0] * data["grid"][1]
    # Three kinds of patches, so that the cut falls between equal ones.
    kinds = np.random.default_rng(1).normal(0, 0.1, (3, count))
    cosines = kinds[np.arange(patches) % 3].astype(np.float32)
    uniform = np.zeros((1, count), np.float32)
    equal = {
        **data,
        "cosines": packing.packed_cosines(cosines, True),
        "uniformCosines": packing.packed_cosines(uniform, True),
    }
    opened(browser, tmp_path, equal)
    for similarity in ("kl", "cosine"):
        changes = {"pruning": pruning, "similarity": similarity, "confidence": 0.5, "ratio": 0.6}
        config = FSAConfig(**changes)
        P = reference.isolated_probabilities(*logits_of(equal))
        S = reference.similarity(P, config)
        # The reference's sums may differ in their last bits between equal patches.
        kept = reference.kept_patches(S.round(decimals=12), config)[0].numpy()
        asked = (0, 1, 2, patches - 1)
        answers = rows_of(browser, [(patch, changes) for patch in asked])
        for patch, answer in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(answer[1], kept[patch], err_msg=f"{similarity} {patch}")


def test_what_is_stored_in_fewer_bits_is_near(browser, segmentor, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "_EXACT_PREDICTIONS", 0)
    monkeypatch.setattr(gathering, "_EXACT_PATCHES", 0)
    data = gathering.gathered(segmentor, SCENE.picture, SCENE.classes, None, SMALL)
    opened(browser, tmp_path, data)
    seen = segmentor.window_attentions(SCENE.picture, SCENE.classes, **SMALL).attentions
    cosines = gathering._cosines(seen.host_features, segmentor.encode(SCENE.classes).features)
    for name, expected, error in (
        ("cosines", cosines, 1e-5),
        ("attention", seen.host[0].numpy(), 0.01 * float(seen.host.max())),
    ):
        np.testing.assert_allclose(
            browser.evaluate(f"Array.from({name})"), expected.ravel(), atol=error
        )
    assert "to within 1% of" in text_of(browser, "notes")
    assert "65,536 steps" in text_of(browser, "notes")


def test_the_page_shows_the_labels_that_were_computed(browser, segmentor, data, tmp_path):
    opened(browser, tmp_path, data)
    for name, config in (("without", False), ("with", True)):
        result = segmentor.with_feedback(config).segment(SCENE.picture, SCENE.classes, **SMALL)
        shown = browser.evaluate(f"Array.from(labels.{name})")
        size = data["picture"]["width"], data["picture"]["height"]
        np.testing.assert_array_equal(shown, gathering._shrunk(result.labels, size).ravel())
        areas = result.areas()
        for shares in data["classes"]:
            assert shares[name] == pytest.approx(areas[shares["name"]])


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser, data, tmp_path):
    file = opened(browser, tmp_path, data, fragment="#patch=1,2&pruning=ratio&ratio=0.25")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [file.as_uri()]
    # The address holds the patch and the settings.
    assert text_of(browser, "text-kept") == f"{36 // 4} of 36"
    assert text_of(browser, "status").startswith("Row 1, column 2:")


@pytest.mark.parametrize("fragment", ["#patch=99,99&beta=inf&pruning=all&similarity", "#%", "#a"])
def test_an_address_that_means_nothing_is_passed_over(browser, data, tmp_path, fragment):
    opened(browser, tmp_path, data, fragment=fragment)
    assert browser.complaints == []
    assert browser.evaluate("settings.pruning") == "confidence"
    assert text_of(browser, "status").startswith("Row 2, column 3:")


def test_the_keyboard_moves_the_patch_and_reaches_every_control(browser, data, tmp_path):
    opened(browser, tmp_path, data)
    reached = []
    for _ in range(13):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.name"))
    assert reached[:3] == ["divider", "tint", "maps"]
    # Of radio buttons, the tabulator reaches the chosen one.
    assert reached[3:-1] == [
        *("pruning", "confidence", "similarity", "isolation", "scaling", "beta"),
        *("after", "before", "only"),
    ]
    browser.evaluate("document.getElementById('maps').focus()")
    for key, place in (
        ("ArrowRight", "Row 2, column 4"),
        ("ArrowUp", "Row 1, column 4"),
        ("End", "Row 1, column 5"),
        ("ArrowRight", "Row 1, column 5"),
        ("ArrowLeft", "Row 1, column 4"),
    ):
        browser.press(key)
        assert settled(browser).startswith(f"{place}:"), key
    assert browser.evaluate("location.hash") == "#patch=1,4"
    style = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"


def frame_of(browser, name):
    """Left, top, width and height of a canvas in the viewport."""
    return browser.evaluate(
        f"""(() => {{
            const canvas = document.getElementById({name!r});
            canvas.scrollIntoView({{ block: "center" }});
            const frame = canvas.getBoundingClientRect();
            return [frame.left, frame.top, frame.width, frame.height];
        }})()"""
    )


def middle_of(browser, name, row, column):
    """Where a patch of the 6 x 6 of a map lies in the viewport."""
    left, top, width, height = frame_of(browser, name)
    return left + (column + 0.5) * width / 6, top + (row + 0.5) * height / 6


def test_the_mouse_looks_at_a_patch_and_a_click_stays_there(browser, data, tmp_path):
    opened(browser, tmp_path, data)
    at = middle_of(browser, "map-feedback", 1, 4)
    browser.mouse("mouseMoved", *at)
    assert settled(browser).startswith("Row 1, column 4:")
    browser.mouse("mouseMoved", 2, 2)
    assert settled(browser).startswith("Row 2, column 3:")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, *at)
    browser.mouse("mouseMoved", 2, 2)
    assert settled(browser).startswith("Row 1, column 4:")
    assert browser.complaints == []


def test_the_picture_tells_its_labels_and_chooses_patches(browser, segmentor, data, tmp_path):
    opened(browser, tmp_path, data)
    left, top, width, height = frame_of(browser, "picture")
    window, size = data["window"], data["size"]

    def point_at(row, column):
        """The middle of a patch of the window."""
        y = (window["top"] + (row + 0.5) * window["height"] / 6) / size[0]
        x = (window["left"] + (column + 0.5) * window["width"] / 6) / size[1]
        return x, y, (left + x * width, top + y * height)

    without, with_feedback = (
        segmentor.with_feedback(config).segment(SCENE.picture, SCENE.classes, **SMALL).labels
        for config in (False, True)
    )
    said = set()
    for row, column in product(range(1, 5), (0, 1, 4, 5)):
        x, y, at = point_at(row, column)
        browser.mouse("mouseMoved", *at)
        place = int(y * len(without)), int(x * len(without[0]))
        before, after = (SCENE.classes[labels[place]] for labels in (without, with_feedback))
        text = text_of(browser, "pixel")
        assert before in text, (row, column)
        assert after in text, (row, column)
        said.add(text)
    assert len(said) > 2
    # In the middle of a patch a click chooses it; on the divider it is taken along.
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, *point_at(4, 1)[2])
    assert settled(browser).startswith("Row 4, column 1:")
    at = left + width / 2, top + height / 2
    for kind, right in (
        ("mousePressed", 0),
        ("mouseMoved", width / 4),
        ("mouseReleased", width / 4),
    ):
        browser.mouse(kind, at[0] + right, at[1])
    assert abs(float(browser.evaluate("document.getElementById('divider').value")) - 75) <= 1
    assert settled(browser).startswith("Row 4, column 1:")
    assert browser.complaints == []


def test_a_finger_chooses_a_patch_on_a_page_no_wider_than_a_phone(browser, data, tmp_path):
    opened(browser, tmp_path, data, size=(390, 844), touch=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    browser.tap(*middle_of(browser, "map-kept", 4, 0))
    assert settled(browser).startswith("Row 4, column 0:")


def test_the_controls_answer_and_can_be_taken_back(browser, data, tmp_path):
    opened(browser, tmp_path, data)
    before = text_of(browser, "text-kept")
    assert browser.evaluate("document.getElementById('reset').disabled")

    def change(name, **values):
        assigned = "".join(f"control.{k} = {json.dumps(v)};" for k, v in values.items())
        browser.evaluate(
            f"""(() => {{
                const control = document.querySelector({name!r});
                {assigned}
                control.dispatchEvent(new Event("input", {{ bubbles: true }}));
            }})()"""
        )
        settled(browser)

    change("[name=confidence]", value="0.2")
    fewer = int(text_of(browser, "text-kept").split()[0])
    assert fewer < int(before.split()[0])
    assert browser.evaluate("document.getElementById('labels-note').className") == "note differs"
    change("[name=pruning][value=none]", checked=True)
    assert text_of(browser, "text-kept") == "36 of 36"
    change("[name=after]", checked=False)
    change("[name=before]", checked=False)
    # The last adaptation cannot be taken away.
    assert browser.evaluate("document.querySelector('[name=only]').disabled")
    browser.evaluate("document.getElementById('reset').click()")
    settled(browser)
    assert text_of(browser, "text-kept") == before
    assert browser.evaluate("document.getElementById('reset').disabled")
    assert browser.evaluate("location.hash") == "#patch=2,3"
    assert browser.complaints == []


def test_settings_beyond_the_sliders_are_kept_as_they_were_computed(browser, data, tmp_path):
    config = replace(FSAConfig(), beta=40.25, confidence=0.4275)
    changed = {**data, "config": {**config.to_dict()}}
    opened(browser, tmp_path, changed)
    assert browser.evaluate("settings.confidence") == 0.4275
    assert browser.evaluate("document.querySelector('[name=beta-value]').textContent") == "40.25"
    assert browser.evaluate("document.getElementById('reset').disabled")


@pytest.mark.parametrize("size", [(3000, 2), (1, 1), (2, 90)])
def test_pictures_of_any_shape_make_a_page(segmentor, tmp_path, browser, size):
    picture = tmp_path / "thin.png"
    Image.new("RGB", size, "green").save(picture)
    sizes = {"short_side": 16, "window": 64, "stride": 64}
    file = segmentor.explore(picture, ["cat", "dog"], tmp_path / "explore.html", **sizes)
    show(browser, file)
    assert browser.complaints == []
    assert browser.evaluate("document.getElementById('picture').clientHeight") < 700
