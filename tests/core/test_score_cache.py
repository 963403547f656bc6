"""The cache on disk gives what the analysis gave, or nothing."""

import gc
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_klora import score_cache, scores
from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.score_cache import LayerTable, ScoreCache, file_sha256

SHA_C, SHA_S = "c" * 64, "5" * 64
QKV = "transformer.transformer_blocks.0.attn."


def lora(rank: int, seed: int, prefixes: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    prefixes = prefixes or tuple(
        f"lora_unet_mid_block_attentions_0_transformer_blocks_{i}_attn1_to_q" for i in range(3)
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix in prefixes:
        tensors[f"{prefix}.lora_up.weight"] = torch.randn(40, rank, generator=generator)
        tensors[f"{prefix}.lora_down.weight"] = torch.randn(rank, 50, generator=generator)
    return tensors


def pair_of(rank_c: int = 4, rank_s: int = 6, **options):
    return pair_files(parse_lora("c", lora(rank_c, 1)), parse_lora("s", lora(rank_s, 2)), **options)


def cached(pair, cache, sha256=(SHA_C, SHA_S), **options):
    return scores.compute_scores(pair, cache=cache, sha256=sha256, **options)


def assert_same(found: scores.Scores, expected: scores.Scores) -> None:
    for name in ("s_content", "s_style", "abs_content", "abs_style"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-7)


@pytest.fixture
def cache(tmp_path) -> ScoreCache:
    return ScoreCache(tmp_path / "host" / "klora")


@pytest.fixture
def no_analysis(monkeypatch):
    """After ``no_analysis()``, computing anything or writing it fails the test."""

    def forbid():
        monkeypatch.setattr(scores, "_analyse", lambda *_: pytest.fail("it is in the cache"))
        monkeypatch.setattr(ScoreCache, "save", lambda *_: pytest.fail("it is in the cache"))

    return forbid


def test_second_time_needs_neither_analysis_nor_tensors(cache, no_analysis):
    pair = pair_of()
    expected = cached(pair, cache)
    assert_same(expected, scores.compute_scores(pair))
    no_analysis()
    assert_same(cached(pair.without_tensors(), ScoreCache(cache.folder)), expected)


@pytest.mark.parametrize("rank", [1, 2, 17, 128])
def test_one_table_serves_every_partner_in_either_role(cache, no_analysis, rank):
    cached(pair_of(), cache)
    other = parse_lora("other", lora(rank, 3))
    content = parse_lora("c", lora(4, 1))
    pair, swapped = pair_files(content, other), pair_files(other, content)
    expected, expected_swapped = scores.compute_scores(pair), scores.compute_scores(swapped)
    alone = "0" * 64
    cached(pair, cache, (SHA_C, alone))
    no_analysis()
    assert_same(cached(pair.without_tensors(), cache, (SHA_C, alone)), expected)
    assert_same(cached(swapped.without_tensors(), cache, (alone, SHA_C)), expected_swapped)


def test_other_multipliers_are_computed_and_kept_too(cache, no_analysis):
    cached(pair_of(), cache)
    triple = pair_of(top_k=3.3)
    expected = scores.compute_scores(triple)
    assert_same(cached(triple, cache), expected)
    no_analysis()
    assert_same(cached(triple, cache), expected)
    cached(pair_of(), cache)  # and the first ones are still there


def test_a_sum_over_all_entries_is_no_smaller_than_one_over_fewer(cache, monkeypatch):
    """Of a K that is too large to keep, the sum over all is Σ|ΔW|, which is rounded otherwise."""
    above = scores._above

    def rounded_down(*args):
        kept, total, energy = above(*args)
        return kept, total * (1 - 1e-7), energy

    monkeypatch.setattr(scores, "_above", rounded_down)
    monkeypatch.setattr(scores, "_MOST_KEPT", 1990)
    for k in (1999, 2000):  # of 2000 entries
        cached(pair_of(top_k=k / 24), cache)
    tables = cache.load(SHA_C)
    assert [table.k[-2:].tolist() for table in tables.values()] == [[1999, 2000]] * 3


def test_many_multipliers_do_not_make_a_table_grow_for_ever(cache, monkeypatch):
    monkeypatch.setattr(scores, "_MOST_KS", 140)
    for k in np.linspace(0.1, 8, 60):
        assert_same(cached(pair_of(top_k=k), cache), scores.compute_scores(pair_of(top_k=k)))
    assert max(len(table.k) for table in cache.load(SHA_C).values()) <= 141


def test_a_fused_layer_is_called_after_its_parts(cache):
    """Whether q, k and v count as one layer depends on the partner, so both may be kept."""
    # Attention alone could be Qwen-Image's too; the modulation is no attention.
    of_flux = "transformer.transformer_blocks.0.norm1.linear"
    split = lora(4, 1, (*(f"{QKV}to_{x}" for x in "qkv"), of_flux))
    whole = lora(4, 2, ("diffusion_model.double_blocks.0.img_attn.qkv",))
    whole = {k: torch.randn(120, 4) if "up" in k else v for k, v in whole.items()}
    split, whole = parse_lora("split", split), parse_lora("whole", whole)
    for partner in (split, whole, split):
        pair = pair_files(split, partner)
        assert_same(cached(pair, cache, (SHA_C, None)), scores.compute_scores(pair))
    one, rest = "double_blocks_0_img_attn_qkv", ["/k", "/q", "/v"]
    assert set(cache.load(SHA_C)) == {*(one + x for x in rest), "+".join(one + x for x in rest)}


def test_more_layers_are_added_to_what_is_there(cache, no_analysis):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    file = parse_lora("c", lora(4, 1, (f"{name}attn1_to_q", f"{name}ff_net_2")))
    cached(pair_files(file, file), cache, (SHA_C, SHA_S))
    both = pair_files(file, file, layers="all")
    assert len(both.paired) == 2
    expected = scores.compute_scores(both)
    assert_same(cached(both, cache), expected)
    no_analysis()
    assert_same(cached(both.without_tensors(), cache), expected)


def test_one_file_in_both_roles_is_analysed_once(cache, monkeypatch):
    calls = []
    analyse = scores._analyse
    monkeypatch.setattr(scores, "_analyse", lambda *args: calls.append(args) or analyse(*args))
    file = parse_lora("c", lora(4, 1))
    seen = []
    found = cached(
        pair_files(file, file),
        cache,
        (SHA_C, SHA_C),
        progress=lambda *step: seen.append(step),
    )
    assert len(calls) == 3
    assert seen[-1][0] == seen[-1][1]
    np.testing.assert_array_equal(found.s_content, found.s_style)


def test_without_a_hash_nothing_is_kept(cache):
    pair = pair_of()
    assert_same(cached(pair, cache, (None, None)), scores.compute_scores(pair))
    assert cache.size() == 0


def test_an_interrupted_analysis_continues_where_it_was(cache):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(pair_of(), cache, progress=stop)
    assert len(cache.load(SHA_C)) == 3
    assert len(cache.load(SHA_S)) == 1
    steps = []
    cached(pair_of(), cache, progress=lambda *step: steps.append(step))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert_same(cached(pair_of(), cache), scores.compute_scores(pair_of()))


def test_progress_is_silent_when_all_is_there(cache):
    cached(pair_of(), cache)
    cached(pair_of(), cache, progress=lambda *_: pytest.fail("nothing is done"))


# -- what is on disk ------------------------------------------------------------------------------


def entry_of(cache: ScoreCache, sha256: str = SHA_C) -> Path:
    (path,) = cache.folder.glob(f"{sha256}-*.npz")
    return path


@given(st.data())
def test_a_damaged_entry_is_never_trusted(tmp_path_factory, data):
    cache = ScoreCache(tmp_path_factory.mktemp("cache"))
    cached(pair_of(), cache)
    good = cache.load(SHA_C)
    path = entry_of(cache)
    content = bytearray(path.read_bytes())
    way = data.draw(st.sampled_from(("flip", "cut", "zero", "insert", "other")))
    place = data.draw(st.integers(0, len(content) - 1))
    if way == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif way == "cut":
        del content[place:]
    elif way == "zero":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif way == "insert":
        content[place:place] = b"\0" * 100
    else:
        content = bytearray(data.draw(st.binary(max_size=200)))
    path.write_bytes(content)
    found = cache.load(SHA_C)
    for name, table in found.items():  # empty, or what was written
        np.testing.assert_array_equal(table.k, good[name].k)
        np.testing.assert_array_equal(table.sums, good[name].sums)
        assert table.total == good[name].total
    assert_same(cached(pair_of(), cache), scores.compute_scores(pair_of()))
    assert cache.load(SHA_C)  # it is good again


def rewritten(cache: ScoreCache, **changed) -> None:
    """Replaces arrays of an entry; the file as such stays a sound one."""
    path = entry_of(cache)
    with np.load(path) as entry:
        arrays = {name: entry[name] for name in entry.files}
    arrays.update({name: change(arrays[name]) for name, change in changed.items()})
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    "changed",
    [
        {"sums": lambda x: x * np.nan},
        {"sums": lambda x: -x},
        {"sums": lambda x: x[::-1]},
        {"sums": lambda x: x * 10},
        {"sums": lambda x: x.astype(np.float32)},
        {"sums": lambda x: x[:-1]},
        {"sums": lambda x: x[:, None]},
        {"sums": lambda x: None},
        {"k": lambda x: x[::-1]},
        {"k": lambda x: x - x[0]},
        {"k": lambda x: x.astype(np.float64)},
        {"totals": lambda x: x * np.inf},
        {"totals": lambda x: x[:1]},
        {"totals": lambda x: x[0]},
        {"lengths": lambda x: x + 1},
        {"lengths": lambda x: x * 0},
        {"lengths": lambda x: np.array([x.sum() + 1, -1, 0])},
        {"names": lambda x: x.astype(np.bytes_)},
        {"names": lambda x: x.astype(object)},
        {"names": lambda x: x[0]},
        {"made_for": lambda x: np.array([f"{SHA_S} {score_cache.VERSION}"])},
        {"made_for": lambda x: np.array([f"{SHA_C} {score_cache.VERSION + 1}"])},
    ],
)
def test_an_entry_that_says_something_else_is_not_used(cache, changed):
    cached(pair_of(), cache)
    assert cache.load(SHA_C)
    rewritten(cache, **changed)
    assert cache.load(SHA_C) == {}
    assert_same(cached(pair_of(), cache), scores.compute_scores(pair_of()))


def test_a_pickle_is_not_opened(cache, tmp_path):
    cached(pair_of(), cache)

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    rewritten(cache, names=lambda x: np.array([Attack()], object))
    assert cache.load(SHA_C) == {}
    assert not (tmp_path / "opened").exists()


def test_another_version_is_not_used(cache, monkeypatch):
    cached(pair_of(), cache)
    monkeypatch.setattr(score_cache, "VERSION", score_cache.VERSION + 1)
    assert cache.load(SHA_C) == {}


def test_an_entry_under_another_files_name_is_not_used(cache):
    cached(pair_of(), cache)
    entry_of(cache).replace(cache.folder / f"{'e' * 64}-{score_cache.VERSION}.npz")
    assert cache.load("e" * 64) == {}


@pytest.mark.parametrize("name", ["", "../x", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_what_is_no_hash_is_refused(cache, name):
    with pytest.raises(ValueError, match="SHA-256"):
        cache.load(name)


def table(entries: int = 1000) -> dict[str, LayerTable]:
    k = np.arange(1, entries + 1)
    return {"layer": LayerTable(k, np.arange(entries) * 1.0, float(entries), float(entries))}


def sha(i: int) -> str:
    return f"{i:064x}"


def test_the_oldest_used_go_first(tmp_path):
    cache = ScoreCache(tmp_path, limit=60_000)  # three entries of 17 kB
    for i in range(3):
        cache.save(sha(i), table())
        os.utime(entry_of(cache, sha(i)), (i, i))
    assert cache.load(sha(0))
    cache.save(sha(3), table())
    assert [bool(cache.load(sha(i))) for i in range(4)] == [True, False, True, True]
    assert cache.size() <= 60_000


def test_the_entry_just_written_stays_even_if_it_is_too_large(tmp_path):
    cache = ScoreCache(tmp_path, limit=100)
    for i in range(2):
        cache.save(sha(i), table())
    assert [bool(cache.load(sha(i))) for i in range(2)] == [False, True]


def test_clear(tmp_path):
    cache = ScoreCache(tmp_path)
    assert (cache.clear(), cache.size()) == (0, 0)
    for i in range(3):
        cache.save(sha(i), table())
    (tmp_path / "not ours.txt").write_text("stays")
    assert cache.size() > 3 * 16_000
    (tmp_path / "folder.npz").mkdir()  # which cannot be removed as a file
    assert cache.clear() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"not ours.txt", "folder.npz"}


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path):
    cache = ScoreCache(tmp_path, limit=1)  # more than full: another process's file stays
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    cache.save(sha(1), table())
    assert not old.exists()
    assert new.exists()


class FullDisk(io.FileIO):
    """A file on a disk that has no room for what is written."""

    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("error")  # some versions of numpy leave a zip file that complains
def test_no_temporary_file_stays_on_a_full_disk(tmp_path, monkeypatch, log):
    cache = ScoreCache(tmp_path)
    monkeypatch.setattr(score_cache, "open", FullDisk, raising=False)
    cache.save(sha(1), table())
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in log.text


def test_a_folder_that_cannot_be_made_costs_the_cache_only(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ScoreCache(tmp_path / "file" / "folder")
    assert_same(cached(pair_of(), cache), scores.compute_scores(pair_of()))
    assert cache.size() == 0
    assert cache.clear() == 0


def test_a_cache_that_may_only_be_read_is_used(cache, no_analysis, log, monkeypatch):
    expected = cached(pair_of(), cache)

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "utime", refuse)
    no_analysis()
    assert_same(cached(pair_of(), cache), expected)
    assert not log.records


def test_two_processes_may_write_at_once(tmp_path):
    """Each writes and reads one entry as fast as it can; no read may see half of one."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from lib_klora.score_cache import LayerTable, ScoreCache
mine = float(sys.argv[3])
cache = ScoreCache(sys.argv[2])
k = np.arange(1, 5001)
for _ in range(150):
    cache.save("a" * 64, {"layer": LayerTable(k, np.full(5000, mine), mine, mine)})
    table = cache.load("a" * 64)["layer"]
    assert (table.sums == table.total).all() and len(table.k) == 5000, table
"""
    root = str(Path(__file__).resolve().parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, root, str(tmp_path), number], stdout=subprocess.PIPE
        )
        for number in ("1", "2")
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [b"", b""]  # nothing was logged: no entry was ever damaged
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_file_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 10**6)
    import hashlib

    assert file_sha256(path) == hashlib.sha256(b"abc" * 10**6).hexdigest()
