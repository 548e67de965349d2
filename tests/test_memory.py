"""The memory estimate that is printed before the first step, against the peak of whole training steps of a pi0_fast.

What runs here at small size on a CPU runs at full size on a GPU:
`python bench/bench_optimiser.py --only training --size pi0_fast`.
"""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from bench_optimiser import training_memory  # noqa: E402


@pytest.mark.parametrize("batch_size, how",
                         [(2, {}), (16, {}), (4, dict(accumulate=2)), (8, dict(anchor_micro_batch=2))])
def test_estimate_is_within_a_tenth(tmp_path, batch_size, how):
    found = training_memory("small", "cpu", batch_size, tmp_path, **how)
    assert list(found) == ["plain", "cut", "pooled", "action_logits"] + ["streamed"] * (not how)
    for name, f in found.items(): assert 0.9 <= f["expected_over_peak"] <= 1.1, (name, f)
    # like with like: a retention step's task batch is without padding
    assert found["action_logits"]["peak_gib"] >= found["cut"]["peak_gib"]
