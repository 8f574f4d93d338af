"""Files as people published them: legacy pickles with transposed tensors, Lightning files with classes inside."""

from __future__ import annotations

import itertools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trained import packaged

import ckptsurgery as cs

FACES = ["pnet", "rnet", "onet"]
PITCHES = ["mir-1k", "mir-1k_g7"]
FILES = {
    **{name: packaged("facenet-pytorch", f"data/{name}.pt") for name in FACES},
    **{name: packaged("pesto-pitch", f"weights/{name}.ckpt") for name in PITCHES},
}


class _Lenient:
    """A pickle module for torch.load that puts an empty class in the place of any that is not installed."""

    __name__ = "lenient"
    load, loads, dump = staticmethod(pickle.load), staticmethod(pickle.loads), staticmethod(pickle.dump)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.partition(".")[0] == "omegaconf":
                return type(name, (dict,), {"__setstate__": lambda self, state: None})
            return super().find_class(module, name)


def by_torch(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Lenient)
    return found.get("state_dict", found)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_files_are_what_makes_them_hard() -> None:
    assert any(not t.is_contiguous() for name in FACES for t in by_torch(FILES[name]).values())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(FILES["mir-1k_g7"], weights_only=True)


@pytest.mark.parametrize("name", FILES)
def test_opened_it_holds_what_torch_loads_and_nothing_was_imported(name: str) -> None:
    before = set(sys.modules)
    with cs.open(FILES[name]) as checkpoint:
        found = checkpoint.state_dict()
        whole = {k: checkpoint[k][0:1] for k in checkpoint if checkpoint[k].spec.shape}
    assert not {m for m in set(sys.modules) - before if m.startswith(("omegaconf", "facenet", "pesto"))}
    expected = by_torch(FILES[name])
    assert identical(found, expected)
    assert all(t.is_contiguous() for t in found.values())
    assert all(torch.equal(part, expected[k][0:1]) for k, part in whole.items())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["x.safetensors", "folder", "x.pt"])
def test_converted_it_is_the_same_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    cs.plan(FILES[name], cs.Recipe(rest="keep")).save(tmp_path / form, check=True)
    with cs.open(tmp_path / form) as converted:
        found = converted.state_dict()
    expected = by_torch(FILES[name])
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("name", PITCHES)
def test_hyper_parameters_are_there_to_read(name: str) -> None:
    with cs.open(FILES[name]) as checkpoint:
        assert checkpoint.extras["hparams"]["encoder"]["prefilt_kernel_size"] in (15, 39)
        assert {"epoch", "global_step", "loops", "hcqt_params"} <= checkpoint.extras.keys()


class PNet(nn.Module):
    """The first stage of MTCNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


@pytest.mark.parametrize("assign", [False, True])
def test_a_face_detector_loads_and_computes_what_it_did(assign: bool) -> None:
    reference = PNet()
    reference.load_state_dict(by_torch(FILES["pnet"]))
    with torch.device("meta" if assign else "cpu"):
        model = PNet()
    report = cs.load_into(model, FILES["pnet"], assign=assign)
    assert report.coverage == 1 and set(report.loaded) == set(reference.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(image), reference(image), strict=True))


class Pitch(nn.Module):
    """The encoder of PESTO, read off the shapes of its file."""

    def __init__(self, width: int = 219, kernel: int = 39, blocks: int = 2, fc: int = 1040) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm([1, width])
        self.conv1 = nn.Sequential(nn.Conv1d(1, 40, kernel, padding=kernel // 2), nn.LeakyReLU(0.3))
        self.prefilt_layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(40, 40, kernel, padding=kernel // 2), nn.LeakyReLU(0.3)) for _ in range(blocks)
        )
        sizes = [40, 30, 30, 10, 3]
        layers = [
            m for a, b in itertools.pairwise(sizes) for m in (nn.Conv1d(a, b, 1), nn.LeakyReLU(0.3), nn.Identity())
        ]
        self.conv_layers = nn.Sequential(*layers)
        self.fc = nn.Conv1d(1, 1, fc, bias=False)


def test_a_lightning_file_that_weights_only_refuses_goes_into_the_part_that_is_meant() -> None:
    expected = by_torch(FILES["mir-1k_g7"])
    model = Pitch()
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, FILES["mir-1k_g7"])
    text = str(error.value)
    assert "confidence" in text and "drop=" in text
    report = cs.load_into(model, FILES["mir-1k_g7"], drop=["confidence", "shift"])
    assert identical(model.state_dict(), {k: expected[f"encoder.{k}"] for k in model.state_dict()})
    assert set(report.dropped) == {k for k in expected if not k.startswith("encoder.")}
    assert "prefix 'encoder.' taken off" in report.notes
    again = cs.load_into(Pitch(), FILES["mir-1k_g7"], subtree="encoder")
    assert again.coverage == 1 and not again.dropped


def test_a_file_of_another_size_names_what_differs() -> None:
    model = Pitch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, FILES["mir-1k"], subtree="encoder")
    text = str(error.value)
    assert {"shape-mismatch", "missing-keys", "unexpected-keys"} == {d.code for d in error.value.diagnostics}
    assert "layernorm" in text and "[1, 264]" in text and "prefilt_layers.0.weight" in text
    assert identical(model.state_dict(), before)
