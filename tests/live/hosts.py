"""What the live tests know of each WebUI: one record per host, and nothing of a host elsewhere.

    python tests/live/hosts.py      prints the names of all hosts

A new host is a new record here and, if none of make_models.py's functions makes its checkpoints,
one more function there. Read by any Python, also by the WebUIs', so it needs nothing but Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CAPABILITIES = {
    "flux": "samples with Flux",
    "infotext field": "its API takes an infotext as a request",
    "errors in the page": "its page shows with which words a generation failed",
    "hires prompt in a paste": "a pasted infotext fills the hires prompt",
    "old diffusers names": "applies LoRA files with the UNet names of old diffusers",
    "pickled LoRAs": "reads .pt files in its own safe way",
    "bundled embeddings": "makes the embeddings in a LoRA file known",
    "one refusal for a file": "refuses a LoRA file with one layer of a type that it does not know",
    "networks": "keeps its LoRAs as network objects, which extensions may change",
    "functional mode": "can add LoRAs in the layers' forward",
    "backups one by one": "backs up a layer's weight and bias by themselves",
    "several checkpoints": "can keep more than one checkpoint in memory",
    "a refiner drops LoRAs": "activates no LoRA for a refiner that it loads anew",
    "img2img alternative": "has a script that calls the model before the first step",
    "foreign UNets": "an extension's model can take the UNet's place",
    "merging between steps": "K-LoRA merges weights at its call between two steps",
    "weights in place": "a merged weight is written to where the weight was",
    "patchers": "extensions may sample with clones of the UNet's patcher",
    "checkpoints held": "an old checkpoint stays in memory while somebody holds its model",
    "room for online LoRAs": "LoRAs that are added at every forward stay on the device",
    "pictures without scripts": "makes a picture for a caller that has no script runner",
    "fp8 by a flag": "keeps fp8 weights only if it is started so",
    "partly loaded": "adds LoRAs at every forward of a layer that stays off the device",
    "refiner at a noise level": "begins with a refiner at a noise level",
    "fast refiner": "can load a refiner's weights into the model that is in use",
    "several LoRA folders": "has more than one folder of LoRA files",
    "layers swapped": "leaves a part of the layers on the CPU if memory is short",
}
"""What the tests ask a host for; what a record does not list under `lacks`, the host can do."""

OFFLINE = r"iframeResizer|ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED"
GRADIO_3 = rf"{OFFLINE}|undefined \(reading 'props'\)"
E4M3 = "float8-e4m3fn"
CPU_ONLY = ("cpu",)


@dataclass(frozen=True)
class Model:
    """A checkpoint, how it is stored, and the LoRA files that fit it.

    options: of the host's, that act at its loading. request: its own defaults for an image.
    memory: how many MiB of the UNet's weights the host may load; the others stay outside.
    """

    checkpoint: str
    family: str = ""
    options: Mapping = field(default_factory=dict)
    request: Mapping = field(default_factory=dict)
    memory: float | None = None
    devices: tuple[str, ...] = ("cpu", "second")

    def lora(self, name):
        """The name of one of its LoRA files."""
        return f"{self.family}_{name}"

    @property
    def file(self):
        """The checkpoint's file name."""
        return self.checkpoint if "." in self.checkpoint else f"{self.checkpoint}.safetensors"

    @property
    def plain_file(self):
        """The file that its layers can be read from: for GGUF the one that it was made from."""
        return self.file.replace("_q8_0.gguf", ".safetensors")


@dataclass(frozen=True, eq=False)
class HostRecord:
    """A WebUI that the live tests know.

    title: what people call it.
    version: a file of its source, a regex for it, and how the groups make the version.
    gradio: the major version of its page's Gradio.
    lora_extension: the folder of its built-in LoRA extension.
    arguments: of its command line; cpu_arguments: besides, where it computes on the CPU.
    names_checkpoint: whether the command line takes the first checkpoint (`--ckpt`).
    signs: what its log must say beside "Startup time" until it is usable.
    settings: for its settings file. ui_defaults: for its file of the page's values.
    loading_options: those settings that act when a checkpoint is loaded, and must_refresh: whether
        it reads them only when its page changes one of them.
    hires: fields that a hires request needs.
    negative: how a card's negative text is written into the negative prompt.
    no_samplers: what the tests use of other hosts' samplers and this one does not have.
    page_errors: a regex for what its page writes to the console by itself, without a network.
    sd_upscale: arguments of its script SD upscale, without an upscaler.
    models: {id: Model}. full_depth: the id of an SDXL with all its 70 transformers.
    maker: the function of make_models.py that makes them. packages: the folders in the WebUI that
        its packages are imported from. tiny: the function of tiny_models.py that lets it load them.
    patcher: how it puts LoRAs into weights: "networks", "LoraLoader" or "ModelPatcher".
    merge: its function that computes a weight with what LoRAs change, where its callers look it up.
    prepare: its function that loads the UNet's patcher for sampling.
    management: its module that moves models between devices.
    lacks: {one of CAPABILITIES: why the host cannot do that, as a sentence}.
    devices: the KLORA_DEVICEs that it can be started on.
    """

    name: str
    title: str
    version: tuple[str, str, str]
    gradio: int
    lora_extension: str
    arguments: tuple[str, ...]
    models: Mapping[str, Model]
    maker: str
    tiny: str
    patcher: str
    merge: str
    full_depth: str = "sdxl"
    cpu_arguments: tuple[str, ...] = ()
    names_checkpoint: bool = True
    signs: tuple[str, ...] = ()
    settings: Mapping = field(default_factory=dict)
    ui_defaults: Mapping = field(default_factory=dict)
    loading_options: tuple[str, ...] = ()
    must_refresh: bool = False
    hires: Mapping = field(default_factory=dict)
    negative: str = "{}"
    no_samplers: frozenset[str] = frozenset()
    sd_upscale: tuple = (None, 16, "None", 1)
    page_errors: str = OFFLINE
    packages: tuple[str, ...] = ()
    prepare: str = ""
    management: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "second")

    def __post_init__(self):
        unknown = set(self.lacks) - set(CAPABILITIES)
        assert not unknown, f"{self.name}: nobody asks for {unknown}"

    @property
    def variable(self):
        """The environment variable that says where the host is."""
        return "KLORA_" + self.name.upper().replace("-", "_")

    def can(self, what):
        """Whether it has one of CAPABILITIES."""
        assert what in CAPABILITIES, what
        return what not in self.lacks


# -- AUTOMATIC1111 --------------------------------------------------------------------------------

A1111 = HostRecord(
    name="a1111",
    title="AUTOMATIC1111",
    version=("CHANGELOG.md", r"(?m)^## (\S+)", "{}"),
    gradio=3,
    lora_extension="Lora",
    arguments=("--no-half", "--do-not-download-clip", "--no-download-sd-model"),
    cpu_arguments=("--use-cpu", "all"),
    signs=("Model loaded in",),  # it loads its first checkpoint in a thread of its own
    settings={
        "sd_checkpoint_cache": 0,
        "sd_checkpoints_limit": 1,
        "lora_in_memory_limit": 0,
        "lora_functional": False,
        "fp8_storage": "Disable",
        "cache_fp16_weight": False,
        "batch_cond_uncond": True,
    },
    loading_options=("fp8_storage", "cache_fp16_weight"),
    negative="({}:1)",
    no_samplers=frozenset(("HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDPM")),
    page_errors=GRADIO_3,
    models={
        "sd15": Model("tiny_sd15", "sd15"),
        "sdxl": Model("tiny_sdxl", "sdxl"),
        "sdxl_full": Model("tiny_sdxl_full", "sdxl_full"),
        # On a device without autocast it computes once with a merged weight before it rounds it to
        # fp8 (modules/devices.py, manual_cast): no `<lora:>` makes the same picture twice there.
        "sd15_fp8": Model("tiny_sd15", "sd15", {"fp8_storage": "Enable"}, devices=CPU_ONLY),
        "sd15_fp8_cache": Model(
            "tiny_sd15", "sd15", {"fp8_storage": "Enable", "cache_fp16_weight": True},
            devices=CPU_ONLY,
        ),
    },
    full_depth="sdxl_full",
    maker="make_a1111",
    tiny="patch_a1111",
    patcher="networks",
    merge="network_lora.NetworkModuleLora.calc_updown",
    lacks={
        "flux": "AUTOMATIC1111 has no Flux",
        "old diffusers names": "AUTOMATIC1111 does not read those names",
        "merging between steps": "AUTOMATIC1111 merges in the layers' forward: see "
        "test_restoration's raise_at",
        "patchers": "AUTOMATIC1111 has no patchers",
        "checkpoints held": "AUTOMATIC1111 empties the old checkpoint's model, whoever holds it",
        "room for online LoRAs": "AUTOMATIC1111 adds no LoRA at the forward by itself",
        "layers swapped": "AUTOMATIC1111 keeps a checkpoint's layers together",
        "fp8 by a flag": "AUTOMATIC1111 has an option for fp8, which is tested",
        "partly loaded": "AUTOMATIC1111 keeps a checkpoint's layers together",
        "refiner at a noise level": "AUTOMATIC1111 begins with a refiner after some steps",
        "fast refiner": "AUTOMATIC1111 loads every refiner anew",
        "several LoRA folders": "AUTOMATIC1111 has one LoRA folder",
    },
)  # fmt: skip

# -- Forge and Forge Neo --------------------------------------------------------------------------

FLUX = {"scheduler": "Simple", "cfg_scale": 1}
FLUX_MODULES = {
    "forge_additional_modules": (
        "tiny_clip_l.safetensors", "tiny_t5.safetensors", "tiny_ae.safetensors"
    )
}  # fmt: skip
DTYPE = "forge_unet_storage_dtype"
FORGE_MODELS = {
    "sd15": Model("tiny_sd15", "sd15"),
    "sdxl": Model("tiny_sdxl", "sdxl"),
    "flux": Model("tiny_flux", "flux", FLUX_MODULES, FLUX),
    "flux_gguf": Model("tiny_flux_q8_0.gguf", "flux", FLUX_MODULES, FLUX),
    "sd15_fp8": Model("tiny_sd15", "sd15", {DTYPE: E4M3}),
    "sd15_fp8_online": Model("tiny_sd15", "sd15", {DTYPE: f"{E4M3} (fp16 LoRA)"}),
    "flux_fp8": Model("tiny_flux", "flux", {**FLUX_MODULES, DTYPE: E4M3}, FLUX),
}
FORGE_SETTINGS = {
    "forge_preset": "sd",
    DTYPE: "Automatic",
    "forge_additional_modules": [],
}
FORGE_LACKS = {
    "infotext field": "Forge's API fails on the field `infotext`; its page is tested elsewhere",
    "hires prompt in a paste": "Forge's paste leaves the hires prompt empty, whatever is in it",
    "pickled LoRAs": "Forge's loader would rename a file that fails, so it is not asked",
    "bundled embeddings": "Forge does not read bundled embeddings",
    "one refusal for a file": "Forge leaves out a layer of a type that it does not know",
    "networks": "Forge has no networks",
    "functional mode": "Forge shows the option but has no such mode",
    "backups one by one": "Forge backs up a parameter together with what it merges into it",
    "several checkpoints": "Forge keeps one checkpoint",
    "a refiner drops LoRAs": "Forge activates the LoRAs again for every refiner",
    "img2img alternative": "on Forge that script asks for an attribute that its models do not have",
    "foreign UNets": "Forge has no such option",
    "fp8 by a flag": "Forge has an option for fp8, which is tested",
    "partly loaded": "Forge merges LoRAs into all layers, wherever they are",
    "refiner at a noise level": "Forge begins with a refiner after some steps",
    "fast refiner": "Forge loads every refiner anew",
    "several LoRA folders": "Forge has one LoRA folder",
}

FORGE = HostRecord(
    name="forge",
    title="Forge",
    version=("modules_forge/forge_version.py", r"version = '(.+?)'", "f{}"),
    gradio=4,
    lora_extension="sd_forge_lora",
    arguments=("--always-cpu", "--disable-gpu-warning", "--no-download-sd-model"),
    settings=FORGE_SETTINGS,
    loading_options=(DTYPE, "forge_additional_modules"),
    must_refresh=True,
    # Its API fails without the first one and has no default for the second.
    hires={"hr_additional_modules": ["Use same choices"], "hr_cfg": 7},
    models=FORGE_MODELS,
    maker="make_backend",
    packages=("packages_3rdparty",),
    tiny="patch_backend",
    patcher="LoraLoader",
    merge="backend.patcher.lora.merge_lora_to_weight",
    prepare="backend.sampling.sampling_function.sampling_prepare",
    management="backend.memory_management",
    lacks=FORGE_LACKS,
)

NEO_MODELS = {  # the families that no other host has: (its checkpoint's modules, its CFG scale)
    "zimage": (("qwen3", "ae"), 1),
    "qwen": (("qwen25", "wan_vae"), 4),
    "chroma": (("t5", "ae"), 4),
    "flux2": (("qwen3", "flux2_vae"), 1),
    "anima": (("qwen3", "wan_vae"), 4),
    "lumina": (("gemma", "ae"), 4),
    "krea": (("qwen3vl", "wan_vae"), 4),
    "ernie": (("ministral", "flux2_vae"), 4),
    "wan": (("umt5", "wan_vae"), 4),
}
NEO_MODELS = {
    family: Model(
        f"tiny_{family}", family,
        {"forge_additional_modules": tuple(f"tiny_{module}.safetensors" for module in modules)},
        {"scheduler": "Simple", "cfg_scale": scale},
    )
    for family, (modules, scale) in NEO_MODELS.items()
}  # fmt: skip
NEO_SETTINGS = {
    **FORGE_SETTINGS,
    "VERSION_UID": "PY313",  # without it the start asks a question on the terminal
    "show_refiner": True,  # a refiner's weights are taken back by a script that needs it
    "refiner_use_steps": True,  # else a refiner begins at a noise level
    "refiner_fast_sd": False,
    "refiner_lora_replacement": "a=a",
}
NEO_CAN = "partly loaded", "refiner at a noise level", "fast refiner", "several LoRA folders"
# As its second start has them. At the first one the prompt has no value, and a paste, which asks
# for the value's type, leaves the prompt as it is (infotext_utils.py, _parse_info).
NEO_UI = {
    f"{tab}/{name}/value": ""
    for tab in ("txt2img", "img2img")
    for name in ("Prompt", "Negative Prompt")
}
NEO_LACKS = {
    **{what: why for what, why in FORGE_LACKS.items() if what not in NEO_CAN},
    "infotext field": "Forge Neo's API fails on the field `infotext`; its page is tested elsewhere",
}
NEO_NO_SAMPLERS = frozenset((
    "DPM fast", "DPM adaptive", "DPM2 a", "DPM++ 2S a", "DDIM CFG++", "HeunPP2", "IPNDM", "IPNDM_V",
    "DEIS", "DDPM",
))  # fmt: skip

NEO = HostRecord(
    name="neo",
    title="Forge Neo",
    version=(
        "modules_forge/forge_version.py",
        r'version = "(.+?)"\s+release = "(.+?)"',
        "{}-{}",
    ),
    gradio=4,
    lora_extension="sd_forge_lora",
    arguments=("--cpu", "--disable-gpu-warning"),
    names_checkpoint=False,  # it would take `--ckpt` for `--ckpt-dirs`
    settings=NEO_SETTINGS,
    ui_defaults=NEO_UI,
    loading_options=(DTYPE, "forge_additional_modules"),
    must_refresh=True,
    # There are no latent upscalers, but the default is one.
    hires={**FORGE.hires, "hr_upscaler": "None"},
    no_samplers=NEO_NO_SAMPLERS,
    sd_upscale=(16, "None", 1.0, False),
    models={
        **FORGE_MODELS,
        **NEO_MODELS,
        "sd15_online": Model("tiny_sd15", "sd15", {DTYPE: "Automatic (fp16 LoRA)"}),
        "sd15_lowvram": Model("tiny_sd15", "sd15", memory=4),
        "flux_lowvram": Model("tiny_flux", "flux", FLUX_MODULES, FLUX, memory=10),
    },
    maker="make_neo",
    packages=("modules_forge/packages",),
    tiny="patch_neo",
    patcher="ModelPatcher",
    merge="backend.patcher.base.merge_lora_to_weight",
    prepare="backend.sampling.sampling_function.sampling_prepare",
    management="backend.memory_management",
    lacks={
        **NEO_LACKS,
        "weights in place": "Forge Neo makes a new parameter of every weight that it merges",
        "room for online LoRAs": "Forge Neo moves a LoRA to the device only while it is added",
        "layers swapped": "KLORA_DEVICE=second is not known to Forge Neo",
    },
    devices=CPU_ONLY,
)

NEO_2025 = HostRecord(
    name="neo-2025",
    title="Forge Neo of 2025",
    version=("modules_forge/forge_version.py", r'version = "(.+?)"', "{} 2025"),
    gradio=4,
    lora_extension="sd_forge_lora",
    arguments=("--always-cpu", "--disable-gpu-warning"),
    names_checkpoint=False,
    # Whoever opens its page chooses this one.
    settings={**NEO_SETTINGS, "forge_checkpoint_sd": "tiny_sd15.safetensors"},
    loading_options=(DTYPE, "forge_additional_modules"),
    must_refresh=True,
    hires=FORGE.hires,
    no_samplers=NEO_NO_SAMPLERS,
    sd_upscale=(16, "None", 1.0, False),
    models=FORGE_MODELS,
    maker="make_backend",
    packages=("modules_forge/packages",),
    tiny="patch_backend",
    patcher="LoraLoader",
    merge="backend.patcher.lora.merge_lora_to_weight",
    prepare="backend.sampling.sampling_function.sampling_prepare",
    management="backend.memory_management",
    lacks={
        **NEO_LACKS,
        "partly loaded": "until 2026 Forge Neo merged LoRAs into all layers",
        "fast refiner": "until 2026 Forge Neo loaded every refiner anew",
        "layers swapped": "KLORA_DEVICE=second is not known to Forge Neo",
    },
    devices=CPU_ONLY,
)

# -- reForge --------------------------------------------------------------------------------------

REFORGE = HostRecord(
    name="reforge",
    title="reForge",
    version=("modules_forge/forge_version.py", r"version = '(.+?)'", "{}"),
    gradio=3,
    lora_extension="Lora",
    arguments=("--always-cpu", "--do-not-download-clip", "--no-download-sd-model"),
    signs=(" loaded in ",),
    settings={"sd_checkpoints_limit": 1},
    hires={"hr_cfg": 7},
    negative="({}:1)",
    no_samplers=frozenset(("DDIM CFG++",)),
    page_errors=GRADIO_3,
    models={
        "sd15": Model("tiny_sd15", "sd15"),
        "sdxl": Model("tiny_sdxl", "sdxl"),
        "sd15_lowvram": Model("tiny_sd15", "sd15", memory=4),
    },
    maker="make_reforge",
    tiny="patch_reforge",
    patcher="ModelPatcher",
    merge="ldm_patched.modules.lora.calculate_weight",
    prepare="modules_forge.forge_sampler.sampling_prepare",
    management="ldm_patched.modules.model_management",
    lacks={
        "flux": "reForge has no Flux",
        "errors in the page": "reForge's page shows “NoneType”, whatever a generation failed with",
        "pickled LoRAs": "reForge's loader would rename a file that fails, so it is not asked",
        "bundled embeddings": "reForge does not read bundled embeddings",
        "one refusal for a file": "reForge leaves out a layer of a type that it does not know",
        "networks": "reForge's networks are empty shells",
        "functional mode": "reForge shows the option but has no such mode",
        "backups one by one": "reForge backs up a parameter together with what it merges into it",
        "several checkpoints": "reForge's checkpoints in memory are not tested",
        "a refiner drops LoRAs": "reForge activates the LoRAs again for every refiner",
        "img2img alternative": "on reForge that script fails",
        "foreign UNets": "reForge has no such option",
        "refiner at a noise level": "reForge counts a refiner's start in timesteps",
        "fast refiner": "reForge loads every refiner anew",
        "several LoRA folders": "reForge has one LoRA folder",
        "weights in place": "reForge makes a new parameter of every weight that it merges",
        "pictures without scripts": "reForge fails without a script runner",
        "room for online LoRAs": "reForge adds no LoRA at the forward but where memory is short",
        "layers swapped": "KLORA_DEVICE=second is not known to reForge",
    },
    devices=CPU_ONLY,
)  # fmt: skip

HOSTS = {record.name: record for record in (A1111, FORGE, NEO, NEO_2025, REFORGE)}

if __name__ == "__main__":
    print(*HOSTS)
