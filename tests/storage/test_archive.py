"""Archives: networks come back from the file, and no other file is taken for one."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import load_compressed, quantization, rebuild, save_compressed, shrink
from lightning_compress.errors import ArchiveError, MissingExtraError
from lightning_compress.storage import ArchiveReader, write_archive
from lightning_compress.storage.archive import MAGIC
from lightning_compress.storage.bits import varint


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


def sparse(net: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape) >= share)
    return net


def test_a_network_comes_back_into_a_fresh_one(tmp_path: Path) -> None:
    net, fresh = sparse(network()), network(1)
    size = save_compressed(net, tmp_path / "new" / "net.lcz", metadata={"trained": "für ein Maß"})
    weights = load_compressed(tmp_path / "new" / "net.lcz", fresh)
    torch.testing.assert_close(fresh.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert weights.keys() == net.state_dict().keys()
    assert size.file_bytes == (tmp_path / "new" / "net.lcz").stat().st_size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["net.lcz"]
    with ArchiveReader(tmp_path / "new" / "net.lcz") as archive:
        assert archive.metadata == {"trained": "für ein Maß"}
        assert archive.shapes["4.weight"] == (3, 144)
        assert archive.dtypes["1.num_batches_tracked"] == torch.int64


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    net[1].weight = net[0].weight
    size = save_compressed(net, tmp_path / "net.lcz")
    assert 4 * 50 * 50 < size.file_bytes < 4 * 50 * 50 + 800
    fresh = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    load_compressed(tmp_path / "net.lcz", fresh)
    torch.testing.assert_close(fresh.state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 2])
def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_quantized_network_is_written_as_it_computes(bits: int, tmp_path: Path) -> None:
    net = perceptron()
    state = quantization.prepare(net, weight_bits=bits)
    quantization.calibrate(net, [torch.randn(8, 20)])
    save_compressed(net, tmp_path / "float.lcz")
    weight = net.get_parameter("2.weight")
    assert torch.equal(load_compressed(tmp_path / "float.lcz")["2.weight"], weight)
    state.is_quantizing = True
    size = save_compressed(net, tmp_path / "net.lcz")
    written = {tensor.name: tensor for tensor in size.tensors}
    assert written["2.weight"].form in ("integers", "sparse integers")
    fresh = perceptron(1)
    load_compressed(tmp_path / "net.lcz", fresh)
    assert torch.equal(fresh.get_parameter("2.weight"), state.weights["2"].rounded(weight).detach())
    assert not torch.equal(fresh.get_parameter("2.weight"), weight)
    assert written["2.weight"].coded_bits < bits * 30 * 40 + 32 * 40 + 8 * 150


def test_a_shrunk_network_comes_back_into_a_fresh_one_with_all_channels(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net.get_parameter("2.weight")[:, [1, 4, 5]] = 0
    small, record = shrink(net, torch.rand(2, 6))
    save_compressed(small, tmp_path / "net.lcz", channels=record)
    fresh: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    load_compressed(tmp_path / "net.lcz", fresh)
    assert fresh.get_parameter("0.weight").shape == (5, 6)
    x = torch.rand(3, 6)
    torch.testing.assert_close(fresh(x), small(x), rtol=0, atol=0)
    load_compressed(tmp_path / "net.lcz", rebuild(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), record))
    with pytest.raises(ArchiveError, match=r"holds another network than this `Sequential`: no `3\.weight` in the file"):
        load_compressed(tmp_path / "net.lcz", nn.Sequential(*fresh, nn.Linear(2, 2)))


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
        ),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_any_state_dict(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[list[int], torch.dtype]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("any") / "net.lcz"
    written = {name: torch.randn(shape).mul(3).to(dtype) for name, (shape, dtype) in tensors.items()}
    write_archive(written, path, metadata=metadata)
    with ArchiveReader(path) as archive:
        assert archive.metadata == metadata
        assert list(archive.shapes) == list(written)
        torch.testing.assert_close(dict(archive), written, rtol=0, atol=0)
        torch.testing.assert_close(dict(archive), written, rtol=0, atol=0)  # again, from the beginning


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "net.lcz"
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5) * (torch.rand(5) < 0.5), "b": torch.ones(3, 4, dtype=torch.int8)}
    tensors["again"] = tensors["a"]
    write_archive(tensors, path, metadata={"of": "tests"})
    return path.read_bytes()


def read(content: bytes, path: Path) -> dict[str, Tensor]:
    path.write_bytes(content)
    return load_compressed(path)


def test_no_flipped_bit_goes_unnoticed(small_archive: bytes, tmp_path: Path) -> None:
    assert len(read(small_archive, tmp_path / "whole")) == 3
    for position in range(len(small_archive)):
        for bit in range(8):
            damaged = bytearray(small_archive)
            damaged[position] ^= 1 << bit
            with pytest.raises(ArchiveError):
                read(bytes(damaged), tmp_path / "damaged")


def test_no_cut_and_nothing_that_follows_goes_unnoticed(small_archive: bytes, tmp_path: Path) -> None:
    for end in range(len(small_archive)):
        with pytest.raises(ArchiveError):
            read(small_archive[:end], tmp_path / "cut")
    with pytest.raises(ArchiveError, match="is cut off or something follows it"):
        read(small_archive + b"x", tmp_path / "longer")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_file_of_others_is_taken_for_an_archive(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, with_magic: bool
) -> None:
    path = tmp_path_factory.mktemp("foreign") / "file"
    with pytest.raises(ArchiveError):
        read((MAGIC if with_magic else b"") + content, path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_headers_that_lie_are_refused_though_their_checksum_fits(
    tmp_path_factory: pytest.TempPathFactory, header: bytes
) -> None:
    path = tmp_path_factory.mktemp("lying") / "file"
    head = MAGIC + struct.pack("<H", 1) + varint(len(header)) + header
    try:
        found = read(head + struct.pack("<I", zlib.crc32(head)), path)
    except ArchiveError:
        return
    assert found == {}  # no tensors at all are no lie


def forged(header: bytes, path: Path, payload: bytes = b"") -> Path:
    head = MAGIC + struct.pack("<H", 1) + varint(len(header)) + header
    tail = payload + struct.pack("<I", zlib.crc32(payload))
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + tail)
    return path


def test_a_tensor_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    payload = bytes([0])
    header = varint(1) + varint(1) + b"w" + bytes([0, 1]) + varint(2**38) + varint(len(payload)) + varint(0)
    with pytest.raises(ArchiveError, match=f"unpacks to {2**40} bytes, more than {2**32}"):
        load_compressed(forged(header, tmp_path / "big", payload))
    with pytest.raises(ArchiveError, match="is damaged in `w`: 1099511627776 bytes are announced, and 0 are left"):
        load_compressed(forged(header, tmp_path / "big", payload), largest=2**41)


def test_a_newer_version_is_named(small_archive: bytes, tmp_path: Path) -> None:
    newer = bytearray(small_archive)
    newer[8] = 2
    with pytest.raises(ArchiveError, match="has version 2, and this package reads up to 1: install a newer"):
        read(bytes(newer), tmp_path / "newer")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(2, 2), r"holds another network than this `Linear`: no `weight` in the file, no `bias` in the file"),
        (
            nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3)),
            r"`0\.weight` of the shape \(4, 1, 3, 3\) for \(5, 1, 3, 3\), .*, and \d more",
        ),
    ],
)
def test_another_network_is_refused_and_left_as_it_is(net: nn.Module, message: str, tmp_path: Path) -> None:
    save_compressed(network(), tmp_path / "net.lcz")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ArchiveError, match=message):
        load_compressed(tmp_path / "net.lcz", net)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_a_damaged_tensor_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    save_compressed(network(), tmp_path / "net.lcz")
    content = bytearray((tmp_path / "net.lcz").read_bytes())
    content[-10] ^= 1
    (tmp_path / "net.lcz").write_bytes(content)
    fresh = network(1)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ArchiveError, match=r"is damaged: the checksum of `4\.bias` does not fit"):
        load_compressed(tmp_path / "net.lcz", fresh)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`coders` must be some of fixed, huffman, ans, got \['zip'\]"):
        save_compressed(network(), tmp_path / "net.lcz", coders=["zip"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`extra` is no tensor but dict, which an archive cannot hold"):
        save_compressed({"extra": {}}, tmp_path / "net.lcz")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"`w` is a torch\.strided tensor of torch\.complex64"):
        save_compressed({"w": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "net.lcz")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "net.lcz")


def test_forged_archives_whose_checksums_fit_are_refused(tmp_path: Path) -> None:
    """Those of a review: endless symbols, tables of no rows, metadata that nests without end."""
    announced = bytes([0b010]) + varint(1) + varint(1) + bytes(1) + varint(2**31) + varint(1) + bytes([2]) + varint(1)
    header = varint(1) + varint(1) + b"w" + bytes([4, 1]) + varint(2**31) + varint(len(announced)) + varint(0)
    with pytest.raises(ArchiveError, match="is damaged in `w`"):
        load_compressed(forged(header, tmp_path / "endless", announced))
    empty = bytes([0b010]) + varint(0) + varint(2**62)
    header = varint(1) + varint(1) + b"w" + bytes([0, 2]) + varint(0) + varint(5) + varint(len(empty)) + varint(0)
    with pytest.raises(ArchiveError, match="A table has 4611686018427387904 values, more than 4096"):
        load_compressed(forged(header, tmp_path / "wide", empty))
    nested = varint(0) + varint(100_000) + b"[" * 100_000
    with pytest.raises(ArchiveError, match="its header cannot be read"):
        load_compressed(forged(nested, tmp_path / "nested"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"0": {"out": [0, 1]}}, "holds another network than this"),
        ({"9": {"out": [0]}}, "tells of channels or layers that this `Sequential` does not have"),
        ({"0": {"out": [-1]}}, "a channel has a negative number"),
        ({"0.weight": {"dimx": [0]}}, "tells of channels or layers that this `Sequential` does not have"),
    ],
)
def test_a_record_of_other_channels_leaves_the_model_as_it_is(
    record: dict[str, dict[str, list[int]]], message: str, tmp_path: Path
) -> None:
    save_compressed(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), tmp_path / "net.lcz", channels=record)
    fresh = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ArchiveError, match=message):
        load_compressed(tmp_path / "net.lcz", fresh)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"9": {"scheme": "channel", "rank": 1}}, "tells of channels or layers that this `Sequential` does not have"),
        ({"0": {"scheme": "channel", "rank": 99}}, "it has channel factors of rank 99 for `0`"),
        ({"0": {"scheme": "channel", "rank": 3}}, "holds another network than this `Sequential`"),
        ({"0": {"scheme": "round", "rank": 1}}, "a rank is no positive number, or its scheme is unknown"),
        ({"0": {"over": "inputs", "groups": [[]]}}, "a group is empty, or over something unknown"),
        ({"0": {"over": "inputs", "groups": [[0, 99]]}}, "it groups 2 inputs of `0`, which has 6"),
        ({"0": {}}, "The record of layers of an archive cannot be read: 'scheme'"),
    ],
)
def test_a_record_of_other_layers_leaves_the_model_as_it_is(
    record: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    small = nn.Sequential(nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 8)), nn.ReLU(), nn.Linear(8, 2))
    save_compressed(small, tmp_path / "net.lcz", layers=record)
    fresh = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ArchiveError, match=message):
        load_compressed(tmp_path / "net.lcz", fresh)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)
    save_compressed(small, tmp_path / "right.lcz", layers={"0": {"scheme": "channel", "rank": 2}})
    load_compressed(tmp_path / "right.lcz", fresh)
    x = torch.rand(3, 6)
    assert torch.equal(fresh(x), small(x))


class TiedNet(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.second = nn.Linear(40, 40) if both else nn.Embedding(40, 40)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.second, nn.Embedding):
            return self.first(x) + self.second(torch.arange(3)).sum()  # type: ignore[no-any-return]
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("both", [True, False])
def test_tied_weights_are_rounded_where_all_their_uses_are(both: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TiedNet(both)
    state = quantization.prepare(net, weight_bits=8)
    quantization.calibrate(net, [torch.randn(8, 40)])
    state.is_quantizing = True
    if both:
        size = save_compressed(net, tmp_path / "net.lcz")
        assert size.file_bytes < 40 * 40 * 1.3 + 1000
    else:
        with pytest.warns(UserWarning, match="`first.weight` and `second.weight` read are written in float"):
            save_compressed(net, tmp_path / "net.lcz")
    found = load_compressed(tmp_path / "net.lcz")
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert torch.equal(found["first.weight"], net.first.weight) != both


def test_weights_that_are_rounded_in_parts_are_named(tmp_path: Path) -> None:
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    state = quantization.prepare(net)
    quantization.calibrate(net, [torch.randn(2, 5, 16)])
    state.is_quantizing = True
    with pytest.warns(UserWarning, match="`self_attn.linear`.* read are written in float, not as they are rounded"):
        save_compressed(net, tmp_path / "net.lcz")
    found = load_compressed(tmp_path / "net.lcz")
    assert torch.equal(found["self_attn.in_proj_weight"], net.self_attn.in_proj_weight)


def test_a_file_that_cannot_be_read_back_takes_no_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_compressed(network(), tmp_path / "net.lcz")
    before = (tmp_path / "net.lcz").read_bytes()
    monkeypatch.setattr(
        "lightning_compress.storage.archive.decode_tensor", lambda payload, dtype, shape: torch.ones(shape)
    )
    with pytest.raises(ArchiveError, match=r"would not give back `0\.weight` as it is: nothing was written"):
        save_compressed(network(), tmp_path / "net.lcz")
    monkeypatch.setattr("lightning_compress.storage.archive._LARGEST_HEADER", 10)
    with pytest.raises(ValueError, match=r"Names and `metadata` take \d+ bytes, more than 10"):
        save_compressed(network(), tmp_path / "net.lcz")
    assert (tmp_path / "net.lcz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.lcz"]


def test_one_memory_under_two_dtypes_is_kept_twice(tmp_path: Path) -> None:
    weight = torch.randn(4)
    write_archive({"a": weight, "b": weight.view(torch.int32)}, tmp_path / "net.lcz")
    found = load_compressed(tmp_path / "net.lcz")
    assert found["b"].dtype == torch.int32
    assert torch.equal(found["b"], weight.view(torch.int32))


def test_the_install_line_where_the_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")
    save_compressed(sparse(network()), tmp_path / "net.lcz", coders=["ans"])
    assert load_compressed(tmp_path / "net.lcz").keys() == network().state_dict().keys()
    monkeypatch.setitem(sys.modules, "constriction", None)
    for use in (
        lambda: save_compressed(sparse(network()), tmp_path / "b", coders=["ans"]),
        lambda: load_compressed(tmp_path / "net.lcz"),
    ):
        with pytest.raises(MissingExtraError, match=r'pip install "lightning_compress\[ans\]"'):
            use()


def test_the_table_tells_the_stages(tmp_path: Path) -> None:
    text = save_compressed(sparse(network()), tmp_path / "net.lcz").to_text()
    assert text.splitlines()[0].split() == [
        "tensor",
        "shape",
        "nonzero,",
        "%",
        "values",
        "bits:",
        "dense",
        "pruned",
        "shared",
        "coded",
        "bound",
        "written",
        "as",
    ]
    line: Any = next(line for line in text.splitlines() if line.startswith("4.weight"))
    assert "3x144" in line
    assert "sparse raw" in line
    assert "times smaller; the entropy bound is" in text.splitlines()[-1]


def test_a_record_of_channels_that_is_none_is_refused(tmp_path: Path) -> None:
    save_compressed(network(), tmp_path / "net.lcz", metadata={"lightning_compress.channels": json.dumps([1])})
    with pytest.raises(ArchiveError, match="record of channels of an archive cannot be read"):
        load_compressed(
            tmp_path / "net.lcz",
            nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3)),
        )
