"""The live tests' instrument inside the WebUI. It knows the host, and nothing of K-LoRA.

POST /klora-probe/next      what to do during the next image; every field may be left out:
  {"record": true,          hash every UNet weight as each model call used it
   "capture": NAME,         keep all UNet layers as the last model call used them
   "swap": {STEP: {LAYER: NAME}}, "hr_swap": ...
                            before model call STEP put captured layers into the model, with the
                            host's LoRA code left out; NAME "base" is the state before; LAYER may
                            end in [FIRST:END], these output rows only
   "raise_at": STEP, "interrupt_at": STEP, "skip_at": STEP, "hr": false
                            end that model call (of the hires pass, if hr) in this way
   "merge_fails_after": [STEP, "memory" | "other"]
                            Forge: the first merging of a weight after that model call raises
   "apply_fails": [FIRST, LAST, "memory" | "other"]
                            from the FIRST to the LAST time that the host computes what a LoRA
                            changes in a weight, that raises
   "backup_fails": N        AUTOMATIC1111: the Nth weight or bias that it backs up finds no memory
   "merging": true,         Forge: note when it merges a weight and when somebody waits for the
                            device
   "steps_unknown_after": STEP
                            after that model call the denoiser has no "steps" any more: nothing of
                            the host's own needs it then
   "weights_of": {NAME: WEIGHT}
                            AUTOMATIC1111: networks of that name have this weight, as under loractl
   "patchers": "clones" | "original"
                            Forge: sample with two clones of the patcher in turn, as its Fooocus
                            inpaint does in a part of the steps, or with one without LoRAs
   "empty_networks": true,  AUTOMATIC1111: empty its list after the image, as LoRA Block Weight does
   "nested": {"prompt": TEXT, "scripts": null | "all" | [FILE STEMS], ...}
                            as ADetailer does: replace the finished image by an img2img of it;
                            other items are fields of the processing object}
GET  /klora-probe/last      {"calls": [...], "errors": [...]} of the last image; per model call its
                            step, total_steps, steps, sampling_step, sigma, device, sampler, hr,
                            nested, iteration, checkpoint, cond (hash), if asked for, merging (in
                            order, since the call before) and, if recorded, weights,
                            touched (the parameters written since the call before),
                            moved (those of them that are elsewhere in memory now), and on Forge
                            online (bytes of what the layers add at every forward) and preserved
                            (bytes that it was told to keep free beside the model)
POST /klora-probe/restore   undo the swaps now; the next image does so by itself
POST /klora-probe/reload_ui what the button does
POST /klora-probe/refresh_model   Forge: read the loading options again, as its page does
GET  /klora-probe/layers    Forge: how many layers were in memory when the last checkpoint had been
                            loaded
GET  /klora-probe/tensors   bytes of all tensors that Python knows
GET  /klora-probe/events    how many of the page's events the server has not finished

AUTOMATIC1111's SD Unet “klora-probe” is a model of an extension's own, as TensorRT's are.
"""

import functools
import gc
import hashlib
import itertools
import re
import sys
import traceback
from copy import copy

import torch
from modules import processing, script_callbacks, scripts, sd_unet, shared

MERGE_ERRORS = {
    "memory": torch.cuda.OutOfMemoryError("raised by klora-probe"),
    "other": ValueError("raised by klora-probe"),
}
LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d"}


# the UNet ---------------------------------------------------------------------------------------


def layers():
    """{dotted LDM name: module} of the UNet's linear and convolution layers."""
    model = shared.sd_model
    if hasattr(model, "forge_objects"):
        unet = model.forge_objects.unet.model.diffusion_model
    else:
        unet = model.model.diffusion_model
    return {name: m for name, m in unet.named_modules() if type(m).__name__ in LAYERS}


def parameters(module):
    """(name, tensor) of a layer's weight and bias as plain tensors, packed formats included."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            yield name, parameter.detach().as_subclass(torch.Tensor)


def raw(tensor):
    """A tensor's storage as bytes in one row."""
    return tensor.view(-1).view(torch.uint8)


def digest(*items):
    """SHA-256 of tensors (their bytes) and other values (their text), nested as they may be."""
    state = hashlib.sha256()

    def add(item):
        if isinstance(item, torch.Tensor):
            state.update(raw(item.detach().cpu().contiguous()).numpy())
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        elif isinstance(item, dict):
            add(sorted(item.items()))
        else:
            state.update(getattr(item, "__name__", repr(item)).encode())

    add(items)
    return state.hexdigest()


def weights():
    """{parameter name: hash}; Forge's online LoRAs under the parameter's name + "#online"."""
    found = {}
    for name, module in layers().items():
        for part, tensor in parameters(module):
            found[f"{name}.{part}"] = digest(tensor)
        for part, entries in getattr(module, "forge_online_loras", {}).items():
            if entries:
                found[f"{name}.{part}#online"] = digest(entries)
    return found


def identities():
    """{parameter name: (object, write counter, address)}. When a parameter is written, one of the
    first two changes: torch keeps no counter for tensors made in inference mode, which a host
    replaces instead."""
    found = {}
    for name, module in layers().items():
        for part in ("weight", "bias"):
            parameter = getattr(module, part, None)
            if parameter is not None:
                count = 0 if parameter.is_inference() else parameter._version
                found[f"{name}.{part}"] = parameter, count, parameter.data_ptr()
    return found


def touched(before, after):
    """The parameters written between two calls of `identities`."""
    return [
        name
        for name, (parameter, count, _) in after.items()
        if before[name][0] is not parameter or before[name][1] != count
    ]


def fail_next_merge(error):
    """Forge: let its next merging of a weight raise."""
    from backend.patcher import lora

    merge = lora.merge_lora_to_weight

    def fail(*args, **kwargs):
        lora.merge_lora_to_weight = merge
        raise error

    lora.merge_lora_to_weight = fail


def replace_patcher(objects, kind):
    """Forge: sample with other patchers than the host's own."""
    from backend.sampling.sampling_function import sampling_prepare

    if kind == "original":
        objects.unet = shared.sd_model.forge_objects_original.unet.clone()
        return
    first, second = (objects.unet.clone() for _ in range(2))
    key = "diffusion_model.out.2.weight"
    change = torch.ones_like(first.model.get_parameter(key))
    for patcher in (first, second):
        patcher.add_patches(filename="klora-probe", patches={key: ("diff", (change,))})
    second.lora_patches = dict(reversed(second.lora_patches.items()))

    def in_turn(model, x, *others):
        patcher = second if probe.denoiser.step in (2, 3, 4) else first
        sampling_prepare(patcher, x)
        return patcher.model, x, *others

    first.add_conditioning_modifier(in_turn)
    objects.unet = first


def fail_to_apply(times):
    """Let the host's computing of what is added to a weight raise; None takes it back."""
    if "network_lora" in sys.modules:
        owner, name = sys.modules["network_lora"].NetworkModuleLora, "calc_updown"
    elif "backend.patcher.lora" in sys.modules:
        owner, name = sys.modules["backend.patcher.lora"], "merge_lora_to_weight"
    else:
        return  # the Lora extension is off
    compute = getattr(owner, name)
    compute = getattr(compute, "own", compute)
    setattr(owner, name, compute)
    if times is None:
        return
    first, last, kind = times
    count = itertools.count(1)

    def fail(*args, **kwargs):
        if first <= next(count) <= last:
            raise MERGE_ERRORS[kind]
        return compute(*args, **kwargs)

    fail.own = compute
    setattr(owner, name, fail)


def note_merging(notes):
    """Forge: add "merge" and "wait" to a list in their order; None takes it back."""
    if "backend.patcher.lora" not in sys.modules:
        return
    merging = sys.modules["backend.patcher.lora"]
    device = getattr(torch, merging.memory_management.get_torch_device().type)
    places = ((merging, "merge_lora_to_weight"), (device, "synchronize"))
    for (owner, name), note in zip(places, ("merge", "wait"), strict=True):
        own = getattr(owner, name)
        own = getattr(own, "noted", own)

        def noting(*args, own=own, note=note, **kwargs):
            notes.append(note)
            return own(*args, **kwargs)

        noting.noted = own
        setattr(owner, name, own if notes is None else noting)


def fail_to_back_up(number):
    """AUTOMATIC1111: let the backup of one parameter raise, once; None takes it back."""
    networks = sys.modules.get("networks")
    store = getattr(networks, "store_weights_backup", None)
    if store is None:
        return
    networks.store_weights_backup = store = getattr(store, "own", store)
    if number is None:
        return
    count = itertools.count(1)

    def fail(weight):
        if next(count) == number:
            raise MERGE_ERRORS["memory"]
        return store(weight)

    fail.own = store
    networks.store_weights_backup = fail


def set_weights_by_name(weights):
    """AUTOMATIC1111: networks of these names have these weights; {} takes it back."""
    if "network" not in sys.modules:
        return  # the Lora extension is off
    network = sys.modules["network"].Network
    for kind in ("te_multiplier", "unet_multiplier"):

        def get(net, kind=kind):
            return weights.get(net.name, vars(net)[kind])

        def put(net, value, kind=kind):
            vars(net)[kind] = value

        if weights:
            setattr(network, kind, property(get, put))
        elif kind in vars(network):
            delattr(network, kind)


def take():
    """All layers as they are now."""
    return {
        name: (
            {part: tensor.clone() for part, tensor in parameters(module)},
            dict(getattr(module, "forge_online_loras", {})),
        )
        for name, module in layers().items()
    }


def put(module, state, rows=slice(None)):
    """Make a layer, or some of its output rows, what `take` saw."""
    tensors, online = state
    for part, tensor in parameters(module):
        count = getattr(module, part).shape[0]
        new, old = (raw(t).view(count, -1)[rows] for t in (tensors[part], tensor))
        old.copy_(new)
    if online:
        module.forge_online_loras = online
    elif hasattr(module, "forge_online_loras"):
        del module.forge_online_loras


def online_bytes():
    """Forge: bytes of what its layers add at every forward."""
    entries = (getattr(module, "forge_online_loras", {}) for module in layers().values())
    return sum(tensor.nbytes for tensor in tensors_in([list(entry.values()) for entry in entries]))


def tensors_in(value):
    """All tensors in lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def bytes_of_tensors():
    """Of all plain ones that Python knows, each piece of memory once."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = (x.untyped_storage() for x in gc.get_objects() if type(x) in kinds and not x.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


# one image --------------------------------------------------------------------------------------


class Probe:
    """What was asked for the next image, and what was seen in the last."""

    def __init__(self):
        self.asked, self.doing = {}, {}
        self.captured, self.base = {}, None
        self.calls, self.errors = [], []
        self.identities = None
        self.denoiser, self.nested = None, False
        self.layers_in_memory = 0
        self.merging = None

    def start(self):
        """A new image: give back what the last one changed."""
        self.restore()
        self.doing, self.asked = self.asked, {}
        set_weights_by_name(self.doing.get("weights_of", {}))
        fail_to_apply(self.doing.get("apply_fails"))
        fail_to_back_up(self.doing.get("backup_fails"))
        self.merging = [] if self.doing.get("merging") else None
        note_merging(self.merging)
        self.calls, self.errors = [], []
        self.identities = None

    def restore(self):
        """Undo the swaps."""
        if self.base is not None:
            with torch.inference_mode():
                for name, module in layers().items():
                    put(module, self.base[name])
            self.base = None

    def before_call(self, params):
        """A model call is about to start."""
        self.denoiser = denoiser = params.denoiser
        hires = bool(getattr(denoiser.p, "is_hr_pass", False))
        info = shared.sd_model.sd_checkpoint_info
        call = {
            "step": denoiser.step,
            "total_steps": denoiser.total_steps,
            "steps": getattr(denoiser, "steps", None),
            "sampling_step": params.sampling_step,
            "sigma": float(params.sigma[0]),
            "device": str(params.x.device),
            "sampler": denoiser.sampler.config.name,
            "hr": hires,
            "nested": self.nested,
            "iteration": denoiser.p.iteration,
            "checkpoint": info.name_for_extra,
            "cond": digest(params.text_cond, params.text_uncond),
        }
        self.calls.append(call)
        if self.nested:
            return
        swaps = self.doing.get("hr_swap" if hires else "swap", {})
        self.swap(swaps.get(str(denoiser.step), {}))
        if hires != self.doing.get("hr", False):
            return
        if self.doing.get("raise_at") == denoiser.step:
            names = list(layers())
            raise_in(layers()[names[len(names) // 2]])
        if self.doing.get("interrupt_at") == denoiser.step:
            shared.state.interrupt()
        if self.doing.get("skip_at") == denoiser.step:
            shared.state.skip()

    def after_call(self):
        """A model call is done and its weights are still in place."""
        if self.doing.get("steps_unknown_after") == self.denoiser.step:
            del self.denoiser.steps
        step, kind = self.doing.get("merge_fails_after", (None, None))
        if step == self.denoiser.step:
            fail_next_merge(MERGE_ERRORS[kind])
        if self.doing.get("record"):
            now = identities()
            self.calls[-1]["weights"] = weights()
            before = self.identities or now
            self.calls[-1]["touched"] = written = touched(before, now)
            self.calls[-1]["moved"] = [n for n in written if before[n][2] != now[n][2]]
            self.identities = now
            unet = getattr(getattr(shared.sd_model, "forge_objects", None), "unet", None)
            if unet is not None:
                self.calls[-1]["online"] = online_bytes()
                self.calls[-1]["preserved"] = unet.extra_preserved_memory_during_sampling
        if self.merging is not None:
            self.calls[-1]["merging"] = self.merging[:]
            self.merging.clear()
        if self.doing.get("capture") and not self.nested:
            self.captured[self.doing["capture"]] = take()

    def swap(self, choice):
        """Put captured layers into the model."""
        if not choice:
            return
        found = layers()
        if self.base is None:
            # AUTOMATIC1111 restores the last image's LoRAs inside the first forward
            settle = getattr(sys.modules["networks"], "network_apply_weights", lambda module: None)
            for module in found.values():
                settle(module)
            self.base = take()
        for part, name in choice.items():
            layer, first, end = re.fullmatch(r"(.+?)(?:\[(\d+):(\d+)\])?", part).groups()
            rows = slice(int(first), int(end)) if end else slice(None)
            source = self.base if name == "base" else self.captured[name]
            put(found[layer], source[layer], rows)

    def make_nested(self, p, image):
        """The image after an img2img of it, made the way ADetailer makes it."""
        fields = dict(self.doing["nested"])
        keep = fields.pop("scripts", None)
        own = {
            "sd_model": shared.sd_model,
            "outpath_samples": p.outpath_samples,
            "outpath_grids": p.outpath_grids,
            "init_images": [image],
            "resize_mode": 0,
            "denoising_strength": 0.4,
            "do_not_save_samples": True,
            "do_not_save_grid": True,
        }
        names = ("negative_prompt", "seed", "sampler_name", "steps", "cfg_scale", "width", "height")
        same = {name: getattr(p, name) for name in names}
        inner = processing.StableDiffusionProcessingImg2Img(**{**own, **same, **fields})
        inner.scheduler = p.scheduler
        inner.cached_c, inner.cached_uc = [None, None], [None, None]
        if keep is not None:
            inner.scripts = copy(p.scripts)
            inner.script_args = [copy(arg) for arg in p.script_args]
            if keep != "all":
                runner = inner.scripts
                runner.alwayson_scripts = [s for s in runner.alwayson_scripts if stem(s) in keep]
        self.nested = True
        try:
            return processing.process_images(inner).images[0]
        finally:
            self.nested = False


def stem(script):
    """The name of a script's file, without .py."""
    return re.split(r"[/\\]", script.filename)[-1].rpartition(".")[0]


def raise_in(module):
    """Make the next forward of a module fail, once."""

    def fail(*_):
        hook.remove()
        raise RuntimeError("raised by klora-probe")

    hook = module.register_forward_pre_hook(fail)


# the host's hooks -------------------------------------------------------------------------------

probe = Probe()


def reported(function):
    """The host swallows what callbacks raise; keep it for the test."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception:
            probe.errors.append(traceback.format_exc())
            raise

    return run


class ProbeScript(scripts.Script):
    """Sees where an image starts and ends."""

    def title(self):
        """The name in the API."""
        return "K-LoRA probe"

    def show(self, is_img2img):
        """Always on, without a page element."""
        return scripts.AlwaysVisible

    @reported
    def before_process(self, p, *args):
        """Start a new image, unless it is part of another."""
        if not probe.nested:
            probe.start()

    @reported
    def process_before_every_sampling(self, p, *args, **kwargs):
        """Other patchers, if asked for."""
        if probe.doing.get("patchers"):
            replace_patcher(p.sd_model.forge_objects, probe.doing["patchers"])

    @reported
    def postprocess_image(self, p, pp, *args):
        """Make the nested image."""
        if probe.doing.get("nested") and not probe.nested:
            pp.image = probe.make_nested(p, pp.image)

    @reported
    def postprocess(self, p, *args):
        """The end of an image."""
        if probe.doing.get("empty_networks"):
            sys.modules["networks"].loaded_networks.clear()


@reported
def on_cfg_denoiser(params):
    """Before each model call."""
    probe.before_call(params)


@reported
def on_cfg_after_cfg(params):
    """After each model call."""
    probe.after_call()


def unfinished_events(queue):
    """Events that wait or run; Gradio 3 has one line for all of them, Gradio 4 several, and
    --no-gradio-queue leaves Gradio 3 with none."""
    if queue is None:
        return 0
    lines = [getattr(queue, "event_queue", ())]
    lines += [x.queue for x in getattr(queue, "event_queue_per_concurrency_id", {}).values()]
    return sum(map(len, lines)) + sum(job is not None for job in queue.active_jobs)


def on_model_loaded(model):
    """A checkpoint has been loaded, and nobody has been told so before us."""
    if hasattr(model, "forge_objects"):
        probe.denoiser = None
        gc.collect()
        unet = model.forge_objects.unet.model.diffusion_model
        kinds = {type(module) for module in unet.modules()}
        probe.layers_in_memory = sum(type(thing) in kinds for thing in gc.get_objects())


class ForeignUnet(sd_unet.SdUnet):
    """Calls no layer of the checkpoint."""

    def forward(self, x, *args, **kwargs):
        """Something that depends on nothing else."""
        return x / 2


class ForeignUnetOption(sd_unet.SdUnetOption):
    """What the host lists."""

    label = "klora-probe"

    def create_unet(self):
        """A new one whenever it is chosen."""
        return ForeignUnet()


def on_app_started(demo, app):
    """The routes."""

    @app.post("/klora-probe/next")
    def ask(fields: dict):
        probe.asked = fields

    @app.get("/klora-probe/last")
    def last():
        return {"calls": probe.calls, "errors": probe.errors}

    @app.post("/klora-probe/restore")
    def restore():
        probe.restore()

    @app.post("/klora-probe/reload_ui")
    def reload_ui():
        shared.state.request_restart()

    @app.post("/klora-probe/refresh_model")
    def refresh_model():
        from modules_forge import main_entry

        main_entry.refresh_model_loading_parameters()

    @app.get("/klora-probe/layers")
    def layers_in_memory():
        return probe.layers_in_memory

    @app.get("/klora-probe/tensors")
    def tensors():
        return bytes_of_tensors()

    @app.get("/klora-probe/events")
    def events():
        return unfinished_events(getattr(demo, "_queue", None))


script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
script_callbacks.on_cfg_after_cfg(on_cfg_after_cfg)
script_callbacks.on_model_loaded(on_model_loaded)
script_callbacks.on_list_unets(lambda known: known.append(ForeignUnetOption()))
script_callbacks.on_app_started(on_app_started)
