"""Figures for people at the edges, where a unit or a percentage changes."""

import pytest

from lightning_compress.report.figures import format_bytes, format_count, format_ms, format_share


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1.00 k"), (999_499, "999 k"), (999_500, "1.00 M"), (25_557_032, "25.6 M"), (3e15, "3000 T")],
)
def test_counts_have_three_digits_and_never_a_thousand_of_a_unit(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1.02 kB"), (97_800_000, "97.8 MB"), (2e9, "2.00 GB")])
def test_a_kilobyte_is_a_thousand_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.8, "80.0 %"), (1.0, "100.0 %"), (1e-9, "< 0.1 %"), (0.99999, "> 99.9 %")]
)
def test_a_share_is_never_rounded_to_nothing_or_everything(share: float, text: str) -> None:
    assert format_share(share) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.0, "0 ms"), (0.03456, "0.0346 ms"), (9.996, "10.0 ms"), (99.96, "100 ms")]
)
def test_times_have_three_digits(milliseconds: float, text: str) -> None:
    assert format_ms(milliseconds) == text
