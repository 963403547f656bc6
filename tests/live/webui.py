"""Run an installed WebUI from a test: find it, start it on loopback on the CPU, use its HTTP API.

With KLORA_DEVICE=second it computes on a second device (second_device/launch.py) instead.

The host's own folder is only read. Everything it writes (settings, caches, models, extensions)
lies in a data folder of ours, through its `--data-dir` option.
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
HOSTS = ("a1111", "forge")
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
    "--no-download-sd-model",
    "--no-prompt-history",
    "--disable-console-progressbars",
    "--api",
]
HOST_ARGUMENTS = {
    "a1111": ["--no-half", "--do-not-download-clip", *(["--use-cpu", "all"] * (DEVICE == "cpu"))],
    "forge": ["--always-cpu", "--disable-gpu-warning"],
}
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
HOST_SETTINGS = {
    "a1111": {
        "sd_checkpoint_cache": 0,
        "sd_checkpoints_limit": 1,
        "lora_in_memory_limit": 0,
        "lora_functional": False,
        "fp8_storage": "Disable",
        "cache_fp16_weight": False,
        "batch_cond_uncond": True,
    },
    "forge": {
        "forge_preset": "sd",
        "forge_unet_storage_dtype": "Automatic",
        "forge_additional_modules": [],
    },
}
FLUX_MODULES = ["tiny_clip_l.safetensors", "tiny_t5.safetensors", "tiny_ae.safetensors"]

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
# Forge's own API fails without the first one and has no default for the second.
FORGE_HIRES = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 7}


@dataclass(frozen=True)
class Install:
    """A WebUI on this machine."""

    host: str
    folder: Path
    python: Path

    @property
    def missing(self):
        """What keeps it from being used, as one sentence; empty if nothing does."""
        variable = f"KLORA_{self.host.upper()}"
        if not (self.folder / "launch.py").is_file():
            return f"no {self.host} at {self.folder}: set {variable} to the WebUI's folder"
        if not self.python.is_file():
            return f"no Python at {self.python}: set {variable}_PYTHON to the WebUI's Python"
        return ""

    @cached_property
    def version(self):
        """The version that the WebUI's source states, with its commit where git knows it."""
        if self.host == "forge":
            text = (self.folder / "modules_forge" / "forge_version.py").read_text(encoding="utf8")
            version = "f" + re.search(r"version = '(.+?)'", text)[1]
        else:
            text = (self.folder / "CHANGELOG.md").read_text(encoding="utf8")
            version = re.search(r"^## (\S+)", text, re.MULTILINE)[1]
        return f"{version} {commit(self.folder)[:10]}".strip()


def locate(host):
    """Where a host would be, whether it is there or not."""
    variable = f"KLORA_{host.upper()}"
    home = Path.home() / ".cache" / "klora" / "hosts" / host
    folder = Path(os.environ.get(variable) or home).expanduser()
    python = os.environ.get(f"{variable}_PYTHON")
    return Install(host, folder, Path(python) if python else folder / "venv" / "bin" / "python")


def find(host):
    """The installed host, or None; `locate(host).missing` says why."""
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


class WebUI:
    """One WebUI process and a client for its API; use it as a context manager.

    extensions: {name under extensions/: folder to link there}, None for the extension and the
    probe. arguments: more command line flags. settings: more options for its settings file.
    """

    def __init__(self, install, data, *, port=None, extensions=None, arguments=(), settings=()):
        self.install, self.host = install, install.host
        self.data = Path(data).absolute()
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.data / "server.log"
        self.extensions = extensions
        if extensions is None:
            self.extensions = {"sd-webui-k-lora": REPOSITORY, "klora-probe": HERE / "probe"}
        self.arguments = list(arguments)
        own = {**HOST_SETTINGS[self.host], **DEVICE_SETTINGS[DEVICE]}
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
        server = WebUI(self.install, self.data.with_name(f"{self.host}-{name}"), **options)
        server.data.mkdir(parents=True, exist_ok=True)
        for folder in ("models", "tiny"):
            if not (server.data / folder).exists():
                (server.data / folder).symlink_to(self.data / folder, target_is_directory=True)
        return server

    def make_models(self):
        """Make the tiny checkpoints if they are not there yet."""
        command = [self.install.python, HERE / "make_models.py", self.host]
        command += [self.install.folder, self.data]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT}, cwd=HERE)

    def code(self):
        """The folder that the host is started in: its own, or a copy of it.

        Gradio 3 serves no file below a folder whose name begins with a dot, such as ~/.cache, so
        the page would have neither scripts nor styles there.
        """
        own = self.install.folder.resolve()
        if not any(part.startswith(".") for part in own.parts):
            return own
        copy = self.data / "webui"
        if not (copy / "launch.py").is_file():
            ours = {"venv", ".git", "extensions", "models", "outputs", "cache"}
            shutil.copytree(
                own, copy, ignore=lambda at, names: ours if Path(at) == own else (), symlinks=True
            )
        return copy

    def start(self, timeout=300):
        """Write the settings, link the extensions, start the server, wait until it is usable."""
        self.data.mkdir(parents=True, exist_ok=True)
        self.lock = (self.data / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another server uses {self.data}: set KLORA_LIVE") from None
        self.loras.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.data / "extensions", ignore_errors=True)
        (self.data / "extensions").mkdir()
        for name, folder in self.extensions.items():
            (self.data / "extensions" / name).symlink_to(folder, target_is_directory=True)
        (self.data / "ui-config.json").unlink(missing_ok=True)
        (self.data / "config.json").write_text(json.dumps(self.settings, indent=1))
        self.loaded = (self.settings["sd_model_checkpoint"], {})
        checkpoint = self.checkpoints / self.settings["sd_model_checkpoint"]
        command = [
            str(self.install.python), LAUNCH[DEVICE], *ARGUMENTS, *HOST_ARGUMENTS[self.host],
            "--data-dir", str(self.data), "--ckpt", str(checkpoint), "--port", str(self.port),
            # Gradio 4 serves the host's own scripts only if the data folder is not elsewhere.
            "--gradio-allowed-path", str(self.code()), *self.arguments,
        ]  # fmt: skip
        caches = {name: str(self.data / "cache" / name) for name in ("HF_HOME", "MPLCONFIGDIR")}
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
        arguments; AUTOMATIC1111 loads its first checkpoint in a thread of its own.
        """
        signs = ["Startup time"]
        if self.host == "a1111" and mark == 0:
            signs.append("Model loaded in")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.host} ended:\n{self.tail()}")
            text = self.log_since(mark)
            if "Stable diffusion model failed to load" in text:
                raise RuntimeError(f"{self.host} could not load its checkpoint:\n{self.tail()}")
            if all(sign in text for sign in signs) and self.answers():
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.host} is not up after {timeout} s:\n{self.tail()}")

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

    def load(self, checkpoint, **options):
        """Choose a checkpoint by file name, and options that act at its loading.

        Forge: forge_unet_storage_dtype. AUTOMATIC1111: fp8_storage, cache_fp16_weight. An option
        that is not given goes back to this server's setting.
        """
        if "." not in checkpoint:
            checkpoint += ".safetensors"
        if self.loaded == (checkpoint, options):
            return
        names = {
            "a1111": ("fp8_storage", "cache_fp16_weight"),
            "forge": ("forge_unet_storage_dtype",),
        }[self.host]
        wanted = {name: options.get(name, self.settings[name]) for name in names}
        assert not set(options) - set(names), options
        if self.host == "forge":
            wanted["forge_additional_modules"] = FLUX_MODULES if "flux" in checkpoint else []
        self.post("/sdapi/v1/options", {**wanted, "sd_model_checkpoint": checkpoint})
        if self.host == "forge":  # it reads the storage option only when its page changes it
            self.post("/klora-probe/refresh_model")
        self.loaded = (checkpoint, options)

    def refresh_loras(self):
        """Make the host look for LoRA files again."""
        self.post("/sdapi/v1/refresh-loras")

    def next(self, **fields):
        """Tell the probe what to do during the next image (see probe/scripts/klora_probe.py)."""
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
        defaults = dict(REQUEST)
        if self.host == "forge":
            if "flux" in self.loaded[0]:
                defaults.update(scheduler="Simple", cfg_scale=1)
            if fields.get("enable_hr"):
                defaults.update(FORGE_HIRES)
        return Result(*self.request(path, {**defaults, **fields}))


opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
