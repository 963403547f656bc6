"""Properties that hold for any pair, tag or setting (hypothesis)."""

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lora_samples import attention_prefixes, linears

from lib_klora import infotext, klora
from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.plan import make_plan, progress
from lib_klora.scores import Scores, compute_scores
from lib_klora.settings import FIELDS, Settings, from_fields
from lib_klora.tag import Tag, parse_tag

PREFIXES = attention_prefixes(5)
steps_ = st.integers(1, 40)
sums = st.floats(0.01, 100)
rows = st.lists(st.tuples(*[sums] * 6), min_size=1, max_size=12)


def file(rank, seed, factor=1.0):
    """A file whose layers differ in strength; ``factor`` scales all of it through ``up``."""
    tensors = linears(PREFIXES, rank=rank, size=8, seed=seed)
    for i, prefix in enumerate(PREFIXES):
        tensors[f"{prefix}.lora_up.weight"] *= factor
        tensors[f"{prefix}.alpha"] = torch.tensor(rank * (0.5 + ((seed + i) % 4) / 2))
    return parse_lora(f"file {seed}", tensors)


def random_scores(rows) -> Scores:
    return Scores(*map(np.array, zip(*rows, strict=True)))


def mirrored(scores: Scores) -> Scores:
    """Those of the same files in the other roles."""
    arrays = [getattr(scores, field.name) for field in dataclasses.fields(scores)]
    return Scores(*(x for pair in zip(arrays[1::2], arrays[::2], strict=True) for x in pair))


def pair_of(layers: int):
    """Any pair with that many layers: plans take only its names from it."""
    prefixes = attention_prefixes(layers)
    return pair_files(*(parse_lora(x, linears(prefixes, rank=1, size=2)) for x in "ab"))


@given(
    seed=st.integers(0, 50),
    exponent=st.integers(-12, 12),
    side=st.sampled_from(["content", "style"]),
    gamma=st.sampled_from(["paper", "authors"]),
    scale=st.sampled_from(["S", "S*", "none"]),
)
def test_scaling_one_lora_by_a_power_of_two_leaves_the_plan_unchanged(
    seed, exponent, side, gamma, scale
):
    settings = Settings(gamma=gamma, scale=scale)

    def plan(content_factor, style_factor):
        pair = pair_files(file(2, seed, content_factor), file(3, seed + 100, style_factor))
        return make_plan(pair, compute_scores(pair), settings, steps=12)

    factor = 2.0**exponent
    scaled = plan(factor, 1.0) if side == "content" else plan(1.0, factor)
    plain = plan(1.0, 1.0)
    assert np.array_equal(scaled.content, plain.content)
    assert scaled.gamma == plain.gamma * (factor if side == "content" else 1 / factor)


@given(rows=rows, steps=steps_, alpha=st.floats(0, 10), beta=st.floats(0, 10))
def test_under_s_a_layer_that_turned_to_style_never_returns(rows, steps, alpha, beta):
    scores = random_scores(rows)
    plan = make_plan(pair_of(len(rows)), scores, Settings(alpha=alpha, beta=beta), steps)
    returned = ~plan.content[:-1] & plan.content[1:]
    assert not returned.any()


@given(rows=rows, steps=steps_, alpha=st.floats(0.01, 10), beta=st.floats(0, 10))
def test_under_s_star_a_layer_returns_at_most_once_and_only_at_the_wrap(rows, steps, alpha, beta):
    settings = Settings(scale="S*", alpha=alpha, beta=beta)
    plan = make_plan(pair_of(len(rows)), random_scores(rows), settings, steps)
    scale = klora.scale_s_star(plan.t, alpha, beta)
    wraps = np.diff(scale[:-1]) < 0  # t < 1: at 1 rounding can wrap a second time
    returned = (~plan.content[:-1] & plan.content[1:])[:-1]
    assert wraps.sum() <= 1
    assert not returned[~wraps].any()
    assert (returned.sum(axis=0) <= 1).all()


@given(t=st.floats(0, 1), alpha=st.floats(0.01, 1e3), beta=st.floats(0, 1e3))
def test_s_star_stays_below_its_modulus(t, alpha, beta):
    assert 0 <= klora.scale_s_star(np.array([t]), alpha, beta)[0] < alpha


@given(rows=rows)
def test_swapping_content_and_style_mirrors_the_papers_gamma(rows):
    scores = random_scores(rows)
    swapped = mirrored(scores)
    assert swapped.gamma("paper") == pytest.approx(1 / scores.gamma("paper"), rel=1e-12)


def test_the_authors_gamma_is_not_mirrored():
    scores = Scores(*(np.array(x, float) for x in ([1, 1], [1, 1], [4, 1], [1, 1], [1, 1], [1, 1])))
    swapped = mirrored(scores)
    assert swapped.gamma("authors") * scores.gamma("authors") > 1.2


@given(seed=st.integers(0, 30))
def test_swapping_two_files_mirrors_the_papers_gamma(seed):
    a, b = file(2, seed), file(3, seed + 100)
    there, back = (compute_scores(pair_files(*x)).gamma("paper") for x in ((a, b), (b, a)))
    assert there * back == pytest.approx(1, rel=1e-12)


entries = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60)


@given(entries=entries)
def test_top_k_sum_grows_with_k_up_to_the_sum_of_all(entries):
    delta = torch.tensor(entries)
    top = [klora.top_k_sum(delta, k) for k in range(1, len(entries) + 1)]
    total = klora.abs_sum(delta)
    assert top[0] == max(abs(x) for x in entries)
    # The K largest come in any order, and a sum of fp64 rounds with it.
    assert all(a <= b + 1e-12 * total for a, b in itertools.pairwise(top))
    assert top[-1] == pytest.approx(total, rel=1e-12)
    # Concave: each further entry is no larger than the one before it.
    steps = np.diff([0, *top])
    assert all(a >= b - 1e-9 * total for a, b in itertools.pairwise(steps))


@given(
    ranks=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    entries=st.integers(1, 10**7),
    multiplier=st.floats(1e-6, 1e6),
)
def test_k_is_always_a_number_of_entries(ranks, entries, multiplier):
    k = klora.top_k(*ranks, entries, multiplier)
    assert isinstance(k, int)
    assert 1 <= k <= entries
    assert k <= klora.top_k(*ranks, entries, 2 * multiplier)


@given(steps=st.integers(1, 200), t0=st.floats(0, 1))
def test_progress_rises_from_its_start_to_one(steps, t0):
    t = progress(steps, t0)
    assert len(t) == steps + 1
    assert t[0] == t0
    assert t[-1] == 1
    assert (np.diff(t) >= 0).all()
    assert ((t >= 0) & (t <= 1)).all()


@given(rows=rows, steps=steps_)
def test_more_beta_never_gives_content_more(rows, steps):
    pair, scores = pair_of(len(rows)), random_scores(rows)
    low, high = (make_plan(pair, scores, Settings(beta=b), steps) for b in (0.3, 0.9))
    assert not (high.content & ~low.content).any()


# -- round trips ----------------------------------------------------------------------------------

# What a file can be called and a tag can hold: no colon or closing bracket, not only blanks.
tag_names = st.text(
    st.characters(blacklist_characters=":>", blacklist_categories=("Cs", "Cc")), min_size=1
).filter(str.strip)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    name=tag_names,
    te=finite,
    unet=finite,
    role=st.sampled_from([None, "content", "style"]),
)
def test_any_name_and_finite_weights_are_read_exactly(name, te, unet, role):
    written = [name, repr(te), repr(unet), *filter(None, [role])]
    assert parse_tag(written) == Tag(name.strip(), te, unet, role)


@given(name=tag_names, weight=finite, role=st.sampled_from(["content", "style"]))
def test_one_weight_is_both(name, weight, role):
    assert parse_tag([name, repr(weight), role]) == Tag(name.strip(), weight, weight, role)


@given(items=st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_any_tag_is_read_or_refused_with_a_sentence(items):
    with contextlib.suppress(KLoraError):
        tag = parse_tag(items)
        assert tag.name == items[0].strip()
        assert math.isfinite(tag.te)
        assert math.isfinite(tag.unet)


NASTY = st.one_of(
    st.sampled_from(
        ["a,b", "a:b", "a;b", "50%", "%2C", "“q”", '"q"', "a\\b", "猫の絵", "a\nb", " a ", "a\r\n",
         "x=y", "\t", "a, Steps: 20", "ünï", "😀", "\u00a0", "a\u0085b"]
    ),
    st.text(
        st.characters(
            blacklist_categories=("Cs",),
            # Non-ASCII blanks at an end: see test_names_with_wide_blanks_at_an_end.
            blacklist_characters="\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"
            "\u2009\u200a\u2028\u2029\u202f\u205f\u3000",
        )
    ),
)  # fmt: skip


def strategy_for(field):
    if field.name == "enabled":
        return st.just(True)  # an infotext is only written where it is on
    if field.choices:
        return st.sampled_from(field.choices)
    if isinstance(field.default, bool):
        return st.booleans()
    if isinstance(field.default, str):
        return NASTY
    if field.whole:
        return st.integers(int(field.low), int(field.high))
    low = max(field.low, -1e12)
    return st.floats(low, min(field.high, 1e12), exclude_min=field.above)


any_settings = st.fixed_dictionaries(
    {}, optional={field.name: strategy_for(field) for field in FIELDS}
)


@given(values=any_settings)
def test_infotext_round_trip(values):
    for prefix in ("", "hires_"):
        assume(not (values.get(f"{prefix}scale") == "S*" and values.get(f"{prefix}alpha") == 0))
    settings = from_fields(values)
    text = infotext.write(settings, ("aaaa", "bbbb"))
    assert from_fields(infotext.read(text)) == settings
    assert not set(text) & set(',:"\n\r\\')
    assert text.endswith("files=aaaa+bbbb")


@pytest.mark.parametrize("name", ["\u3000猫", "ink\u2003", "\u2028x"])
def test_names_with_wide_blanks_at_an_end(name):
    settings = Settings(content=name, style="b")
    text = infotext.write(settings, ("aaaa", "bbbb"))
    assert from_fields(infotext.read(text)) == settings


@given(text=st.text())
def test_any_text_can_be_read_as_infotext(text):
    assert set(infotext.read(text)) <= {field.name for field in FIELDS}
