"""The picture's ``K-LoRA`` parameter, as it is written and as it is read back."""

import pytest

from lib_klora import infotext
from lib_klora.settings import Settings

HASHES = ("1a2b3c4d5e6f", "6f5e4d3c2b1a")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
        ({"alpha": 2}, "alpha=2; files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
        (
            {"alpha": 2, "scale": "S*", "text_encoder": False},
            "alpha=2; scale=S*; text_encoder=false; files=1a2b3c4d5e6f+6f5e4d3c2b1a",
        ),
        ({"beta": 0.1}, "beta=0.1; files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
        ({"enabled": False}, "files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
        ({"content": " a b "}, "content=%20a b%20; files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
        ({"content": "a, b"}, "content=a%2C b; files=1a2b3c4d5e6f+6f5e4d3c2b1a"),
    ],
)
def test_written(settings, text):
    assert infotext.write(Settings(**settings), HASHES) == text


@pytest.mark.parametrize(
    ("settings", "hashes", "text"),
    [
        ({}, ("", ""), "method=K-LoRA"),
        ({"alpha": 2}, ("", ""), "alpha=2"),
        ({}, ("", HASHES[1]), "files=+6f5e4d3c2b1a"),
        ({}, (HASHES[0], ""), "files=1a2b3c4d5e6f+"),
    ],
)
def test_a_hash_that_is_not_known_and_no_hash_at_all(settings, hashes, text):
    written = infotext.write(Settings(**settings), hashes)
    assert written == text
    assert Settings(**infotext.read(written)) == Settings(**settings)
    assert infotext.unread(written) == []
    assert infotext.hashes(written) == (hashes if any(hashes) else None)


def test_nothing_written_has_a_meaning_in_the_hosts_infotext():
    # The hosts quote a value with , : or a line end, and unquote it with JSON.
    text = infotext.write(Settings(content='a,b:c"d\\e\nf\rg', style="%;="), HASHES)
    assert not set(text) & set(',:"\\\n\r')


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("files=aa+bb", {}),
        ("alpha=2; scale=S*; files=aa+bb", {"alpha": 2.0, "scale": "S*"}),
        ("alpha=2;scale=S*", {"alpha": 2.0, "scale": "S*"}),
        ("alpha=x; beta=1", {"beta": 1.0}),
        ("alpha; beta=1", {"beta": 1.0}),
        ("content; scale; beta=1", {"beta": 1.0}),
        ("from_a_later_version=1; beta=1", {"beta": 1.0}),
        ("text_encoder=false", {"text_encoder": False}),
        ("text_encoder=true", {"text_encoder": True}),
        ("content=a%2C b%3B%25", {"content": "a, b;%"}),
        ("content=100%", {"content": "100%"}),
        ("gibberish;;;=;", {}),
    ],
)
def test_read(text, fields):
    assert infotext.read(text) == fields


@pytest.mark.parametrize("text", ["alpha=nan", "alpha=-1", "top_k=0", "scale=Q", "text_encoder=x"])
def test_malformed_value_is_left_out(text):
    assert infotext.read(text) == {}
    assert infotext.unread(text) == [text]


def test_what_is_left_out_is_said_as_it_was_written():
    text = "of_a_later_version=a%2C b; beta=1; alpha; =; files=aa+bb; "
    assert infotext.unread(text) == ["of_a_later_version=a%2C b", "alpha", "="]
    assert infotext.unread("alpha=2; content=a%3B b; files=aa+bb") == []


@pytest.mark.parametrize(
    ("text", "hashes"),
    [
        ("alpha=2; files=aa+bb", ("aa", "bb")),
        ("files=+bb", ("", "bb")),
        ("alpha=2", None),
        ("files=aa", None),
        ("files=aa+bb+cc", None),
        ("profiles=aa+bb", None),
    ],
)
def test_hashes(text, hashes):
    assert infotext.hashes(text) == hashes


def test_other_values_take_the_place_of_those_that_stand_there():
    text = infotext.with_fields(
        "content=old; alpha=2; files=aa+bb", {"content": "new; cat", "style": "ink"}
    )
    assert infotext.read(text) == {"content": "new; cat", "style": "ink", "alpha": 2}
    assert infotext.hashes(text) == ("aa", "bb")
