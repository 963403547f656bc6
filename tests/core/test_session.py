"""One generation after another through the session, on a host in memory and real files."""

import logging
import math
import os
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_host import FakeHost, Model, Processing
from lora_samples import attention_prefixes, linear, linears
from safetensors.torch import save_file

from lib_klora import infotext
from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.methods import BITS, METHODS
from lib_klora.pair import pair_files
from lib_klora.plan import make_plan
from lib_klora.projection import project
from lib_klora.scores import compute_scores
from lib_klora.session import Session
from lib_klora.settings import Settings, from_args
from lib_klora.steps import Pass
from lib_klora.tensor_file import SafetensorsFile

OFF = Settings(enabled=False)  # the accordion is off: the defaults for tags
PREFIXES = attention_prefixes(8)
TAGS = [["cat", "1"], ["ink", "1"]]


@pytest.fixture
def folder(tmp_path):
    for seed, (name, rank) in enumerate((("cat", 4), ("ink", 2), ("oil", 3))):
        tensors = linears(PREFIXES, rank=rank, seed=seed)
        for i, prefix in enumerate(PREFIXES):
            tensors[f"{prefix}.alpha"] = torch.tensor(rank * (1.0 + ((seed * 3 + i) % 5) / 4))
        tensors |= linear("lora_te_text_model_encoder_layers_0_mlp_fc1", rank, seed=seed)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def host(folder):
    return FakeHost(folder, Model(PREFIXES))


@pytest.fixture
def session(host):
    return Session(host)


def call(i, steps=4, t0=0.0) -> Callable[[], Pass]:
    return partial(Pass, i, steps, t0)


def generate(session, tags=TAGS, settings=OFF, p=None, steps=4) -> Processing:
    """One txt2img as the hosts run it: take back, activate, a model call a step."""
    p = p or Processing()
    session.begin(p)
    session.activate(p, tags, settings)
    for i in range(steps):
        session.before_model_call(call(i, steps))
        session.after_model_call()
    return p


def plan_of(folder, settings=OFF, steps=4, t0=0.0, names=("cat", "ink")):
    files = [parse_lora(n, SafetensorsFile(folder / f"{n}.safetensors")) for n in names]
    pair = pair_files(*files, layers=settings.layers)
    return make_plan(pair, compute_scores(pair), settings, steps, t0)


def selected(host):
    return [entry[1].tolist() for entry in host.asked if entry[0] == "select"]


class TestOneGeneration:
    def test_every_call_gets_the_plans_row(self, session, host, folder):
        generate(session)
        assert selected(host) == plan_of(folder).choice[:4].tolist()
        assert host.attached is not None

    def test_only_flips_are_rebuilt(self, session, host, folder):
        generate(session, steps=20)
        rows = plan_of(folder, steps=20).choice[:20]
        assert host.rebuilt == [0, *(rows[1:] != rows[:-1]).sum(axis=1).tolist()]
        assert sum(host.rebuilt) > 0

    def test_two_calls_of_a_step_share_the_choice(self, session, host, folder):
        p = Processing()
        session.activate(p, TAGS, OFF)
        for i in (0, 0, 1, 1, 2, 2, 3):
            session.before_model_call(call(i, 4))
        rows = plan_of(folder).choice.tolist()
        assert selected(host) == [rows[i] for i in (0, 0, 1, 1, 2, 2, 3)]

    def test_calls_past_the_end_stay_on_the_last_row(self, session, host, folder):
        session.activate(p := Processing(), TAGS, OFF)
        session.before_model_call(call(83, 4))
        assert selected(host) == [plan_of(folder).choice[4].tolist()]
        assert not p.comments

    def test_no_tags_and_accordion_off_is_nothing(self, session, host):
        p = generate(session, tags=[])
        assert host.attached is None
        assert not p.comments
        assert p.extra_generation_params == {"Other": "stays"}
        assert host.count("read") == host.count("select") == 0

    def test_the_hashes_of_the_files_in_use(self, session):
        p = generate(session)
        assert session.hashes(p) == {"cat": "hash_cat", "ink": "hash_ink"}
        assert session.hashes(Processing()) == {}
        assert session.hashes(generate(session, tags=[], p=p)) == {}

    def test_written_into_the_picture(self, session):
        p = generate(session, settings=Settings(enabled=False, alpha=2))
        assert p.extra_generation_params == {
            "Other": "stays",
            infotext.KEY: "alpha=2; files=hash_cat+hash_ink",
        }
        assert not p.comments

    def test_hashes_are_content_then_style_whatever_the_tags_order(self, session, host):
        p = generate(session, tags=[["ink", "1", "s"], ["cat", "1"]])
        assert p.extra_generation_params[infotext.KEY] == "files=hash_cat+hash_ink"
        assert [tag.name for tag in host.attached.tags.in_order()] == ["ink", "cat"]

    def test_loras_named_in_the_settings_instead_of_tags(self, session, host):
        settings = Settings(content="cat", style="ink", content_weight=0.7, style_weight=-1)
        p = generate(session, tags=[], settings=settings)
        tags = host.attached.tags
        assert (tags.content.name, tags.content.te, tags.content.unet) == ("cat", 0.7, 0.7)
        assert (tags.style.name, tags.style.te, tags.style.unet) == ("ink", -1, -1)
        assert "content=cat; style=ink" in p.extra_generation_params[infotext.KEY]

    def test_tags_win_over_named_loras_and_say_so(self, session, host):
        p = generate(session, settings=Settings(content="oil", style="oil"))
        assert host.attached.tags.content.name == "cat"
        (comment,) = p.comments
        assert "tags are used" in comment
        assert "oil" not in p.extra_generation_params[infotext.KEY]

    def test_one_file_in_both_roles(self, session, host):
        p = generate(session, tags=[["cat", "1"], ["cat", "0.5"]])
        assert not p.comments
        assert host.attached is not None
        assert host.count("load") == 2

    @pytest.mark.parametrize("te", [True, False])
    def test_text_encoder_setting_reaches_the_host(self, session, host, te):
        generate(session, settings=Settings(enabled=False, text_encoder=te))
        assert host.attached.te is te

    def test_layers_of_one_file_only_reach_the_host(self, session, host, folder, log):
        save_file(linears(PREFIXES[:6], seed=7), folder / "short.safetensors")
        p = generate(session, tags=[["cat"], ["short"]])
        assert len(host.attached.layers) == 6
        assert set(host.attached.unpaired.values()) == {"content"}
        assert len(host.attached.unpaired) == 2
        assert len(host.applied) == 8
        assert infotext.ERROR_KEY not in p.extra_generation_params
        assert "2 layers are only in “cat” (keep)." in log.text


class TestPasses:
    """Batches, hires, img2img and nested generations: each activates anew, as the hosts do."""

    @pytest.mark.parametrize(("progress", "t0"), [("continue", 0.4), ("restart", 0.0)])
    def test_img2img_starts_where_the_strength_says(self, session, host, folder, progress, t0):
        settings = Settings(enabled=False, progress=progress)
        session.activate(Processing(), TAGS, settings)
        for i in range(5):
            session.before_model_call(call(i, 5, t0=0.4))
        assert selected(host) == plan_of(folder, steps=5, t0=t0).choice[:5].tolist()

    def test_first_and_hires_pass_have_their_own_plans(self, session, host, folder):
        p = Processing(enable_hr=True)
        session.activate(p, TAGS, OFF)
        for i in range(4):
            session.before_model_call(call(i, 4))
        p.is_hr_pass = True
        session.activate(p, TAGS, OFF)
        for i in range(3):
            session.before_model_call(call(i, 3, t0=0.5))
        expected = [
            *plan_of(folder, steps=4).choice[:4].tolist(),
            *plan_of(folder, steps=3, t0=0.5).choice[:3].tolist(),
        ]
        assert selected(host) == expected
        assert host.count("read") == 2

    def test_hires_with_other_tags_has_its_own_pair_and_the_pictures_text_is_the_firsts(
        self, session, host
    ):
        p = Processing(enable_hr=True)
        session.activate(p, TAGS, OFF)
        p.is_hr_pass = True
        session.activate(p, [["cat"], ["oil"]], OFF)
        session.before_model_call(call(0))
        assert host.attached.tags.style.name == "oil"
        assert p.extra_generation_params[infotext.KEY] == "files=hash_cat+hash_ink"

    def test_alternating_hires_activations_read_no_file_twice(self, session, host):
        # --medvram and Forge activate the main and the hires prompt in turn, several times.
        p = Processing(enable_hr=True)
        for hires, style in ((False, "ink"), (True, "oil"), (False, "ink"), (True, "oil")):
            p.is_hr_pass = hires
            session.activate(p, [["cat"], [style]], OFF)
        assert host.count("load") == 3
        assert host.count("fuse") == 2

    def test_files_of_earlier_generations_are_let_go_with_hires_too(self, session, folder):
        """One pair for the first pass and one for the hires pass, however many there were."""
        for i in range(5):
            for name in ("cat", "ink"):
                save_file(linears(PREFIXES, seed=50 + i), folder / f"{name}{i}.safetensors")
        for i in range(5):
            p = Processing(enable_hr=True)
            session.activate(p, [[f"cat{i}"], [f"ink{i}"]], OFF)
            p.is_hr_pass = True
            session.activate(p, [[f"cat{i}"], ["oil"]], OFF)
            assert len(session._loader._loras) <= 4
            assert len(session._loader._pairs) <= 2
        generate(session)
        assert len(session._loader._loras) == 2

    def test_hires_again_reads_no_file_again(self, session, host):
        for _ in range(2):
            p = Processing(enable_hr=True)
            for hires, style in ((False, "ink"), (True, "oil")):
                p.is_hr_pass = hires
                session.activate(p, [["cat"], [style]], OFF)
        assert host.count("load") == 3

    def test_named_loras_go_on_in_a_hires_pass_without_tags(self, session, host):
        named = Settings(content="cat", style="oil")
        p = Processing(enable_hr=True, extra_network_data={}, hr_extra_network_data={})
        session.activate(p, [], named)
        p.is_hr_pass = True
        session.activate(p, [], named)
        assert host.attached.tags.style.name == "oil"

    def test_the_host_begins_with_the_choice_of_the_passes_start(self, session, host, folder):
        # A script may call the model before the first step.
        generate(session)
        settings = Settings(enabled=False, alpha=3)
        wanted = plan_of(folder, settings, steps=1, t0=0.6).row(0)
        session.activate(Processing(), TAGS, settings, 0.6)
        assert host.began_with[-1].tolist() == wanted.tolist()
        assert wanted.tolist() != plan_of(folder, settings, steps=1).row(0).tolist()

    @pytest.mark.parametrize("settings", [OFF, Settings(content="cat", style="oil")])
    def test_hires_without_tags_runs_without_where_the_prompt_has_tags(
        self, session, host, settings
    ):
        p = Processing(enable_hr=True, extra_network_data={"klora": TAGS})
        session.activate(p, TAGS, settings)
        p.is_hr_pass = True
        session.activate(p, [], settings)
        session.before_model_call(call(0))
        assert host.attached is None
        assert infotext.ERROR_KEY not in p.extra_generation_params

    def test_every_batch_activates_and_reads_nothing(self, session, host):
        p = Processing()
        for _ in range(3):
            session.activate(p, TAGS, OFF)
            session.before_model_call(call(0))
        assert host.count("read") == 2
        assert host.count("fuse") == 1
        assert host.attached is not None

    def test_lora_activation_afterwards_attaches_again(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        host.attached = None  # <lora:>'s activation begins its list anew
        session.attach(p)
        assert host.attached is not None

    def test_activation_of_another_generation_attaches_nothing(self, session, host):
        session.activate(Processing(), TAGS, OFF)
        session.attach(Processing())  # ADetailer's inner img2img, without our tags
        assert host.attached is None

    def test_nested_generation_without_tags_then_the_next_batch(self, session, host, folder):
        outer, inner = Processing(), Processing()
        session.activate(outer, TAGS, OFF)
        session.activate(inner, [], OFF)
        session.before_model_call(call(0))
        assert host.attached is None
        assert not selected(host)
        session.activate(outer, TAGS, OFF)
        session.before_model_call(call(0))
        assert selected(host) == plan_of(folder).choice[:1].tolist()


class TestBetweenGenerations:
    def test_pair_is_kept(self, session, host):
        for _ in range(3):
            generate(session)
        assert host.count("read") == host.count("load") == 2
        assert host.count("fuse") == 1

    @pytest.mark.parametrize(
        "settings", [{"alpha": 2}, {"beta": 0.1}, {"scale": "S*"}, {"gamma": "authors"}]
    )
    def test_what_only_moves_the_plan_reads_nothing(self, session, host, folder, settings):
        generate(session)
        host.asked.clear()
        settings = Settings(enabled=False, **settings)
        generate(session, settings=settings)
        assert host.count("read") == host.count("fuse") == 0
        assert selected(host) == plan_of(folder, settings).choice[:4].tolist()

    @pytest.mark.parametrize(
        "changed",
        [{"text_encoder": False}, {"layers": "all"}, {"unpaired": "drop"}, {"top_k": 0.5}],
    )
    def test_what_changes_the_pair_is_as_in_a_new_session(self, folder, changed):
        alone, other = attention_prefixes(9)[8], "lora_unet_conv_out"
        tensors = linears([*PREFIXES, alone, other], rank=4, seed=7)
        save_file(tensors, folder / "cat.safetensors")
        save_file(linears([*PREFIXES, other], rank=2, seed=8), folder / "ink.safetensors")

        def seen(host, session, settings):
            p = generate(session, settings=settings)
            fusion, (done,) = host.attached, session.report(p).passes
            ks = [layer.k for layer in done.pair.paired]
            return fusion.te, fusion.layers, fusion.unpaired, ks, host.applied

        hosts = [FakeHost(folder, Model([*PREFIXES, alone, other])) for _ in range(2)]
        used, new = map(Session, hosts)
        before = seen(hosts[0], used, OFF)
        after = seen(hosts[0], used, Settings(enabled=False, **changed))
        assert after == seen(hosts[1], new, Settings(enabled=False, **changed)) != before

    def test_weights_read_nothing_and_fuse_anew(self, session, host):
        generate(session)
        generate(session, tags=[["cat", "0.5"], ["ink", "2"]])
        assert host.count("read") == 2
        assert host.count("fuse") == 2
        assert host.attached.tags.content.unet == 0.5

    def test_another_style_reads_only_that(self, session, host):
        generate(session)
        generate(session, tags=[["cat"], ["oil"]])
        assert [name for what, name, *_ in filter(len2, host.asked) if what == "load"] == [
            "cat",
            "ink",
            "oil",
        ]
        assert len(session._loader._pairs) == len(session._loader._fusions) == 1

    def test_the_fusions_used_last_are_kept_and_few(self, session, host):
        for weight in range(2, 9):
            generate(session)
            generate(session, tags=[["cat", str(weight)], ["ink"]])
        assert host.count("fuse") == 8
        assert len(session._loader._fusions) == 4

    def test_a_preview_keeps_its_pair_only(self, session, folder):
        for i in range(3):
            save_file(linears(PREFIXES, seed=50 + i), folder / f"cat{i}.safetensors")
            session.preview([[f"cat{i}"], ["ink"]], OFF, 4)
        assert len(session._loader._loras) == 2
        assert len(session._loader._pairs) == 1

    def test_files_of_earlier_generations_are_let_go(self, session, host):
        generate(session)
        generate(session, tags=[["oil"], ["cat"]])
        host.asked.clear()
        generate(session)  # ink was let go and must be read again
        assert ("load", "ink") in host.asked

    def test_changed_file_is_read_again(self, session, host, folder):
        generate(session)
        save_file(linears(PREFIXES, rank=4, seed=40), folder / "cat.safetensors")
        os.utime(folder / "cat.safetensors", ns=(1, 1))
        host.asked.clear()
        generate(session)
        assert ("load", "cat") in host.asked
        assert selected(host) == plan_of(folder).choice[:4].tolist()

    def test_another_checkpoint_loads_the_files_for_it(self, session, host):
        generate(session)
        first = host.attached
        host.present = Model(PREFIXES)
        generate(session)
        assert host.count("load") == 4
        assert host.attached is not first

    def test_a_checkpoint_with_fewer_layers_has_a_pair_of_its_own(self, session, host):
        generate(session)
        host.present = Model(PREFIXES[1:])
        p = generate(session)
        assert len(host.attached.layers) == 7
        assert [" fit this model" in comment for comment in p.comments] == [True, True]

    def test_next_generation_without_tags_is_clean(self, session, host):
        generate(session)
        p = generate(session, tags=[])
        assert host.attached is None
        assert not host.applied
        assert p.extra_generation_params == {"Other": "stays"}

    def test_next_generation_is_clean_after_one_that_stopped_anywhere(self, session, host):
        # Neither deactivate nor postprocess: an exception in sampling skips both.
        session.activate(Processing(), TAGS, OFF)
        session.before_model_call(call(0))
        generate(session, tags=[])
        assert host.attached is None

    def test_detach_is_repeatable(self, session, host):
        generate(session)
        session.detach()
        session.detach()
        session.before_model_call(call(0))
        assert host.attached is None

    def test_infotext_of_a_generation_run_twice_is_not_mixed(self, session):
        p = generate(session, tags=[["cat"]])
        assert infotext.ERROR_KEY in p.extra_generation_params
        generate(session, p=p)
        assert infotext.ERROR_KEY not in p.extra_generation_params
        assert infotext.KEY in p.extra_generation_params


class TestReport:
    """What the page shows of a generation: one entry for each kind of pass."""

    def passes(self, session, p):
        return [(done.hires, done.plan.steps) for done in session.report(p).passes]

    def test_a_batch_count_is_one_pass(self, session):
        p = Processing()
        for _ in range(3):
            session.activate(p, TAGS, OFF)
            for i in range(4):
                session.before_model_call(call(i))
        assert self.passes(session, p) == [(False, 4)]

    def test_another_pair_in_the_next_batch_is_another(self, session):
        p = Processing()
        for style in ("ink", "oil", "ink"):
            session.activate(p, [["cat"], [style]], OFF)
            session.before_model_call(call(0))
        assert [done.names for done in session.report(p).passes] == [("cat", "ink"), ("cat", "oil")]

    def test_the_hires_pass_is_told_apart(self, session):
        p = Processing(enable_hr=True)
        for hires in (False, True):
            p.is_hr_pass = hires
            session.activate(p, TAGS, OFF)
            session.before_model_call(partial(Pass, 0, 4, 0.0, hires))
        assert self.passes(session, p) == [(False, 4), (True, 4)]

    @pytest.mark.parametrize("failing", [0, 1, None])
    def test_a_picture_without_in_a_batch_count(self, session, failing):
        p = Processing()
        for p.iteration in range(2):
            session.activate(p, [["nowhere"], ["ink"]] if p.iteration == failing else TAGS, OFF)
            session.before_model_call(call(0))
        report = session.report(p)
        assert self.passes(session, p) == [(False, 4)]
        assert report.has_picture_without is (failing is not None)

    def test_a_hires_pass_without_is_no_picture_without(self, session):
        p = Processing(enable_hr=True)
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        p.is_hr_pass = True
        session.activate(p, [["nowhere"], ["ink"]], OFF)
        assert session.report(p).error
        assert not session.report(p).has_picture_without

    def test_a_batch_count_tells_a_note_once(self, session):
        p = Processing()
        for _ in range(3):
            session.activate(p, TAGS, Settings(content="oil", style="oil"))
        assert len(session.report(p).notes) == 1

    def test_the_next_generation_of_the_same_object_begins_anew(self, session):
        # Loopback and the img2img batch run one object several times.
        p = generate(session)
        generate(session, p=p, steps=7)
        assert self.passes(session, p) == [(False, 7)]

    def test_a_generation_within_another_has_its_own(self, session):
        # A detailer works on each finished picture.
        outer, inner = Processing(), Processing()
        for p, tags in ((outer, TAGS), (inner, [["cat"], ["oil"]])):
            session.activate(p, tags, OFF)
            session.before_model_call(call(0))
        assert [done.names for done in session.report(outer).passes] == [("cat", "ink")]
        assert [done.names for done in session.report(inner).passes] == [("cat", "oil")]

    def test_few_are_kept(self, session):
        kept = [generate(session) for _ in range(6)]
        assert session.report(kept[0]) is None
        assert session.report(kept[-1]) is not None

    def test_an_error_is_told_whichever_generation_it_is_of(self, host):
        told = []
        session = Session(host, on_error=told.append)
        outer = Processing()
        session.begin(outer)
        session.activate(outer, TAGS, OFF)
        session.activate(Processing(), TAGS[:1], OFF)
        assert len(told) == 1
        assert "exactly two" in told[0]
        assert not session.report(outer).error

    def test_an_error_in_one_batch_leaves_the_others(self, session):
        p = Processing()
        session.activate(p, [["cat"], ["nowhere"]], OFF)
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        assert "nowhere" in session.report(p).error
        assert self.passes(session, p) == [(False, 4)]

    def test_a_pass_that_fails_is_no_pass(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        host.fails_in = "select"
        session.before_model_call(call(1))
        assert session.report(p).error
        assert self.passes(session, p) == []


class TestErrorInTheHiresPass:
    @pytest.fixture
    def p(self, session):
        p = Processing(enable_hr=True)
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        p.is_hr_pass = True
        return p

    def test_the_first_passs_parameter_stays(self, session, p):
        before = p.extra_generation_params[infotext.KEY]
        session.activate(p, [["cat"]], OFF)
        assert p.extra_generation_params[infotext.KEY] == before
        error = p.extra_generation_params[infotext.ERROR_KEY]
        assert error.endswith("The first pass has K-LoRA, the hires pass does not.")
        assert any("hires pass does not" in comment for comment in p.comments)

    def test_also_if_it_fails_between_two_steps(self, session, host, p):
        session.activate(p, TAGS, OFF)
        host.fails_in = "select"
        session.before_model_call(call(0))
        assert infotext.KEY in p.extra_generation_params
        assert "hires pass does not" in p.extra_generation_params[infotext.ERROR_KEY]

    def test_without_a_first_pass_it_is_as_in_one(self, session):
        p = Processing(enable_hr=True, is_hr_pass=True)
        session.activate(p, [["cat"]], OFF)
        assert infotext.KEY not in p.extra_generation_params
        assert "first pass" not in p.extra_generation_params[infotext.ERROR_KEY]


class TestOtherExtensions:
    def test_what_they_changed_is_settled_for_their_generation_alone(self, session, host):
        p = Processing()
        session.settle(p)
        session.activate(p, TAGS, OFF)
        session.settle(Processing())
        assert host.count("settle") == 0
        session.settle(p)
        assert host.count("settle") == 1

    def test_a_failure_ends_k_lora(self, session, host):
        session.activate(p := Processing(), TAGS, OFF)
        host.fails_in = "settle"
        session.settle(p)
        assert "settle broke" in p.extra_generation_params[infotext.ERROR_KEY]
        assert host.attached is None


class TestErrorAtTheRefiner:
    """A refiner takes a pass over between two of its steps, and the host activates once more."""

    @pytest.fixture
    def p(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        host.present = Model(["lora_unet_unrelated"])
        return p

    def test_the_steps_before_keep_their_parameter(self, session, host, p):
        before = p.extra_generation_params[infotext.KEY]
        session.activate(p, TAGS, OFF)
        assert p.extra_generation_params[infotext.KEY] == before
        error = p.extra_generation_params[infotext.ERROR_KEY]
        assert "does not fit this model" in error
        assert error.endswith("before the refiner have K-LoRA, the refiner's do not.")
        assert any("the refiner's do not" in comment for comment in p.comments)
        assert host.attached is None

    def test_an_empty_generation_while_the_refiner_is_loaded(self, session, p):
        """AUTOMATIC1111's and reForge's get_empty_cond."""
        before = p.extra_generation_params[infotext.KEY]
        session.activate(Processing(), [], OFF)
        session.activate(p, TAGS, OFF)
        assert p.extra_generation_params[infotext.KEY] == before
        assert p.extra_generation_params[infotext.ERROR_KEY].endswith("the refiner's do not.")

    def test_the_same_request_again_begins_anew(self, session, p):
        session.begin(p)
        session.activate(p, TAGS, OFF)
        assert "refiner" not in p.extra_generation_params[infotext.ERROR_KEY]

    def test_the_next_image_of_the_batch_count_begins_anew(self, session, p):
        p.iteration = 1
        session.activate(p, TAGS, OFF)
        assert infotext.KEY not in p.extra_generation_params
        assert "refiner" not in p.extra_generation_params[infotext.ERROR_KEY]

    def test_what_failed_before_it_stays_so_and_stays_told(self, session, host, p):
        host.present, host.fails_in = Model(PREFIXES), "select"
        session.before_model_call(call(3))
        error = p.extra_generation_params[infotext.ERROR_KEY]
        host.fails_in = None
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(3))
        assert p.extra_generation_params[infotext.ERROR_KEY] == error
        assert infotext.KEY not in p.extra_generation_params
        assert host.attached is None
        p.iteration = 1
        session.activate(p, TAGS, OFF)
        assert infotext.ERROR_KEY not in p.extra_generation_params
        assert infotext.KEY in p.extra_generation_params

    def test_a_picture_within_the_pass_is_none(self, session, p):
        inner = Processing()
        session.activate(inner, TAGS[:1], OFF)
        assert "refiner" not in inner.extra_generation_params[infotext.ERROR_KEY]


def len2(entry):
    return len(entry) > 1


NO_TE = Settings(enabled=False, text_encoder=False)
STATES = {
    "none": ([], OFF),
    "pair": (TAGS, OFF),
    "other te weight": ([["cat", "0.5", "1"], ["ink"]], OFF),
    "other file": ([["cat"], ["oil"]], OFF),
    "other order": ([["ink", "s"], ["cat"]], OFF),
    "without te": (TAGS, NO_TE),
    "error": ([["cat"]], OFF),
}


class TestTextState:
    """What the hosts' caches of encoded text are told is the same exactly when the text encoders
    are."""

    def state(self, session, tags, settings):
        p = generate(session, tags, settings)
        return session.text_state(p)

    @pytest.mark.parametrize("before", STATES)
    @pytest.mark.parametrize("after", STATES)
    def test_it_tells_every_two_states_apart(self, session, before, after):
        nothing = {"none", "error"}
        same = before == after or {before, after} <= nothing
        states = [self.state(session, *STATES[name]) for name in (before, after)]
        assert (states[0] == states[1]) is same
        assert (repr(states[0]) == repr(states[1])) is same

    @pytest.mark.parametrize("name", ["none", "error"])
    def test_nothing_is_none(self, session, name):
        assert self.state(session, *STATES[name]) is None

    def test_a_file_that_was_replaced(self, session, folder):
        before = self.state(session, TAGS, OFF)
        path = folder / "cat.safetensors"
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
        assert self.state(session, TAGS, OFF) != before

    @pytest.mark.parametrize(
        "settings", [{"alpha": 3}, {"scale": "none"}, {"layers": "all"}, {"unpaired": "drop"}]
    )
    def test_what_the_text_encoder_does_not_see(self, session, settings):
        before = self.state(session, TAGS, OFF)
        assert self.state(session, TAGS, Settings(enabled=False, **settings)) == before

    def test_unet_weight(self, session):
        before = self.state(session, TAGS, OFF)
        assert self.state(session, [["cat", "1", "0.3"], ["ink", "unet=2"]], OFF) == before

    def test_another_generation_has_none_of_it(self, session):
        p = generate(session)
        assert session.text_state(p) is not None
        assert session.text_state(Processing()) is None

    def test_failed_attach_does_not_pass_for_the_pairs_state(self, session, host):
        host.fails_in = "attach"
        p = generate(session)
        assert session.text_state(p) is None


def nan_file():
    tensors = linears(PREFIXES, seed=1)
    tensors[f"{PREFIXES[3]}.lora_up.weight"][0, 0] = math.nan
    return tensors


BAD_FILES = {
    "no_lora": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)},
    "nans": nan_file(),
    "zero_rank": {
        f"{PREFIXES[0]}.lora_up.weight": torch.ones(8, 0),
        f"{PREFIXES[0]}.lora_down.weight": torch.ones(0, 8),
    },
    "other_family": linears([p.replace("_down_blocks_0", "_joint_blocks_0") for p in PREFIXES]),
    "other_shape": linears(PREFIXES, size=16),
    "same_count_other_shape": {  # 4 × 16 entries for a weight of 8 × 8
        key: torch.ones(4, 2) if "up" in key else torch.ones(2, 16) for key in linears(PREFIXES)
    },
    "control_lora": {"lora_controlnet": torch.ones(1), "input_blocks.1.0.up": torch.ones(2, 2)},
    "lllite": {"lllite_unet_input_blocks_4_1.down.0.weight": torch.ones(2, 2)},
    "for_a_controlnet": linears([p.replace("unet", "controlnet") for p in PREFIXES]),
    "te_only": linear("lora_te_text_model_encoder_layers_0_mlp_fc1"),
}


@pytest.fixture
def bad_folder(folder):
    for name, tensors in BAD_FILES.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "cat.safetensors").read_bytes()[:900])
    (folder / "empty.safetensors").write_bytes(b"")
    return folder


def args(*values) -> Settings | KLoraError:
    """The accordion's or the API's values, as webui hands them to the session."""
    try:
        return from_args(values) or OFF
    except KLoraError as error:
        return error


NO_TAGS = []
WRONG = [
    # (tags, settings, what the sentence quotes)
    ([["cat"]], OFF, ["“cat”", "exactly two"]),
    ([["cat"], ["ink"], ["oil"]], OFF, ["“oil”", "exactly two"]),
    ([["cat", "c"], ["ink", "content"]], OFF, ["cat", "ink", "content"]),
    ([["cat", "s"], ["ink", "role=style"]], OFF, ["cat", "ink", "style"]),
    ([["kat"], ["ink"]], OFF, ["“kat”"]),
    ([["cat"], ["inc"]], OFF, ["“inc”"]),
    *[([["cat"], [name]], OFF, [name]) for name in (*BAD_FILES, "truncated", "empty")],
    *[([["cat"], [name]], OFF, ["is for a ControlNet"]) for name in ("control_lora", "lllite")],
    ([["cat"], ["for_a_controlnet"]], OFF, ["made for a ControlNet", "is Stable Diffusion"]),
    ([["other_family"], ["ink"]], OFF, ["other_family", "Stable Diffusion 3", "0 of its 8"]),
    ([["cat", "nan"], ["ink"]], OFF, ["<klora:cat:nan>"]),
    ([["cat", "1", "inf"], ["ink"]], OFF, ["<klora:cat:1:inf>"]),
    ([["cat", "strong"], ["ink"]], OFF, ["“strong”"]),
    ([["cat", "role=artist"], ["ink"]], OFF, ["“artist”"]),
    ([[""], ["ink"]], OFF, ["<klora:>"]),
    (NO_TAGS, args({"content": "cat"}), ["content", "no style"]),
    (NO_TAGS, args({"style": "ink"}), ["style", "no content"]),
    (NO_TAGS, args({"content": "kat", "style": "ink"}), ["“kat”"]),
    (NO_TAGS, args({"content_weight": math.nan}), ["content_weight", "nan"]),
    (NO_TAGS, args({}), ["no LoRAs are given"]),
    (TAGS, args({"alhpa": 1}), ["“alhpa”"]),
    (TAGS, args({"alpha": "much"}), ["alpha", "'much'"]),
    (TAGS, args({"alpha": -1}), ["alpha", "-1"]),
    (TAGS, args({"alpha": math.nan}), ["alpha", "nan"]),
    (TAGS, args({"alpha": math.inf}), ["alpha", "inf"]),
    (TAGS, args({"scale": "Q"}), ["scale", "'Q'"]),
    (TAGS, args({"text_encoder": 1}), ["text_encoder", "true or false"]),
    (TAGS, args({"method": "ZipLoRA"}), ["method", "ZipLoRA"]),
    (TAGS, args(True, 1.5, math.nan), ["beta", "nan"]),
    (TAGS, args("yes"), ["enabled", "'yes'"]),
]  # fmt: skip


def wrong_id(case) -> str:
    tags, settings, quoted = case
    written = " ".join(":".join(tag) for tag in tags) or "no tags"
    return f"{written}, {quoted[0]}" if isinstance(settings, KLoraError) else written


@pytest.mark.parametrize("wrong", WRONG, ids=wrong_id)
class TestWhatBadInputGets:
    def test_one_sentence_everywhere_and_no_k_lora(self, host, bad_folder, log, wrong):
        tags, settings, quoted = wrong
        session = Session(host)
        before = {path: path.read_bytes() for path in bad_folder.iterdir()}

        p = generate(session, tags, settings)

        assert host.attached is None
        assert not host.applied
        assert host.count("select") == 0
        sentence = p.extra_generation_params[infotext.ERROR_KEY]
        assert infotext.KEY not in p.extra_generation_params
        assert p.extra_generation_params["Other"] == "stays"
        assert list(p.comments) == [f"K-LoRA: {sentence}"]
        assert [record.getMessage() for record in log.records] == [sentence]
        assert all(word in sentence for word in quoted)
        assert "Traceback" not in sentence
        assert "Please report" not in sentence, "an error of ours, not of the person's"
        assert sentence.endswith(".")
        assert {path: path.read_bytes() for path in bad_folder.iterdir()} == before

    def test_after_a_good_generation_nothing_of_it_is_left(self, session, host, bad_folder, wrong):
        tags, settings, _ = wrong
        generate(session)
        p = generate(session, tags, settings)
        assert host.attached is None
        assert infotext.ERROR_KEY in p.extra_generation_params

    def test_the_queue_goes_on(self, session, host, bad_folder, wrong):
        tags, settings, _ = wrong
        generate(session, tags, settings)
        host.asked.clear()
        p = generate(session)
        assert host.attached is not None
        assert not p.comments
        assert infotext.ERROR_KEY not in p.extra_generation_params
        assert selected(host) == plan_of(bad_folder).choice[:4].tolist()

    def test_said_once_a_generation_in_the_log(self, session, bad_folder, log, wrong):
        tags, settings, _ = wrong
        p = Processing()
        for _ in range(3):  # three batches
            session.activate(p, tags, settings)
        assert len(p.comments) == len(log.records) == 1


def test_lora_of_zeros_is_told_as_the_persons_error(session, host, folder):
    zeros = {key: torch.zeros_like(value) for key, value in linears(PREFIXES).items()}
    save_file(zeros, folder / "zeros.safetensors")
    p = generate(session, tags=[["cat"], ["zeros"]])
    assert host.attached is None
    assert "zero" in p.extra_generation_params[infotext.ERROR_KEY]
    assert "report" not in p.extra_generation_params[infotext.ERROR_KEY]


def test_log_lines_carry_the_extensions_name():
    record = logging.LogRecord("lib_klora", logging.INFO, "", 0, "a sentence", (), None)
    lines = [handler.format(record) for handler in logging.getLogger("lib_klora").handlers]
    assert "[K-LoRA] a sentence" in lines


def test_switched_on_without_loras_is_said_with_hires_too(session):
    p = Processing(enable_hr=True)
    session.activate(p, [], Settings())
    p.is_hr_pass = True
    session.activate(p, [], Settings())
    assert infotext.ERROR_KEY in p.extra_generation_params


TAGGED = "a cat <klora:cat> <klora:ink>"
RUNNER = SimpleNamespace(
    selectable_scripts=[
        SimpleNamespace(args_from=1, args_to=3), SimpleNamespace(args_from=3, args_to=5),
    ]
)  # fmt: skip


class TestSwitchedOnAndNoTagsInThisPicture:
    @pytest.mark.parametrize(
        "job",
        [
            {"all_prompts": ["a cat", TAGGED, "a dog"]},
            {"all_prompts": ["a cat"], "all_hr_prompts": [TAGGED]},
            {"scripts": RUNNER, "script_args": (2, "", "", 7, f"{TAGGED}, a cat", "")},
            {"scripts": RUNNER, "script_args": [1, TAGGED, None, None, None]},
        ],
        ids=["another batch", "a hires pass", "a plot's values", "the first script"],
    )
    def test_nothing_is_said_where_the_job_names_a_pair(self, session, host, job):
        p = generate(session, [], Settings(), Processing(**job))
        assert p.extra_generation_params == {"Other": "stays"}
        assert not p.comments
        assert host.attached is None
        other = generate(session, TAGS, Settings(), p)
        assert infotext.KEY in other.extra_generation_params

    @pytest.mark.parametrize(
        "job",
        [
            {"all_prompts": ["a cat", "a dog <lora:cat:1>"], "all_hr_prompts": None},
            {"scripts": RUNNER, "script_args": (2, TAGGED, "", "a cat", "a dog", TAGGED)},
            {"scripts": RUNNER, "script_args": (0, TAGGED, TAGGED)},
            {"scripts": RUNNER, "script_args": (3, TAGGED, TAGGED)},
            {"scripts": RUNNER, "script_args": ()},
            {"scripts": None, "script_args": (1, TAGGED, TAGGED)},
        ],
        ids=["no batch", "of other scripts", "no script", "no such script", "no arguments", "none"],
    )
    def test_it_is_said_where_nothing_does(self, session, job):
        p = generate(session, [], Settings(), Processing(**job))
        assert "no LoRAs are given" in p.extra_generation_params[infotext.ERROR_KEY]


class TestPartlyFittingFile:
    def few_strange_layers(self, folder):
        strange = [p.replace("down_blocks_0", "down_blocks_7") for p in PREFIXES[:2]]
        save_file(linears([*PREFIXES, *strange], seed=9), folder / "strange.safetensors")

    @pytest.mark.parametrize(("layers", "advice"), [("attention", "“all”"), ("all", None)])
    def test_a_file_without_attention_layers_is_not_said_to_change_text_only(
        self, session, host, folder, layers, advice
    ):
        ff = PREFIXES[0].replace("attn1_to_q", "ff_net_2")
        host.present = Model([*PREFIXES, ff])
        save_file(linear(ff), folder / "cat.safetensors")
        p = generate(session, settings=Settings(layers=layers))
        error = p.extra_generation_params.get(infotext.ERROR_KEY)
        assert (advice in error and "text encoder" not in error) if advice else error is None

    def test_layers_that_do_not_fit_are_left_out_and_said(self, session, host, folder):
        self.few_strange_layers(folder)
        p = generate(session, tags=[["strange"], ["ink"]])
        assert len(host.attached.layers) == 8
        (comment,) = p.comments
        assert "2 layers of “strange”" in comment
        assert infotext.KEY in p.extra_generation_params

    def test_one_layer_that_is_left_out_is_one(self, session, host, folder):
        unread = {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(2, 2, 2)}
        strange = linear(PREFIXES[0].replace("down_blocks_0", "down_blocks_7"))
        save_file(linears(PREFIXES, seed=9) | strange | unread, folder / "cat.safetensors")
        assert [comment.partition(")")[2] for comment in generate(session).comments] == [
            " does not fit this model and is left out.",
            " is of a type that K-LoRA cannot compare and is left out.",
        ]

    def test_larger_file_goes_first_and_the_contents_notes_too(self, session, host, folder):
        """Whichever role the larger file has: the memory a host needs for it is free then."""
        self.few_strange_layers(folder)
        large = linears(PREFIXES, rank=7) | linear("lora_unet_input_blocks_9_attn1_to_k", 400)
        save_file(large, folder / "large.safetensors")
        for tags in (["strange"], ["large"]), (["large"], ["strange"]):
            host.asked.clear()
            session = Session(host)
            p = generate(session, tags=tags)
            assert [entry[1] for entry in host.asked if entry[0] == "load"] == ["large", "strange"]
            first, second = p.comments
            assert tags[0][0] in first
            assert tags[1][0] in second

    def test_as_many_entries_in_other_rows_do_not_fit(self, session, host):
        host.present.shapes[next(iter(host.present.shapes))] = (4, 16)
        p = generate(session)
        assert len(host.attached.layers) == 7
        assert [" fit this model" in comment for comment in p.comments] == [True, True]

    def test_names_that_the_host_does_not_read_are_told_from_another_model(
        self, session, host, folder
    ):
        dotted = [x.replace("lora_unet_", "unet_", 1).replace("unet_", "unet.") for x in PREFIXES]
        save_file(linears(dotted, seed=9), folder / "cat.safetensors")
        host.unread = ("unet.",)
        error = generate(session).extra_generation_params[infotext.ERROR_KEY]
        assert "“cat” is for this model" in error
        assert "(such as unet.down_blocks_0" in error
        assert ", 0 of its 8 layers are read)" in error
        assert "python -m lib_klora convert FILE OUT" in error

    def test_a_file_that_the_host_drops_for_what_else_is_in_it(self, session, host, folder):
        """Forge does for more than 12 tensors that it cannot place, such as embeddings."""
        bundle = {f"bundle_emb.word{i}.clip_l": torch.ones(1, 4) for i in range(14)}
        save_file(linears(PREFIXES) | bundle, folder / "cat.safetensors")
        host.unread = ("lora_unet_",)
        error = generate(session).extra_generation_params[infotext.ERROR_KEY]
        assert "drops the whole file for the 14 tensors" in error
        assert "(such as bundle_emb.word" in error
        assert "convert --only-layers FILE OUT" in error

    @pytest.mark.parametrize(("fitting", "made"), [(3, False), (4, True)])
    def test_less_than_half_of_a_file_is_no_plan(self, session, host, folder, fitting, made):
        """Whatever is in scope: here all attention layers fit, and the others do not."""
        others = [f"lora_unet_input_blocks_99_1_ff_{i}" for i in range(4)]
        save_file(linears([*PREFIXES[:fitting], *others]), folder / "cat.safetensors")
        error = generate(session).extra_generation_params.get(infotext.ERROR_KEY)
        assert (error is None) == made
        assert made or f"{fitting} of its {fitting + 4} layers fit" in error

    def test_a_file_for_another_model_of_the_family_is_told_of(self, session, host, folder):
        own = [f"lora_unet_double_blocks_{i}_img_attn_proj" for i in range(4)]
        host.present = Model([*own, "lora_unet_distilled_guidance_layer_in_proj"])
        save_file(
            linears([*own, "lora_unet_double_blocks_0_img_mod_lin"]), folder / "a.safetensors"
        )
        save_file(linears(own, seed=3), folder / "b.safetensors")
        p = generate(session, tags=[["a"], ["b"]])
        assert list(p.comments) == [
            "K-LoRA: “a” was made for Flux.1, and the checkpoint is Chroma: 4 of its 5 layers fit."
        ]
        assert len(host.attached.layers) == 4

    def test_what_the_host_applies_to_text_is_not_missing(self, session, host, folder):
        """Anima's adapter, which Forge Neo has moved into the text encoder."""
        adapter = [f"lora_unet_llm_adapter_{i}" for i in range(5)]
        save_file(linears([*PREFIXES, *adapter], seed=9), folder / "cat.safetensors")
        host.of_text = ("lora_unet_llm_adapter",)
        assert not generate(session).comments
        assert len(host.attached.layers) == 8

    def test_an_unknown_network_is_said(self, session, host, folder):
        own = [f"lora_unet_stage_{i}_attn_mix" for i in range(4)]
        other = "lora_unet_stage_0_mlp"
        host.present = Model([*own, other])
        for i, name in enumerate("ab"):
            save_file(linears([*own, other], seed=i), folder / f"{name}.safetensors")
        p = generate(session, tags=[["a"], ["b"]])
        assert host.attached.layers == tuple(f"stage_{i}_attn_mix" for i in range(4))
        (comment,) = p.comments
        assert "does not know this network: the 4 layers" in comment

    def test_files_without_a_common_layer_are_said(self, session, host, folder):
        save_file(linears(PREFIXES[:4]), folder / "cat.safetensors")
        save_file(linears(PREFIXES[4:]), folder / "ink.safetensors")
        (comment,) = generate(session).comments
        assert "“cat” and “ink” have no layer in common" in comment
        assert len(host.attached.unpaired) == 8

    def test_said_in_every_generation(self, session, folder):
        self.few_strange_layers(folder)
        first = generate(session, tags=[["strange"], ["ink"]])
        second = generate(session, tags=[["strange"], ["ink"]])
        assert first.comments == second.comments


class TestPreview:
    """What the page and ``/klora/plan`` show without a generation is what one would do."""

    def test_it_tells_what_a_generation_would(self, session, host):
        host.present = Model(PREFIXES[1:])
        named = Settings(content="oil", style="oil")
        report = session.preview(TAGS, named, 4)
        assert len(report.notes) == 3
        told = generate(session, settings=named).comments
        assert [f"K-LoRA: {note}" for note in report.notes] == list(told)

    def test_it_is_for_the_checkpoint_that_a_generation_would_load(self, session, host):
        generate(session)
        host.prepare_model = lambda: setattr(host, "present", Model(PREFIXES[1:]))
        report = session.preview(TAGS, OFF, 4)
        assert len(report.passes[0].pair.paired) == 7


class TestNoStep:
    """A sampler may make none (DDIM, told to make one): then nothing has K-LoRA."""

    def test_no_step_no_parameter(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        session.finish(p)
        assert infotext.KEY not in p.extra_generation_params
        assert not session.report(p).passes

    def test_with_a_step_the_parameter_stays_whatever_comes_after_it(self, session, host):
        p = generate(session)
        session.finish(p)
        assert infotext.KEY in p.extra_generation_params
        p.is_hr_pass = True
        session.activate(p, TAGS, OFF)  # whose pass makes none
        session.finish(p)
        assert infotext.KEY in p.extra_generation_params

    def test_each_batch_by_itself(self, session, host):
        p = generate(session)
        p.iteration = 1
        session.activate(p, TAGS, OFF)
        session.finish(p)
        assert infotext.KEY not in p.extra_generation_params


class TestErrorsOfOurs:
    """A bug of ours or a surprise in the host: the picture is made without K-LoRA, and says so."""

    @pytest.mark.parametrize("step", [0, 1, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KLoraError, MemoryError])
    def test_a_failure_in_a_step_says_in_which(self, session, host, step, error):
        p, host.error = Processing(), error
        session.activate(p, TAGS, OFF)
        for i in range(step):
            session.before_model_call(call(i))
            session.after_model_call()
        host.fails_in = "select"
        session.before_model_call(call(step))
        sentence = p.extra_generation_params[infotext.ERROR_KEY]
        told = f" It ended in step {step + 1} of 4: the steps before have K-LoRA."
        assert sentence.endswith(told) == bool(step)
        assert ("It ended" in sentence) == bool(step)

    @pytest.mark.parametrize("where", ["read", "load", "fuse", "follow", "select"])
    def test_detached_and_told(self, session, host, where):
        host.fails_in = where
        p = generate(session)
        assert host.attached is None
        assert f"{where} broke" in p.extra_generation_params[infotext.ERROR_KEY]
        assert "report" in p.extra_generation_params[infotext.ERROR_KEY]
        assert infotext.KEY not in p.extra_generation_params
        assert len(p.comments) == 1

    @pytest.mark.parametrize("where", ["read", "load", "fuse", "select", "attach"])
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError,
            torch.cuda.OutOfMemoryError,
            lambda _: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"),
            lambda _: RuntimeError("MPS backend out of memory (MPS allocated: 5 GB …)"),
            lambda _: RuntimeError("There is not enough GPU video memory available!"),
            lambda _: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cubla…"),
            lambda _: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            lambda _: RuntimeError(
                "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
            ),
        ],
    )
    def test_full_memory_is_none(self, session, host, where, error):
        host.fails_in, host.error = where, error
        p = generate(session)
        assert host.attached is None
        sentence = p.extra_generation_params[infotext.ERROR_KEY]
        assert sentence.startswith("Memory is full")
        assert "report" not in sentence

    @pytest.mark.parametrize("where", ["select", "check"])
    def test_what_failed_is_gone_before_memory_is_needed_to_take_back(self, session, host, where):
        """A GPU is full because of the tensors that the failed call holds."""

        class Tensor:
            """Stands for one."""

        held = []

        def fail(*_):
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            raise RuntimeError("out of memory")

        alive = []
        abandon = host.abandon
        host.abandon = lambda: (alive.append(held[0]() is not None), abandon())
        setattr(host, where, fail)
        generate(session)
        assert alive == [False]

    def test_a_surprise_after_a_model_call_is_told(self, session, host):
        def check(_):
            raise AttributeError("no such counter")

        host.check = check
        p = generate(session)
        assert host.attached is None
        assert "no such counter" in p.extra_generation_params[infotext.ERROR_KEY]

    def test_without_a_checkpoint(self, session, host):
        host.present = None
        with pytest.raises(KLoraError, match="No checkpoint is loaded: choose one"):
            session.preview(TAGS, OFF, 4)

    def test_a_device_that_broke_is_not_full(self, session, host):
        host.fails_in = "select"
        host.error = lambda _: RuntimeError("CUDA error: an illegal memory access")
        p = generate(session)
        assert "illegal memory access" in p.extra_generation_params[infotext.ERROR_KEY]

    @pytest.mark.parametrize("where", ["read", "load", "fuse", "select", "attach"])
    def test_next_generation_works(self, session, host, folder, where):
        host.fails_in = where
        generate(session)
        host.fails_in = None
        host.asked.clear()
        p = generate(session)
        assert not p.comments
        assert selected(host) == plan_of(folder).choice[:4].tolist()

    def test_error_between_steps_ends_k_lora_for_the_rest_of_the_pass(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        session.before_model_call(call(0))
        host.fails_in = "select"
        session.before_model_call(call(1))
        host.fails_in = None
        session.before_model_call(call(2))
        assert host.attached is None
        assert host.count("select") == 2

    @pytest.mark.parametrize("where", ["select", "attach"])
    def test_nothing_is_reused_of_what_failed_half_way(self, session, host, where):
        host.fails_in = where
        generate(session)
        host.fails_in = None
        host.asked.clear()
        generate(session)
        generate(session)
        assert host.count("fuse") == 1
        assert host.count("read") == 0

    @pytest.mark.parametrize("where", ["select", "attach"])
    def test_nor_in_the_next_image_of_the_batch_count(self, session, host, where):
        host.fails_in = where
        p = generate(session)
        host.fails_in = None
        host.asked.clear()
        p.iteration = 1
        session.activate(p, TAGS, OFF)
        assert host.count("fuse") == 1

    def test_a_host_that_does_not_say_where_it_is_ends_it_at_once(self, session, host):
        p = Processing()
        session.activate(p, TAGS, OFF)
        session.before_model_call(lambda: 1 / 0)
        assert host.count("abandon") == 1
        assert host.attached is None
        assert "ZeroDivisionError" in p.extra_generation_params[infotext.ERROR_KEY]

    def test_ctrl_c_between_two_steps_leaves_nothing(self, session, host):
        host.fails_in, host.error = "select", KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            generate(session)
        assert host.count("abandon") == 1
        assert host.attached is None

    def test_what_the_host_left_out_is_told_and_not_reused(self, session, host):
        host.fails_in = "check"
        p = generate(session)
        assert p.extra_generation_params[infotext.ERROR_KEY] == "Not all layers have it."
        assert infotext.KEY not in p.extra_generation_params
        assert not session.report(p).passes
        assert host.attached is None
        host.fails_in = None
        host.asked.clear()
        assert not generate(session).comments
        assert host.count("recover") == host.count("fuse") == 1

    def test_what_the_host_refuses_is_told_in_its_words(self, session, host):
        host.fails_in, host.error = "select", KLoraError
        p = generate(session)
        assert p.extra_generation_params[infotext.ERROR_KEY] == "select broke"
        assert infotext.KEY not in p.extra_generation_params
        assert not session.report(p).passes
        assert host.attached is None

    @pytest.mark.parametrize("calls", [0, 1, 3])
    def test_a_generation_that_ended_while_layers_were_applied(self, session, host, calls):
        """As an exception in the text encoder's layers or in a model call ends it."""
        generate(session)
        assert host.count("recover") == 0
        session.begin(p := Processing())
        session.activate(p, TAGS, OFF)
        for i in range(calls):
            if i:
                session.after_model_call()
            session.before_model_call(call(i))
        assert host.count("recover") == 0
        host.asked.clear()
        for tags in ([], [], TAGS, TAGS):
            generate(session, tags=tags)
        assert host.count("recover") == host.count("fuse") == 1

    @pytest.mark.parametrize("where", ["select", "attach"])
    def test_told_also_if_taking_back_fails(self, session, host, where, monkeypatch):
        def abandon():
            raise RuntimeError("abandon broke")

        host.fails_in = where
        monkeypatch.setattr(host, "abandon", abandon)
        p = Processing()
        with pytest.raises(RuntimeError, match="abandon"):
            generate(session, p=p)
        assert f"{where} broke" in p.extra_generation_params[infotext.ERROR_KEY]
        monkeypatch.undo()
        host.fails_in = None
        assert not generate(session).comments
        assert host.count("recover") == 1

    def test_attach_that_fails_is_told(self, session, host):
        host.fails_in = "attach"
        p = generate(session)
        assert "attach broke" in p.extra_generation_params[infotext.ERROR_KEY]
        assert host.count("select") == 0

    def test_attach_that_fails_half_way_leaves_nothing(self, session, host):
        host.fails_in = "attach"
        generate(session)
        assert host.attached is None

    def test_generation_that_is_gone_cannot_be_told_but_does_not_raise(self, session, host):
        session.activate(Processing(), TAGS, OFF)  # nobody holds it
        host.fails_in = "select"
        session.before_model_call(call(0))
        assert host.attached is None


def test_alpha_and_beta_zero_is_the_content_lora_all_along(session, host):
    generate(session, settings=Settings(enabled=False, alpha=0, beta=0))
    assert set(host.applied.values()) == {"content"}
    assert sum(host.rebuilt) == 0


def test_huge_beta_is_the_style_lora_all_along(session, host):
    generate(session, settings=Settings(enabled=False, alpha=0, beta=1e10))
    assert set(host.applied.values()) == {"style"}
    assert not np.any(np.array(selected(host)) & BITS["content"])


def of(method, **settings) -> Settings:
    return Settings(enabled=False, method=method, **settings)


WITHOUT_SCORES = ["Direct merge", "LoRA Switch", "Fixed selection", "Random selection"]
ANYWHERE = [name for name, x in METHODS.items() if x.blocks is None and not x.apart]


class TestMethods:
    """The same way to the host for each of them; what needs no scores does not wait for any."""

    @pytest.mark.parametrize("method", ANYWHERE)
    def test_every_call_gets_the_plans_row(self, session, host, folder, method):
        p = generate(session, settings=of(method), steps=6)
        rows = plan_of(folder, of(method), steps=6).choice[:6]
        assert selected(host) == rows.tolist()
        assert host.rebuilt[1:] == (rows[1:] != rows[:-1]).sum(axis=1).tolist()
        assert infotext.ERROR_KEY not in p.extra_generation_params
        written = {"method": method} if method != "K-LoRA" else {}
        assert infotext.read(p.extra_generation_params[infotext.KEY]) == written

    @pytest.mark.parametrize("method", WITHOUT_SCORES)
    def test_the_files_are_not_compared_without_need(self, session, host, folder, method):
        generate(session, settings=of(method))
        assert host.attached is not None
        assert host.count("show_progress") == 0
        assert not (folder / "cache").exists()
        report = session.preview(TAGS, of(method), 4)
        assert host.count("show_progress") == 0
        assert report.passes[0].plan.gamma is None

    @pytest.mark.parametrize("role_last", ["content", "style"])
    def test_both_are_applied_in_the_order_of_the_tags(self, session, host, role_last):
        tags = [["cat"], ["ink"]] if role_last == "style" else [["ink", "style"], ["cat"]]
        generate(session, tags=tags, settings=of("Direct merge"))
        first = "content" if role_last == "style" else "style"
        assert set(host.applied.values()) == {f"{first}+{role_last}"}
        assert host.rebuilt == [0, 0, 0, 0]

    def test_the_files_are_compared_once_a_method_needs_it(self, session, host, folder):
        generate(session, settings=of("LoRA Switch"))
        host.asked.clear()
        generate(session, settings=of("K-LoRA"))
        assert host.count("load") == 0, "the host has both already"
        assert host.count("show_progress") > 0
        assert selected(host) == plan_of(folder).choice[:4].tolist()
        host.asked.clear()
        generate(session, settings=of("LoRA Switch"))
        generate(session, settings=of("Without γ"))
        assert host.count("read") == host.count("show_progress") == 0

    @pytest.mark.parametrize("method", ANYWHERE)
    def test_layers_of_one_file_stay_whatever_the_method(self, session, host, folder, method):
        save_file(linears(PREFIXES[:6], seed=7), folder / "short.safetensors")
        generate(session, tags=[["cat"], ["short"]], settings=of(method))
        assert len(host.attached.layers) == 6
        alone = {name: host.applied[name] for name in host.attached.unpaired}
        assert list(alone.values()) == ["content", "content"]

    @pytest.mark.parametrize("method", ANYWHERE)
    def test_the_next_generation_without_tags_is_clean(self, session, host, method):
        generate(session, settings=of(method))
        p = generate(session, tags=[])
        assert host.attached is None
        assert p.extra_generation_params == {"Other": "stays"}

    def test_the_hires_pass_has_the_method_with_its_own_scale(self, session, host, folder):
        settings = of("Fixed selection", hires="own", hires_beta=4.0)
        p = Processing(enable_hr=True)
        session.activate(p, TAGS, settings)
        session.before_model_call(call(0))
        p.is_hr_pass = True
        session.activate(p, TAGS, settings.for_hires())
        session.before_model_call(call(0))
        assert selected(host) == [[BITS["content"]] * 8, [BITS["style"]] * 8]

    def test_switch_counts_the_steps_of_its_pass(self, session, host):
        """Wherever an img2img starts, its first step is content."""
        session.activate(Processing(), TAGS, of("LoRA Switch"))
        for i in range(3):
            session.before_model_call(call(i, 3, t0=0.6))
        assert [row[0] for row in selected(host)] == [1, 2, 1]

    def test_a_seed_gives_the_same_selection_again_and_another_another(self, session, host):
        seen = []
        for seed in (3, 3, 4):
            host.asked.clear()
            p = generate(session, settings=of("Random selection", seed=seed))
            assert f"seed={seed}" in p.extra_generation_params[infotext.KEY]
            seen.append(selected(host))
        assert seen[0] == seen[1] != seen[2]


SDXL_BLOCKS = [
    [f"lora_unet_output_blocks_{i}_1_transformer_blocks_{j}_attn2_to_k" for j in range(3)]
    for i in range(3)
]
SDXL_LAYERS = [name for names in SDXL_BLOCKS for name in names]
OWN_BLOCKS = {
    name.removeprefix("lora_unet_"): role
    for names, role in zip(SDXL_BLOCKS, ("content", "style"), strict=False)
    for name in names
}


class TestBLora:
    """On SDXL layers of three blocks, in two files that have all of them."""

    @pytest.fixture
    def folder(self, tmp_path):
        te = linear("lora_te1_text_model_encoder_layers_0_mlp_fc1")
        for seed, name in enumerate(("cat", "ink")):
            tensors = linears(SDXL_LAYERS, seed=seed) | te
            save_file(tensors, tmp_path / f"{name}.safetensors")
        for i, name in enumerate(("first", "second")):
            save_file(linears(SDXL_BLOCKS[i], seed=i), tmp_path / f"{name}.safetensors")
        return tmp_path

    @pytest.fixture
    def host(self, folder):
        return FakeHost(folder, Model(SDXL_LAYERS))

    def test_each_block_has_its_own_and_nothing_else_anything(self, session, host, log):
        p = generate(session, settings=of("B-LoRA"))
        assert host.applied == OWN_BLOCKS
        assert host.rebuilt == [0, 0, 0, 0]
        assert not host.attached.te
        assert not p.comments
        assert infotext.read(p.extra_generation_params[infotext.KEY]) == {"method": "B-LoRA"}
        assert "6 and 6 other layers are left out, so are the text encoder parts" in log.text

    @pytest.mark.parametrize("tags", [[["first"], ["second"]], [["cat"], ["second"]]])
    def test_files_with_a_block_alone(self, session, host, tags):
        p = generate(session, tags=tags, settings=of("B-LoRA"))
        assert host.applied == OWN_BLOCKS
        assert not p.comments

    def test_in_turn_with_another_method_nothing_is_read_again(self, session, host):
        for _ in range(2):
            generate(session, settings=of("Direct merge"))
            assert len(host.applied) == 9
            assert host.attached.te
            generate(session, settings=of("B-LoRA"))
            assert host.applied == OWN_BLOCKS
            assert not host.attached.te
        assert host.count("load") == host.count("fuse") == 2

    def test_a_file_without_its_block_is_told(self, session, host):
        p = generate(session, tags=[["second"], ["second"]], settings=of("B-LoRA"))
        (comment,) = p.comments
        assert "“second” has no layer in up_blocks.0.attentions.0" in comment
        assert set(host.applied.values()) == {"style"}

    def test_swapped_files_are_refused(self, session, host):
        p = generate(session, tags=[["second"], ["first"]], settings=of("B-LoRA"))
        assert "swap the two" in p.extra_generation_params["K-LoRA error"]
        assert host.attached is None

    @pytest.mark.parametrize(
        ("prefixes", "size", "name"),
        [
            (attention_prefixes(8), 768, "Stable Diffusion 1.x"),
            (["lora_unet_double_blocks_0_img_attn_proj"], 8, "Flux"),
            (["lora_unet_new_attention_0"], 8, "not recognised"),
        ],
    )
    def test_another_network_gets_a_sentence(self, folder, prefixes, size, name):
        host = FakeHost(folder, Model(prefixes, size))
        for file in ("cat", "ink"):
            save_file(linears(prefixes, size=size), folder / f"{file}.safetensors")
        p = generate(Session(host), settings=of("B-LoRA"))
        assert p.extra_generation_params["K-LoRA error"] == (
            f"B-LoRA is for SDXL, and the checkpoint is {name}: choose another checkpoint or "
            f"method."
        )
        assert host.attached is None


class TestNPLora:
    """The content's file is loaded once more with other numbers, and only this method has that."""

    def changed(self, host):
        return dict(host.attached.changed)

    def projected(self, folder, content, style):
        files = (
            parse_lora(n, SafetensorsFile(folder / f"{n}.safetensors")) for n in (content, style)
        )
        return project(pair_files(*files)).changed

    def same(self, found, wanted):
        return found.keys() == wanted.keys() and all(
            torch.equal(found[x], wanted[x]) for x in found
        )

    def test_both_everywhere_with_the_content_projected(self, session, host, folder):
        p = generate(session, settings=of("NP-LoRA"))
        assert set(host.applied.values()) == {"content+style"}
        assert self.same(self.changed(host), self.projected(folder, "cat", "ink"))
        assert {key.rpartition(".lora_")[2] for key in self.changed(host)} == {"down.weight"}
        assert not p.comments
        assert host.attached.te

    def test_in_turn_with_others_each_has_its_own_and_nothing_is_read_again(
        self, session, host, folder
    ):
        wanted = self.projected(folder, "cat", "ink")
        for _ in range(2):
            for method in ("K-LoRA", "NP-LoRA", "Direct merge", "NP-LoRA"):
                generate(session, settings=of(method))
                assert self.same(self.changed(host), wanted if method == "NP-LoRA" else {})
        assert [x[1] for x in host.asked if x[0] == "load"].count("cat") == 2
        assert host.count("load") == 3
        assert host.count("read") == 4, "both files once for K-LoRA, once for NP-LoRA"
        assert host.count("fuse") == 2, "K-LoRA and Direct merge have one"
        assert selected(host)[:4] == plan_of(folder).choice[:4].tolist()

    def test_another_style_is_another_projection_and_the_first_is_let_go(
        self, session, host, folder
    ):
        for style in ("ink", "oil", "ink"):
            generate(session, tags=[["cat"], [style]], settings=of("NP-LoRA"))
            assert self.same(self.changed(host), self.projected(folder, "cat", style))
            assert len(session._loader._projected) == 1

    def test_the_same_file_as_style_and_alone(self, session, host, folder):
        generate(session, settings=of("NP-LoRA"))
        generate(session, tags=[["ink"], ["cat"]], settings=of("NP-LoRA"))
        assert self.same(self.changed(host), self.projected(folder, "ink", "cat"))
        generate(session, tags=[["cat"], ["cat"]], settings=of("NP-LoRA"))
        assert self.same(self.changed(host), self.projected(folder, "cat", "cat"))
        generate(session, tags=[["cat"], ["oil"]])
        assert not self.changed(host)

    def test_two_pairs_of_one_hires_generation(self, session, host, folder):
        for _ in range(2):
            p = Processing(enable_hr=True)
            for hires, style in ((False, "ink"), (True, "oil")):
                p.is_hr_pass = hires
                session.activate(p, [["cat"], [style]], of("NP-LoRA"))
                assert self.same(self.changed(host), self.projected(folder, "cat", style))
        assert host.count("load") == 5

    def test_a_changed_file_or_checkpoint_is_projected_anew(self, session, host, folder):
        generate(session, settings=of("NP-LoRA"))
        save_file(linears(PREFIXES, rank=4, seed=40), folder / "ink.safetensors")
        os.utime(folder / "ink.safetensors", ns=(1, 1))
        generate(session, settings=of("NP-LoRA"))
        assert self.same(self.changed(host), self.projected(folder, "cat", "ink"))
        host.present, loads = Model(PREFIXES), host.count("load")
        generate(session, settings=of("NP-LoRA"))
        assert host.count("load") == loads + 3

    def test_layers_all_is_a_projection_of_its_own(self, session, host, folder):
        for seed, name in enumerate(("cat", "ink")):
            save_file(
                linears([*PREFIXES, "lora_unet_conv_out"], seed=seed),
                folder / f"{name}.safetensors",
            )
        host.present = Model([*PREFIXES, "lora_unet_conv_out"])
        for layers, count in (("attention", 8), ("all", 9), ("attention", 8)):
            generate(session, settings=of("NP-LoRA", layers=layers))
            assert len(self.changed(host)) == count

    def test_the_overlap_is_shown_and_a_small_one_is_told(self, session, host, folder):
        (done,) = session.preview(TAGS, of("NP-LoRA"), 4).passes
        assert 0.1 < done.pair.overlap < 0.5, "two of eight directions"
        assert session.preview(TAGS, of("Direct merge"), 4).passes[0].pair.overlap is None
        tensors = linears(PREFIXES, rank=4, seed=1)
        other = linears(PREFIXES, rank=4, seed=2)
        for key in tensors:
            if key.endswith("down.weight"):
                tensors[key][:, 4:], other[key][:, :4] = 0, 0
                other[key][:, 4:] += 0.01 * tensors[key][:, :4]
        save_file(tensors, folder / "left.safetensors")
        save_file(other, folder / "right.safetensors")
        p = generate(session, tags=[["left"], ["right"]], settings=of("NP-LoRA"))
        (comment,) = p.comments
        assert comment == (
            "K-LoRA: “left” and “right” hardly overlap (0.0 % of content in the style's "
            "directions), so this is nearly Direct merge."
        )

    def test_what_is_no_lora_is_told(self, session, host, folder):
        tensors = dict(linears(PREFIXES[1:], seed=3))
        tensors[f"{PREFIXES[0]}.lokr_w1"] = torch.ones(2, 2)
        tensors[f"{PREFIXES[0]}.lokr_w2"] = torch.ones(4, 4)
        save_file(tensors, folder / "mixed.safetensors")
        for tags in ([["mixed"], ["ink"]], [["cat"], ["mixed"]]):
            p = generate(session, tags=tags, settings=of("NP-LoRA"))
            (comment,) = p.comments
            assert f"NP-LoRA leaves 1 layer of “{tags[0][0]}” (such as {PREFIXES[0]})" in comment
            assert len(self.changed(host)) == 7
        again = generate(session, tags=tags, settings=of("NP-LoRA"))
        assert again.comments == p.comments

    def test_interrupted_it_is_told_and_done_the_next_time(self, session, host, monkeypatch):
        def stop(done, total):
            if done == 3:
                raise KLoraError("interrupted")

        with monkeypatch.context() as patch:
            patch.setattr(host, "show_progress", stop)
            p = generate(session, settings=of("NP-LoRA"))
        assert p.extra_generation_params["K-LoRA error"] == "interrupted"
        again = generate(session, settings=of("NP-LoRA"))
        assert "K-LoRA error" not in again.extra_generation_params
        assert len(self.changed(host)) == 8


class TestScoresOnDisk:
    def test_a_new_process_reads_the_scores_instead_of_computing_them(self, host):
        first = generate(Session(host))
        shown = host.count("show_progress")
        assert shown > 0
        second = generate(Session(host))
        assert host.count("show_progress") == shown, "compared again"
        assert first.extra_generation_params == second.extra_generation_params

    def test_a_changed_file_is_compared_again(self, host, folder):
        generate(Session(host))
        shown = host.count("show_progress")
        save_file(linears(PREFIXES, rank=2, seed=9), folder / "ink.safetensors")
        generate(Session(host))
        assert host.count("show_progress") > shown

    def test_an_interrupted_comparison_is_told_and_goes_on_where_it_stopped(
        self, session, host, monkeypatch
    ):
        def stop(done, total):
            if done == 3:
                raise KLoraError("interrupted")

        with monkeypatch.context() as patch:
            patch.setattr(host, "show_progress", stop)
            p = generate(session)
        assert p.extra_generation_params["K-LoRA error"] == "interrupted"
        assert host.attached is None
        again = generate(session)
        assert "K-LoRA error" not in again.extra_generation_params
        totals = {entry[2] for entry in host.asked if entry[0] == "show_progress"}
        assert totals == {2 * len(PREFIXES) - 3}, "three layers were kept"
