"""The small world: its pictures, its judges, its model and LoRAs, and K-LoRA's quality in it.

The last part is the regression test of quality: with γ or the order of t broken, the judges do not
find in the pictures what was asked for. It breaks both to show that it would be seen.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_klora import klora, plan
from lib_klora.families import is_attention
from lib_klora.lora_file import parse_lora
from lib_klora.settings import Settings
from lib_klora.tensor_file import SafetensorsFile
from playground import demo, judges, model, train, ways, world
from playground.generate import Playground, strengthened
from playground.scores import PAIRS, Way, judge
from playground.ways import K_LORA, STRENGTHS, STRONG

HELD_OUT = (*world.HELD_OUT_SUBJECTS, *world.HELD_OUT_STYLES)
MEGABYTE = 1e6
ROOT = Path(__file__).resolve().parents[2]


def draw(subject, style, seed=0, **context):
    return world.draw(subject, style, world.Context(**context), np.random.default_rng(seed))


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return Playground(cache=tmp_path_factory.mktemp("cache"))


# -- the world -------------------------------------------------------------------------------------


def test_a_picture_follows_from_its_seed():
    assert np.array_equal(draw("cat", "lava", 3), draw("cat", "lava", 3))
    assert not np.array_equal(draw("cat", "lava", 3), draw("cat", "lava", 4))


@pytest.mark.parametrize("context", [{"size": "small"}, {"position": "left"}, {"setting": "sun"},
                                     {"setting": "hill"}, {"count": "two"}])  # fmt: skip
def test_each_word_of_the_context_shows(context):
    assert not np.array_equal(draw("star", "comic"), draw("star", "comic", **context))


def test_the_base_model_is_not_shown_what_is_held_out():
    _, prompts = train._base_pictures(seed=1, count=400)
    words = {word for prompt in prompts for word in prompt.split()}
    assert set(world.BASE_SUBJECTS) | set(world.BASE_STYLES) <= words
    assert not words & set(HELD_OUT)
    assert not set(model.VOCABULARY) & set(HELD_OUT)


@pytest.mark.parametrize("seed", range(20))
def test_a_made_up_thing_in_a_made_up_style_can_be_seen(seed):
    rng = np.random.default_rng(seed)
    thing, style, context = world.random_subject(rng), world.random_style(rng), world.Context()
    picture, mask = world.draw(thing, style, context, np.random.default_rng(seed), mask=True)
    ground = world.draw([], style, context, np.random.default_rng(seed))
    assert 0.005 < mask.mean() < 0.6
    assert np.abs(picture[mask].astype(int) - ground[mask]).mean() > 25


# -- patches and measures --------------------------------------------------------------------------


def test_pictures_survive_being_cut_into_patches():
    pictures = np.stack([draw(subject, "comic") for subject in world.BASE_SUBJECTS])
    assert np.array_equal(model.to_pictures(model.to_patches(pictures)), pictures)


@pytest.mark.parametrize("style", world.HELD_OUT_STYLES)
def test_the_palette_is_nearest_to_its_own_style(style):
    picture = draw("mug", style, seed=91)
    distances = {s: judges.palette_distance(picture, "mug", s) for s in world.STYLES}
    assert min(distances, key=distances.get) == style


def test_the_silhouette_tells_subjects_apart():
    found = []
    for subject in world.HELD_OUT_SUBJECTS:
        for style in world.HELD_OUT_STYLES:
            picture = draw(subject, style, seed=92)
            fit = {s: judges.silhouette_iou(picture, s) for s in judges.SUBJECTS}
            found.append(max(fit, key=fit.get) == subject)
    assert np.mean(found) > 0.75


@pytest.mark.parametrize(("kind", "names"), [("subject", judges.SUBJECTS),
                                             ("style", judges.STYLES)])  # fmt: skip
def test_the_judges_name_drawn_pictures_rightly(kind, names):
    pairs = [(c, s) for c in world.SUBJECTS for s in world.STYLES]
    pictures = np.stack([draw(*pair, seed=90) for pair in pairs])
    wanted = [pair[kind == "style"] for pair in pairs]
    named = [names[i] for i in judges.probabilities(kind, pictures).argmax(1)]
    assert np.mean([a == b for a, b in zip(named, wanted, strict=True)]) > 0.97


# -- the files -------------------------------------------------------------------------------------


def test_what_ships_is_small():
    files = [path for path in model.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * MEGABYTE


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_loras_are_ordinary_files(name, playground):
    tensors = SafetensorsFile(model.WEIGHTS / "loras" / f"{name}.safetensors")
    file = parse_lora(name, tensors)
    projections = [
        path
        for path, _ in playground.model.unet.named_modules()
        if re.search(r"attn\d\.to_(q|k|v|out\.0)$", path)
    ]
    assert len(file.layers) == len(projections) > 50
    assert all(is_attention(layer, file.family) for layer in file.layers)
    assert {layer.rank for layer in file.layers.values()} == {train.LORA_RANK}


# -- generating ------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_picture_and_the_model_stays(playground):
    before = {n: p.detach().clone() for n, p in playground.model.unet.named_parameters()}
    prompt = K_LORA.prompt("cat", "lava")
    first, _ = playground.generate(prompt, [5], K_LORA.settings, steps=4)
    second, _ = playground.generate(prompt, [5], K_LORA.settings, steps=4)
    other, _ = playground.generate(prompt, [6], K_LORA.settings, steps=4)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    for name, parameter in playground.model.unet.named_parameters():
        assert torch.equal(parameter, before[name]), name


# -- what is shown ---------------------------------------------------------------------------------


def test_the_demo_shows_every_way_with_its_map(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo", "--out", "shown", "--pairs", "1"])
    demo.main()
    table, page = capsys.readouterr().out, Path("shown/index.html").read_text(encoding="utf-8")
    for way in demo.WAYS:
        assert way.name in table
        assert way.name in page
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 3  # the pictures, and the maps of S and S*
    for name in (*sources, "demo.png"):
        with Image.open(Path("shown", name)) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_the_evaluation_is_of_all_ways_as_they_are_now():
    text = (ROOT / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
    template = (ROOT / "playground" / "evaluation.md").read_text(encoding="utf-8")
    for part in re.split(r"<!-- \w+ -->", template):
        assert part in text
    tables = (ways.METHOD_WAYS, ways.MULTIPLIERS, ways.STEP_COUNTS, ways.GAMMAS, ways.STRENGTHS)
    for table in tables:
        for way in table.values() if isinstance(table, dict) else table:
            assert f"| {way.name} |" in text


# -- quality ---------------------------------------------------------------------------------------


ENOUGH = 0.5
RISING = Way("from subject to style", settings=Settings(alpha=1, beta=0))
"""S(t) from 0 to 1: the way in which the order of the steps decides most."""
UNEQUAL = replace(STRENGTHS["style", "K-LoRA"], settings=Settings(scale="S*"))
"""For style files that are stronger than the content files, as files from elsewhere may be."""


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    folder = strengthened(STRONG, world.HELD_OUT_STYLES, tmp_path_factory.mktemp("strong"))
    return Playground(folder=folder, cache=tmp_path_factory.mktemp("cache"))


def quality(playground: Playground, way: Way) -> float:
    """Over all pairs, the mean of subject score × style score, 0..1."""
    scores, _ = judge(playground, way, PAIRS, seeds=[0])
    return float(scores.both.mean())


def test_the_pictures_show_the_subject_in_the_style(playground):
    assert quality(playground, RISING) > ENOUGH


def test_steps_in_the_wrong_order_would_be_seen(playground, monkeypatch):
    right = plan.progress
    monkeypatch.setattr(plan, "progress", lambda *passed: right(*passed)[::-1])
    assert quality(playground, RISING) < ENOUGH / 2


def test_files_of_unequal_strength_fuse_as_well(unequal):
    assert quality(unequal, UNEQUAL) > ENOUGH


@pytest.mark.parametrize("wrong", ["one", "upside down"])
def test_a_wrong_gamma_would_be_seen(unequal, monkeypatch, wrong):
    right = klora.gamma_paper
    broken = {"one": lambda c, s: 1.0, "upside down": lambda c, s: right(s, c)}[wrong]
    monkeypatch.setattr(klora, "gamma_paper", broken)
    assert quality(unequal, UNEQUAL) < ENOUGH - 0.1
