"""Files that are read tensor by tensor: the same numbers, never more than one file in memory."""

import errno
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from fake_host import FakeHost, Model, Processing
from lora_samples import linear
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib_klora import tensor_file
from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.scores import compute_scores
from lib_klora.session import Session
from lib_klora.settings import Settings
from lib_klora.tensor_file import TensorFile, read_safetensors

NAME = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn1_to_q"
SMAPS = Path("/proc/self/smaps")

sees_mappings = pytest.mark.skipif(
    not SMAPS.exists(), reason="only Linux tells a process which files it has mapped"
)


def mapped(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    resident, ours = 0, False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1] == str(path)
        elif ours and words[0] == "Rss:":
            resident += int(words[1]) * 1024
    return resident


@pytest.fixture
def write(tmp_path):
    """Writes a LoRA of 16 layers, 128 KiB each; its path and its tensors."""

    def write(name: str, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
        tensors = {}
        for i in range(16):
            tensors |= linear(NAME.format(i), rank=32, size=512, seed=100 * seed + i)
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        return path, tensors

    return write


class Openings:
    """A file of these tensors that counts how often it is opened."""

    def __init__(self, tensors):
        self.tensors, self.count = tensors, 0

    def __call__(self):
        self.count += 1
        return self.tensors.keys(), self.tensors.__getitem__


class TestMapping:
    def test_has_the_files_tensors(self, write):
        path, tensors = write("cat", 1)
        file = read_safetensors(path)
        assert set(file) == set(tensors)
        assert len(file) == len(tensors)
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
        assert "no such key" not in file
        with pytest.raises(KeyError):
            file["no such key"]

    def test_read_all_is_the_same(self, write):
        path, tensors = write("cat", 1)
        found = read_safetensors(path).read_all()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def test_read_all_keeps_every_type_and_shape(self, tmp_path):
        names = [
            "float32",
            "float16",
            "bfloat16",
            "float8_e4m3fn",
            "float64",
            "int64",
            "uint8",
            "bool",
        ]
        shapes = [(), (0,), (3,), (2, 5), (4, 3, 1, 1)]
        tensors = {
            f"{name} {shape}": (torch.randn(shape) * 3).to(getattr(torch, name))
            for name, shape in itertools.product(names, shapes)
        }
        save_file(tensors, tmp_path / "cat.safetensors")
        found = read_safetensors(tmp_path / "cat.safetensors").read_all()
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[key].double(), tensor.double())

    def test_read_all_holds_nothing_of_the_file(self, write):
        """A training may save over a file whose layers a host has still to switch."""
        path, tensors = write("cat", 1)
        found = read_safetensors(path).read_all()
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        os.truncate(path, 0)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def test_asking_for_keys_reads_nothing(self, tmp_path):
        (tmp_path / "a").touch()

        def refuse(key):
            raise AssertionError(key)

        file = TensorFile(tmp_path / "a", lambda: ({"x": 0}, refuse))
        assert "x" in file
        assert list(file.keys()) == ["x"]


class TestOpening:
    def test_again_after_so_many_bytes(self, tmp_path):
        (tmp_path / "a").touch()
        openings = Openings({str(i): torch.zeros(100) for i in range(10)})
        file = TensorFile(tmp_path / "a", openings, at_once=1000)
        for key in file:
            file[key]
        assert openings.count == 4  # three tensors of 400 bytes each time

    def test_once_for_a_file_that_is_read_as_a_whole(self, tmp_path):
        (tmp_path / "a").touch()
        openings = Openings({str(i): torch.zeros(100) for i in range(10)})
        dict(TensorFile(tmp_path / "a", openings))
        assert openings.count == 1

    def test_one_file_at_a_time(self, tmp_path):
        (tmp_path / "a").touch()
        counts = [Openings({"x": torch.zeros(1)}) for _ in "ab"]
        a, b = (TensorFile(tmp_path / "a", openings) for openings in counts)
        for _ in range(3):
            a["x"], b["x"], b["x"]
        # Once to learn the keys, and once in every turn.
        assert [openings.count for openings in counts] == [4, 4]

    @sees_mappings
    def test_release_closes_and_so_does_letting_go(self, write):
        path, tensors = write("cat", 1)
        file = read_safetensors(path)
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
        assert mapped(path) > 0
        file.release()
        assert mapped(path) == 0
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
        assert mapped(path) > 0
        del file
        assert mapped(path) == 0


class TestWhatCanHappenMeanwhile:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(tensor_file, "AT_ONCE", 1)

    def test_another_file_takes_its_place(self, write, tmp_path):
        path, _ = write("cat", 1)
        file = read_safetensors(path)
        first, second = list(file)[:2]
        file[first]
        other, _ = write("other", 2)
        os.utime(other, (0, 0))  # two files of one size may be written in one tick of the clock
        os.replace(other, path)
        with pytest.raises(KLoraError, match=r"cat\.safetensors.*replaced.*try again"):
            file[second]

    def test_it_is_deleted(self, write):
        path, _ = write("cat", 1)
        file = read_safetensors(path)
        first, second = list(file)[:2]
        file[first]
        path.unlink()
        with pytest.raises(KLoraError, match=r"cat\.safetensors.*cannot be read"):
            file[second]


class TestRefusals:
    """What is wrong with a file is told apart from a file that is damaged."""

    def sentence(self, path) -> str:
        with pytest.raises(KLoraError) as error:
            read_safetensors(path)
        sentence = str(error.value)
        assert str(path.parent) not in sentence
        return sentence

    def test_damaged(self, tmp_path):
        path = tmp_path / "cat.safetensors"
        path.write_bytes(b"no safetensors file")
        assert "“cat.safetensors”" in self.sentence(path)
        assert "the file is damaged" in self.sentence(path)

    def test_may_not_be_read(self, write, monkeypatch):
        path, _ = write("cat", 1)

        def refuse(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr("builtins.open", refuse)  # a test that runs as root may read any file
        sentence = self.sentence(path)
        assert "“cat.safetensors” cannot be read (Permission denied): allow it" in sentence
        assert "damaged" not in sentence

    def test_no_file_and_a_folder(self, tmp_path):
        for path, reason in ((tmp_path / "none", "No such file"), (tmp_path / "sub", "directory")):
            (tmp_path / "sub").mkdir(exist_ok=True)
            sentence = self.sentence(path)
            assert reason in sentence
            assert "still there" in sentence
            assert "damaged" not in sentence

    @pytest.mark.skipif(sys.platform != "linux", reason="others have no such names")
    def test_a_name_that_is_not_utf_8(self, write, monkeypatch):
        path, _ = write("cat", 1)
        odd = path.with_name(os.fsdecode(b"c\xe9t.safetensors"))
        path.rename(odd)

        def refuse(*_):  # as the newer versions of safetensors do
            raise SafetensorError("Path is not valid UTF-8")

        monkeypatch.setattr(tensor_file, "safe_open", refuse)
        assert "is not UTF-8: rename it" in self.sentence(odd)
        assert "damaged" not in self.sentence(odd)


def test_a_number_type_that_this_torch_has_not_gets_a_sentence(write, monkeypatch):
    """Before 2.3, torch had no uint16, and safetensors looks for it as an attribute."""
    path, _ = write("cat", 1)
    monkeypatch.delattr(torch, "float32")
    with pytest.raises(KLoraError, match=r"cat\.safetensors.*cannot be read"):
        read_safetensors(path).read_all()


@sees_mappings
class TestMemory:
    """While two files are compared, only a part of one of them is in memory."""

    AT_ONCE = 2**19
    MOST = AT_ONCE + 2**18
    """And the layer that is looked at, and what the system maps around a page."""

    @pytest.fixture
    def files(self, write, monkeypatch):
        monkeypatch.setattr(tensor_file, "AT_ONCE", self.AT_ONCE)
        paths = {name: write(name, seed)[0] for seed, name in enumerate(("cat", "ink"))}
        assert all(path.stat().st_size > 2 * self.MOST for path in paths.values())
        return paths

    def test_scores(self, files):
        pair = pair_files(*(parse_lora(n, read_safetensors(p)) for n, p in files.items()))
        seen = []
        compute_scores(
            pair, progress=lambda *_: seen.append([mapped(path) for path in files.values()])
        )
        assert max(map(sum, seen)) <= self.MOST
        assert any(map(sum, seen))
        assert all(0 in both for both in seen)

    def test_session(self, files, tmp_path):
        """The same, with a host that reads its files by itself; and nothing is left open."""

        class Host(FakeHost):
            def show_progress(self, done, total):
                seen.append([mapped(path) for path in files.values()])

            def load(self, on_disk, tensors):
                seen.append([mapped(path) for path in files.values()])
                assert not any(seen[-1]), "the host has to have the memory for itself"
                return super().load(on_disk, tensors)

        seen = []
        prefixes = [NAME.format(i) for i in range(16)]
        session = Session(Host(tmp_path, Model(prefixes, size=512)))
        p = Processing()
        session.activate(p, [["cat", "1"], ["ink", "1"]], Settings(enabled=False))
        assert not p.comments
        assert len(seen) == 2 + 33
        assert max(map(sum, seen)) <= self.MOST
        assert any(map(sum, seen))
        assert not any(mapped(path) for path in files.values())
