"""A real browser on the real page: chromium through Playwright, or a skip with a plain reason."""

import base64
import json
import os
import re
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from webui import decode

CHROMIUM = Path(os.environ.get("KLORA_CHROMIUM") or "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
SECONDS = 60_000  # one minute, in Playwright's milliseconds


@contextmanager
def chromium():
    """A browser; skips the test if this machine has none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright: make .venv/ready"
    )
    if not CHROMIUM.is_file():
        pytest.skip(f"no chromium at {CHROMIUM}: install it, or set KLORA_CHROMIUM")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """The WebUI's page in one tab of the browser.

    tab: txt2img or img2img; what the methods work on.
    errors: what the page has written to the console as an error, and the requests that failed,
        without what differs from one server to the next. script: JavaScript to run before the
        page's own.
    """

    def __init__(self, browser, webui, *, theme="light", width=1500, script=""):
        self.webui, self.tab, self.errors = webui, "txt2img", []
        self.page = browser.new_page(viewport={"width": width, "height": 1500})
        self.page.set_default_timeout(30_000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._note(f"error: {error}"))
        self.page.on("requestfailed", self._failed)
        self.pending = set()
        self.page.on("request", self._sent)
        for ended in ("requestfinished", "requestfailed"):
            self.page.on(ended, self._ended)
        self.page.on("response", self._response)
        if script:
            self.page.add_init_script(script)
        self.page.goto(f"{webui.url}/?__theme={theme}")
        self.page.wait_for_selector("#txt2img_generate", timeout=SECONDS)
        self.page.wait_for_function(
            "typeof opts !== 'undefined' && 'keyedit_precision_extra' in opts"
        )
        self.wait_quiet()  # the host's own values come late, and would replace ours
        self.seed = 100
        self.number("steps", 4)
        self.number("width", 64)
        self.number("height", 64)

    def _note(self, error):
        error = re.sub(r"https?://127\.0\.0\.1:\d+", "", error)
        self.errors.append(re.sub(r"\?[\w=&.%-]+", "", error))

    def _console(self, message):
        if message.type == "error":
            self._note(f"console: {message.text}")

    def _sent(self, request):
        # Gradio 4 keeps a heartbeat open, and at times the stream of its events' results as well.
        if "/heartbeat/" not in request.url and "/queue/data" not in request.url:
            self.pending.add(request)

    def _ended(self, request):
        self.pending.discard(request)

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # the page itself ends what it has no use for
            self._note(f"{request.method} {request.url}: {request.failure}")

    def _response(self, response):
        if response.status >= 400:
            self._note(f"{response.request.method} {response.url}: {response.status}")

    # the host's part

    def host(self, name):
        """One of the host's components of this tab."""
        return self.page.locator(f"#{self.tab}_{name}").first

    def number(self, name, value):
        """Writes into one of the host's number fields."""
        field = self.host(name).locator("input").first
        field.fill(str(value))
        field.blur()

    @property
    def prompt(self):
        """The prompt's text field."""
        return self.host("prompt").locator("textarea")

    def generate(self, prompt=None, *, seed=None, until="", without=None):
        """Makes an image; the infotext that the page shows under it.

        With the seed of the image before, say what the new infotext has, or has no more.
        """
        if prompt is not None:
            self.prompt.fill(prompt)
        self.seed = seed or self.seed + 1
        self.number("seed", self.seed)
        self.page.wait_for_timeout(200)
        self.host("generate").click()
        info = self.page.locator(f"#html_info_{self.tab}").first
        self.page.wait_for_function(
            """([id, gone, ...texts]) => {
                const found = document.querySelector(id).innerText;
                return texts.every((text) => found.includes(text)) &&
                    !(gone && found.includes(gone));
            }""",
            arg=[f"#html_info_{self.tab}", without, f"Seed: {self.seed},", until],
            timeout=SECONDS,
        )
        return info.inner_text()

    def infotexts(self):
        """One infotext for each image in the gallery."""
        text = self.page.locator(f"#generation_info_{self.tab} textarea").input_value()
        return json.loads(text)["infotexts"]

    def image(self):
        """The first image in the gallery, as an array."""
        picture = self.page.locator(f"#{self.tab}_gallery img").first
        answer = self.page.request.get(picture.evaluate("e => e.src"))
        return decode(base64.b64encode(answer.body()).decode())

    def pick(self, dropdown, value):
        """Chooses in a dropdown, as a person does who types what they look for."""
        field = dropdown.locator("input").first
        field.click()
        field.fill(value)
        dropdown.locator(f"li[aria-label='{value}']").click()

    def wait_quiet(self, ms=500):
        """Waits until page and server have nothing to do, and the page has not changed for a
        while since then."""
        quiet = """([ms, most]) => new Promise((done, fail) => {
            let timer = setTimeout(done, ms);
            setTimeout(() => fail(new Error('the page does not come to rest')), most);
            new MutationObserver(() => {
                clearTimeout(timer);
                timer = setTimeout(done, ms);
            }).observe(document, {childList: true, subtree: true, attributes: true});
        })"""
        deadline = time.monotonic() + SECONDS / 1000
        busy = True
        while busy and time.monotonic() < deadline:
            busy = self.webui.get("/klora-probe/events") > 0
            self.page.evaluate(quiet, [ms, SECONDS])
            busy = busy or bool(self.pending)

    def open_tab(self, name):
        """One of the tabs at the top, by the end of its id."""
        self.page.evaluate(
            """name => {
                const tabs = [...document.querySelectorAll('#tabs > div[id^=tab_]')];
                const place = tabs.findIndex((tab) => tab.id === `tab_${name}`);
                document.querySelectorAll('#tabs > .tab-nav > button')[place].click();
            }""",
            name,
        )
        self.page.locator(f"#tab_{name}").wait_for(state="visible")

    def open_settings(self):
        """Our section of the Settings page."""
        self.open_tab("settings")
        self.page.locator("#settings button", has_text="K-LoRA").first.click()
        self.page.locator("#settings_klora").wait_for(state="visible")

    def paste(self, infotext):
        """Pastes an infotext as a person does: into the prompt, then the arrow button."""
        self.prompt.fill(infotext)
        self.page.locator(f"#{self.tab}_tools #paste").click()
        self.page.wait_for_function(
            "([id, text]) => document.querySelector(id).value !== text",
            arg=[f"#{self.tab}_prompt textarea", infotext],
        )
        self.page.wait_for_timeout(800)

    # ours

    def part(self, name):
        """One of our components of this tab."""
        return self.page.locator(f"#script_{self.tab}_klora_{name}").first

    @property
    def report(self):
        """Where the page says what was done."""
        return self.part("report")

    @property
    def is_on(self):
        """Whether the accordion is open, which is what switches K-LoRA on."""
        return self.page.locator(
            f"#script_{self.tab}_klora_enabled-checkbox input, "
            f"#script_{self.tab}_klora_enabled-visible-checkbox"
        ).first.is_checked()

    def switch_on(self, advanced=False):
        """Opens the accordion."""
        if not self.is_on:
            self.part("enabled").locator("> .label-wrap").click()
        if advanced:
            self.part("advanced").locator("> .label-wrap").click()
        self.page.wait_for_timeout(500)

    def set(self, name, value):
        """Sets one of our controls by hand."""
        part = self.part(name)
        if isinstance(value, bool):
            part.locator("input[type=checkbox]").set_checked(value)
        elif isinstance(value, (int, float)):
            field = part.locator("input[type=number]")
            field.fill(str(value))
            field.blur()
        elif part.locator("input[type=radio]").count():
            part.locator(f"input[value='{value}']").check()
        else:
            self.pick(part, value)
        self.page.wait_for_timeout(250)

    def value(self, name):
        """What one of our controls shows."""
        part = self.part(name)
        kind = part.locator("input").first.get_attribute("type")
        if kind == "checkbox":
            return part.locator("input").first.is_checked()
        if kind == "radio":
            return part.locator("input:checked").get_attribute("value")
        number = part.locator("input[type=number]")
        return (
            float(number.input_value())
            if number.count()
            else part.locator("input").first.input_value()
        )

    def wait_report(self, selector):
        """Waits until the report shows something."""
        self.page.wait_for_selector(
            f"#script_{self.tab}_klora_report {selector}", timeout=SECONDS, state="attached"
        )
        return self.report.inner_text()

    def close(self):
        """Closes the tab, once the server has answered it."""
        deadline = time.monotonic() + 10
        with suppress(OSError):  # a test may have ended the server
            while time.monotonic() < deadline and self.webui.get("/klora-probe/events") > 0:
                self.page.wait_for_timeout(100)
        self.page.close()
