"""What a sentence quotes, and what becomes of quotes that nobody can read."""

import json

import pytest

from lib_klora.errors import KLoraError, no_such_lora, readable
from lib_klora.settings import from_fields
from lib_klora.tag import parse_tags

HALF = "\ud800"
"""Of a UTF-16 pair: JSON can have it, UTF-8 cannot."""
LONG = "x" * 10**6


def sentence_of(make, *arguments):
    with pytest.raises(KLoraError) as error:
        make(*arguments)
    return str(error.value)


@pytest.mark.parametrize("odd", [HALF, LONG, HALF * 10**6], ids=["half", "long", "both"])
@pytest.mark.parametrize(
    "make",
    [
        lambda odd: parse_tags([[odd], ["b"], ["c"]]),
        lambda odd: parse_tags([["a", odd], ["b"]]),
        lambda odd: parse_tags([[odd, "role=x"], ["b"]]),
        lambda odd: from_fields({odd: 1}),
        lambda odd: from_fields({"scale": odd}),
        lambda odd: from_fields({"content": [odd]}),
        lambda odd: from_fields({f"{odd}{i}": 1 for i in range(20)}),
    ],
    ids=["name", "item", "role", "field", "value", "type", "fields"],
)
def test_whatever_is_quoted_can_be_written_and_read(make, odd):
    sentence = sentence_of(make, odd)
    json.dumps(sentence, ensure_ascii=False).encode()
    assert len(sentence) < 2100
    assert sentence.rstrip(".…").rpartition(" ")[2], "what to do is at its end"


def test_what_to_do_is_not_cut_off_with_a_long_quote():
    assert "exactly two" in sentence_of(parse_tags, [[LONG], ["b"], ["c"]])
    assert "keep two; others can be <lora:…>." in sentence_of(parse_tags, [[LONG], ["b"], ["c"]])
    assert "the fields are enabled" in sentence_of(from_fields, {f"{i}": 1 for i in range(10_000)})
    assert "must be" in sentence_of(from_fields, {"scale": LONG})
    assert "write a weight" in sentence_of(parse_tags, [["a", LONG], ["b"]])


def test_a_sentence_that_can_be_read_stays():
    for sentence in ("“a” and “b”: <klora:a:1> is “ä, 漢, 🐈”.", "x" * 2000):
        assert readable(sentence) == sentence


def test_a_name_that_no_tag_can_hold():
    known = ["cat:v2", "cat", "dog>1", "dogs", " ink "]
    assert "“cat:v2”, no tag can hold that name" in no_such_lora("cat", ["cat:v2"])
    assert "“dog>1”, no tag" in no_such_lora("dog", known)
    assert "“ ink ”, no tag" in no_such_lora("ink", known)
    assert "check the spelling" in no_such_lora("ca", known)
