"""The small world's pictures, and the measures that need no training. Its model is not trained
yet."""

import numpy as np
import pytest

from playground import judges, model, train, world

HELD_OUT = (*world.HELD_OUT_SUBJECTS, *world.HELD_OUT_STYLES)


def draw(subject, style, seed=0, **context):
    return world.draw(subject, style, world.Context(**context), np.random.default_rng(seed))


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


# -- patches and measures -----------------------------------------------------------------------


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
