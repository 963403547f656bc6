"""When the host is asked to make its list of LoRA files anew: that opens every one of them."""

import os
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest


class WebUI:
    """What hosts/common.py uses of one: the list by file name, made of whole folders."""

    def __init__(self, **folders):
        self.made = 0
        self.unreadable = set()
        self.available_networks = {}
        self.cmd_opts = SimpleNamespace(**folders)

    def walk_files(self, path, allowed_extensions=None):
        for root, _, files in os.walk(path, followlinks=True):
            for name in sorted(files):
                if os.path.splitext(name)[1].lower() in allowed_extensions:
                    yield os.path.join(root, name)

    def list_available_networks(self):
        self.made += 1
        folders = [self.cmd_opts.lora_dir, *getattr(self.cmd_opts, "lora_dirs", ())]
        paths = [p for at in folders for p in self.walk_files(at, (".pt", ".ckpt", ".safetensors"))]
        stems = {os.path.splitext(os.path.basename(path))[0] for path in paths}
        self.available_networks.clear()
        self.available_networks.update(dict.fromkeys(stems - self.unreadable))


@pytest.fixture
def start(monkeypatch):
    """A host on a WebUI with these folders, and that WebUI."""

    def start(**folders):
        webui = WebUI(**folders)
        networks, modules, paths = (ModuleType(x) for x in ("networks", "modules", "modules.paths"))
        networks.available_networks = webui.available_networks
        networks.list_available_networks = webui.list_available_networks
        modules.shared = SimpleNamespace(cmd_opts=webui.cmd_opts, walk_files=webui.walk_files)
        paths.data_path = ""
        for module in (networks, modules, paths):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        sys.modules.pop("lib_klora.hosts.common", None)
        host = import_module("lib_klora.hosts.common").CommonHost()
        webui.list_available_networks()
        webui.made = 0
        return host, webui

    yield start
    sys.modules.pop("lib_klora.hosts.common", None)  # made from those modules


def test_only_where_files_have_come_or_gone(start, tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("cat.safetensors", "below/ink.pt", "notes.txt"):
        (tmp_path / name).touch()
    host, webui = start(lora_dir=str(tmp_path))
    for change, made, names in (
        (lambda: None, 0, ["cat", "ink"]),
        ((tmp_path / "notes.json").touch, 0, ["cat", "ink"]),
        ((tmp_path / "below" / "oil.safetensors").touch, 1, ["cat", "ink", "oil"]),
        (lambda: None, 1, ["cat", "ink", "oil"]),
        ((tmp_path / "cat.safetensors").unlink, 2, ["ink", "oil"]),
    ):
        change()
        host.look_for_loras()
        assert (webui.made, host.lora_names()) == (made, names)


def test_what_somebody_else_has_listed_is_not_listed_again(start, tmp_path):
    host, webui = start(lora_dir=str(tmp_path))
    (tmp_path / "cat.safetensors").touch()
    webui.list_available_networks()  # by the Lora tab's own button
    host.look_for_loras()
    assert (webui.made, host.lora_names()) == (1, ["cat"])


def test_a_file_that_the_host_cannot_read_is_tried_once(start, tmp_path):
    host, webui = start(lora_dir=str(tmp_path))
    webui.unreadable.add("broken")
    (tmp_path / "broken.safetensors").touch()
    for _ in range(3):
        host.look_for_loras()
    assert webui.made == 1


def test_all_folders_are_looked_at(start, tmp_path):
    """Forge Neo may have several."""
    more = [tmp_path / "b", tmp_path / "c", tmp_path / "not there"]
    for folder in (tmp_path / "a", *more[:2]):
        folder.mkdir()
    host, webui = start(lora_dir=str(tmp_path / "a"), lora_dirs=[str(x) for x in more])
    (more[1] / "cat.ckpt").touch()
    host.look_for_loras()
    assert (webui.made, host.lora_names()) == (1, ["cat"])
