"""The languages that come with the extension."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib_klora import plot
from lib_klora.errors import KLoraError
from lib_klora.pair import Pair
from lib_klora.plan import Plan, progress
from lib_klora.settings import BY_NAME, from_fields
from lib_klora.tag import ROLES, parse_tags
from lib_klora.texts import cache_sentence, copies_sentence, fragments, to_html
from tools import make_localizations

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {
    path.stem: json.loads(path.read_text(encoding="utf8"))
    for path in (ROOT / "localizations").glob("*.json")
}
NO_WORDS = {"(", ").", ",", ".", ":", ";", ""}


def untranslated(sentence):
    """The fixed parts of a sentence that a language does not have."""
    fixed = {text.strip() for text, is_fixed in fragments(sentence) if is_fixed} - NO_WORDS
    return {(name, text) for name, words in LANGUAGES.items() for text in fixed - words.keys()}


def test_every_text_of_the_page_is_translated_and_the_files_are_up_to_date():
    command = [sys.executable, ROOT / "tools" / "make_localizations.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("There is no LoRA “a; 7 (b)”: look.", ["There is no LoRA ", ": look."]),
        ("2 layers of “x” (such as a.b-1) do not.", [" layers of ", " (such as ", ") do not."]),
        ("“x” was made with (0123456789ab).", [" was made with (", ")."]),
        ("47 % content; style at step 9 of 30", [" % content", "style at step ", " of "]),
        ("SD1.5 and S* fit: 1e+10, -0.5, 3.", ["SD1.5 and S* fit: ", ", ", ", ", "."]),
        ("<klora:a:b> needs two <klora:…> or <klora:NAME> tags", None),
    ],
)
def test_names_and_numbers_are_apart_from_what_is_always_the_same(sentence, parts):
    assert "".join(text for text, _ in fragments(sentence)) == sentence
    fixed = [text for text, is_fixed in fragments(sentence) if is_fixed]
    assert fixed == (parts or [" needs two <klora:…> or <klora:NAME> tags"])


def test_a_sentence_is_text_in_the_page_whatever_the_names():
    page = to_html("There is no LoRA “<img src=x onerror=alert(1)>” & <klora:<b>>.")
    assert "<img" not in page
    assert "<b>" not in page
    assert "&amp;" in page


def readings():
    """The words of maps of every kind: no, one or two layers, and what comes after what."""
    for unpaired in ({}, {"x": "content"}, {"y": "style", "z": "style"}):
        pair = Pair((), unpaired, ())
        for layers in (0, 1, 2):
            for course in ((1,) * 4, (2,) * 4, (3,) * 4, (1, 2, 1, 2), (2, 1, 3, 3), (1, 2) * 9):
                choice = np.array((*course, course[-1]), np.uint8)[:, None].repeat(layers, 1)
                for method in ("K-LoRA", "Direct merge", "Without γ"):
                    plan = Plan(("a", "b")[:layers], choice, progress(len(course)), 1.0, method)
                    yield plot.describe(plan, pair)


def test_every_reading_of_a_map_and_the_commonest_sentences_are_translated():
    found = set()
    for words in readings():
        found |= untranslated(words)
    for tags in (
        [["a"]],
        [["a"], ["b"], ["c"]],
        [["a", "c"], ["b", "c"]],
        [["a", "s"], ["b", "s"]],
        [["a", "0,8"], ["b"]],
    ):
        with pytest.raises(KLoraError) as error:
            parse_tags(tags)
        found |= untranslated(str(error.value))
    with pytest.raises(KLoraError) as error:
        from_fields({"scale": "S*", "alpha": 0})
    found |= untranslated(str(error.value))
    found |= untranslated(cache_sentence(3 * 2**20, 2**27))
    found |= untranslated(copies_sentence("b", ["a", "b", "c"]))
    assert not found


@pytest.mark.parametrize("language", LANGUAGES)
def test_brackets_are_closed_as_they_were_opened(language):
    """What is between them is written as it is, and with it a bracket that stands alone."""
    words = LANGUAGES[language]
    for sentence in make_localizations.SENTENCES:
        text = "".join(words.get(part.strip(), part) for part, _ in fragments(sentence))
        for opened, closed in ("()", "（）"):
            assert text.count(opened) == text.count(closed), text


@pytest.mark.parametrize(("language", "scale"), [("zh_CN", "缩放因子"), ("ja_JP", "スケール")])
def test_the_scale_is_the_papers_factor_and_no_size_of_a_picture(language, scale):
    """A slider of img2img is called “Scale” too, and the host would translate both alike."""
    words = LANGUAGES[language]
    label = BY_NAME["scale"].label
    assert "Scale" not in words
    assert words[label] == f"{scale} S(t)"
    named = [BY_NAME[name] for name in ("hires", "hires_scale", "share_start", "share_end")]
    assert all(scale in words[field.help] for field in named)


def test_what_the_scripts_of_the_page_write_is_translated_as_they_write_it():
    """They look their texts up by themselves, so a text has to be there word for word."""
    code = "".join(path.read_text(encoding="utf8") for path in (ROOT / "javascript").glob("*.js"))
    for text, written in (
        ("Refresh the LoRA lists", "'Refresh the LoRA lists'"),
        *((f"K-LoRA: use as {role}. Again", "`K-LoRA: use as ${role}. Again") for role in ROLES),
    ):
        assert written in code
        for words in LANGUAGES.values():
            assert [key for key in words if key.startswith(text)]


def test_a_new_sentence_would_be_noticed():
    assert untranslated("Something that nobody has translated: 7.")
