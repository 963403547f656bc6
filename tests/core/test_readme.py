"""The README says what the table of settings says, and the sentences that people meet."""

import ast
import re
from pathlib import Path

from lib_klora.settings import FIELDS, default_beta

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")
ROWS = {
    name: row.split("|")
    for row in README.splitlines()
    if row.startswith("| `")
    for name in re.findall(r"`(\w+)`", row.split("|")[1])
}


def test_every_field_is_in_the_table_and_nothing_else():
    assert list(ROWS) == [field.name for field in FIELDS]


def test_values_and_defaults_are_those_of_the_table():
    for field in FIELDS:
        _, _, values, default, *_ = (cell.strip() for cell in ROWS[field.name])
        if field.choices and values != "as above":
            assert values.split(", ") == list(field.choices)
        if field.name == "beta":
            assert default == f"{default_beta('S'):g} (S*: {default_beta('S*'):g})"
        elif isinstance(field.default, float) and default != "as above":
            assert float(default) == field.default
        elif field.choices and default != "as above":
            assert default == field.default


def test_a_quoted_sentence_is_one_that_a_person_meets():
    """Whoever looks for it finds the row. Names and numbers in a sentence are no part of it."""
    said = [
        node.value
        for path in ROOT.glob("lib_klora/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r"^\| “(?:… ?)?(.+?)(?: …)?”", README.replace("`", ""), re.MULTILINE)
    assert len(quoted) > 3
    assert [words for words in quoted if not any(words in sentence for sentence in said)] == []
