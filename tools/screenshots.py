"""Takes the screenshots of the README from a real WebUI: make screenshots HOST=a1111.

Usage: python tools/screenshots.py HOST FOLDER [--all]. Needs what the live tests of the page need.
--all: every state in each theme and in a narrow window, to look at before a release.
"""

import io
import os
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "live"))

import make_loras  # noqa: E402 - needs the path
from browser import Page, chromium  # noqa: E402
from webui import WebUI, find, locate  # noqa: E402

PAIR = "a cat on a chair <klora:sd15_content> <klora:sd15_style>"
STATES = "closed", "open", "map", "error", "advanced"
BUILD = Path(os.environ.get("KLORA_LIVE") or ROOT / "build" / "live")


def main() -> None:
    """Starts the host, and takes one picture of each state of the accordion."""
    host, folder = sys.argv[1], Path(sys.argv[2])
    everything = "--all" in sys.argv
    if find(host) is None:
        sys.exit(locate(host).missing)
    folder.mkdir(parents=True, exist_ok=True)
    server = WebUI(find(host), BUILD / host)
    server.make_models()
    make_loras.write_set(server.checkpoints, server.loras)
    with server, chromium() as browser:
        for theme, width in (("light", 1500), ("dark", 1500), ("light", 560)):
            name = "narrow" if width < 1000 else theme
            wanted = STATES if everything or name == "light" else ("map",)
            page = Page(browser, server, theme=theme, width=width)
            states(page, folder, f"{host}-{name}", wanted)
            page.close()


def states(page: Page, folder: Path, name: str, wanted: tuple[str, ...]) -> None:
    """Goes through all states, and takes a picture of those that are wanted."""

    def take(state: str) -> None:
        page.page.mouse.move(0, 0)
        page.wait_quiet()
        if state in wanted:
            shrink(page.part("enabled").screenshot(), folder / f"{name}-{state}.png")

    take("closed")
    page.switch_on()
    take("open")
    page.number("steps", 30)
    page.prompt.fill(PAIR)
    page.part("preview").click()
    page.wait_report(".klora-map img")
    take("map")
    page.prompt.fill("a cat <klora:no_such_file> <klora:sd15_style>")
    page.part("preview").click()
    page.wait_report(".klora-error")
    take("error")
    page.part("advanced").locator("> .label-wrap").click()
    take("advanced")


def shrink(png: bytes, path: Path) -> None:
    """Saves a screenshot in 256 colours, which is all that the page has, at a third of the size."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
