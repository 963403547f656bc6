"""``python -m lib_klora``: look at a pair, or at one file, without a WebUI.

::

    python -m lib_klora plan CONTENT STYLE [--steps 30] [--scale S*] … [--png map.png]
    python -m lib_klora plan CONTENT STYLE --method "LoRA Switch"
    python -m lib_klora inspect FILE [--json file.json]
    python -m lib_klora convert FILE OUT

Exit code 0: done; 1: a file cannot be used or written, the reason is on stderr; 2: bad usage;
130: interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import numpy  # noqa: F401
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    sys.exit(f"K-LoRA: this Python has no {error.name}: use one that has, such as the WebUI's.")

from . import plot
from .convert import convert
from .errors import KLoraError, get_log
from .families import is_attention
from .lora_file import LoraFile, parse_lora
from .methods import METHODS
from .pair import Pair, pair_files
from .plan import Plan, make_plan
from .projection import project
from .score_cache import ScoreCache, file_sha256
from .scores import Scores, compute_scores
from .settings import FIELDS, default_beta, from_fields
from .tag import ROLES
from .tensor_file import SafetensorsFile

_SETTINGS = (
    "alpha", "beta", "scale", "method", "gamma", "layers", "top_k", "unpaired", "seed",
    "share_start", "share_end",
)  # fmt: skip
"""The fields that decide a plan."""

_SPELLINGS = (
    ("lycoris_", "LyCORIS"),
    ("lora_transformer_", "OneTrainer"),
    ("lora_unet_", "kohya"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    ("unet.", "diffusers"),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    _prepare_streams()
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with _log_on_stderr():
            options.run(options, parser)
        sys.stdout.flush()
    except KLoraError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # “| head” has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by “>&-”: nobody wants to read it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without Greek letters


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """In a WebUI the log goes to stdout; here stdout is for the answer alone."""
    handlers = [x for x in get_log().handlers if type(x) is logging.StreamHandler]
    before = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.stream = sys.stderr
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            handler.stream = stream


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib_klora", description="K-LoRA: which LoRA has which layer at which step."
    )
    commands = parser.add_subparsers(required=True, metavar="plan | inspect | convert")

    plan = commands.add_parser("plan", help="the selection of a pair of files")
    plan.add_argument("content", type=_path, help="the subject's LoRA, a .safetensors file")
    plan.add_argument("style", type=_path, help="the style's LoRA, a .safetensors file")
    plan.add_argument("--steps", type=_steps, default=30, help="sampling steps (30)")
    for field in FIELDS:
        if field.name in _SETTINGS:
            default = field.default
            if default is None:
                default = f"{default_beta('S'):g}, with S* {default_beta('S*'):g}"
            plan.add_argument(
                "--" + field.name.replace("_", "-"),
                choices=field.choices or None,
                type=str if field.choices else float,
                help=f"{field.help.replace('%', '%%')} ({default})",
            )
    to_file = {"type": _output, "metavar": "FILE"}
    plan.add_argument(
        "--png", **to_file, help="the selection map as a picture; - for standard output"
    )
    plan.add_argument("--json", **to_file, help="everything as JSON; - for standard output")
    plan.add_argument("--device", default="cpu", help="where to compute: cpu (default), cuda …")
    plan.add_argument(
        "--cache",
        type=_path,
        metavar="FOLDER",
        help="keep the files' scores there for the next time",
    )
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="what a LoRA file holds")
    inspect.add_argument("file", type=_path, help="a .safetensors file")
    inspect.add_argument("--json", **to_file, help="as JSON; - for standard output")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert", help="write a LoRA file anew, with layer names that every WebUI reads"
    )
    convert.add_argument("file", type=_path, help="a .safetensors file")
    convert.add_argument("out", type=_path, help="the new .safetensors file")
    convert.add_argument(
        "--only-layers",
        action="store_true",
        help="leave out what is no part of a layer, such as embeddings in the file",
    )
    convert.set_defaults(run=_convert)
    return parser


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        steps = 0
    if not 1 <= steps <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, not “{text}”")
    return steps


def _path(text: str) -> str:
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not have a NUL character")
    return text


def _output(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a file")
    if text.lower().endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"would write over a LoRA: “{text}”")
    return _path(text)


# -- plan -----------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    given = {name: getattr(options, name) for name in _SETTINGS}
    try:
        settings = from_fields({name: x for name, x in given.items() if x is not None})
    except KLoraError as error:
        parser.error(str(error))
    if options.png == options.json == "-":
        parser.error("--png and --json cannot both have standard output: give one of them a file")
    files, hashes = {}, {}
    for role in ROLES:
        path = getattr(options, role)
        files[role] = _read(path)
        hashes[role] = file_sha256(path)
    method = METHODS[settings.method]
    for file in files.values():
        if method.model is not None and file.base_model.excludes(method.model):
            raise KLoraError(
                f"{settings.method} is for {method.model}, and “{file.name}” was made for "
                f"{file.base_model}: choose another file or method."
            )
    pair = pair_files(
        *files.values(),
        layers=settings.layers,
        top_k=settings.top_k,
        unpaired=settings.unpaired,
        blocks=method.blocks,
    )
    scores, device = None, _device(options.device)
    if method.compares:
        scores = compute_scores(
            pair,
            device,
            progress=_progress_bar(),
            cache=ScoreCache(options.cache) if options.cache else None,
            sha256=tuple(hashes.values()),
        )
    if method.projects:
        projection = project(pair, _progress_bar())
        told = projection.notes(*(file.name for file in files.values()))
        pair = replace(pair, overlap=projection.overlap, warnings=(*pair.warnings, *told))
    plan = make_plan(pair, scores, settings, options.steps)
    if options.png:
        picture = _picture(plan, pair)
        if options.png == "-":
            sys.stdout.buffer.write(picture)
        else:
            _write(options.png, picture)
    if options.json:
        record = {
            **{role: {"file": getattr(options, role), "sha256": hashes[role]} for role in ROLES},
            "settings": {name: getattr(settings, name) for name in _SETTINGS},
            **_plan_record(pair, scores, plan),
        }
        _write_json(options.json, record)
    if "-" not in (options.png, options.json):
        _print_plan(files, pair, plan, settings.gamma)


def _picture(plan: Plan, pair: Pair) -> bytes:
    try:
        from .picture import png, selection_map  # only now: nothing else needs Pillow
    except ModuleNotFoundError as error:
        raise KLoraError(
            f"--png needs Pillow, and this Python has no {error.name}: use one that has, such as "
            f"the WebUI's."
        ) from error
    return png(selection_map(plan, pair))


def _print_plan(files: dict[str, LoraFile], pair: Pair, plan: Plan, gamma: str) -> None:
    """The plan for a person; ``gamma`` is the setting of that name."""
    for role in ROLES:
        print(f"{role:8} {files[role].name}  {_summary(files[role])}")
    print(f"paired   {_count(len(pair.paired), 'layer')}{_of_ks(pair)}")
    of_files = [note for file in files.values() for note in (*file.notes, _unread_note(file))]
    for note in (*pair.warnings, *pair.notes, *of_files):
        if note:
            print(f"         {note}")
    if plan.gamma is not None:
        method = METHODS[plan.method]
        origin = (method.own_gamma or gamma) if method.uses_gamma else plan.method
        print(f"γ        {plan.gamma:.6g} ({origin})")
    print()
    if plan.layers:
        _print_steps(plan)
        print()
    print(plot.describe(plan, pair))


def _print_steps(plan: Plan) -> None:
    print("step  progress  content #, style ., both +")
    shares = zip(plot.content_share(plan), plot.style_share(plan), strict=True)
    for step, (content, style) in enumerate(shares):
        bar = "#" * round(40 * (1 - style))
        bar = f"{bar:+<{round(40 * content)}}"
        print(f"{step + 1:4}  {plan.t[step]:8.3f}  {bar:.<40} {100 * content:3.0f} %")


def _plan_record(pair: Pair, scores: Scores | None, plan: Plan) -> dict[str, Any]:
    """A plan as JSON; a layer's choice has a letter for each step: c, s, or b for both. What a
    method does not need is null."""
    columns = [field.name for field in dataclasses.fields(Scores)]
    return {
        "steps": plan.steps,
        "gamma": plan.gamma,
        "overlap": pair.overlap,
        "notes": [*pair.warnings, *pair.notes],
        "reading": plot.describe(plan, pair),
        "content_share": plot.content_share(plan).tolist(),
        "layers": [
            {
                "name": layer.name,
                "k": layer.k,
                **{x: float(getattr(scores, x)[i]) if scores else None for x in columns},
                "choice": "".join(" csb"[x] for x in plan.choice[: plan.steps, i]),
            }
            for i, layer in enumerate(pair.paired)
        ],
        "unpaired": dict(pair.unpaired),
    }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        # no such word; no such hardware or build; a device that comes with a package of its own
        reason = str(error).partition("\n")[0]
        raise KLoraError(f"There is no device “{name}” for torch here: {reason}") from error
    return device


def _of_ks(pair: Pair) -> str:
    ks = sorted({layer.k for layer in pair.paired})
    if not ks:
        return ""
    return f", K {ks[0]}" + (f" to {ks[-1]}" if len(ks) > 1 else "")


def _progress_bar() -> Callable[[int, int], None] | None:
    """A bar on stderr, if a person looks at it, and not for what is done at once."""
    if not sys.stderr.isatty():
        return None
    begin = time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - begin < 0.5 and done < total:
            return
        bar = "#" * (30 * done // total)
        end = "\r\033[K" if done == total else ""
        print(f"\ranalysis [{bar:.<30}] {done}/{total}{end}", end="", file=sys.stderr, flush=True)

    return show


# -- inspect --------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    file, sha256 = _read(options.file), file_sha256(options.file)
    layers = list(file.layers.values())
    attention = sum(is_attention(layer.name, file.family) for layer in layers)
    record = {
        "file": options.file,
        "sha256": sha256,
        "bytes": os.path.getsize(options.file),
        "spelling": sorted({_spelling(layer.prefix) for layer in layers}),
        "base_model": str(file.base_model),
        "types": dict(Counter(layer.kind for layer in layers).most_common()),
        "ranks": {str(rank): n for rank, n in _ranks(file)},
        "dtypes": sorted(
            {_dtype(t.dtype) for layer in layers for t in layer.tensors.values() if t.dim()}
        ),
        "attention_layers": attention,
        "other_layers": len(layers) - attention,
        "text_encoder_layers": file.text_encoder,
        "unread": list(file.unread),
        "notes": list(file.notes),
    }
    if options.json:
        _write_json(options.json, record)
    if options.json == "-":
        return
    others = record["other_layers"]
    lines = {
        "file": ", ".join([file.name, f"{record['bytes'] / 2**20:.1f} MiB", *record["dtypes"]]),
        "SHA-256": f"{sha256}",
        "names": ", ".join(record["spelling"]) or "none of the denoising network",
        "made for": record["base_model"],
        "types": ", ".join(f"{kind} ({n})" for kind, n in record["types"].items()),
        "ranks": ", ".join(f"{rank} ({_count(n, 'layer')})" for rank, n in _ranks(file)),
        "layers": f"{attention} attention, {others} other, {file.text_encoder} text encoder",
        "": _unread_note(file),
    }
    for word, text in (*lines.items(), *(("", note) for note in file.notes)):
        if text:
            print(f"{word:9}{text}")


def _ranks(file: LoraFile) -> list[tuple[int | str, int]]:
    """(rank, layers that have it), the most frequent first."""
    counts = Counter(layer.rank for layer in file.layers.values())
    return [("none" if rank is None else rank, n) for rank, n in counts.most_common()]


def _spelling(prefix: str) -> str:
    for beginning, name in _SPELLINGS:
        if prefix.startswith(beginning):
            return name
    return "other"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


# -- convert --------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not options.out.lower().endswith(".safetensors"):
        parser.error(f"the new file's name must end in .safetensors: “{options.out}”")
    if os.path.exists(options.out):
        raise KLoraError(f"“{options.out}” is there already: give a name that is free.")
    _require_file(options.file)
    tensors = SafetensorsFile(options.file)
    new = convert(os.path.basename(options.file), tensors)
    left_out = new.unplaced if options.only_layers else ()
    key_of = {key: old for key, old in new.key_of.items() if old not in left_out}
    with safe_open(options.file, "pt") as file:
        metadata = file.metadata()
    try:
        save_file({key: tensors[old] for key, old in key_of.items()}, options.out, metadata)
    except (OSError, SafetensorError) as error:
        raise KLoraError(
            f"“{options.out}” cannot be written ({error}): give another name."
        ) from error
    print(f"{options.out}: {_count(len(key_of), 'tensor')}, made for {new.base_model}")
    if new.unplaced:
        what = "left out" if left_out else "under the old name, because the place is not known"
        print(
            f"{_count(len(new.unplaced), 'tensor')} {what}: {', '.join(new.unplaced[:5])}"
            f"{' …' * (len(new.unplaced) > 5)}"
        )


# -- all of them ----------------------------------------------------------------------------------


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        raise KLoraError(f"There is no file “{path}”.")
    if not os.path.isfile(path):
        raise KLoraError(f"“{path}” is a folder, a pipe or a device: give a .safetensors file.")


def _read(path: str) -> LoraFile:
    _require_file(path)
    return parse_lora(os.path.basename(path), SafetensorsFile(path))


def _summary(file: LoraFile) -> str:
    kinds = Counter(layer.kind for layer in file.layers.values())
    ranks = [str(rank) for rank, _ in _ranks(file) if rank != "none"]
    words = [_count(len(file.layers), "layer"), " and ".join(kinds)]
    if ranks:
        words.append(f"rank {', '.join(ranks[:3])}{' …' * (len(ranks) > 3)}")
    return ", ".join(words)


def _unread_note(file: LoraFile) -> str:
    if not file.unread:
        return ""
    return (
        f"{_count(len(file.unread), 'layer')} of “{file.name}” cannot be compared, such as "
        f"{file.unread[0]}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _write_json(path: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1)  # ASCII, which no console's encoding can spoil
    if path == "-":
        print(text)
    else:
        _write(path, f"{text}\n".encode())


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise KLoraError(
            f"“{path}” cannot be written ({error.strerror}): give another file."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
