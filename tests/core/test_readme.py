"""The README says what the table of settings says."""

import re
from pathlib import Path

from lib_klora.settings import FIELDS, default_beta

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
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
