"""The settings: one table, one record, and every way in which a value can be wrong."""

import dataclasses
import math

import pytest

from lib_klora.errors import KLoraError
from lib_klora.settings import (
    BY_NAME,
    FIELDS,
    NO_LORA,
    Settings,
    default_beta,
    from_args,
    from_fields,
)

NUMBERS = [
    "alpha", "beta", "top_k", "content_weight", "style_weight", "hires_alpha", "hires_beta",
    "seed", "share_start", "share_end", "hires_share_start", "hires_share_end",
]  # fmt: skip
SWITCHES = ["enabled", "text_encoder"]
CHOICES = ["scale", "method", "layers", "gamma", "unpaired", "progress", "hires"]
NAMES = ["content", "style"]


class TestTable:
    def test_record_and_table_have_the_same_fields_in_the_same_order(self):
        record = [field.name for field in dataclasses.fields(Settings)]
        assert record == [field.name for field in FIELDS] == list(BY_NAME)

    def test_this_file_knows_every_field(self):
        assert sorted([*NUMBERS, *SWITCHES, *CHOICES, *NAMES, "hires_scale"]) == sorted(BY_NAME)

    def test_defaults_of_record_and_table_agree(self):
        for field in dataclasses.fields(Settings):
            assert BY_NAME[field.name].default == field.default, field.name

    @pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
    def test_every_field_can_be_shown_and_explained(self, field):
        assert field.label
        assert field.help.endswith(".")
        if field.choices:
            assert field.default in field.choices
        if field.slider:
            low, high, step = field.slider
            assert field.low <= low < high <= field.high
            assert step > 0

    def test_what_names_one_pair_has_no_default_on_the_settings_page(self):
        per_pair = {field.name for field in FIELDS if field.per_pair}
        assert per_pair == {"enabled", *NAMES, "content_weight", "style_weight"}


class TestDefaults:
    def test_are_the_issues(self):
        assert dataclasses.asdict(from_fields({})) == {
            "enabled": True,
            "alpha": 1.5,
            "beta": 0.5,
            "scale": "S",
            "method": "K-LoRA",
            "layers": "attention",
            "gamma": "paper",
            "top_k": 1,
            "unpaired": "keep",
            "text_encoder": True,
            "progress": "continue",
            "content": "",
            "style": "",
            "content_weight": 1,
            "style_weight": 1,
            "hires": "as first pass",
            "hires_scale": "S",
            "hires_alpha": 1.5,
            "hires_beta": None,
            "seed": 0,
            "share_start": 100,
            "share_end": 0,
            "hires_share_start": 100,
            "hires_share_end": 0,
        }

    @pytest.mark.parametrize(("scale", "beta"), [("S", 0.5), ("S*", 1.3), ("none", 0.5)])
    def test_beta_depends_on_the_scale(self, scale, beta):
        assert Settings(scale=scale).beta == default_beta(scale) == beta
        assert Settings(scale=scale, beta=0.7).beta == 0.7

    @pytest.mark.parametrize(
        ("given", "changed"),
        [
            ({}, {}),
            ({"alpha": 1.5, "beta": 0.5}, {}),
            ({"alpha": 2}, {"alpha": 2.0}),
            ({"scale": "S*"}, {"scale": "S*"}),
            ({"scale": "S*", "beta": 1.3}, {"scale": "S*"}),
            ({"scale": "S*", "beta": 0.5}, {"beta": 0.5, "scale": "S*"}),
            ({"beta": 1.3}, {"beta": 1.3}),
            ({"style": "ink", "text_encoder": False}, {"text_encoder": False, "style": "ink"}),
            ({"method": "Random selection", "seed": 7}, {"method": "Random selection", "seed": 7}),
            ({"scale": "share", "share_end": 0}, {"scale": "share"}),
            ({"scale": "share", "share_end": 20}, {"scale": "share", "share_end": 20}),
        ],
    )
    def test_changed_is_what_differs_from_the_paper(self, given, changed):
        assert Settings(**given).changed() == changed

    def test_changed_is_in_the_tables_order(self):
        changed = Settings(style="b", content="a", scale="none", beta=0.1, alpha=0.2).changed()
        assert list(changed) == [name for name in BY_NAME if name in changed]


def refused(**values) -> str:
    (name,) = values
    with pytest.raises(KLoraError) as error:
        from_fields(values)
    assert name in str(error.value), "the field is not named"
    return str(error.value)


class TestNumbers:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_must_be_finite(self, name, value):
        assert "finite" in refused(**{name: value})

    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", [True, False, "1", "", [1], {}, (1.0,), 1j])
    def test_must_be_numbers_and_not_bools(self, name, value):
        assert repr(value) in refused(**{name: value})

    @pytest.mark.parametrize("name", ["alpha", "top_k", "content_weight", "style_weight", "seed"])
    def test_null_is_no_number(self, name):
        refused(**{name: None})

    def test_null_beta_is_the_scales_own(self):
        assert from_fields({"beta": None, "scale": "S*"}).beta == 1.3

    @pytest.mark.parametrize("name", NUMBERS)
    def test_integer_beyond_every_float_is_refused(self, name):
        refused(**{name: 10**400})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("alpha", 0), ("alpha", 1e10), ("beta", 0), ("beta", 1e10), ("top_k", 1e-9),
            ("top_k", 1e10), ("content_weight", -3), ("content_weight", 0), ("style_weight", 1e30),
        ],
    )  # fmt: skip
    def test_in_range(self, name, value):
        accepted = getattr(from_fields({name: value}), name)
        assert accepted == value
        assert isinstance(accepted, float)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("alpha", -1e-9), ("alpha", 1.01e10), ("beta", -0.5), ("beta", 2e10),
            ("top_k", 0), ("top_k", 0.0), ("top_k", -1), ("top_k", 2e10),
        ],
    )  # fmt: skip
    def test_out_of_range(self, name, value):
        sentence = refused(**{name: value})
        assert repr(value) in sentence
        assert "1e+10" in sentence

    @pytest.mark.parametrize("value", [0, 3, 3.0, 10**9])
    def test_seed_is_a_whole_number_whichever_way_it_is_written(self, value):
        seed = from_fields({"seed": value}).seed
        assert seed == value
        assert type(seed) is int

    @pytest.mark.parametrize("value", [0.5, -1, 1e-9, 10**9 + 1])
    def test_seed_out_of_range_or_with_a_fraction(self, value):
        assert f"{value!r}: it must be a whole number" in refused(seed=value)

    def test_s_star_needs_a_modulus(self):
        with pytest.raises(KLoraError, match="alpha is 0"):
            from_fields({"scale": "S*", "alpha": 0})


class TestWords:
    @pytest.mark.parametrize("name", CHOICES)
    def test_every_choice_is_accepted(self, name):
        for choice in BY_NAME[name].choices:
            assert getattr(from_fields({name: choice}), name) == choice

    @pytest.mark.parametrize("name", CHOICES)
    @pytest.mark.parametrize("value", ["", "Q", "ATTENTION", None, True, 1, ["S"], {"a": 1}])
    def test_anything_else_is_refused_with_the_choices(self, name, value):
        sentence = refused(**{name: value})
        assert all(choice in sentence for choice in BY_NAME[name].choices)

    @pytest.mark.parametrize("name", SWITCHES)
    @pytest.mark.parametrize("value", [True, False])
    def test_switches(self, name, value):
        assert getattr(from_fields({name: value}), name) is value

    @pytest.mark.parametrize("name", SWITCHES)
    @pytest.mark.parametrize("value", [0, 1, "true", "", None, [], math.nan])
    def test_switch_must_be_true_or_false(self, name, value):
        assert "true or false" in refused(**{name: value})

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", ["cat", "猫:v2", "", " a "])
    def test_names_are_any_text(self, name, value):
        assert getattr(from_fields({name: value}), name) == value

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [None, NO_LORA])
    def test_null_name_is_no_name(self, name, value):
        assert getattr(from_fields({name: value}), name) == ""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [1, True, ["cat"], math.nan])
    def test_name_must_be_text(self, name, value):
        assert repr(value) in refused(**{name: value})


class TestUnknown:
    def test_unknown_fields_are_all_named_with_the_known_ones(self):
        with pytest.raises(KLoraError) as error:
            from_fields({"alpha": 1, "alhpa": 2, "sead": 3})
        sentence = str(error.value)
        assert "“alhpa”" in sentence
        assert "“sead”" in sentence
        assert "“alpha”" not in sentence
        assert all(name in sentence for name in BY_NAME)

    def test_record_cannot_be_changed_unchecked(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Settings().alpha = -1


class TestHires:
    def test_as_the_first_pass(self):
        settings = Settings(alpha=2, scale="S*")
        assert settings.for_hires() is settings

    def test_what_is_not_used_makes_no_difference(self):
        assert Settings(hires_alpha=3, hires_scale="none", hires_beta=2) == Settings()

    def test_its_own(self):
        settings = Settings(alpha=2, beta=0.1, hires="own", hires_scale="S*", hires_alpha=1)
        hires = settings.for_hires()
        assert (hires.scale, hires.alpha, hires.beta) == ("S*", 1, 1.3)
        assert settings.changed() == {
            "alpha": 2, "beta": 0.1, "hires": "own", "hires_scale": "S*", "hires_alpha": 1,
        }  # fmt: skip

    def test_wrapping_at_zero_is_refused(self):
        with pytest.raises(KLoraError, match="hires_alpha is 0"):
            Settings(hires="own", hires_scale="S*", hires_alpha=0)

    @pytest.mark.parametrize("scale", BY_NAME["hires_scale"].choices)
    def test_every_scale(self, scale):
        assert Settings(hires="own", hires_scale=scale).for_hires().scale == scale


class TestArgs:
    @pytest.mark.parametrize(
        "args", [[], (), [False], [False, "nonsense", math.nan], [{"enabled": False, "alpha": 2}]]
    )
    def test_off_is_none(self, args):
        assert from_args(args) is None

    def test_positional_values_are_in_the_tables_order(self):
        args = [
            True, 2, 0.25, "S*", "LoRA Switch", "all", "authors", 0.5, "drop", False, "restart",
            "cat", "ink", 0.8, 0.7, "own", "none", 1.1, 0.9, 5,
            90, 20, 80, 10,
        ]  # fmt: skip
        settings = from_args(args)
        assert dict(zip(BY_NAME, args, strict=True)) == dataclasses.asdict(settings)

    def test_missing_positional_values_are_the_papers(self):
        assert from_args([True, 2]) == Settings(alpha=2)

    def test_object_of_fields(self):
        assert from_args([{"beta": 1}]) == Settings(beta=1)

    def test_empty_object_switches_on(self):
        assert from_args([{}]) == Settings()

    def test_what_follows_an_object_is_ignored(self):
        # The hosts fill the list up with the page's values.
        assert from_args([{"beta": 1}, 9, 9, "S*"]) == Settings(beta=1)

    def test_values_of_a_switched_off_object_are_still_checked(self):
        with pytest.raises(KLoraError, match="alpha"):
            from_args([{"enabled": False, "alpha": "x"}])

    @pytest.mark.parametrize("first", [1, 0, "true", None, "S", [True]])
    def test_first_value_must_be_the_switch(self, first):
        with pytest.raises(KLoraError, match="enabled"):
            from_args([first, 1.5])

    def test_wrong_positional_value_names_its_field(self):
        with pytest.raises(KLoraError, match="scale is 'Q'"):
            from_args([True, 1.5, 0.5, "Q"])
