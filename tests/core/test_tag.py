"""The tag grammar as (text, expected) pairs, and what a malformed tag is told."""

import pytest

from lib_klora.errors import KLoraError
from lib_klora.tag import Tag, parse_tag, parse_tags


def items(text: str) -> list[str]:
    """As the hosts split ``<klora:…>``."""
    return text.removeprefix("<klora:").removesuffix(">").split(":")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<klora:cat>", Tag("cat")),
        ("<klora:cat:0.8>", Tag("cat", 0.8, 0.8)),
        ("<klora:cat:0.5:0.8>", Tag("cat", 0.5, 0.8)),
        ("<klora:cat:0>", Tag("cat", 0, 0)),
        ("<klora:cat:-1>", Tag("cat", -1, -1)),
        ("<klora:cat: 0.8 >", Tag("cat", 0.8, 0.8)),
        ("<klora: cat >", Tag("cat")),
        ("<klora: black cat :0.8: s >", Tag("black cat", 0.8, 0.8, "style")),
        ("<klora:cat:1e-2>", Tag("cat", 0.01, 0.01)),
        ("<klora:cat:te=0.5>", Tag("cat", 0.5, 0.5)),
        ("<klora:cat:unet=0.5>", Tag("cat", 1, 0.5)),
        ("<klora:cat:te=0.2:unet=0.5>", Tag("cat", 0.2, 0.5)),
        ("<klora:cat:unet=0.5:te=0.2>", Tag("cat", 0.2, 0.5)),
        ("<klora:cat:0.7:unet=0.5>", Tag("cat", 0.7, 0.5)),
        ("<klora:cat:TE = 0.5>", Tag("cat", 0.5, 0.5)),
        ("<klora:cat:content>", Tag("cat", role="content")),
        ("<klora:cat:c>", Tag("cat", role="content")),
        ("<klora:cat:subject>", Tag("cat", role="content")),
        ("<klora:cat:role=Subject>", Tag("cat", role="content")),
        ("<klora:ink:style>", Tag("ink", role="style")),
        ("<klora:ink:s>", Tag("ink", role="style")),
        ("<klora:ink:Style>", Tag("ink", role="style")),
        ("<klora:ink:role=style>", Tag("ink", role="style")),
        ("<klora:ink:role=c>", Tag("ink", role="content")),
        ("<klora:ink:role=Content>", Tag("ink", role="content")),
        ("<klora:ink:0.8:style>", Tag("ink", 0.8, 0.8, "style")),
        ("<klora:ink:style:0.8>", Tag("ink", 0.8, 0.8, "style")),
        ("<klora:ink:0.5:s:0.8>", Tag("ink", 0.5, 0.8, "style")),
        # A name is whatever stands first, as in <lora:NAME>.
        ("<klora:style>", Tag("style")),
        ("<klora:subject>", Tag("subject")),
        ("<klora:0.8>", Tag("0.8")),
        ("<klora:a=b>", Tag("a=b")),
        ("<klora:猫 の絵_v2 (final)>", Tag("猫 の絵_v2 (final)")),
    ],
)
def test_grammar(text, expected):
    assert parse_tag(items(text)) == expected


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("<klora:>", "<klora:>"),
        ("<klora: >", "<klora: >"),
        ("<klora:cat:x>", "x"),
        ("<klora:cat:>", "<klora:cat:>"),
        ("<klora:cat:nan>", "nan"),
        ("<klora:cat:inf>", "inf"),
        ("<klora:cat:-Infinity>", "-Infinity"),
        ("<klora:cat:1e999>", "1e999"),
        ("<klora:cat:0,8>", "0,8"),
        ("<klora:cat:te=>", "<klora:cat:te=>"),
        ("<klora:cat:te=much>", "much"),
        ("<klora:cat:unet=nan>", "nan"),
        ("<klora:cat:1:2:3>", "3 weights"),
        ("<klora:cat:dyn=8>", "dyn=8"),
        ("<klora:cat:role=artist>", "artist"),
        ("<klora:cat:role=>", "<klora:cat:role=>"),
        ("<klora:cat:c:s>", "twice"),
        ("<klora:cat:c:subject>", "twice"),
        ("<klora:cat:role=c:content>", "twice"),
    ],
)
def test_malformed_tag_is_quoted_in_the_error(text, quoted):
    with pytest.raises(KLoraError) as error:
        parse_tag(items(text))
    assert text in str(error.value)
    assert quoted in str(error.value)


@pytest.mark.parametrize("text", ["<klora:cat:te=1:te=0.5>", "<klora:cat:unet=1:unet=0.5>"])
def test_repeated_item_is_an_error(text):
    with pytest.raises(KLoraError):
        parse_tag(items(text))


def test_no_tags_is_no_pair():
    assert parse_tags([]) is None


@pytest.mark.parametrize(
    ("first", "second", "content", "style", "style_first"),
    [
        ("cat", "ink", "cat", "ink", False),
        ("cat:c", "ink", "cat", "ink", False),
        ("cat", "ink:s", "cat", "ink", False),
        ("cat:c", "ink:s", "cat", "ink", False),
        ("ink:s", "cat", "cat", "ink", True),
        ("ink", "cat:c", "cat", "ink", True),
        ("ink", "cat:subject", "cat", "ink", True),
        ("ink:s", "cat:c", "cat", "ink", True),
    ],
)
def test_roles_of_two_tags(first, second, content, style, style_first):
    pair = parse_tags([first.split(":"), second.split(":")])
    assert (pair.content.name, pair.content.role) == (content, "content")
    assert (pair.style.name, pair.style.role) == (style, "style")
    assert pair.style_first is style_first
    assert [tag.name for tag in pair.in_order()] == [first.split(":")[0], second.split(":")[0]]


def test_weights_stay_with_their_names_when_style_is_written_first():
    pair = parse_tags([["ink", "0.3", "s"], ["cat", "0.7"]])
    assert (pair.content.unet, pair.style.unet) == (0.7, 0.3)


@pytest.mark.parametrize("role", ["content", "style"])
def test_twice_the_same_role_names_both_loras(role):
    with pytest.raises(KLoraError) as error:
        parse_tags([["cat", role], ["ink", role]])
    for word in ("cat", "ink", role):
        assert word in str(error.value)


@pytest.mark.parametrize("names", [["cat"], ["cat", "ink", "oil"], ["a", "b", "c", "d"]])
def test_any_other_number_of_tags_is_an_error_that_names_them(names):
    with pytest.raises(KLoraError) as error:
        parse_tags([[name] for name in names])
    assert all(f"“{name}”" in str(error.value) for name in names)
    assert f"has {len(names)}" in str(error.value)
