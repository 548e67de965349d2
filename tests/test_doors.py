"The doors open quickly: `python bench/bench_doors.py` measures more often."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_doors as B


@pytest.mark.parametrize("names",
                         [["import torch", "import craft_nb", "craft-demo --help", "craft-cache info"],
                          pytest.param(["lerobot-train --help", "craft-train --help"], marks=pytest.mark.slow)],
                         ids=["light", "train"])
def test_answers_in_time(names):
    found = B.ratios(B.measure(3, names))
    assert len(found) == sum(n in B.LIMITS for n in names)
    assert all(x <= B.LIMITS[n][1] for n, x in found.items()), found
