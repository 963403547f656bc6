"""The live tests' instrument inside the WebUI. It knows the host, and nothing of K-LoRA.

POST /klora-probe/next      what to do during the next image; every field may be left out:
  {"record": true,          hash every UNet weight as each model call used it
   "capture": NAME,         keep all UNet layers as the last model call used them
   "swap": {STEP: {LAYER: NAME}}, "hr_swap": ...
                            before model call STEP put captured layers into the model, with the
                            host's LoRA code left out; NAME "base" is the state before; LAYER may
                            end in [FIRST:END], these output rows only
   "mean": [NAME, NAME],     every time that the UNet is called, call it with each of these captured
                            states in all layers, and give out the mean
   "control": NUMBER,        the Forges: hand the UNet a ControlNet's tensors, which add NUMBER to
                            the middle block's output and to what the block behind it is given
   "raise_at": STEP, "interrupt_at": STEP, "skip_at": STEP, "hr": false
                            end that model call (of the hires pass, if hr) in this way
   "merge_fails_after": [STEP, "memory" | "other"]
                            the Forges: the first merging of a weight after that model call raises
   "unload_at": STEP        ModelPatcher: before that model call the host makes room by taking three
                            quarters of the UNet's weights out of the device
   "apply_fails": [FIRST, LAST, "memory" | "other"]
                            from the FIRST to the LAST time that the host computes what a LoRA
                            changes in a weight, that raises
   "backup_fails": N        AUTOMATIC1111: the Nth weight or bias that it backs up finds no memory
   "merging": true,         the Forges: note when it merges a weight and when somebody waits for the
                            device
   "steps_unknown_after": STEP
                            after that model call the denoiser has no "steps" any more: nothing of
                            the host's own needs it then
   "weights_of": {NAME: WEIGHT}
                            AUTOMATIC1111: networks of that name have this weight, as under loractl
   "patchers": "clones" | "original"
                            the Forges: sample with two clones of the patcher in turn, as their
                            Fooocus inpaint does in some of the steps, or with one without LoRAs
   "lists": FACTOR          ModelPatcher: after the LoRAs are activated, put lists of its own into
                            the patchers, with each parameter's first entry alone and its strength
                            times FACTOR, as LoRA Block Weight does
   "empty_networks": true,  AUTOMATIC1111: empty its list after the image, as LoRA Block Weight does
   "nested": {"prompt": TEXT, "scripts": null | "all" | [FILE STEMS], ...}
                            as ADetailer does: replace the finished image by an img2img of it;
                            other items are fields of the processing object}
GET  /klora-probe/last      {"calls": [...], "errors": [...]} of the last image; per model call its
                            step, total_steps, steps, sampling_step, sigma, device, sampler, hr,
                            nested, iteration, checkpoint, cond (hash), if asked for, merging (in
                            order, since the call before) and, if recorded, weights,
                            touched (the parameters written since the call before),
                            moved (those of them that are elsewhere in memory now), and on Forges
                            online (bytes of what the layers add at every forward) and preserved
                            (bytes that it was told to keep free beside the model)
POST /klora-probe/restore   undo the swaps now; the next image does so by itself
POST /klora-probe/reload_ui what the button does
POST /klora-probe/refresh_model   Forge, Neo: read the loading options again, as their page does
POST /klora-probe/memory    {"mib": SIZE}: ModelPatcher: of the UNet's weights the host loads no
                            more than that, also on the CPU, until it is told another size or null
GET  /klora-probe/layers    the Forges: how many layers were in memory when the last checkpoint had
                            been loaded
GET  /klora-probe/tensors   bytes of all tensors that Python knows
GET  /klora-probe/events    how many of the page's events the server has not finished
"""

import functools
import gc
import hashlib
import inspect
import itertools
import re
import sys
import traceback
from copy import copy

import gradio
import torch
from klora_live_host import record
from modules import processing, script_callbacks, scripts, shared
from starlette.websockets import WebSocketState

MERGE_ERRORS = {
    "memory": torch.cuda.OutOfMemoryError("raised by klora-probe"),
    "other": ValueError("raised by klora-probe"),
}
LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d"}
STATE = (
    "forge_online_loras", "weight_function", "bias_function", "parameters_manual_cast",
    "prev_parameters_manual_cast", "ldm_patched_cast_weights", "prev_ldm_patched_cast_weights",
)  # fmt: skip
"""A layer's attributes by which a host adds LoRAs at every forward; each host has a few of them."""


# the UNet ---------------------------------------------------------------------------------------


def unet():
    """The denoising network."""
    model = shared.sd_model
    if hasattr(model, "forge_objects"):
        return model.forge_objects.unet.model.diffusion_model
    return model.model.diffusion_model


def layers():
    """{dotted LDM name: module} of the UNet's linear and convolution layers."""
    return {name: m for name, m in unet().named_modules() if type(m).__name__ in LAYERS}


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
        elif hasattr(item, "weights"):  # ComfyUI's adapters
            add([type(item).__name__, item.weights])
        else:
            state.update(getattr(item, "__name__", repr(item)).encode())

    add(items)
    return state.hexdigest()


def online(module):
    """{"weight" or "bias": what the host adds to it at every forward}, as it would look it up."""
    found = dict(getattr(module, "forge_online_loras", {}))
    for part in ("weight", "bias"):
        for function in patching(getattr(module, f"{part}_function", None)):
            found[part] = [*found.get(part, ()), *function.patches[function.key]]
    # What a ModelPatcher adds at strength 0 is nothing, not even a rounding.
    found = {part: [entry for entry in found[part] if entry[0]] for part in found}
    return {part: entries for part, entries in found.items() if entries}


def patching(functions):
    """Those of a ModelPatcher layer's functions that look up LoRAs."""
    return [function for function in functions or () if hasattr(function, "patches")]


def weights():
    """{parameter name: hash}; what is added at every forward under its name + "#online"."""
    found = {}
    for name, module in layers().items():
        for part, tensor in parameters(module):
            found[f"{name}.{part}"] = digest(tensor)
        for part, entries in online(module).items():
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


def merging():
    """(owner, name) of the host's function that computes a weight with what its LoRAs change."""
    path, name = record.merge.rsplit(".", 1)
    if path in sys.modules:
        return sys.modules[path], name
    module, _, owner = path.rpartition(".")  # a class
    return getattr(sys.modules.get(module), owner, None), name


def fail_next_merge(error):
    """Let the host's next merging of a weight raise."""
    owner, name = merging()
    merge = getattr(owner, name)

    def fail(*args, **kwargs):
        setattr(owner, name, merge)
        raise error

    setattr(owner, name, fail)


def replace_patcher(objects, kind):
    """Sample with other patchers than the host's own."""
    module, _, name = record.prepare.rpartition(".")
    prepare = getattr(sys.modules[module], name)
    if kind == "original":
        objects.unet = shared.sd_model.forge_objects_original.unet.clone()
        return
    first, second = (objects.unet.clone() for _ in range(2))
    key = "diffusion_model.out.2.weight"
    change = torch.ones_like(first.model.get_parameter(key))
    for patcher in (first, second):
        takes = inspect.signature(patcher.add_patches).parameters
        more = {"filename": "klora-probe"} if "filename" in takes else {}
        patcher.add_patches(patches={key: ("diff", (change,))}, **more)
    if hasattr(second, "lora_patches"):
        second.lora_patches = dict(reversed(second.lora_patches.items()))

    def in_turn(model, x, *others):
        patcher = second if probe.denoiser.step in (2, 3, 4) else first
        prepare(patcher, x)
        return patcher.model, x, *others

    first.add_conditioning_modifier(in_turn)
    objects.unet = first


def fail_to_apply(times):
    """Let the host's computing of what is added to a weight raise; None takes it back."""
    owner, name = merging()
    if owner is None:
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
    """Add "merge" and "wait" to a list in their order; None takes it back."""
    if not record.management:
        return
    management = sys.modules[record.management]
    device = getattr(torch, management.get_torch_device().type)
    for (owner, name), note in ((merging(), "merge"), ((device, "synchronize"), "wait")):
        own = getattr(owner, name)
        own = getattr(own, "noted", own)

        def noting(*args, own=own, note=note, **kwargs):
            notes.append(note)
            return own(*args, **kwargs)

        noting.noted = own
        setattr(owner, name, own if notes is None else noting)


def limit_memory(mib):
    """ModelPatcher: load only so much of the UNet, as where a device has no room; None is all."""
    management = sys.modules[record.management]
    loaded = management.LoadedModel
    load = getattr(loaded.model_load, "own", loaded.model_load)

    def limited(self, lowvram_model_memory=0, **kwargs):
        if hasattr(self.model.model, "diffusion_model"):
            lowvram_model_memory = mib * 2**20 - self.model.loaded_size() or 0.1
        return load(self, lowvram_model_memory, **kwargs)

    limited.own = load
    loaded.model_load = load if mib is None else limited
    management.unload_all_models()
    # Neo would leave what an online LoRA was added by in the layers that are outside from now on.
    patcher = shared.sd_model.forge_objects.unet
    for module in patcher.model.modules():
        inspect.getmodule(patcher.partially_load).wipe_lowvram_weight(module)


def unload(share):
    """ModelPatcher: take a part of the UNet's weights out of the device."""
    for loaded in sys.modules[record.management].current_loaded_models:
        patcher = loaded.model
        if hasattr(patcher.model, "diffusion_model"):
            patcher.partially_unload(patcher.offload_device, share * patcher.loaded_size())


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
            {name: vars(module)[name] for name in STATE if name in vars(module)},
            {part: entries[:] for part, entries in online(module).items()},
        )
        for name, module in layers().items()
    }


def put(module, state, rows=slice(None)):
    """Make a layer, or some of its output rows, what `take` saw."""
    tensors, attributes, _ = state
    for part, tensor in parameters(module):
        count = getattr(module, part).shape[0]
        new, old = (raw(t).view(count, -1)[rows] for t in (tensors[part], tensor))
        if not torch.equal(old, new):  # Neo's GGUF weights lie in a file that cannot be written
            old.copy_(new)
    for name in STATE:
        if name in attributes:
            setattr(module, name, attributes[name])
        elif name in vars(module):
            delattr(module, name)


def put_elsewhere(module, state, rows):
    """As `put`, for another image: the host has other LoRAs now than those that it looked up."""
    put(module, state, rows)
    for part, entries in state[2].items():
        if f"{part}_function" in state[1]:
            functions = [copy(function) for function in patching(state[1][f"{part}_function"])]
            for function in functions:
                function.patches = {function.key: entries}
            setattr(module, f"{part}_function", functions)


def online_bytes():
    """Bytes of what the layers add at every forward."""
    entries = (online(module) for module in layers().values())
    return sum(tensor.nbytes for tensor in tensors_in([list(entry.values()) for entry in entries]))


def tensors_in(value):
    """All tensors in lists, tuples and adapters."""
    value = getattr(value, "weights", value)
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
        self.undoing = []
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
        while self.undoing:
            self.undoing.pop()()
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
        if not self.undoing:
            if "control" in self.doing:
                self.put_in(shared.sd_model.forge_objects.unet.model, "apply_model", controlled)
            if "mean" in self.doing:
                self.put_in(unet(), "forward", self.mean_of)
        swaps = self.doing.get("hr_swap" if hires else "swap", {})
        self.swap(swaps.get(str(denoiser.step), {}))
        if hires != self.doing.get("hr", False):
            return
        if self.doing.get("unload_at") == denoiser.step:
            unload(3 / 4)
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
            patcher = getattr(getattr(shared.sd_model, "forge_objects", None), "unet", None)
            if patcher is not None:
                self.calls[-1]["online"] = online_bytes()
                self.calls[-1]["preserved"] = patcher.extra_preserved_memory_during_sampling
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
            (put if name == "base" else put_elsewhere)(found[layer], source[layer], rows)

    def put_in(self, owner, name, around):
        """Let an object's method be `around` of what it is, until the image is over."""
        before = vars(owner).get(name)
        setattr(owner, name, around(getattr(owner, name)))

        def undo():
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)

        self.undoing.append(undo)

    def mean_of(self, predict):
        """The mean of what the UNet predicts in each of the states that were asked for."""

        def forward(*args, control=None, **kwargs):
            total, names = 0, self.doing["mean"]
            for name in names:
                self.swap(dict.fromkeys(layers(), name))
                if control is not None:
                    kwargs["control"] = {place: found[:] for place, found in control.items()}
                total = total + predict(*args, **kwargs)
            return total / len(names)

        return forward

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


def controlled(apply_model):
    """The same with a ControlNet's tensors, in lists of their own for each call."""

    def apply(x, *args, control=None, **kwargs):
        tensor = torch.full((1, 1, 1, 1), float(probe.doing["control"]), device=x.device)
        return apply_model(x, *args, control={"middle": [tensor], "output": [tensor]}, **kwargs)

    return apply


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
    def after_extra_networks_activate(self, p, *args, **kwargs):
        """Other lists, if asked for."""
        factor = probe.doing.get("lists")
        if factor is not None:
            objects = shared.sd_model.forge_objects_after_applying_lora
            for patcher in (objects.unet, objects.clip.patcher):
                for key, entries in patcher.patches.items():
                    first = [(entry[0] * factor, *entry[1:]) for entry in entries[:1]]
                    patcher.patches[key] = first

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
        kinds = {type(x) for x in model.forge_objects.unet.model.diffusion_model.modules()}
        probe.layers_in_memory = sum(type(thing) in kinds for thing in gc.get_objects())


def end_forgotten_connections(queue):
    """Gradio 3 drops an event whose page has gone from its queue, and leaves the connection that
    brought it open for ever: the next Reload UI waits for it without end, with or without K-LoRA.
    (queueing.py, clean_event; routes.py, join_queue, which looks at the state that is set here.)"""
    clean = queue.clean_event

    async def clean_event(event):
        await clean(event)
        event.websocket.application_state = WebSocketState.DISCONNECTED

    queue.clean_event = clean_event


def on_app_started(demo, app):
    """The routes."""
    if gradio.__version__.startswith("3.") and getattr(demo, "_queue", None) is not None:
        end_forgotten_connections(demo._queue)

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

    @app.post("/klora-probe/memory")
    def memory(fields: dict):
        limit_memory(fields["mib"])

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
script_callbacks.on_app_started(on_app_started)
