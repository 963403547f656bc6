"""Files that are read tensor by tensor: the same numbers, never more than one file in memory."""

import errno
import gc
import itertools
import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from fake_host import FakeHost, Model, Processing
from lora_samples import linear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib_klora import tensor_file
from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.scores import compute_scores
from lib_klora.session import Session
from lib_klora.settings import Settings
from lib_klora.tensor_file import SafetensorsFile, UnpickledFile

FILES = Path("/proc/self/fd")
NAME = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn1_to_q"


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


class TestMapping:
    def test_has_the_files_tensors(self, write):
        path, tensors = write("cat", 1)
        file = SafetensorsFile(path)
        assert set(file) == set(tensors)
        assert len(file) == len(tensors)
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
        assert "no such key" not in file
        with pytest.raises(KeyError):
            file["no such key"]

    def test_read_all_is_the_same(self, write):
        path, tensors = write("cat", 1)
        found = SafetensorsFile(path).read_all()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def test_what_is_changed_is_for_the_host_alone(self, write):
        path, tensors = write("cat", 1)
        file, key = SafetensorsFile(path), next(iter(tensors))
        file.changed = {key: torch.zeros(3)}
        found = file.read_all()
        assert list(found) == list(file), "in the file's order"
        assert torch.equal(found.pop(key), torch.zeros(3))
        assert all(torch.equal(tensor, file[x]) for x, tensor in found.items())
        assert file[key].numel() != 3

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
        found = SafetensorsFile(tmp_path / "cat.safetensors").read_all()
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[key].double(), tensor.double())

    def test_read_all_holds_nothing_of_the_file(self, write):
        """A training may save over a file whose layers a host has still to switch."""
        path, tensors = write("cat", 1)
        found = SafetensorsFile(path).read_all()
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        os.truncate(path, 0)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def test_asking_for_keys_reads_nothing(self, write, monkeypatch):
        path, tensors = write("cat", 1)
        file = SafetensorsFile(path)
        monkeypatch.setattr(SafetensorsFile, "__getitem__", None)
        assert all(key in file for key in tensors)
        assert set(file.keys()) == set(tensors)

    def test_it_is_as_safetensors_reads_it(self, tmp_path):
        """A header that is not padded, so that numbers lie at odd places; and other data first."""
        header = {
            "__metadata__": {"a": "b"},
            "two": {"dtype": "F32", "shape": [2, 1], "data_offsets": [3, 11]},
            "one": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        }
        text = json.dumps(header).encode()
        text += b" " * (len(text) % 2 == 0)
        path = tmp_path / "odd.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(1, 12)))
        file, expected = SafetensorsFile(path), load_file(path)
        assert list(file) == ["one", "two"]
        for found in (dict(file), file.read_all()):
            assert {key: x.tolist() for key, x in found.items()} == {
                key: x.tolist() for key, x in expected.items()
            }

    def test_nothing_is_left_behind(self, write):
        """safetensors' own get_tensor leaves two numbers of Python's with every call."""
        path, tensors = write("cat", 1)

        def read():
            file = SafetensorsFile(path)
            dict(file), file.read_all()

        read()
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(10):
            read()
        gc.collect()
        assert sys.getallocatedblocks() - before < len(tensors)


class TestRelease:
    @pytest.mark.skipif(not FILES.exists(), reason="only Linux tells which files are open")
    def test_closes_and_so_does_letting_go(self, write):
        def is_open():
            return str(path) in {os.path.realpath(link) for link in FILES.iterdir()}

        path, tensors = write("cat", 1)
        file = SafetensorsFile(path)
        assert not is_open()
        for _ in "again":
            assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
            assert is_open()
            file.release()
            assert not is_open()
        next(iter(file.values()))
        del file
        assert not is_open()

    def test_what_is_read_as_a_whole_is_read_once_until_then(self, tmp_path):
        def read():
            read.count += 1
            return {str(i): torch.full((3,), i) for i in range(10)}

        (tmp_path / "a").touch()
        read.count = 0
        file = UnpickledFile(tmp_path / "a", read)
        for count in (1, 2):
            assert [file[str(i)].tolist() for i in range(10)] == [[i] * 3 for i in range(10)]
            assert "10" not in file
            with pytest.raises(KeyError):
                file["10"]
            assert read.count == count
            file.release()


class TestWhatCanHappenMeanwhile:
    def test_it_is_saved_over(self, write):
        path, _ = write("cat", 1)
        file = SafetensorsFile(path)
        first, second = list(file)[:2]
        file[first]
        path.write_bytes(path.read_bytes())
        os.utime(path, (0, 0))  # a file may be written twice in one tick of the clock
        with pytest.raises(KLoraError, match=r"cat\.safetensors.*replaced.*try again"):
            file[second]

    def test_it_is_truncated(self, write):
        path, _ = write("cat", 1)
        file = SafetensorsFile(path)
        *_, last = file
        os.truncate(path, 5000)
        with pytest.raises(KLoraError, match=r"cat\.safetensors"):
            file[last]

    def test_another_file_takes_its_place(self, write, tmp_path):
        path, _ = write("cat", 1)
        file = SafetensorsFile(path)
        first, second = list(file)[:2]
        file[first]
        other, _ = write("other", 2)
        os.utime(other, (0, 0))  # two files of one size may be written in one tick of the clock
        os.replace(other, path)
        file.release()
        with pytest.raises(KLoraError, match=r"cat\.safetensors.*replaced.*try again"):
            file[second]

    def test_it_is_deleted(self, write):
        path, _ = write("cat", 1)
        file = SafetensorsFile(path)
        first, second = list(file)[:2]
        file[first]
        path.unlink()
        file.release()
        with pytest.raises(KLoraError, match=r"cat\.safetensors.*cannot be read"):
            file[second]


class TestRefusals:
    """What is wrong with a file is told apart from a file that is damaged."""

    def sentence(self, path) -> str:
        with pytest.raises(KLoraError) as error:
            SafetensorsFile(path)
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
    """Before 2.3, torch had no uint16."""
    path, _ = write("cat", 1)
    monkeypatch.delattr(torch, "float32")
    with pytest.raises(KLoraError, match=r"cat\.safetensors.*no numbers of type F32.*choose"):
        SafetensorsFile(path).read_all()


class TestMemory:
    """While two files are compared, only a layer of each is in memory."""

    MOST = 3 * 2 * 32 * 512 * 4
    """Bytes of the two layers that are looked at and the one that is read next."""

    @pytest.fixture
    def files(self, write):
        return {name: write(name, seed)[0] for seed, name in enumerate(("cat", "ink"))}

    @pytest.fixture
    def held(self, monkeypatch):
        """Bytes of what was read before that were still there, at each reading."""
        read, seen = [], []
        own = SafetensorsFile.__getitem__

        def getitem(self, key):
            seen.append(sum(x().nbytes for x in read if x() is not None))
            tensor = own(self, key)
            read.append(weakref.ref(tensor))
            return tensor

        monkeypatch.setattr(SafetensorsFile, "__getitem__", getitem)
        return seen

    def test_scores(self, files, held):
        compute_scores(pair_files(*(parse_lora(n, SafetensorsFile(p)) for n, p in files.items())))
        assert 0 < max(held) <= self.MOST

    def test_session(self, files, held, tmp_path):
        """The same, with a host that reads its files by itself."""
        prefixes = [NAME.format(i) for i in range(16)]
        session = Session(FakeHost(tmp_path, Model(prefixes, size=512)))
        p = Processing()
        session.activate(p, [["cat", "1"], ["ink", "1"]], Settings(enabled=False))
        assert not p.comments
        assert 0 < max(held) <= self.MOST
