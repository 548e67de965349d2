"""A real, tiny workload for all tests: two Meta-World tasks, tokenizers, an untrained small pi0_fast."""
import logging
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    from craft_nb.small import tiny_workload
    logging.disable(logging.WARNING)
    yield tiny_workload(tmp_path_factory.mktemp("work"), episodes=2)
    logging.disable(logging.NOTSET)
