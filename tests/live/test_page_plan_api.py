"""`POST /klora/plan`, `GET /klora/loras`: what they answer, and who may ask."""

import base64
import json
import math
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from kloras import PAIR, choice
from webui import opener

REQUEST = {"content": PAIR[0], "style": PAIR[1], "steps": 8}


def test_the_loras_are_the_hosts(webui):
    names = [entry["name"] for entry in webui.get("/klora/loras")]
    assert set(names) == {entry["name"] for entry in webui.get("/sdapi/v1/loras")}


def test_the_plan_is_the_papers(webui):
    plan = webui.post("/klora/plan", REQUEST)
    reading = choice(webui, *PAIR)
    assert len(plan["layers"]) == 128
    assert plan["t"] == [i / 8 for i in range(8)]
    for step in range(8):
        roles = reading.step(step, 8)
        share = sum(role == "content" for role in roles.values()) / len(roles)
        assert plan["content_share"][step] == pytest.approx(share)
    for layer in plan["layers"]:
        for t, content in zip(plan["t"], layer["content"], strict=True):
            scale = 1.5 * t + 0.5
            if abs(layer["ratio"] - scale) > 1e-9:
                assert content == (layer["ratio"] > scale)
    assert "% content" in plan["summary"]
    assert plan["warnings"] == []


def test_settings_and_where_the_pass_starts(webui):
    always = {"settings": {"alpha": 0, "beta": 1e10}}
    plan = webui.post("/klora/plan", {**REQUEST, **always})
    assert plan["content_share"] == [0] * 8
    late = webui.post("/klora/plan", {**REQUEST, "t0": 0.5})
    assert late["t"][0] == 0.5
    assert late["gamma"] == plan["gamma"]


def test_layers_of_one_file_are_named(webui):
    request = {**REQUEST, "content": "sd15_content_down"}
    plan = webui.post("/klora/plan", request)
    assert set(plan["unpaired"].values()) == {"style"}
    assert len(plan["unpaired"]) + len(plan["layers"]) == 128
    assert any("only in “sd15_style” (keep)" in warning for warning in plan["warnings"])
    dropped = webui.post("/klora/plan", {**request, "settings": {"unpaired": "drop"}})
    assert dropped["unpaired"] == {}


def test_a_plan_changes_nothing(webui):
    plain = webui.txt2img()
    webui.post("/klora/plan", REQUEST)
    assert webui.txt2img().sha == plain.sha


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({**REQUEST, "content": "nowhere"}, 422, "nowhere"),
        ({**REQUEST, "content": "../../../etc/passwd"}, 422, "no LoRA"),
        ({**REQUEST, "content": "/etc/passwd"}, 422, "no LoRA"),
        ({**REQUEST, "content": "", "style": ""}, 422, "No LoRAs"),
        ({**REQUEST, "settings": {"alpha": -1}}, 422, "alpha"),
        ({**REQUEST, "settings": {"strength": 1}}, 422, "strength"),
        ({**REQUEST, "alpha": 1}, 422, "alpha"),  # it belongs into "settings"
        ({**REQUEST, "style": "sdxl_style"}, 422, "does not fit"),
        ({**REQUEST, "steps": 0}, 422, "steps"),
        ({**REQUEST, "steps": math.inf}, 422, "steps"),
        ({**REQUEST, "t0": math.nan}, 422, "t0"),
        ({**REQUEST, "t0": math.inf}, 422, "t0"),
        ({**REQUEST, "content": "\ud800"}, 422, "no LoRA"),
        ({**REQUEST, "\ud800": 1}, 422, "not as in /docs"),
        ({**REQUEST, "settings": {"\ud800": 1}}, 422, "no field"),
        ({**REQUEST, "settings": {"content": "sd15_other"}}, 422, "leave it out of the settings"),
        ({"content": PAIR[0]}, 422, "style"),
    ],
)
def test_bad_requests_get_a_sentence(webui, body, status, word):
    found, answer = webui.request("/klora/plan", body)
    assert found == status
    assert word in json.dumps(answer)


def test_they_are_in_the_documentation(webui):
    paths = webui.get("/openapi.json")["paths"]
    plan, loras = paths["/klora/plan"]["post"], paths["/klora/loras"]["get"]
    assert "PlanRequest" in json.dumps(plan)
    assert "PlanAnswer" in json.dumps(plan)
    assert loras["summary"]


@contextmanager
def guarded(webui, *arguments):
    """A server of its own with a log-in."""
    server = webui.beside("guarded", arguments=arguments)
    server.answers = lambda: True  # the harness's own question would need the log-in
    with server:
        yield server


def status(server, path, headers=None, data=None):
    """The HTTP status of a request."""
    request = urllib.request.Request(server.url + path, data, headers or {})
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_the_hosts_log_ins_hold(webui):
    basic = {"Authorization": "Basic " + base64.b64encode(b"ann:secret").decode()}
    refused = [
        {"Authorization": "Basic " + base64.b64encode(user).decode()}
        for user in (b"ann:guess", b"ann:", b"nobody:")
    ]
    with guarded(webui, "--api-auth", "ann:secret") as server:
        assert status(server, "/klora/loras")[0] == 401
        assert [status(server, "/klora/loras", wrong)[0] for wrong in refused] == [401] * 3
        assert status(server, "/klora/loras", basic)[0] == 200
        body = json.dumps(REQUEST).encode()
        kind = {"Content-Type": "application/json"}
        assert status(server, "/klora/plan", kind, body)[0] == 401
        assert status(server, "/klora/plan", {**kind, **basic}, body)[0] == 200
    with guarded(webui, "--gradio-auth", "bob:word") as server:
        assert status(server, "/klora/loras")[0] == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        code, headers = status(server, "/login", form, b"username=bob&password=word")
        assert code == 200
        cookies = [value.split(";")[0] for value in headers.get_all("set-cookie")]
        assert status(server, "/klora/loras", {"Cookie": "; ".join(cookies)})[0] == 200
        forged = "; ".join(f"{cookie.partition('=')[0]}=forged" for cookie in cookies)
        assert status(server, "/klora/loras", {"Cookie": forged})[0] == 401
