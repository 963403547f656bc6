"""LoRA Composite: two predictions wherever the network is called in a step, and their mean."""

from functools import partial

import pytest
import torch
from fake_host import FakeHost, Model, Processing
from lora_samples import attention_prefixes, linears
from safetensors.torch import save_file
from torch import nn

from lib_klora import infotext
from lib_klora.composite import TwoPredictions
from lib_klora.hosts.diffusers_unet import DiffusersUNet
from lib_klora.session import Session
from lib_klora.settings import Settings
from lib_klora.steps import Pass

PREFIXES = attention_prefixes(8)
TAGS = [["cat", "0.5"], ["ink", "2"]]
COMPOSITE = Settings(enabled=False, method="LoRA Composite")


# the hooks ----------------------------------------------------------------------------------------


class Network(nn.Module):
    """Predicts ``factor`` times its input, plus what ControlNet gives it, which it takes out."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.calls = 0

    def forward(self, x, *, control=None, **_):
        self.calls += 1
        for found in (control or {}).values():
            while isinstance(found, list) and found:
                x = x + found.pop()
        return x * self.factor


@pytest.fixture
def network():
    return Network()


def test_the_mean_of_two(network):
    def change():
        network.factor = 4.0
        return True

    TwoPredictions(network, change)
    assert network(torch.tensor(10.0)) == (10 + 40) / 2
    assert network.calls == 2


def test_both_get_the_same_control(network):
    TwoPredictions(network, lambda: True)
    control = {"middle": [torch.tensor(1.0)], "output": [torch.tensor(2.0), torch.tensor(3.0)]}
    assert network(torch.tensor(10.0), control=control | {"scale": 0.5}) == 16


def test_where_the_other_has_none_only_that_counts(network):
    def change():
        network.factor = 4.0
        return False

    TwoPredictions(network, change)
    assert network(torch.tensor(10.0)) == 40


def test_where_once_will_do_it_is_called_once(network):
    TwoPredictions(network, lambda: None)
    assert network(torch.tensor(10.0)) == 10
    assert network.calls == 1


def test_a_forward_that_somebody_has_put_in_its_place_is_called_twice_too(network):
    """As ControlNet does in AUTOMATIC1111."""
    own = network.forward
    network.forward = lambda x, **fields: own(x + 1, **fields)
    TwoPredictions(network, lambda: True)
    assert network(torch.tensor(10.0)) == 11
    assert network.calls == 2


def test_an_error_in_the_second_leaves_the_next_call_as_it_was(network):
    fails = [True]

    def change():
        if fails:
            network.factor = None
        return True

    TwoPredictions(network, change)
    with pytest.raises(TypeError):
        network(torch.tensor(10.0))
    fails.clear()
    network.factor = 2.0
    network.calls = 0
    assert network(torch.tensor(10.0)) == 20
    assert network.calls == 2


def test_taken_out_it_predicts_once(network):
    two = TwoPredictions(network, lambda: True)
    two.remove()
    network(torch.tensor(10.0))
    assert network.calls == 1
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


# in a generation ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for seed, (name, count) in enumerate((("cat", 8), ("ink", 8), ("short", 6))):
        save_file(linears(PREFIXES[:count], seed=seed), tmp_path / f"{name}.safetensors")
    return tmp_path


class Seen(nn.Module):
    """Predicts how many layers have content, and a hundred times how many have style."""

    def __init__(self, host) -> None:
        super().__init__()
        self.host = host
        self.seen = []

    def forward(self, x):
        applied = list(self.host.applied.values())
        self.seen.append(applied)
        return x + applied.count("content") + 100 * applied.count("style")


@pytest.fixture
def host(folder):
    host = FakeHost(folder, Model(PREFIXES))
    host.present.network = Seen(host)
    return host


@pytest.fixture
def session(host):
    return Session(host)


def sample(session, host, p, *, steps=3, calls=1, inside=lambda i: None):
    """What the network predicts in each step of a pass."""
    found = []
    for i in range(steps):
        session.before_model_call(partial(Pass, i, steps, 0.0))
        inside(i)
        found += [host.network()(torch.zeros(1)).item() for _ in range(calls)]
        session.after_model_call()
    session.finish(p)
    return found


def begin(session, tags=TAGS, settings=COMPOSITE):
    p = Processing()
    session.begin(p)
    session.activate(p, tags, settings)
    return p


@pytest.mark.parametrize("calls", [1, 2])
def test_every_call_is_the_mean_of_the_two(session, host, calls):
    """Also where conditional and unconditional are predicted one after the other."""
    p = begin(session)
    assert sample(session, host, p, calls=calls) == [(8 + 800) / 2] * 3 * calls
    seen = host.network().seen
    assert all(set(applied) in ({"content"}, {"style"}) for applied in seen)
    assert [x[0] for x in seen].count("content") == len(seen) / 2
    assert infotext.ERROR_KEY not in p.extra_generation_params
    assert "method=LoRA Composite" in p.extra_generation_params[infotext.KEY]


def test_each_call_costs_one_change_of_the_layers(session, host):
    p = begin(session)
    sample(session, host, p, steps=4)
    assert [count for count in host.rebuilt if count] == [8] * 4


@pytest.mark.parametrize(("unpaired", "mean"), [("keep", (8 + 600) / 2), ("drop", (6 + 600) / 2)])
def test_a_layer_of_one_file_belongs_to_its_prediction_alone(session, host, unpaired, mean):
    settings = Settings(enabled=False, method="LoRA Composite", unpaired=unpaired)
    p = begin(session, [["cat"], ["short"]], settings)
    assert sample(session, host, p) == [mean] * 3


def test_the_pair_after_another_method_and_before(session, host):
    for method, mean in (("LoRA Switch", 8), ("LoRA Composite", 404), ("LoRA Switch", 8)):
        p = begin(session, settings=Settings(enabled=False, method=method))
        assert sample(session, host, p, steps=1) == [mean]


def test_what_calls_the_network_outside_of_a_step_calls_it_once(session, host):
    begin(session)
    host.network()(torch.zeros(1))
    assert len(host.network().seen) == 1


def test_after_the_batch_the_network_is_as_it_was(session, host):
    p = begin(session)
    assert host.network()._forward_hooks
    sample(session, host, p)
    assert not host.network()._forward_hooks


@pytest.mark.parametrize("end", ["begin", "detach"])
def test_a_generation_that_was_cut_off_leaves_nothing(session, host, end):
    begin(session)
    session.before_model_call(partial(Pass, 0, 3, 0.0))
    if end == "begin":
        session.begin(Processing())
    else:
        session.detach()
    assert not host.network()._forward_hooks


def test_where_the_second_cannot_be_applied_the_step_is_without_it(session, host):
    p = begin(session)

    def fail(i):
        host.fails_in = "select" if i == 1 else None

    assert sample(session, host, p, inside=fail) == [404, 0, 0]
    sentence = p.extra_generation_params[infotext.ERROR_KEY]
    assert "select broke" in sentence
    assert "It ended in step 2 of 3: the steps before have K-LoRA." in sentence
    assert not host.network()._forward_hooks


def test_a_first_prediction_without_all_layers_is_told(session, host):
    p = begin(session)

    def fail(i):
        host.fails_in = "check"

    assert sample(session, host, p, steps=1, inside=fail) == [0]
    assert "Not all layers have it." in p.extra_generation_params[infotext.ERROR_KEY]


def test_a_network_that_nobody_calls_is_told(session, host):
    """Another extension may have one of its own."""
    p = begin(session)
    session.before_model_call(partial(Pass, 0, 3, 0.0))
    session.after_model_call()
    assert "needs two predictions in each step" in p.extra_generation_params[infotext.ERROR_KEY]
    assert host.attached is None


def test_the_hires_pass_has_hooks_of_its_own(session, host):
    p = begin(session)
    session.before_model_call(partial(Pass, 0, 1, 0.0))
    p.is_hr_pass = True
    session.activate(p, TAGS, COMPOSITE)
    assert len(host.network()._forward_hooks) == 1
    assert sample(session, host, p) == [404] * 3


def test_over_a_diffusers_unet_it_is_the_mean_of_the_two_loras(folder):
    """Each at its weight."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, prefix in enumerate(PREFIXES):
                linear = nn.Linear(8, 8, bias=False)
                linear.weight.data = torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
                self.add_module(prefix.removeprefix("lora_unet_"), linear)

        def forward(self, x):
            for linear in self.children():
                x = x + linear(x)
            return x

    host = DiffusersUNet(UNet(), folder, folder / "cache")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    alone = []
    for name, weight in (("cat", 0.5), ("short", 2.0)):
        host.use_loras([(name, weight)])
        alone.append(host.network()(x))
    host.use_loras([])
    session = Session(host)
    p = begin(
        session,
        [["cat", "0.5"], ["short", "2"]],
        Settings(enabled=False, layers="all", method="LoRA Composite"),
    )
    session.before_model_call(partial(Pass, 0, 3, 0.0))
    assert torch.equal(host.network()(x), (alone[0] + alone[1]) / 2)
    assert infotext.ERROR_KEY not in p.extra_generation_params
