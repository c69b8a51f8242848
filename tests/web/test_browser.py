"""The page in a browser, as a visitor uses it: Chromium of the system's packages, driven headless."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.web.tiny_runs import SIDE, export

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="the page needs gradio")
webdriver = pytest.importorskip("selenium.webdriver", reason="the tests in a browser need selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip(
        "no Chromium with chromedriver on this machine: apt-get install chromium chromium-driver",
        allow_module_level=True,
    )
ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,1600",
)
PATIENCE = 30  # seconds


def failures(log):
    """The tracebacks in a log, but for gradio's own of events from panels that had just been replaced.

    A visitor who changes the run while the browser still sends something of the old one meets it on a slow
    machine; gradio answers with an error that the browser has no use for any more.
    """
    found = log.split("Traceback (most recent call last)")[1:]
    return [one for one in found if "in get_fn\n" not in one or "KeyError: " not in one]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with three runs, served by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("page")
    export(folder / "runs" / "class_label", "class_label", layers=6, width=192)  # slow enough to be watched
    for key in ("segmentation", "objects_bbox"):
        export(folder / "runs" / key, key)
    (folder / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    words = ["-r", str(folder / "runs"), "-o", str(folder / "kept"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "sample_conditional.py"), *words, "--max-upload", "0.2"],
            stdout=log, stderr=log, env=environment, cwd=folder,
        )
    try:
        end = time.monotonic() + 2 * PATIENCE
        while not (found := re.search(r"http://\S+", (folder / "log.txt").read_text())):
            assert server.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)
    assert not list(folder.glob("taming-page-*")), "what visitors left is still there"
    log = (folder / "log.txt").read_text()
    assert not failures(log), log


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):  # it is closed before the page is
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    downloads = tmp_path_factory.mktemp("downloads")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


class Visitor:
    """A page that was just opened, and what a visitor does with it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.until(lambda: self.one("#generate").is_enabled())

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def until(self, condition):
        """Wait until it is true, and return what it gives."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if value := condition():
                    return value
            except Exception:  # not there yet, or replaced meanwhile
                if time.monotonic() > end:
                    raise
            if time.monotonic() > end:
                self.browser.save_screenshot(str(self.browser.downloads / "failed.png"))
                pytest.fail(f"waited {PATIENCE} s; the status is {self.status!r}")
            time.sleep(0.05)

    @property
    def status(self):
        return self.one("#status").text

    def choose(self, run):
        """Choose a run, and wait until it is there."""
        self.one("#run input").click()
        options = (By.CSS_SELECTOR, "ul[role=listbox] li")
        found = self.until(lambda: [o for o in self.browser.find_elements(*options) if run in o.text])
        found[0].click()
        if run != "unfinished":
            self.until(lambda: f"given {run.replace('_', ' ')}" in self.one("#about").text)
            self.until(lambda: self.one("#generate").is_enabled())

    def put(self, name, value):
        """Type a number into an input."""
        field = self.one(f"#{name} input")
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(str(value), Keys.TAB)

    def upload(self, button, path):
        within = f"//*[@id='{button}']/.."
        field = self.until(lambda: self.browser.find_element(By.XPATH, f"{within}//input[@type='file']"))
        field.send_keys(str(path))

    def generate(self):
        """Click on Generate, and return the status that it ends with."""
        self.until(lambda: self.one("#generate").is_enabled())
        self.browser.execute_script(
            "window.changes = 0; window.watcher?.disconnect();"
            "window.watcher = new MutationObserver(() => {window.changes += 1});"
            "window.watcher.observe(document.querySelector('#generate'), {attributeFilter: ['disabled']})"
        )
        self.one("#generate").click()
        self.until(lambda: self.browser.execute_script("return window.changes >= 2"))  # off, and on again
        return self.status

    def stroke(self, selector, *moves):
        """Paint over the middle of a canvas."""
        canvas = self.until(lambda: self.one(f"{selector} canvas"))
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        time.sleep(0.3)
        chain = ActionChains(self.browser).move_to_element_with_offset(canvas, *moves[0]).click_and_hold()
        for move in moves[1:]:
            chain = chain.move_by_offset(*move)
        chain.release().perform()

    def message(self):
        """The text of the newest message in the corner."""
        return self.until(lambda: self.browser.find_elements(By.CSS_SELECTOR, ".toast-body")[-1].text)


@pytest.fixture
def visitor(browser, address):
    return Visitor(browser, address)


def test_generate_an_image_and_download_it(visitor, browser):
    assert "trained at 32x32 pixels" in visitor.until(lambda: visitor.one("#about").text)
    visitor.choose("class_label")
    visitor.put("seed", 7)
    assert visitor.generate() == "done"
    visitor.until(lambda: visitor.one("#live img").get_attribute("naturalWidth") == str(SIDE))
    visitor.until(lambda: visitor.one("#gallery img"))
    details = visitor.one("#details").text
    assert "seed 7" in details and "0 (mountains at dawn)" in details
    visitor.one("#download").click()
    (file,) = visitor.until(lambda: list(browser.downloads.glob("*.png")))
    with Image.open(file) as image:
        assert image.size == (SIDE, SIDE)
        assert image.info["seed"] == "7" and image.info["class_label"] == "0 (mountains at dawn)"
    visited = "return performance.getEntriesByType('resource').map(entry => new URL(entry.name).hostname)"
    assert set(browser.execute_script(visited)) == {"127.0.0.1"}


def test_watch_and_cancel(visitor):
    visitor.choose("class_label")
    visitor.put("height", 256)
    visitor.put("width", 256)
    visitor.one("#generate").click()
    progress = r"(\d+) of 1024 codes, \d+ a second, \d+ s left"
    seen = visitor.until(lambda: re.match(progress, visitor.status))
    first = visitor.until(lambda: visitor.one("#live img").get_attribute("src"))
    visitor.until(lambda: visitor.one("#live img").get_attribute("src") != first)  # it grows
    visitor.until(lambda: int(re.match(progress, visitor.status)[1]) > int(seen[1]))
    # not at once: the image may just be replaced, and then it has no size
    visitor.until(lambda: visitor.one("#live img").get_attribute("naturalWidth") == "256")
    visitor.one("#cancel").click()
    assert visitor.until(lambda: visitor.status == "cancelled")
    visitor.until(lambda: visitor.one("#generate").is_enabled())
    assert not visitor.one("#cancel").is_enabled()


def test_garbage_bombs_and_large_files(visitor, tmp_path):
    (tmp_path / "garbage.png").write_bytes(b"this is not an image")
    (tmp_path / "huge.png").write_bytes(np.random.default_rng(0).bytes(300_000))
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    visitor.one("#completion button").click()
    for name, message in (
        ("garbage.png", "garbage.png is not an image that can be read here"),
        ("bomb.png", "bomb.png is too large"),
        ("huge.png", "maximum"),
    ):
        visitor.upload("upload-original", tmp_path / name)
        visitor.until(lambda message=message: message in visitor.message())


def test_paint_a_segmentation(visitor):
    visitor.choose("segmentation")
    visitor.until(lambda: "sky" in visitor.one(".legend").text)
    assert visitor.generate() == "done"
    before = visitor.one("#details").text
    visitor.stroke("#painting", (-60, 0), (60, 10), (60, -10))
    time.sleep(0.5)
    assert visitor.generate() == "done"
    assert visitor.until(lambda: visitor.one("#details").text != before)


def test_brush_over_an_original(visitor):
    visitor.choose("class_label")
    visitor.one("#completion button").click()
    visitor.until(lambda: visitor.one("#take-original").is_displayed())
    visitor.one("#take-original").click()
    time.sleep(1.5)
    assert "there is nothing to generate" in visitor.generate()
    visitor.stroke("#original", (-100, 50), (200, 0))
    time.sleep(0.5)
    assert visitor.generate() == "done"
    assert visitor.until(lambda: re.search(r"completion \d+% of an original", visitor.one("#details").text))


def test_boxes_by_two_clicks(visitor, browser):
    visitor.choose("objects_bbox")
    layout = visitor.until(lambda: visitor.one("#layout img"))
    for place in ((-80, -60), (-20, 10)):
        before = visitor.one("#layout img").get_attribute("src")
        ActionChains(browser).move_to_element_with_offset(layout, *place).click().perform()
        visitor.until(lambda before=before: visitor.one("#layout img").get_attribute("src") != before)
        layout = visitor.one("#layout img")
    assert visitor.generate() == "done"
    assert visitor.until(lambda: '[["sun", ' in visitor.one("#details").text)


def test_what_does_not_work_is_said(visitor):
    visitor.choose("class_label")
    for name, value, message in (
        ("width", 36, "the nearest is 32x32"), ("width", 32, "done"),
        ("top-k", 99, "top_k is 99: give 1 to 16"),
    ):
        visitor.put(name, value)
        assert message in visitor.generate()
    visitor.choose("unfinished")
    visitor.until(lambda: "has no checkpoint yet" in visitor.one("#about").text)
    assert not visitor.one("#generate").is_enabled()
