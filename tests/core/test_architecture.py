"""Arrows point one way: webui → session → core; hosts implement the protocol. Imports are scanned,
not run, so that this holds without a host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lib_klora"
CODE = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "install.py"])
CORE = sorted(PACKAGE.glob("*.py"))

HOST_LORA_CODE = {
    "network", "networks", "network_lora", "extra_networks_lora", "lora", "lora_patches",
    "backend", "ldm_patched", "packages_3rdparty", "modules_forge",
}  # fmt: skip
OF_ONE_KIND = tuple(
    f"lib_klora.hosts.{name}" for name in ("a1111", "engine", "lora_loader", "model_patcher")
)
THIRD_PARTY = {"torch", "safetensors", "numpy", "gradio", "fastapi", "pydantic", "PIL"}


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports, anywhere in it; relative ones are resolved."""
    here = [*path.relative_to(ROOT).with_suffix("").parts]
    package = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", CODE, ids=relative)


def test_the_scan_sees_the_code():
    assert {"lib_klora/klora.py", "lib_klora/hosts/a1111.py", "scripts/klora.py"} <= {
        relative(path).replace("\\", "/") for path in CODE
    }
    assert "networks" in tops(PACKAGE / "hosts" / "a1111.py")
    assert "lib_klora.loading" in imports(PACKAGE / "session.py")
    assert "lib_klora.pair" in imports(PACKAGE / "hosts" / "protocol.py")
    assert "lib_klora.settings.FIELDS" in imports(PACKAGE / "webui" / "script.py")


@every_file
def test_only_what_a_webui_has_is_imported(path):
    ours = {"lib_klora"}
    host = HOST_LORA_CODE | {"modules"}
    assert tops(path) <= set(sys.stdlib_module_names) | THIRD_PARTY | ours | host


@every_file
def test_only_hosts_import_the_hosts_lora_code(path):
    if path.parent.name != "hosts":
        assert not tops(path) & HOST_LORA_CODE


@every_file
def test_only_webui_imports_gradio(path):
    if path.parent.name != "webui":
        assert "gradio" not in tops(path)


@every_file
def test_only_webui_and_hosts_import_the_hosts_modules(path):
    if path.parent.name not in ("webui", "hosts"):
        assert "modules" not in tops(path)


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_imports_neither_webui_nor_a_host(path):
    for name in imports(path):
        assert not name.startswith("lib_klora.webui")
        assert not name.startswith(OF_ONE_KIND)
        assert name != "lib_klora.hosts.find_host"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("hosts/*.py")), ids=relative)
def test_hosts_know_neither_session_nor_webui(path):
    for name in imports(path):
        assert not name.startswith(("lib_klora.session", "lib_klora.loading", "lib_klora.webui"))


def test_the_paper_needs_torch_and_arithmetic_only():
    own = {name for name in imports(PACKAGE / "klora.py") if name.startswith("lib_klora")}
    assert not own
    assert tops(PACKAGE / "klora.py") <= {"__future__", "collections", "math", "numpy", "torch"}


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_knows_the_hosts_by_their_protocol(path):
    if path.name in ("__init__.py", "__main__.py"):
        return
    used = {name for name in imports(path) if "hosts" in name}
    names = {name.removeprefix("lib_klora.hosts").removeprefix(".") for name in used}
    assert names <= {"", "Fusion", "Host", "HostLora", "OnDisk"}


def test_no_top_level_name_of_ours_is_one_of_the_hosts():
    taken = {"network", "networks", "modules", "lora", "backend"}
    top_level = {path.stem for path in ROOT.glob("*.py")} | {
        path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))
    }
    # The hosts run the files in scripts/ by path; as a package it would hide theirs.
    assert not (ROOT / "scripts" / "__init__.py").exists()
    assert not top_level & taken


def test_core_runs_without_a_webui():
    """In a Python of its own, since another test may have a host's module loaded."""
    names = [f"lib_klora.{path.stem}".removesuffix(".__init__") for path in CORE]
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}]; "
        "print({'modules', 'networks', 'gradio'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "set()"


@every_file
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@every_file
def test_no_star_imports_and_no_sys_path_tricks(path):
    text = path.read_text(encoding="utf-8")
    assert "import *" not in text
    assert "sys.path" not in text
