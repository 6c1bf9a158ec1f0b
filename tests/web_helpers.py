"""The page of demos/web_demo.py: run as a command or in this process, and driven in a real browser."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, free_port, listens, until
from transformers import LogitsProcessor

DIALOGUES = {}  # by the first question
for line in (TINY / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
    turns = json.loads(line)["turns"]
    DIALOGUES[turns[0][0]] = turns
SUN, SPAIN = DIALOGUES["what is the sun"], DIALOGUES["where is Spain"]
CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def command(*options):
    """The address of `python demos/web_demo.py`, run as a person runs it."""
    port = free_port()
    arguments = [str(ROOT / "demos" / "web_demo.py"), "--device", "cpu", "--temperature", "0", "--port", str(port)]
    arguments += options
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as file:
            server = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file, stderr=file, cwd="/")
        try:
            until(lambda: listens(url, server, log), "web_demo.py does not listen", seconds=120)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


@contextmanager
def chromium():
    """A browser. One that is installed already, as playwright's own is a download."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


class Chat:
    """The page, as a person sees it."""

    def __init__(self, browser, url, language="en-US"):
        self.requests = []
        self.context = browser.new_context(locale=language, viewport={"width": 1000, "height": 700})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.box = self.page.locator("textarea:not([placeholder=''])")
        self.box.wait_for()

    def ask(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def press(self, name):
        self.page.get_by_label(name, exact=True).first.click()

    def open_settings(self):
        self.page.locator(".label-wrap").click()

    def set(self, values):
        """Types each value into the field whose label has that name, until all stay.

        gradio puts a default back over what is typed within some 20 ms of the unfolding, which no person does.
        """
        typed = self.page.locator("textarea, input[type=number]")
        fields = [(self.page.get_by_label(name).and_(typed), value) for name, value in values.items()]

        def stay():
            if all(field.input_value() == value for field, value in fields):
                return True
            for field, value in fields:
                field.fill(value)
                field.press("Tab")
            return False

        self.wait_until(stay, f"the page does not keep {values}")

    def stop(self):
        self.page.locator(".stop-button").click()

    def texts(self, role):
        return self.page.locator(f".message.{role}:not(.pending)").all_inner_texts()

    def wait_until(self, true, what):
        """As `until`; playwright wants to do the waiting."""
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, f"{what}: {self.page.locator('body').inner_text()}"
            self.page.wait_for_timeout(20)

    def wait_until_connected(self):
        """The last request of a page that has loaded is a connection that stays open."""
        self.wait_until(lambda: any("/heartbeat/" in url for url in self.requests), "no heartbeat")

    def wait_until_ready(self):
        self.page.locator(".submit-button").wait_for()
        self.wait_until(self.box.is_enabled, "the box stays closed")

    def shows(self, *turns):
        """Waits for the end of the answer, and for exactly these turns."""
        self.wait_until_ready()
        expected = [query for query, _ in turns], [answer for _, answer in turns]
        self.wait_until(lambda: (self.texts("user"), self.texts("bot")) == expected, f"not {expected}")


@pytest.fixture(scope="module")
def server():
    with command() as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_chat(browser):
    """A factory of pages, each in a browser profile of its own."""
    chats = []

    def open_chat(url, language="en-US"):
        chats.append(Chat(browser, url, language))
        return chats[-1]

    yield open_chat
    for chat in chats:
        chat.context.close()


class Slow(LogitsProcessor):
    """Makes every step last, and notes that it is `call`'s; `endless` answers never come to an end."""

    def __init__(self, call, steps, seconds, endless):
        self.call, self.steps, self.seconds, self.endless = call, steps, seconds, endless

    def __call__(self, input_ids, scores):
        self.steps.append(self.call)
        time.sleep(self.seconds)
        if self.endless:
            scores[:, 2] = -float("inf")
        return scores


@pytest.fixture
def serve(tiny_model, tokenizer):
    """A factory of pages served from this process, by a model that is slow and whose steps and calls can be counted.

    `stream` replaces that of the sessions.
    """
    import web_demo

    pages = []

    def serve(*options, seconds=0.05, endless=True, stream=None):
        calls, steps = [], []
        sessions = web_demo.Sessions(tiny_model, tokenizer)
        plain = sessions.stream

        def slow_stream(key, query, history, system, **settings):
            calls.append((query, history, {**settings, "system": system}))
            slow = Slow(len(calls), steps, seconds, endless)
            return plain(key, query, history, system, logits_processor=[slow], **settings)

        sessions.stream = stream or slow_stream
        page = web_demo.build(sessions, web_demo.parse_arguments(["--temperature", "0", *options]))
        web_demo.launch(page, server_port=free_port(), prevent_thread_lock=True, quiet=True)
        pages.append(page)
        return SimpleNamespace(url=page.local_url, sessions=sessions, steps=steps, calls=calls)

    yield serve
    for page in pages:
        page.close()


def has_ended(served):
    """True if the model takes no further step."""
    before = len(served.steps)
    time.sleep(0.5)
    return len(served.steps) == before
