"""Run an installed WebUI from a test: find it, start it on loopback on the CPU, use its HTTP API.

With KLORA_DEVICE=second it computes on a second device (second_device/launch.py) instead.

What differs between the hosts is in hosts.py. The host's own folder is only read. Everything it
writes (settings, caches, models, extensions) lies in a data folder of ours, through its
`--data-dir` option.
"""

import base64
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from hosts import HOSTS, HostRecord, Model
from PIL import Image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DEVICE = os.environ.get("KLORA_DEVICE") or "cpu"
LAUNCH = {"cpu": "launch.py", "second": str(HERE / "second_device" / "launch.py")}
DEVICE_SETTINGS = {"cpu": {}, "second": {"randn_source": "CPU"}}  # it has no random numbers

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "NO_PROXY": "127.0.0.1,localhost",
    "COMMANDLINE_ARGS": "",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # more threads change the bits, and are slower on such small models
    "PYTHONUNBUFFERED": "1",
    "SD_WEBUI_RESTARTING": "1",  # opens no browser
}
ARGUMENTS = [
    "--skip-prepare-environment",
    "--skip-install",
    "--skip-torch-cuda-test",
    "--skip-python-version-check",
    "--skip-version-check",
    "--no-prompt-history",
    "--disable-console-progressbars",
    "--api",
]
# A host restores an option that a request overrides only if its settings file names it.
SETTINGS = {
    "samples_save": False,
    "grid_save": False,
    "return_grid": False,  # so that a batch's images are just that
    "live_previews_enable": False,
    "show_progress_type": "Approx cheap",  # others ask for a model to be downloaded
    "auto_launch_browser": "Disable",
    "sd_model_checkpoint": "tiny_sd15.safetensors",
    "sd_vae": "Automatic",
    "sd_lora": "None",
    "CLIP_stop_at_last_layers": 1,
    "img2img_fix_steps": False,
    "persistent_cond_cache": True,
    "pad_cond_uncond": False,
    "s_min_uncond": 0,
    "skip_early_cond": 0,
    "eta_noise_seed_delta": 0,
    "enable_batch_seeds": True,
}

REQUEST = {
    "prompt": "a cat",
    "negative_prompt": "",
    "width": 64,
    "height": 64,
    "steps": 4,
    "seed": 1,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "cfg_scale": 7,
}


@dataclass(frozen=True)
class Install:
    """A WebUI on this machine."""

    host: HostRecord
    folder: Path
    python: Path

    @property
    def missing(self):
        """What keeps it from being used, as one sentence; empty if nothing does."""
        variable = self.host.variable
        if not (self.folder / "launch.py").is_file():
            return f"no {self.host.name} at {self.folder}: set {variable} to the WebUI's folder"
        if not self.python.is_file():
            return f"no Python at {self.python}: set {variable}_PYTHON to the WebUI's Python"
        if DEVICE not in self.host.devices:
            return f"{self.host.title} cannot be started with KLORA_DEVICE={DEVICE}"
        return ""

    @cached_property
    def version(self):
        """The version that the WebUI's source states, with its commit where git knows it."""
        file, pattern, form = self.host.version
        found = re.search(pattern, (self.folder / file).read_text(encoding="utf8"))
        return f"{form.format(*found.groups())} {commit(self.folder)[:10]}".strip()


def locate(host):
    """Where the host of a name would be, whether it is there or not."""
    record = HOSTS[host]
    home = Path.home() / ".cache" / "klora" / "hosts" / host
    folder = Path(os.environ.get(record.variable) or home).expanduser()
    python = os.environ.get(f"{record.variable}_PYTHON")
    return Install(record, folder, Path(python) if python else folder / "venv" / "bin" / "python")


def find(host):
    """The installed host of a name, or None; `locate(host).missing` says why."""
    install = locate(host)
    return None if install.missing else install


def commit(folder):
    """The git commit of a folder, or an empty string."""
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


@dataclass(frozen=True)
class Result:
    """The answer to one image request."""

    status: int
    body: dict

    @property
    def error(self):
        """What the server said instead of an image; empty if it made one."""
        return "" if self.status == 200 else json.dumps(self.body)

    @cached_property
    def info(self):
        """The host's description of the run."""
        return json.loads(self.body["info"])

    @property
    def infotexts(self):
        """One infotext per image."""
        return self.info["infotexts"]

    @cached_property
    def images(self):
        """The images, height × width × 3, uint8."""
        return [decode(image) for image in self.body["images"]]

    @property
    def hashes(self):
        """Each image's SHA-256, over its raw pixels."""
        return [sha(image) for image in self.images]

    @property
    def sha(self):
        """The first image's SHA-256, over its raw pixels."""
        return self.hashes[0]


def decode(text):
    """A base64 PNG as an array."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.split(",")[-1]))).convert("RGB"))


def encode(image):
    """An array as base64 PNG, as the API takes it."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def sha(image):
    """SHA-256 of an image's size and raw pixels."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


CHECKPOINT_FOLDERS = ("Stable-diffusion", "text_encoder", "VAE")


class WebUI:
    """One WebUI process and a client for its API; use it as a context manager.

    extensions: {name under extensions/: folder to link there}, None for the extension and the
    probe. arguments: more command line flags. settings: more options for its settings file.
    shared: the folder of the checkpoints, if that is not the data folder; servers of one host may
    have it in common.
    """

    def __init__(
        self, install, data, *, port=None, extensions=None, arguments=(), settings=(), shared=None
    ):
        self.install, self.host = install, install.host
        self.data = Path(data).absolute()
        self.shared = Path(shared or data).absolute()
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.data / "server.log"
        self.extensions = extensions
        if extensions is None:
            self.extensions = {"sd-webui-k-lora": REPOSITORY, "klora-probe": HERE / "probe"}
        self.arguments = list(arguments)
        own = {**self.host.settings, **DEVICE_SETTINGS[DEVICE]}
        self.settings = {**SETTINGS, **own, **dict(settings)}
        self.process = self.lock = None
        self.loaded = None

    # the process

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def loras(self):
        """The folder of LoRA files."""
        return self.data / "models" / "Lora"

    @property
    def checkpoints(self):
        """The folder of checkpoints."""
        return self.data / "models" / "Stable-diffusion"

    def beside(self, name, **options):
        """Another server with the same models, in a data folder of its own; options as above."""
        data = self.data.with_name(f"{self.data.name}-{name}")
        server = WebUI(self.install, data, shared=self.shared, **options)
        server.link_models()
        self.loras.mkdir(parents=True, exist_ok=True)  # this one may be started first, or later
        server.loras.symlink_to(self.loras, target_is_directory=True)
        return server

    def make_models(self):
        """Make the tiny checkpoints if they are not there yet."""
        command = [self.install.python, HERE / "make_models.py", self.host.name]
        command += [self.install.folder, self.shared]
        environment = {**os.environ, **ENVIRONMENT}
        with alone(self.shared):
            subprocess.run(command, check=True, env=environment, cwd=HERE)
        if self.data != self.shared:
            self.link_models()

    def link_models(self):
        """Let the data folder have the shared checkpoints, in which no server writes."""
        for folder in (self.data / "models", self.data / "tiny"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
        (self.data / "models").mkdir(parents=True)
        for folder in ("tiny", *(f"models/{kind}" for kind in CHECKPOINT_FOLDERS)):
            (self.data / folder).symlink_to(self.shared / folder, target_is_directory=True)

    def code(self):
        """The folder that the host is started in: its own, or a copy of it.

        Gradio 3 serves no file below a folder whose name begins with a dot, such as ~/.cache, so
        the page would have neither scripts nor styles there.
        """
        own = self.install.folder.resolve()
        if not any(part.startswith(".") for part in own.parts):
            return own
        copy = self.shared / "webui"
        with alone(self.shared):
            if not (copy / "launch.py").is_file():
                ours = {"venv", ".git", "extensions", "models", "outputs", "cache"}
                shutil.copytree(
                    own, copy, ignore=lambda at, names: ours if Path(at) == own else (),
                    symlinks=True,
                )  # fmt: skip
        return copy

    def start(self, timeout=300):
        """Write the settings, link the extensions, start the server, wait until it is usable."""
        self.data.mkdir(parents=True, exist_ok=True)
        self.lock = (self.data / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another server uses {self.data}: set KLORA_LIVE") from None
        for folder in (self.loras, self.data / "tmp"):  # Neo keeps the page's images in the second
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.data / "extensions", ignore_errors=True)
        (self.data / "extensions").mkdir()
        for name, folder in self.extensions.items():
            (self.data / "extensions" / name).symlink_to(folder, target_is_directory=True)
        (self.data / "ui-config.json").write_text(json.dumps(self.host.ui_defaults))
        (self.data / "config.json").write_text(json.dumps(self.settings, indent=1))
        self.loaded = self.host.models["sd15"]  # as in SETTINGS
        command = [
            str(self.install.python), LAUNCH[DEVICE], *ARGUMENTS, *self.host.arguments,
            "--data-dir", str(self.data), "--port", str(self.port),
            # Gradio 4 serves the host's own scripts only if the data folder is not elsewhere.
            "--gradio-allowed-path", str(self.code()), *self.arguments,
        ]  # fmt: skip
        if self.host.names_checkpoint:
            command += ["--ckpt", str(self.checkpoints / self.loaded.file)]
        if DEVICE == "cpu":
            command += self.host.cpu_arguments
        caches = {name: str(self.data / "cache" / name) for name in ("HF_HOME", "MPLCONFIGDIR")}
        caches["KLORA_HOST"] = self.host.name  # for the probe
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.code(), env={**os.environ, **ENVIRONMENT, **caches},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_until_up(timeout=timeout)
        except BaseException:
            self.stop()
            raise

    def wait_until_up(self, mark=0, timeout=300):
        """Wait for everything that a start (or, from a log mark, a Reload UI) sets up.

        The API answers before extensions have their say, and a request then gets no script
        arguments.
        """
        signs = ["Startup time", *(self.host.signs if mark == 0 else ())]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.host.name} ended:\n{self.tail()}")
            text = self.log_since(mark)
            if "Stable diffusion model failed to load" in text:
                raise RuntimeError(f"{self.host.name} loads no checkpoint:\n{self.tail()}")
            if all(sign in text for sign in signs) and self.answers():
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.host.name} is not up after {timeout} s:\n{self.tail()}")

    def stop(self):
        """End the server: this process's own group and nothing else."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    continue
        self.process = None
        self.lock.close()

    def restart(self):
        """Stop and start again, with the settings of the first start."""
        self.stop()
        self.start()

    def reload_ui(self):
        """Do what the button "Reload UI" does, and wait until the server is usable again."""
        mark = self.mark()
        self.post("/klora-probe/reload_ui")
        self.wait_until_up(mark)

    # the log

    def mark(self):
        """A place in the log, for `log_since`."""
        return self.log.stat().st_size

    def log_since(self, mark=0):
        """What the server has printed since a mark."""
        with self.log.open("rb") as log:
            log.seek(mark)
            return log.read().decode("utf8", "replace")

    def tail(self, lines=40):
        """The last lines of the log."""
        return "\n".join(self.log_since().splitlines()[-lines:])

    # the API

    def request(self, path, body=None, timeout=300):
        """(status, parsed answer) of a GET, or of a POST if there is a body; it may hold NaN."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with opener.open(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, {"text": text.decode("utf8", "replace")}

    def get(self, path):
        """The answer to a GET that must succeed."""
        status, answer = self.request(path)
        assert status == 200, f"GET {path}: {status} {answer}"
        return answer

    def post(self, path, body=None):
        """The answer to a POST that must succeed."""
        status, answer = self.request(path, {} if body is None else body)
        assert status == 200, f"POST {path}: {status} {answer}"
        return answer

    def answers(self):
        """Whether the API answers."""
        try:
            return self.request("/sdapi/v1/progress?skip_current_image=true", timeout=5)[0] == 200
        except OSError:
            return False

    def load(self, model):
        """Choose a checkpoint: one of the host's models, or a file of models/Stable-diffusion.

        Options that act at its loading go back to this server's setting if the model has none.
        """
        model = Model(model) if isinstance(model, str) else model
        if self.loaded == model:
            return
        names = self.host.loading_options
        assert set(model.options) <= set(names), model.options
        options = {name: model.options.get(name, self.settings[name]) for name in names}
        if model.memory != self.loaded.memory:
            self.post("/klora-probe/memory", {"mib": model.memory})
        self.post("/sdapi/v1/options", {**options, "sd_model_checkpoint": model.file})
        if self.host.must_refresh:
            self.post("/klora-probe/refresh_model")
        self.loaded = model

    def refresh_loras(self):
        """Make the host look for LoRA files again."""
        self.post("/sdapi/v1/refresh-loras")

    def next(self, **fields):
        """Tell the probe what to do during the next image (see probe/scripts/klora_probe.py)."""
        nested = fields.get("nested", {})
        if "scripts" in nested and not self.host.can("pictures without scripts"):
            fields["nested"] = {**nested, "scripts": nested["scripts"] or []}
        self.post("/klora-probe/next", fields)

    def last(self):
        """What the probe saw of each model call of the last image."""
        seen = self.get("/klora-probe/last")
        assert not seen["errors"], "\n".join(seen["errors"])
        return seen["calls"]

    def capture(self, name, prompt, **fields):
        """Make an image, and let the probe keep its UNet weights under a name."""
        self.next(capture=name)
        return self.txt2img(prompt=prompt, **fields)

    def txt2img(self, checkpoint=None, **fields):
        """Make an image from text; `fields` as in the API."""
        return self._image("/sdapi/v1/txt2img", checkpoint, fields)

    def img2img(self, image, checkpoint=None, **fields):
        """Make an image from an image (an array); `fields` as in the API."""
        fields = {"init_images": [encode(image)], "denoising_strength": 0.75, **fields}
        return self._image("/sdapi/v1/img2img", checkpoint, fields)

    def _image(self, path, checkpoint, fields):
        if checkpoint:
            self.load(checkpoint)
        defaults = {**REQUEST, **self.loaded.request}
        if fields.get("enable_hr"):
            defaults.update(self.host.hires)
        return Result(*self.request(path, {**defaults, **fields}))


@contextmanager
def alone(folder):
    """Nobody else makes anything in this folder meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
