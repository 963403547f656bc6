"""While the two files are compared: what the page shows, and that Interrupt ends it."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from kloras import PAIR, tags

HELD_AT = 5
"""Layers after which the analysis waits for the test."""


@contextmanager
def held(webui):
    """Analyses inside wait until the test has looked."""
    webui.post("/klora-probe/hold", {"at": HELD_AT})
    try:
        yield
    finally:
        webui.post("/klora-probe/release")


def forget(page, top_k):
    """Makes the next analysis begin anew: nothing on the disk, and a K that is not in memory."""
    shutil.rmtree(page.webui.data / "cache" / "klora", ignore_errors=True)
    page.switch_on(advanced=True)
    page.set("top_k", top_k)


def wait_interrupted(webui):
    """Waits until the server knows that the button was pressed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        progress = webui.get("/sdapi/v1/progress?skip_current_image=true")
        if progress["state"]["interrupted"]:
            return
        time.sleep(0.1)
    raise TimeoutError("Interrupt did not reach the server")


def test_a_preview_shows_how_far_it_is_and_a_picture_waits_for_it(page):
    forget(page, 0.35)
    page.prompt.fill(tags(*PAIR))
    with ThreadPoolExecutor() as other, held(page.webui):
        page.part("preview").click()
        progress = page.page.locator(
            "#script_txt2img_klora_report", has_text=re.compile(f"{HELD_AT}/256 layers.*Analysing")
        ).first
        progress.wait_for()  # before, it says 0 for a moment
        bar = progress.locator(".progress-bar")
        assert bar.evaluate("e => parseFloat(e.style.width)") > 0
        picture = other.submit(page.webui.txt2img)
        wait([picture], timeout=3)
        assert not picture.done()
    assert not picture.result().error
    page.wait_report(".klora-map img")
    page.page.get_by_text("Analysing").first.wait_for(state="detached")


def test_a_generation_shows_it_in_the_hosts_progress_bar_and_interrupt_ends_it(page):
    forget(page, 0.45)
    page.prompt.fill(tags(*PAIR))
    with held(page.webui):
        page.host("generate").click()
        bar = page.page.locator(
            ".progressDiv", has_text=re.compile(f"K-LoRA: comparing layers.*{HELD_AT} of 256")
        )
        bar.wait_for()
        page.host("interrupt").click()
        wait_interrupted(page.webui)
    sentence = page.wait_report(".klora-error")
    assert "was interrupted: generate again and it goes on where it stopped" in sentence
    assert not page.page.locator("#html_log_txt2img .error").count()
    kept = list((page.webui.data / "cache" / "klora").glob("*.npz"))
    assert kept, "the layers that were finished are not kept"
    assert "K-LoRA error" not in page.generate()
    page.wait_report(".klora-map img")
