"""Reports of evaluations: what is written, what is left out, what is refused, and how cards take it."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import build_class_pipeline

from llamagen_hf.evaluation.report import REPORT, REPORT_FILES, model_index_results, read_report, write_report
from llamagen_hf.evaluation.report.html import Point, plot, tick_texts, ticks
from llamagen_hf.evaluation.report.results import METRICS
from llamagen_hf.publishing.cards import write_card
from llamagen_hf.publishing.publications import open_publication


CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
EVIL = 'a | <script>alert(1)</script> "quoted" <img src=x onerror=alert(2)> & `code` [a](http://x.org) $y$'
RESULTS = {
    "checkpoint": "user/model",
    "revision": "8b1c0de",
    "preset": "imagenet256_paper",
    "count": 50_000,
    "image_size": [256, 256],
    "sampling": {"guidance_scale": 2.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "seed": 12345},
    "reference": {"name": "VIRTUAL_imagenet256_labeled", "count": 10_000, "caveats": ["Of the training set."]},
    "metrics": {"fid": 3.3941234, "precision": 0.82911, "recall": 0.54, "kid": 0.000512, "kid_std": 0.0002},
    "sweep": [
        {"guidance_scale": 1.5, "fid": 5.1, "inception_score": 184.6, "precision": 0.76, "recall": 0.62},
        {"guidance_scale": 1.0, "fid": 14.6, "inception_score": 86.9, "precision": 0.61, "recall": 0.67},
        {"guidance_scale": 2.0, "fid": 3.39, "inception_score": 257.1, "precision": 0.83, "recall": 0.54},
    ],
    "scores": [{"name": f"class {i}", "score": float(i)} for i in range(20)] + [{"name": EVIL, "score": 99.0}],
    "score_metric": "clip_score",
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "date": "2026-03-01",
}


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:  # elements without an end, such as img
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def flat_image(color="red", size=(300, 200)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with everything in it."""
    root = tmp_path_factory.mktemp("report")
    notes = PngInfo()
    notes.add_text("parameters", "from the secret folder")
    flat_image("blue").save(root / "sample.png", pnginfo=notes)
    images = {EVIL: [flat_image()] * 9, "class 0": [root / "sample.png"]}
    samples = [(flat_image(), EVIL), (root / "sample.png", ""), (flat_image("green", (16, 16)), "a fish")]
    write_report(root / "evaluation", RESULTS, samples, images)
    return root / "evaluation"


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_json_round_trip(folder):
    assert read_report(folder / "report.json") == RESULTS
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(name).name for name in REPORT_FILES)


def test_the_page_holds_the_numbers(page):
    for text in (
        "FID ↓ (lower is better) 3.39", "Precision ↑ (higher is better) 0.829",
        "KID × 10³ ↓ (lower is better) 0.51 ± 0.20",
        "50,000 images of 256 × 256 pixels, compared with the 10,000 of VIRTUAL_imagenet256_labeled.",
        "Of the training set.", "seed 12345", "top-k 0", "torch 2.13.0", "Best: 3.39 at a guidance scale of 2.",
    ):  # fmt: skip
        assert text in page.text


def test_the_page_needs_nothing_from_elsewhere(page, folder):
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        if source := attributes.get("src") or attributes.get("srcset"):
            assert source.startswith("data:image/webp;base64,")
        if tag == "a":
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", attributes["href"])
        else:
            assert "href" not in attributes
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html and "@import" not in html
    assert page.of("meta")[3]["content"].startswith("default-src 'none'")
    assert {"light dark"} < {attributes.get("content") for attributes in page.of("meta")}


def test_prompts_are_text_on_the_page(page):
    assert EVIL in page.text
    assert [attributes["alt"] for attributes in page.of("img")].count(EVIL) == 1 + 4  # the sheet's, and four at most


def test_images_are_small_and_say_nothing_of_their_files(page):
    sizes = []
    for attributes in page.of("img"):
        content = base64.b64decode(attributes["src"].partition(",")[2])
        assert b"secret" not in content
        with Image.open(io.BytesIO(content)) as image:
            sizes.append(image.size)
            colors = np.asarray(image).reshape(-1, 3).mean(axis=0)
    assert set(sizes) == {(256, 171), (16, 16)}
    assert sizes[-1] == (16, 16) and np.allclose(colors, (0, 128, 0))  # small ones are kept exactly


def test_best_and_worst_follow_the_metrics_direction(tmp_path):
    scores = [{"name": f"class {i}", "score": float(i)} for i in range(20)]
    for name, expected in (("clip_score", ["class 19", "class 0"]), ("fid", ["class 0", "class 19"])):
        write_report(tmp_path, {"metrics": {"fid": 1.0}, "scores": scores, "score_metric": name})
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        best, worst = text.split("## Best")[1].split("## Worst")
        assert [re.findall(r"class \d+", part)[0] for part in (best, worst)] == expected
    write_report(tmp_path, {"metrics": {"fid": 1.0}, "scores": scores[:3]})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert len(re.findall(r"class \d", text)) == 2  # none is both
    write_report(tmp_path, {"metrics": {"fid": 1.0}, "scores": scores[:1]})
    assert "Best" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_markdown_tables(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [token.content for token in tokens if token.type == "inline"]
    for cell in (
        "FID ↓",
        "3.39",
        "0.51 ± 0.20",
        "guidance",
        "14.60",
        "imagenet256_paper",
        "VIRTUAL_imagenet256_labeled",
    ):
        assert cell in cells
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert not {tag for tag, _ in Page(html).elements} & {"script", "img", "a", "code"}
    assert EVIL in Page(html.replace("\\$", "$")).text  # GitHub takes the escaped dollar for a dollar
    rows = [line for line in text.splitlines() if line.startswith("| 1")]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 1.5"]  # sorted by guidance


@pytest.mark.parametrize("left_out", [name for name in RESULTS if name != "metrics"])
def test_missing_parts_are_left_out(left_out, tmp_path):
    write_report(tmp_path, {name: value for name, value in RESULTS.items() if name != left_out})
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "None" not in text and "undefined" not in text.lower()


def test_metrics_alone_make_a_report(tmp_path):
    page = Page(
        write_report(tmp_path / "a" / "b", {"metrics": {"emoji_distance": 1.23456}}).read_text(encoding="utf-8")
    )
    assert "emoji distance 1.235" in page.text
    for heading in ("Guidance", "Settings", "Samples", "Best", "Before you compare", "What the numbers mean"):
        assert heading not in page.text
    assert not page.of("img") and not page.of("svg")


def test_a_sweep_without_some_numbers(tmp_path):
    sweep = [{"guidance_scale": 1.0, "fid": 4.0}, {"guidance_scale": 2.0, "fid": 3.0, "kid": 0.001, "kid_std": 0.0001}]
    write_report(tmp_path, {"metrics": {"fid": 3.0}, "sweep": sweep})
    assert "| 2 | 3.00 | 1.00 ± 0.10 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [attributes["aria-label"] for attributes in page.of("svg")] == ["FID against guidance scale"]
    write_report(tmp_path, {"metrics": {"fid": 3.0}, "sweep": sweep[:1]})  # a point is no plot
    assert not Page((tmp_path / "report.html").read_text(encoding="utf-8")).of("svg")


def test_few_images_come_with_a_caveat(tmp_path):
    for count, is_said in ((5_000, True), (50_000, False)):
        write_report(tmp_path, {"metrics": {"fid": 3.0}, "count": count})
        for name in ("report.md", "report.html"):
            assert ("1911.07023" in (tmp_path / name).read_text(encoding="utf-8")) == is_said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": {"fid": math.nan}}, r"results\['metrics'\]\['fid'\] is nan; a report takes finite numbers only"),
        ({"metrics": {"fid": 1.0, "kid_std": math.inf}}, r"\['kid_std'\] is inf"),
        ({"sweep": [{"guidance_scale": 1.0, "fid": -math.inf}]}, r"\['sweep'\]\[0\]\['fid'\] is -inf"),
        ({"scores": [{"name": "a", "score": math.nan}]}, r"\['scores'\]\[0\]\['score'\] is nan"),
        ({"sampling": {"temperature": math.nan}}, r"\['temperature'\] is nan"),
        ({"metrics": {}}, "hold no metrics"),
        ({"metrics": {"fid": "3.2"}}, "is '3.2'; expected a number"),
        ({"metrics": {"fid": True}}, "is True; expected a number"),
        ({"metrics": {"fid": np.float32(3)}}, "is of type float32; a report takes plain JSON only"),
        ({"sampling": {1: 2}}, "has the key 1"),
        ({"sweep": [{"fid": 1.0}]}, "expected a dict with guidance_scale"),
        ({"scores": [{"name": "a"}]}, "expected a dict with name and score"),
        ({"count": "many"}, r"results\['count'\] is 'many'; expected a number"),
        ({"reference": {"count": "many"}}, r"results\['reference'\]\['count'\] is 'many'"),
        ({"reference": "imagenet"}, r"results\['reference'\] is 'imagenet'; expected a dict"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_and_the_report_before_stays(change, message, tmp_path):
    write_report(tmp_path, RESULTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, RESULTS | change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cut\.png' can't be read"):
        write_report(tmp_path / "evaluation", RESULTS, [(tmp_path / "cut.png", "")])
    assert not (tmp_path / "evaluation").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="The report can't be written to"):
        write_report(tmp_path / "file", RESULTS)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_path_of_this_machine(tmp_path):
    home = Path.home()
    results = RESULTS | {
        "checkpoint": str(tmp_path / "runs" / "own"),
        "reference": {"name": str(tmp_path / "refs" / "batch.npz"), "caveats": [f"Read from {tmp_path}/refs/b.npz."]},
        "sampling": {"weights": str(home / "weights.pt"), "file": "../up/inception.pt", "ratio": "1/2"},
        "scores": [{"name": f"{tmp_path}/classes/{i}", "score": 1.0 * i} for i in range(4)],
        "versions": {"torch": "2.13.0+cpu"},
    }
    images = {f"{tmp_path}/classes/0": [flat_image()]}
    write_report(tmp_path / "evaluation", results, [(flat_image(), f"{tmp_path}/x/drawn.png")], images)
    for name in ("report.json", "report.md", "report.html"):
        text = re.sub(r"base64,[\w+/=]*", "", (tmp_path / "evaluation" / name).read_text(encoding="utf-8"))
        for place in (str(tmp_path), str(Path.cwd()), "/weights.pt", "up/inception.pt"):
            assert place not in text
        assert "batch.npz" in text and "weights.pt" in text and "1/2" in text and "Read from b.npz." in text
    page = Page((tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8"))
    assert [attributes["alt"] for attributes in page.of("img")] == ["0", "drawn.png"]
    assert read_report(tmp_path / "evaluation" / "report.json")["checkpoint"] == "own"


def test_ticks_are_round_and_hold_all_values():
    generator = np.random.default_rng(0)
    for _ in range(300):
        values = (generator.normal() * 10 + generator.normal(size=5) * 10 ** generator.uniform(-4, 4)).tolist()
        found = ticks(values)
        steps = np.diff(found)
        assert found[0] <= min(values) + 1e-9 and found[-1] >= max(values) - 1e-9
        assert 3 <= len(found) <= 8 and np.allclose(steps, steps[0])
        assert f"{steps[0]:.0e}"[0] in "125"
        texts = tick_texts(found)
        assert len(set(texts)) == len(texts)
        assert np.allclose([float(text.replace(",", "")) for text in texts], found, atol=1e-6 * steps[0])
    assert ticks([2.0, 2.0])[0] < 2 < ticks([2.0, 2.0])[-1]
    assert ticks([0.0, 0.0])[0] < 0 < ticks([0.0, 0.0])[-1]


def test_points_lie_where_the_axes_say():
    points = [Point(x, y, f"<b>{x}</b>", f"{x}", x == 2) for x, y in ((1, 14), (2, 3), (4, 9))]
    svg = plot(points, "a & b", "x", "y")
    elements = Page(svg)
    assert "<b>" not in svg and elements.of("svg")[0]["aria-label"] == "a & b"
    circles = [circle for circle in elements.of("circle") if circle["class"] != "hit"]
    assert [circle["class"] for circle in circles] == ["point", "best", "point"]
    (x1, y1), (x2, y2), (x3, y3) = [(float(circle["cx"]), float(circle["cy"])) for circle in circles]
    assert (x3 - x1) / (x2 - x1) == pytest.approx(3, abs=0.01)
    assert (y2 - y1) / (y2 - y3) == pytest.approx(11 / 6, abs=0.01)
    assert elements.texts.count("2") == 2  # a tick and a label


def test_model_index_is_valid(folder):
    found = model_index_results(read_report(folder / "report.json"))
    data = ModelCardData(model_name="model", eval_results=found)
    card = ModelCard(f"---\n{data}\n---\n# model\n")  # written as YAML and read again
    assert [result.is_equal_except_value(other) for result, other in zip(card.data.eval_results, found, strict=True)]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"fid": 3.39412, "precision": 0.82911, "recall": 0.54, "kid": 0.000512}
    fid, *_, kid = card.data.eval_results
    assert fid.dataset_name == "VIRTUAL_imagenet256_labeled" and fid.metric_name == "FID"
    assert fid.metric_args == {"num_images": 50_000, **RESULTS["sampling"]} and kid.metric_args["std"] == 0.0002
    assert ModelCardData(model_name="m", eval_results=model_index_results({"metrics": {"fid": 1.0}})).eval_results
    (result,) = model_index_results({"metrics": {"fid": 1.0}, "reference": {"name": str(Path.home() / "batch.npz")}})
    assert result.dataset_name == "batch.npz"


def test_the_card_takes_a_report_beside_the_training(tmp_path):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)
    facts = {"generator": {"settings": {}, "metrics": {"test_loss": 3.2}}, "data": {"dataset": "user/images"}}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    write_report(tmp_path / "evaluation", RESULTS)
    publication = open_publication(tmp_path)
    assert set(REPORT_FILES) < set(publication.files)
    card = ModelCard(str(write_card(publication, "user/fish", pipe, [0], "mit")))
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["test_loss"].dataset_name == "user/images" and results["fid"].metric_value == 3.39412
    assert "| user/model | 3.39 | 0.829 | 0.540 | 0.51 ± 0.20 |" in card.text and "- Of the training set." in card.text
    assert "generator, loss in nats a code | 3.200" in card.text and "(evaluation/report.md)" in card.text


def test_a_damaged_report_is_not_published(tmp_path):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)
    write_report(tmp_path / "evaluation", RESULTS)
    whole = (tmp_path / REPORT).read_text(encoding="utf-8")
    (tmp_path / REPORT).write_text(whole[:100], encoding="utf-8")
    with pytest.raises(OSError, match="report.json is damaged"):
        open_publication(tmp_path)
    for text, message in (("{}", "The results hold no metrics"), ("[]", "The results are not a dict")):
        (tmp_path / REPORT).write_text(text, encoding="utf-8")
        with pytest.raises(OSError, match=f"report.json is damaged: {message}"):
            write_card(open_publication(tmp_path), "user/fish", pipe, [0], None)
    with pytest.raises(OSError, match="There is no report"):
        read_report(tmp_path / "report.json")


def test_every_known_metric_says_what_it_is():
    for name, known in METRICS.items():
        assert known.better in ("lower", "higher") and known.about.endswith("."), name
        assert known.write(0.5)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; Debian's package of that name will do")
def test_a_browser_shows_it_on_a_desk_and_on_a_phone(folder):
    playwright = pytest.importorskip("playwright.sync_api")
    asked, said = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        for width, scheme in ((1280, "light"), (360, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab.on("request", lambda request: asked.append(request.url.partition(":")[0]))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.goto((folder / "report.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == width  # no scrolling sideways
            assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            red, *_ = map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor")))
            assert red > 200 if scheme == "light" else red < 60
    assert [scheme for scheme in asked if scheme != "data"] == ["file"] * 2 and said == []
