"""Fixtures for tests against an installed WebUI; see webui.py for where it is looked for.

`--host a1111` (or HOST=a1111) chooses one host. Each host gets one server for the session, and
build/live/<host>.json tells how its tests went. KLORA_DEVICE=second runs them on a second device
(second_device/launch.py), in build/live-second. KLORA_LIVE names another folder than these, for a
second run at the same time.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import make_loras
import pytest
from browser import Page, chromium
from webui import DEVICE, HERE, HOSTS, LAUNCH, REPOSITORY, WebUI, commit, find, locate

FOLDER = "live" if DEVICE == "cpu" else f"live-{DEVICE}"
BUILD = Path(os.environ.get("KLORA_LIVE") or REPOSITORY / "build" / FOLDER)
outcomes = {}


class Model(NamedTuple):
    """A checkpoint, how it is stored, and the LoRA files that fit it."""

    checkpoint: str
    family: str
    options: Mapping = MappingProxyType({})

    def lora(self, name):
        """The name of one of its LoRA files."""
        return f"{self.family}_{name}"


E4M3 = "float8-e4m3fn"
MODELS = {
    "a1111": {
        "sd15": Model("tiny_sd15", "sd15"),
        "sdxl": Model("tiny_sdxl", "sdxl"),
        "sdxl_full": Model("tiny_sdxl_full", "sdxl_full"),
        "sd15_fp8": Model("tiny_sd15", "sd15", {"fp8_storage": "Enable"}),
        "sd15_fp8_cache": Model(
            "tiny_sd15", "sd15", {"fp8_storage": "Enable", "cache_fp16_weight": True}
        ),
    },
    "forge": {
        "sd15": Model("tiny_sd15", "sd15"),
        "sdxl": Model("tiny_sdxl", "sdxl"),
        "flux": Model("tiny_flux", "flux"),
        "flux_gguf": Model("tiny_flux_q8_0.gguf", "flux"),
        "sd15_fp8": Model("tiny_sd15", "sd15", {"forge_unet_storage_dtype": E4M3}),
        "sd15_fp8_online": Model(
            "tiny_sd15", "sd15", {"forge_unet_storage_dtype": f"{E4M3} (fp16 LoRA)"}
        ),
        "flux_fp8": Model("tiny_flux", "flux", {"forge_unet_storage_dtype": E4M3}),
    },
}
if DEVICE == "second":
    # On a device without autocast AUTOMATIC1111 computes once with a merged weight before it rounds
    # it to fp8 (modules/devices.py, manual_cast): no `<lora:>` makes the same picture twice there.
    for name in ("sd15_fp8", "sd15_fp8_cache"):
        del MODELS["a1111"][name]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """``make test`` has to end: what is left when its time is up is skipped, and says so."""
    until = os.environ.get("KLORA_LIVE_UNTIL")
    if until and time.time() > float(until):
        pytest.skip("make test has used up its 26 minutes; make live runs everything")


def pytest_addoption(parser):
    """--host."""
    parser.addoption("--host", choices=HOSTS, help="run the live tests on this WebUI only")


def pytest_configure(config):
    """Make the markers known, and know the device."""
    if DEVICE not in LAUNCH:
        raise pytest.UsageError(
            f"There is no KLORA_DEVICE={DEVICE}: use {' or '.join(LAUNCH)}, or leave it out."
        )
    config.addinivalue_line("markers", "live: needs an installed WebUI")
    config.addinivalue_line("markers", "models(regex): which of the models (by id) to run with")


def pytest_collection_modifyitems(items):
    """Mark what lies in this folder, and let each host have its tests in one go."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("live")
    items.sort(key=host_of)


def host_of(item):
    """The host that a test runs on, or an empty string."""
    host = item.callspec.params.get("host") if hasattr(item, "callspec") else None
    return host if host in HOSTS else ""


def pytest_generate_tests(metafunc):
    """A test that takes `host` runs on each chosen host, one that takes `model` on each model."""
    chosen = metafunc.config.getoption("--host", None) or os.environ.get("HOST")
    hosts = [chosen] if chosen else HOSTS
    names = metafunc.fixturenames
    if "model" in names:
        marker = metafunc.definition.get_closest_marker("models")
        wanted = re.compile(marker.args[0] if marker else "")
        cases = [(host, id) for host in hosts for id in MODELS[host] if wanted.match(id)]
        metafunc.parametrize(("host", "model"), cases, indirect=True)
    elif "host" in names:
        metafunc.parametrize("host", hosts, indirect=True)


@pytest.fixture
def host(request):
    """The name of a host that is installed."""
    if find(request.param) is None:
        pytest.skip(locate(request.param).missing)
    return request.param


@pytest.fixture
def model(request, host):
    """A `Model` of the host."""
    return MODELS[host][request.param]


@pytest.fixture(scope="session")
def running():
    """The server that runs, as a list of none or one."""
    servers = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def server(host, running):
    """The host's server, with the tiny checkpoints and LoRA files; started on first use."""
    if running and running[0].host != host:
        running.pop().stop()
    if not running:
        server = WebUI(find(host), BUILD / host)
        server.make_models()
        make_loras.write_set(server.checkpoints, server.loras)
        server.start()
        running.append(server)
    return running[0]


@pytest.fixture
def webui(server, request):
    """The server, with the test's `model` or tiny_sd15 loaded; its log is shown if a test fails."""
    mark = server.mark()
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        server.load(model.checkpoint, **model.options)
    else:
        server.load("tiny_sd15")
    yield server
    print(server.log_since(mark)[-8000:])


@pytest.fixture(scope="session")
def browser():
    """A chromium for all tests of the page."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(webui, browser):
    """A new tab of the browser on the server's page."""
    page = Page(browser, webui)
    yield page
    page.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Count how each host's tests end."""
    report = (yield).get_result()
    host = host_of(item)
    if host and (report.when == "call" or not report.passed):
        outcomes.setdefault(host, {})[item.nodeid] = report.outcome


def pytest_sessionfinish():
    """Write build/live/<host>.json."""
    for host, ends in outcomes.items():
        count = Counter(ends.values())
        install = find(host)
        result = {
            "host": host,
            "host_version": install.version if install else None,
            "commit": commit(REPOSITORY),
            **{end: count[end] for end in ("passed", "failed", "skipped")},
        }
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / f"{host}.json").write_text(json.dumps(result, indent=1) + "\n")
