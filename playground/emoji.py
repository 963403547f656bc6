"""Emoji: the same few hundred things, drawn by several design houses, each in a style of its own.

They come as npm packages under licences that allow this (see NOTICE) and are drawn into small
pictures here. Needed for training and for the judges' references only: what the demo shows of them
lies in weights/.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
import unicodedata
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path("build/playground/emoji")
REGISTRY = "https://registry.npmjs.org"
MASTER = 96
"""Pixels of a side of the pictures that are kept; the world scales them down."""
_DRAWN, _MARGIN = 192, 4
_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
_NO_THINGS = re.compile(r"o’clock|-thirty|moon|globe|map of|hole|hotel|\bbank\b|japanese .* button")
"""Emoji that look like each other, or like nothing."""


@dataclass(frozen=True)
class Package:
    """An npm package: name, version, and the digest that npm itself gives for it."""

    name: str
    version: str
    sha512: str

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


SETS = {
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "fluent-black": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "firefox": Package(
        "@iconify-json/fxemoji", "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "emojione-black": Package(
        "@iconify-json/emojione-monotone", "1.2.1",
        "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
    ),
    "streamline": Package(
        "@iconify-json/streamline-emojis", "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
}  # fmt: skip
"""The sets, by the names that they have here."""
NAMES = Package(
    "emojibase-data", "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)  # fmt: skip
"""What each emoji is called (MIT)."""


def _archive(package: Package, folder: Path) -> tarfile.TarFile:
    """The package, fetched once. Raises OSError without a network, ValueError for other content."""
    path = folder / f"{package.name.split('/')[-1]}-{package.version}.tgz"
    if not path.exists():
        print(f"{package.url} …", file=sys.stderr, flush=True)
        with urllib.request.urlopen(package.url, timeout=120) as answer:
            content = answer.read()
        if base64.b64encode(hashlib.sha512(content).digest()).decode() != package.sha512:
            raise ValueError(f"{package.url} is not what it was when this was written.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tarfile.open(path)


def _json(archive: tarfile.TarFile, name: str) -> dict | list:
    """A file of a package; empty if it is not there."""
    try:
        return json.load(archive.extractfile(f"package/{name}"))
    except KeyError:
        return {}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _things(folder: Path) -> dict[str, str]:
    """Code point → what it is called, as one word; only things, no faces, people, signs, flags."""
    with _archive(NAMES, folder) as archive:
        groups = {g["order"]: g["key"] for g in _json(archive, "en/messages.json")["groups"]}
        emoji = _json(archive, "en/data.json")
    found = {}
    for one in emoji:
        code = one["hexcode"].replace("-FE0F", "").lower()
        if (
            groups.get(one.get("group")) in _GROUPS
            and "-" not in code
            and not _NO_THINGS.search(one["label"])
        ):
            found[code] = re.sub(r"[^a-z0-9]+", "-", one["label"].lower()).strip("-")
    return found


def _codes(things: dict[str, str], archives: dict[str, tarfile.TarFile]) -> dict[str, str]:
    """What an icon may be called, letters only → code point. Sets differ in the year of their
    names: today's, Unicode's own, and those that the packages list as aliases."""
    codes = {}
    for code, label in things.items():
        codes.setdefault(_letters(label), code)
        codes.setdefault(_letters(unicodedata.name(chr(int(code, 16)), code)), code)
    for archive in archives.values():
        aliases = _json(archive, "icons.json").get("aliases", {})
        for written, name in _json(archive, "chars.json").items():
            code = written.replace("-fe0f", "")
            if code in things:
                older = (alias for alias, of in aliases.items() if of["parent"] == name)
                for each in (name, *older):
                    codes.setdefault(_letters(each), code)
    return codes


def _cut(picture: Image.Image) -> np.ndarray:
    """On white, uint8 [MASTER, MASTER, 3], the thing as large as fits with a margin: how much room
    it takes is no part of a style here."""
    box = picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    picture = picture.crop(box).convert("RGBa")
    scale = (MASTER - 2 * _MARGIN) / max(picture.size)
    size = [max(round(side * scale), 1) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    whole = Image.new("RGBA", (MASTER, MASTER), "white")
    whole.alpha_composite(picture, ((MASTER - size[0]) // 2, (MASTER - size[1]) // 2))
    return np.asarray(whole.convert("RGB"))


def _draw_svg(icon: dict, icons: dict) -> Image.Image:
    import resvg_py  # for training only

    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_DRAWN, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def pictures(folder: Path = FOLDER) -> dict[str, dict[str, np.ndarray]]:
    """Set → thing → uint8 [MASTER, MASTER, 3]; fetched and drawn once, then read from ``folder``.

    Raises OSError if a package cannot be had.
    """
    kept = folder / f"pictures-{MASTER}.npz"
    if not kept.exists():
        np.savez_compressed(kept, **_draw_all(folder))
    with np.load(kept) as arrays:
        return {
            name: dict(zip(arrays[f"{name} things"].tolist(), arrays[name], strict=True))
            for name in SETS
        }


def _draw_all(folder: Path) -> dict[str, np.ndarray]:
    things = _things(folder)
    archives = {name: _archive(package, folder) for name, package in SETS.items()}
    codes = _codes(things, archives)
    arrays = {}
    for name, archive in archives.items():
        drawn: dict[str, np.ndarray] = {}
        icons = _json(archive, "icons.json")
        if icons:
            for icon_name, icon in icons["icons"].items():
                code = codes.get(_letters(re.sub(r"-\d+$", "", icon_name)))
                if code and not icon.get("hidden"):
                    drawn.setdefault(things[code], _cut(_draw_svg(icon, icons)))
        else:  # one file for each code point
            for member in archive:
                code = Path(member.name).stem.replace("-fe0f", "")
                if code in things:
                    picture = Image.open(archive.extractfile(member)).convert("RGBA")
                    drawn[things[code]] = _cut(picture.resize((_DRAWN, _DRAWN)))
        print(f"{name}: {len(drawn)} things", file=sys.stderr, flush=True)
        arrays[name] = np.stack(list(drawn.values()))
        arrays[f"{name} things"] = np.array(list(drawn))
    return arrays
