"""The benchmark of the cache reads what it has built."""

import sys

import pytest

from tools import benchmark_cache


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_small_cache_is_built_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_cache, "BATCHES", 2)
    assert benchmark_cache.build(tmp_path, 300)["rows/s"] > 0
    assert len(list((tmp_path / "moments" / "synthetic").iterdir())) == 2
    figures = benchmark_cache.read(tmp_path, 300)
    assert figures["rows/s"] > 0
    assert 0 <= figures["anonymous MiB after"] - figures["anonymous MiB before"] < 100
    (tmp_path / "moments" / "synthetic").rename(tmp_path / "moments" / "gone")
    with pytest.raises(AssertionError):
        benchmark_cache.read(tmp_path, 300)
