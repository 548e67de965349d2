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


def _ordinary_priority():
    """SVT-AV1, LeRobot's own video encoder, puts the thread that calls it at real-time priority 99 where it runs as
    root, and every thread and process begun afterwards inherits that: whatever else is on the machine starves. Back to
    what it was."""
    if not hasattr(os, "sched_getscheduler"): return
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        try:
            if os.sched_getscheduler(int(thread)) != os.SCHED_OTHER:
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
        except ProcessLookupError: continue   # it has ended since


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    try: return (yield)
    finally: _ordinary_priority()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try: return (yield)
    finally: _ordinary_priority()


LONG = ("test_resume", "test_policies", "test_distributed", "test_faults", "test_jupyterlab", "test_own_data",
        "test_odd_inputs")


def pytest_collection_modifyitems(items):
    """Files that take minutes go first: several processes share the files, and none shall begin a long one when the
    others are done."""
    items.sort(key=lambda i: LONG.index(i.path.stem) if i.path.stem in LONG else len(LONG))
