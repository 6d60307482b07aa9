"""Counts of a model: numbers that can be checked in the head."""

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.report.statistics import model_statistics


class SmallConvNet(nn.Module):
    """Conv 3 -> 4 (3x3, same), batch norm, depthwise conv (3x3, stride 2, same), linear 4*4*4 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor, *, scale: float = 1.0) -> Tensor:
        features: Tensor = self.depthwise(self.norm(self.conv(image)).relu())
        logits: Tensor = self.head(features.flatten(1))
        return logits * scale


def test_parameters_and_macs_of_a_small_net_are_those_counted_by_hand() -> None:
    counted = model_statistics(SmallConvNet(), (torch.zeros(5, 3, 8, 8),))
    assert counted.parameters == (3 * 4 * 9 + 4) + (4 + 4) + 4 * 9 + (64 * 10 + 10)
    assert counted.weight_parameters == 108 + 36 + 640
    assert counted.macs == 108 * 64 + 36 * 16 + 640


def test_macs_are_per_sample_and_do_not_depend_on_the_batch() -> None:
    net = SmallConvNet()
    of_one, of_six = (model_statistics(net, (torch.zeros(n, 3, 8, 8),)).macs for n in (1, 6))
    assert of_one == of_six == 8128


def test_inputs_may_be_given_by_keyword_and_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, *, batch: dict[str, list[Tensor]]) -> Tensor:
            return self.fc(batch["views"][0])  # type: ignore[no-any-return]

    assert model_statistics(Nested(), (), {"batch": {"views": [torch.zeros(2, 4)]}}).macs == 12


def test_layer_rows_hold_zeros_and_bits() -> None:
    net = SmallConvNet()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        net.head.weight[:8] = 0.0
    counted = model_statistics(net, (torch.zeros(1, 3, 8, 8),), bits={"conv": 8, "head": 4})
    rows = [(row.name, row.kind, row.shape, row.parameters, row.nonzeros, row.bits) for row in counted.layers]
    assert rows == [
        ("conv", "Conv2d", (4, 3, 3, 3), 108, 108, 8),
        ("depthwise", "Conv2d", (4, 1, 3, 3), 36, 36, 32),
        ("head", "Linear", (10, 64), 640, 128, 4),
    ]
    assert counted.layers[2].sparsity == 0.8
    assert counted.parameters - counted.nonzeros == counted.weight_parameters - counted.weight_nonzeros == 512
    assert counted.sparsity == 512 / 784


def test_a_shared_weight_counts_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    counted = model_statistics(net, (torch.zeros(1, 4),))
    assert (counted.parameters, counted.weight_parameters, len(counted.layers), counted.macs) == (16, 16, 2, 32)


def test_attention_is_counted_although_torch_would_fuse_it() -> None:
    layer = nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32, batch_first=True)
    projections, feed_forward, attention = 5 * 4 * 16 * 16, 5 * 2 * 16 * 32, 2 * 5 * 5 * 16
    assert model_statistics(layer, (torch.zeros(2, 5, 16),)).macs == projections + feed_forward + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_every_module_is_back_in_its_own_mode() -> None:
    net = SmallConvNet().train()
    net.norm.eval()
    model_statistics(net, (torch.ones(2, 3, 8, 8),))
    assert [module.training for module in net.modules()] == [True, True, False, True, True]


def test_batch_norm_statistics_are_not_touched() -> None:
    net = SmallConvNet().train()
    model_statistics(net, (torch.ones(2, 3, 8, 8),))
    assert net.norm.num_batches_tracked is not None
    assert int(net.norm.num_batches_tracked) == 0


def test_a_model_without_weights_has_no_sparsity_and_no_macs() -> None:
    counted = model_statistics(nn.ReLU(), (torch.zeros(2, 3),))
    assert (counted.parameters, counted.sparsity, counted.macs, counted.layers) == (0, 0.0, 0, ())


def test_inputs_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        model_statistics(nn.ReLU(), (torch.tensor(1.0),))
    assert str(caught.value) == (
        "The example inputs hold no tensor with a batch axis. "
        "Pass the inputs of one `forward` call, such as `(images,)` with images of shape (batch, channels, ...)."
    )
