"""Fixtures for tests against an installed WebUI; see webui.py for where it is looked for.

`--host a1111` (or HOST=a1111) chooses one host. Each host gets one server for the session, or one
for each worker of pytest-xdist (`-n 2 --dist loadgroup`), and build/live/<host>.json tells how its
tests went. KLORA_DEVICE=second runs them on a second device (second_device/launch.py), in
build/live-second. KLORA_LIVE names another folder than these, for a second run at the same time.

`-m smoke` runs what `make test` does: each invariant of K-LoRA once, and the page once.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import make_loras
import pytest
from browser import Page, chromium
from hosts import HOSTS
from webui import DEVICE, HERE, LAUNCH, REPOSITORY, WebUI, commit, find, locate

FOLDER = "live" if DEVICE == "cpu" else f"live-{DEVICE}"
BUILD = Path(os.environ.get("KLORA_LIVE") or REPOSITORY / "build" / FOLDER)
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
outcomes = {}


def pytest_addoption(parser):
    """--host."""
    parser.addoption("--host", choices=[*HOSTS], help="run the live tests on this WebUI only")


def pytest_configure(config):
    """Make the markers known, and know the device."""
    if DEVICE not in LAUNCH:
        raise pytest.UsageError(
            f"There is no KLORA_DEVICE={DEVICE}: use {' or '.join(LAUNCH)}, or leave it out."
        )
    config.addinivalue_line("markers", "live: needs an installed WebUI")
    for marker in (
        "models(regex, smoke=regex): which of the models (by id) to run with, and to smoke with",
        "needs(capability): skip it on hosts that do not have that one of hosts.CAPABILITIES",
        "smoke: one of the few live tests that make test runs",
    ):
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups after us
def pytest_collection_modifyitems(items):
    """Mark what lies in this folder; let each host have its tests in one go, and within a file each
    of its models: to load another one takes longer than many a test."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("live")
            item.add_marker(pytest.mark.xdist_group("-".join(group_of(item))))
            item.user_properties.append(("host", host_of(item)))
    first = {}
    for number, item in enumerate(items):
        for group in (group_of(item), group_of(item)[:2]):
            first.setdefault(group, number)
    items.sort(key=lambda item: (host_of(item), first[group_of(item)[:2]], first[group_of(item)]))


def group_of(item):
    """Host, file and model of a test: tests that have these in common follow each other."""
    named = item.callspec.params if hasattr(item, "callspec") else {}
    return host_of(item), item.path.stem, str(named.get("model", ""))


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
        wanted = re.compile(marker.args[0] if marker and marker.args else "")
        smoke = marker and marker.kwargs.get("smoke")
        cases = [
            pytest.param(host, id, marks=pytest.mark.smoke if smoke and re.match(smoke, id) else ())
            for host in hosts
            for id in ids_of(host, wanted) or [f"none is {wanted.pattern}"]
        ]
        metafunc.parametrize(("host", "model"), cases, indirect=True)
    elif "host" in names:
        metafunc.parametrize("host", hosts, indirect=True)


def ids_of(host, wanted):
    """The ids of a host's models that a regex wants and the device can sample with."""
    models = HOSTS[host].models
    return [id for id, model in models.items() if wanted.match(id) and DEVICE in model.devices]


@pytest.fixture
def host(request):
    """The record of a host that is installed, and that can do what the test needs."""
    record = HOSTS[request.param]
    if find(record.name) is None:
        pytest.skip(locate(record.name).missing)
    for marker in request.node.iter_markers("needs"):
        for capability in marker.args:
            if not record.can(capability):
                pytest.skip(record.lacks[capability])
    return record


@pytest.fixture
def model(request, host):
    """One of the host's models."""
    if request.param not in host.models:
        pytest.skip(f"of {host.title}'s models {request.param}")
    return host.models[request.param]


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
    if running and running[0].host is not host:
        running.pop().stop()
    if not running:
        data = BUILD / "-".join(filter(None, (host.name, WORKER)))
        server = WebUI(find(host.name), data, shared=BUILD / host.name)
        server.make_models()
        make_loras.write_set(server.checkpoints, server.loras)
        server.start()
        running.append(server)
    return running[0]


@pytest.fixture
def webui(server, request):
    """The server, with the test's `model` or tiny_sd15 loaded; its log is shown if a test fails."""
    mark = server.mark()
    named = "model" in request.fixturenames
    server.load(request.getfixturevalue("model") if named else server.host.models["sd15"])
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


def pytest_runtest_logreport(report):
    """Count how each host's tests end."""
    host = dict(report.user_properties).get("host")
    if host and (report.when == "call" or not report.passed):
        outcomes.setdefault(host, {})[report.nodeid] = report.outcome


def pytest_sessionfinish():
    """Write build/live/<host>.json. Workers tell their results to the process that writes it."""
    for host, ends in outcomes.items() if not WORKER else ():
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
