"""The Space in a real browser, as it stands in spaces/, with the shipped checkpoint."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline
from tiny_diffusion import build_diffusion_pipeline


pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
SPACE = Path(__file__).parents[2] / "spaces" / "llamagen"

# As soon as the gallery shows another image, note it down.
WATCH = """() => {
  window.frames_seen = [];
  setInterval(() => {
    const image = document.querySelector('.easel img');
    if (image && window.frames_seen.at(-1) !== image.src) window.frames_seen.push(image.src);
  }, 10);
}"""


def serve(*command, **environment):
    """Start an app on a free port of loopback; its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": os.pathsep.join(sys.path)
    } | environment  # fmt: skip
    process = subprocess.Popen([sys.executable, *command], env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=1)
            return url, process
        except OSError:
            assert process.poll() is None, "the app did not start"
            time.sleep(0.5)
    raise AssertionError("the app does not answer")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium; Debian's package of that name will do")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


@pytest.fixture(scope="module")
def space():
    url, process = serve(str(SPACE / "app.py"))
    yield url
    process.terminate()
    process.wait()


def visit(browser, url, width=1280, height=860):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(url)
    page.get_by_role("button", name="Draw").first.wait_for()
    page.wait_for_timeout(1000)  # what can be seen does not listen yet
    page.evaluate(WATCH)
    return page


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, space):
    page = visit(browser, space, *request.param)
    yield page
    assert page.problems == []
    page.close()


def set_to(page, label: str, value: str, shown: str | None = None):
    """Fill in an input. It may be there before it listens, and then loses what it is told."""
    field, shown = page.get_by_label(label).first, page.get_by_label(shown or label).first
    for _ in range(20):
        field.fill(value)
        field.press("Tab")
        page.wait_for_timeout(200)
        if field.input_value() == shown.input_value() == value:
            return
    raise AssertionError(f"{label} can't be set")


def choose_count(page, count: str):
    page.get_by_role("button", name="Settings").first.click()
    set_to(page, "number input for Images", count, shown="range slider for Images")


def frames(page) -> list[str]:
    return page.evaluate("() => window.frames_seen")


def test_a_prompt_and_enter_show_an_image_row_by_row(page):
    prompt = page.get_by_label("Prompt").first
    prompt.fill("a red heart")
    start = time.perf_counter()
    prompt.press("Enter")
    page.wait_for_function("() => window.frames_seen.length > 0")
    assert time.perf_counter() - start < 2
    page.get_by_text(re.compile(r"1 image in")).wait_for()
    page.wait_for_timeout(200)
    assert len(frames(page)) >= 4  # three that are partial, and the image
    assert page.get_by_role("button", name="Draw").first.is_enabled()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").first.click()
    with Image.open(download.value.path()) as image:
        assert image.format == "PNG" and image.size == (512, 512) and "a red heart" in image.info["parameters"]
    # Nothing is wider than the screen.
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_an_example_draws_with_one_click(page):
    page.get_by_text("full moon").click()
    page.get_by_text(re.compile(r"1 image in")).wait_for()
    assert page.get_by_label("Prompt").first.input_value() == "full moon"
    assert len(frames(page)) >= 4


def test_several_images_with_seeds_and_parameters(page):
    choose_count(page, "4")
    set_to(page, "Seed", "7")
    page.get_by_label("Prompt").first.fill("sun with face")
    page.get_by_label("Prompt").first.press("Enter")
    page.get_by_text("4 images in").wait_for()
    for seed in (7, 8, 9, 10):
        page.get_by_text(f"seed {seed}", exact=True).first.wait_for()
    page.get_by_role("button", name="Parameters").first.click()
    page.get_by_text('"sun with face"').first.wait_for()


def test_stop_stops(page):
    choose_count(page, "8")
    page.get_by_label("Prompt").first.fill("person, noto style")
    page.get_by_role("button", name="Draw").first.click()
    page.wait_for_function("() => window.frames_seen.length > 0")
    page.get_by_role("button", name="Stop").first.click()
    page.wait_for_timeout(500)
    seen = frames(page)
    page.wait_for_timeout(2500)
    assert frames(page) == seen  # the grid stays as it was
    assert page.get_by_text("images in").count() == 0
    assert page.get_by_role("button", name="Draw").first.is_enabled()
    page.get_by_label("Prompt").first.press("Enter")  # and the next generation goes through
    page.get_by_text("8 images in").wait_for(timeout=120_000)


def test_nothing_moves_during_a_generation(page):
    def places():
        return page.evaluate(
            "() => ['.easel', '.below', '.more'].map(name => document.querySelector(name).getBoundingClientRect())"
            ".map(box => [box.left, box.top + window.scrollY, box.width, box.height].map(Math.round))"
        )

    before = places()
    page.get_by_label("Prompt").first.fill("a red heart")
    page.get_by_label("Prompt").first.press("Enter")
    page.wait_for_function("() => window.frames_seen.length > 1")
    during = places()
    page.get_by_text("1 image in").wait_for()
    page.wait_for_timeout(300)
    assert before == during == places()
    width = page.evaluate("() => document.querySelector('.easel').offsetWidth")
    page.get_by_role("tab", name="Complete").click()
    page.wait_for_timeout(300)
    assert page.evaluate("() => [...document.querySelectorAll('.easel')].at(-1).offsetWidth") == width


def test_an_error_is_a_toast_and_nothing_gets_stuck(page):
    page.get_by_role("button", name="Draw").first.click()
    page.get_by_text("Type a prompt first.").wait_for()
    page.wait_for_function("() => !document.querySelector('.go button').disabled")
    page.get_by_label("Prompt").first.fill("a red heart")
    page.get_by_label("Prompt").first.press("Enter")
    page.get_by_text("1 image in").wait_for()
    # A refusal leaves the images before it, and what belongs to them.
    page.get_by_label("Prompt").first.fill("")
    page.get_by_role("button", name="Draw").first.click()
    page.get_by_text("Type a prompt first.").last.wait_for()
    page.wait_for_function("() => !document.querySelector('.go button').disabled")
    assert page.get_by_role("button", name="Save PNG").first.is_enabled()


def test_an_upload_is_completed(page, tmp_path):
    Image.new("RGB", (90, 70), (250, 200, 40)).save(tmp_path / "yellow.png")
    page.get_by_role("tab", name="Complete").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "yellow.png")
    page.get_by_text("This part is kept.").wait_for()
    page.get_by_label("Prompt").nth(1).fill("sun with face")
    page.get_by_label("Prompt").nth(1).press("Enter")
    page.get_by_text("1 image in").wait_for()


def test_a_broken_upload_is_a_toast(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.get_by_role("tab", name="Complete").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    page.get_by_text("can't be read").first.wait_for()


def test_a_class_conditional_checkpoint_by_environment_and_command(browser, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "classes")
    commands = [(str(SPACE / "app.py"),), ("-m", "llamagen_cli", "demo", "--checkpoint", str(tmp_path / "classes"))]
    for command in commands:
        url, process = serve(*command, LLAMAGEN_CHECKPOINT=str(tmp_path / "classes"))
        try:
            page = visit(browser, url)
            page.get_by_role("tab", name="Class").wait_for()
            page.get_by_text("golden retriever", exact=True).click()
            page.get_by_text("1 image in").wait_for()
            assert str(tmp_path) not in page.content()
            assert page.problems == []
            page.close()
        finally:
            process.terminate()
            process.wait()


def test_an_upsampler_by_environment_and_command(browser, tmp_path):
    build_text_pipeline().save_pretrained(tmp_path / "base")
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(tmp_path / "large")
    names = {"checkpoint": str(tmp_path / "base"), "upsampler": str(tmp_path / "large")}
    options = [word for name, folder in names.items() for word in (f"--{name}", folder)]
    variables = {f"LLAMAGEN_{name.upper()}": folder for name, folder in names.items()}
    commands = [((str(SPACE / "app.py"),), variables), (("-m", "llamagen_cli", "demo", *options), {})]
    for command, environment in commands:
        url, process = serve(*command, **environment)
        try:
            page = visit(browser, url)
            page.get_by_role("button", name="Settings").first.click()
            set_to(page, "number input for Upsampling steps", "9", shown="range slider for Upsampling steps")
            start(page)
            page.get_by_text("1 image in").wait_for()
            page.wait_for_timeout(200)
            assert len(frames(page)) >= 4  # rows of the small image, then the larger one
            page.get_by_role("button", name="Parameters").first.click()
            page.get_by_text('"upsampler"').first.wait_for()
            assert str(tmp_path) not in page.content() and page.problems == []
            page.close()
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def slow_app(monkeypatch):
    """An app whose steps take a while and are counted, with room for one who waits."""
    from llamagen_hf.demo import launch
    from llamagen_hf.demo.app import lay_out

    pipe = build_text_pipeline()
    forward, steps = pipe.transformer.forward, []

    def slow(*args, **kwargs):
        steps.append(time.perf_counter())
        time.sleep(0.3)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", slow)
    demo = lay_out(pipe, ["an apple"], "tiny", queue_size=1)
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    yield url, steps
    demo.close()


def start(page, prompt: str = "apple"):
    page.get_by_label("Prompt").first.fill(prompt)
    page.get_by_label("Prompt").first.press("Enter")


def status(page) -> str:
    return page.locator(".status").first.inner_text()


@pytest.mark.parametrize("preview", ["every row", "off"])
def test_stop_stops_the_work_of_its_own_tab_alone(browser, slow_app, preview):
    url, steps = slow_app
    first, second = visit(browser, url), visit(browser, url)
    first.get_by_role("button", name="Settings").first.click()
    first.get_by_label(preview, exact=True).first.check()
    start(first)
    first.get_by_text("25%").wait_for()
    start(second)
    second.get_by_text("Waiting ...").wait_for()
    first.get_by_role("button", name="Stop").first.click()
    first.get_by_text("Stopped.").wait_for()
    second.get_by_text("1 image in").wait_for()
    assert 16 < len(steps) <= 16 + 12  # all of the second, not all of the first
    assert status(first) == "Stopped."
    for page in (first, second):
        assert page.get_by_role("button", name="Draw").first.is_enabled() and page.problems == []
        page.close()


def test_who_waits_can_stop_waiting_and_who_leaves_stops_the_work(browser, slow_app):
    url, steps = slow_app
    first, second = visit(browser, url), visit(browser, url)
    start(first)
    first.get_by_text("25%").wait_for()
    start(second)
    second.get_by_text("Waiting ...").wait_for()
    second.get_by_role("button", name="Stop").first.click()
    second.get_by_text("Stopped.").wait_for()
    first.get_by_text("1 image in").wait_for()
    first.wait_for_timeout(1500)
    assert len(steps) == 16  # nothing was generated for the second
    start(first)
    first.get_by_text("25%").wait_for()
    first.close()
    second.wait_for_timeout(1500)
    done = len(steps)
    assert done < 32
    second.wait_for_timeout(1000)
    assert len(steps) == done
    second.close()


def test_a_full_queue_is_a_toast_and_nothing_gets_stuck(browser, slow_app):
    url, _ = slow_app
    pages = [visit(browser, url) for _ in range(3)]
    start(pages[0])
    pages[0].get_by_text("25%").wait_for()
    start(pages[1])
    pages[1].get_by_text("Waiting ...").wait_for()
    start(pages[2])
    pages[2].get_by_text("This application is currently busy. Please try again.").wait_for()
    pages[2].wait_for_function("() => !document.querySelector('.go button').disabled")
    for page in pages[:2]:
        page.get_by_text("1 image in").wait_for()
    start(pages[2])
    pages[2].get_by_text("1 image in").wait_for()
    for page in pages:
        page.close()
