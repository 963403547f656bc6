"""The selection map in the page, as far as it can be read without one: what its attributes say, its
table, its size. tests/live has it in a browser."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_klora import texts
from lib_klora.map_html import map_html
from lib_klora.pair import LayerPair, Pair
from lib_klora.picture import PALETTE
from lib_klora.plan import Plan, progress
from lib_klora.plot import ALONE, SelectionMap

LETTERS = "ncsb"


class Read(HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of_class(self, name):
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def names_of(coded: str) -> list[str]:
    names, before = [], []
    for one in coded.split(" "):
        shared, _, rest = one.partition(":")
        before = [*before[: int(shared)], *rest.split("_")]
        names.append("_".join(before))
    return names


def cells_of(runs: str) -> np.ndarray:
    rows = []
    for row in runs.split(" "):
        cells = []
        for letter, count in re.findall(r"([a-zA-Z])(\d*)", row):
            cell = LETTERS.index(letter.lower()) + ALONE * letter.isupper()
            cells += [cell] * int(count or 1)
        rows.append(cells)
    return np.array(rows)


def sdxl_names() -> list[str]:
    depths = {f"input_blocks_{i}_1": 2 for i in (4, 5)} | {
        f"input_blocks_{i}_1": 10 for i in (7, 8)
    }
    depths |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 for i in range(3)}
    depths |= {f"output_blocks_{i}_1": 2 for i in range(3, 6)}
    return [
        f"{block}_transformer_blocks_{i}_attn{a}_to_{part}"
        for block, depth in depths.items()
        for i in range(depth)
        for a in (1, 2)
        for part in ("q", "k", "v", "out_0")
    ]


def drawn(choice: np.ndarray, names=None, alone=None, ratio=None) -> SelectionMap:
    """``choice``: [steps, layers]."""
    choice = np.asarray(choice, np.uint8)
    names = tuple(names or (f"input_blocks_{i}_1_x" for i in range(choice.shape[1])))
    pair = Pair(tuple(LayerPair(n, None, None, 1) for n in names), alone or {}, ())
    whole = np.concatenate([choice, choice[-1:]])
    return SelectionMap.of(Plan(names, whole, progress(len(choice)), 1.0, "K-LoRA", ratio), pair)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_picture_and_attributes_say_what_each_layer_gets(steps, layers, seed):
    rng = np.random.default_rng(seed)
    the_map = drawn(rng.integers(0, 4, (steps, layers)), alone={"output_blocks_3_1_y": "style"})
    page = Read(map_html(the_map, "words"))
    attributes = page.of_class("klora-map")[0]
    assert tuple(names_of(attributes["data-layers"])) == the_map.layers
    assert np.array_equal(cells_of(attributes["data-runs"]), the_map.cells)
    source = next(a["src"] for tag, a in page.tags if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        shown = np.asarray(picture.convert("RGBA"))
    assert np.array_equal(shown[..., :3], PALETTE[the_map.cells])
    assert np.array_equal(shown[..., 3] == 0, the_map.cells == 0)  # the page's own ground


def test_ratios_are_there_where_layers_are_compared():
    ratio = np.array([0.5, 1.25, np.inf])
    page = Read(
        map_html(drawn(np.ones((4, 3)), alone={"middle_block_1_y": "style"}, ratio=ratio), "")
    )
    assert page.of_class("klora-map")[0]["data-ratios"] == "0.5 1.25 inf "
    page = Read(map_html(drawn(np.full((4, 3), 3)), ""))
    assert "data-ratios" not in page.of_class("klora-map")[0]


def test_the_table_has_the_blocks_and_the_steps():
    names = ["input_blocks_4_1_a", "input_blocks_4_1_b", "middle_block_1_a", "output_blocks_3_1_a"]
    choice = [[1, 1, 1, 2], [1, 2, 2, 2]]
    page = map_html(drawn(choice, names, ratio=np.array([1, 3, 0.2, 5])), "")
    table = page[page.index("<details") :]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall("<tr>(.*?)</tr>", table)]
    assert rows == [
        list(texts.MAP_BLOCK_COLUMNS),
        ["down 4", "2", "2", "75 %"], ["mid", "1", "0.2", "50 %"], ["up 3", "1", "5", "0 %"],
        list(texts.MAP_STEP_COLUMNS), ["1", "75 %"], ["2", "25 %"],
    ]  # fmt: skip


def test_words_are_for_those_who_hear_the_page():
    page = Read(map_html(drawn(np.ones((2, 2))), 'half & “half” "x"'))
    assert page.of_class("klora-map")[0]["aria-label"] == 'Selection map: half & “half” "x"'


@pytest.mark.parametrize(("table", "kinds"), [
    ([[1, 1], [1, 1]], ["content"]),
    ([[1, 2], [2, 2]], ["content", "style"]),
    ([[1, 3], [0, 2]], ["content", "style", "both"]),
])  # fmt: skip
def test_the_legend_has_what_occurs(table, kinds):
    assert drawn(table).kinds == kinds
    assert drawn(table, alone={"middle_block_1_y": "content"}).kinds[-1] == texts.ALONE


def test_no_layer_in_common_has_no_shares():
    the_map = drawn(np.empty((3, 0)), alone={"middle_block_1_a": "content"})
    page = Read(map_html(the_map, ""))
    assert page.of_class("klora-map-cells")
    assert not page.of_class("klora-map-shares")


@pytest.mark.parametrize("choice", ["S", "at random"])
def test_small_for_all_of_sdxl(choice):
    """560 layers, 50 steps; the worst is a choice that changes everywhere."""
    names, rng = sdxl_names(), np.random.default_rng(0)
    assert len(names) == 560
    ratio = np.exp(0.3 * rng.normal(size=560))
    content = {
        "S": (1.5 * progress(49) + 0.5)[:, None] <= ratio,
        "at random": rng.random((50, 560)) < 1 / 3,
    }[choice]
    page = map_html(drawn(np.where(content, 1, 2), names, ratio=ratio), "words")
    assert len(page.encode()) < 60 * 1024
