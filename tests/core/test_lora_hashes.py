"""The host's own ``Lora hashes``, with our files beside those of its tags."""

from copy import copy

import pytest
from fake_host import Processing

from lib_klora import lora_hashes
from lib_klora.lora_hashes import KEY

PAIR = {"cat": "c1", "ink": "1a"}


def host(p, **tags):
    """What ExtraNetworkLora.activate of every host does for ``<lora:>`` tags, names as they are."""
    if not p.is_hr_pass or not hasattr(p, "lora_hashes"):
        p.lora_hashes = {}
    p.lora_hashes.update(tags)
    if p.lora_hashes:
        p.extra_generation_params[KEY] = ", ".join(f"{k}: {v}" for k, v in p.lora_hashes.items())


def ours(p, hashes=PAIR):
    """What KLoraNetwork.activate does."""
    if not p.is_hr_pass:
        lora_hashes.begin(p)
    lora_hashes.add(p, hashes)
    lora_hashes.write(p)


def activate(p, tags, hashes, ours_first):
    """Both, in either order; after the host's own, its text is written once more."""
    if ours_first:
        ours(p, hashes)
    host(p, **tags)
    lora_hashes.write(p)
    if not ours_first:
        ours(p, hashes)
    return p.extra_generation_params.get(KEY)


either_order = pytest.mark.parametrize("ours_first", [False, True], ids=["host first", "we first"])


@either_order
@pytest.mark.parametrize(
    ("tags", "hashes", "text"),
    [
        ({}, PAIR, "cat: c1, ink: 1a"),
        ({"oil": "01"}, PAIR, "oil: 01, cat: c1, ink: 1a"),
        ({"ink": "1a", "oil": "01"}, PAIR, "ink: 1a, oil: 01, cat: c1"),
        ({"oil": "01"}, {}, "oil: 01"),
        ({}, {}, None),
        ({}, {"a: b, c": "ab", "ink": "1a"}, "a b c: ab, ink: 1a"),
        ({}, {"cat": "", "ink": "1a"}, "ink: 1a"),
        ({}, {"cat": "", "ink": ""}, None),
        ({}, {":": "c1"}, None),
    ],
)
def test_one_batch(ours_first, tags, hashes, text):
    assert activate(Processing(), tags, hashes, ours_first) == text


@either_order
def test_a_batch_has_nothing_of_the_one_before(ours_first):
    p = Processing()
    assert activate(p, {"oil": "01"}, PAIR, ours_first) == "oil: 01, cat: c1, ink: 1a"
    assert activate(p, {"oil": "01"}, {}, ours_first) == "oil: 01"
    assert activate(p, {}, {"dog": "d0"}, ours_first) == "dog: d0"
    assert activate(p, {}, {}, ours_first) is None


@either_order
def test_the_hires_pass_adds_to_the_first(ours_first):
    p = Processing()
    activate(p, {"oil": "01"}, PAIR, ours_first)
    p.is_hr_pass = True
    wanted = "oil: 01, pen: 02, cat: c1, ink: 1a, dog: d0"
    assert activate(p, {"pen": "02"}, {"dog": "d0", "ink": "1a"}, ours_first) == wanted


@either_order
def test_a_cell_of_a_plot_has_nothing_of_another_although_they_share_their_parameters(ours_first):
    first = Processing()
    activate(first, {}, PAIR, ours_first)
    second = copy(first)
    assert second.extra_generation_params is first.extra_generation_params
    assert activate(second, {}, {}, ours_first) is None
    activate(first, {}, PAIR, ours_first)
    assert activate(copy(first), {"cat": "c1", "ink": "1a"}, {}, ours_first) == "cat: c1, ink: 1a"


def test_what_is_not_ours_stays_where_there_is_nothing_of_ours():
    p = Processing()
    p.extra_generation_params[KEY] = "of another extension: 00"
    ours(p, {})
    assert p.extra_generation_params == {"Other": "stays", KEY: "of another extension: 00"}
