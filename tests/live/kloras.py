"""What the live tests of K-LoRA share: requests, and what a run must look like."""

import re

from make_loras import ATTENTION
from paper import Choice


def tags(content, style, more=""):
    """A prompt with two K-LoRA tags."""
    return f"a cat <klora:{content}> <klora:{style}>{more}"


def script(**fields):
    """The API's object of named fields."""
    return {"K-LoRA": {"args": [fields]}}


def always(role):
    """The settings under which one role wins every layer: α = 0, β = 0 or huge."""
    return script(alpha=0, beta=0 if role == "content" else 1e10)


def checkpoint_of(webui):
    """A file with the layers of the loaded checkpoint."""
    return webui.checkpoints / webui.loaded.plain_file


def choice(webui, content, style, **how):
    """The independent reading of the paper for two files on the loaded checkpoint."""
    files = (webui.loras / f"{name}.safetensors" for name in (content, style))
    return Choice(*files, checkpoint_of(webui), **how)


def is_attention(part):
    """Whether a layer is one of those the paper fuses."""
    return bool(re.search(ATTENTION, part.partition("[")[0]))


def recorded(webui, image=None, **fields):
    """(result, model calls with the weights that each used) of an image that must succeed."""
    webui.next(record=True)
    result = webui.txt2img(**fields) if image is None else webui.img2img(image, **fields)
    assert not result.error, result.error
    return result, webui.last()


def weights_under(webui, prompt, **fields):
    """The UNet's weights under a prompt with `<lora:…>`, as the last call of one step used them."""
    return recorded(webui, prompt=prompt, steps=1, **fields)[1][-1]["weights"]


def assert_weights(found, wanted, roles, base):
    """Every layer's parameters are those of its role, all others those of `base`.

    found, base: {parameter: hash}; wanted: {role: {parameter: hash}}; roles: {layer: role}.
    """
    wrong = []
    for parameter in found.keys() | base.keys():
        layer = parameter.partition("#")[0].rpartition(".")[0]
        right = wanted[roles[layer]] if layer in roles else base
        if found.get(parameter) != right.get(parameter):
            wrong.append(parameter)
    assert not wrong, f"{len(wrong)} of {len(found)} parameters differ: {sorted(wrong)[:5]}"


PAIR = "sd15_content", "sd15_style"


class Expectation:
    """The weights that a K-LoRA of two files must give, on the loaded checkpoint."""

    def __init__(self, webui, content=PAIR[0], style=PAIR[1], **how):
        self.reading = choice(webui, content, style, **how)
        self.base = weights_under(webui, "a cat")
        self.wanted = {
            "content": weights_under(webui, f"a cat <lora:{content}:1>"),
            "style": weights_under(webui, f"a cat <lora:{style}:1>"),
        }

    def check(self, call, i, steps, t0=0.0, **scale):
        """The call used the weights that the paper asks for after `i` of `steps` steps."""
        roles = self.reading.step(i, steps, t0, **scale)
        assert_weights(call["weights"], self.wanted, roles, self.base)

    def check_base(self, call):
        """The call used the checkpoint's own weights."""
        assert call["weights"] == self.base
