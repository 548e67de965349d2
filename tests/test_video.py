"""Data sets of videos, as robots record them: two cameras, several tasks, episodes of different lengths, H.264 and AV1: read forward, every frame is LeRobot's own."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

OLD = ("top", "wrist"), [("Push and open a window", 11), ("Press a button from the top", 7), ("Push and open a window", 9)]
NEW = ("front", "side"), [("Push and close a window", 12), ("Push and open a window", 8)]


def record(root, codec, cameras, episodes):
    "A LeRobot data set whose frames are told apart by a bar that moves."
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset
    video, numbers = (dict(dtype="video", shape=(64, 64, 3), names=["height", "width", "channels"]), dict(dtype="float32", shape=(4,), names=None))
    features = {f"observation.images.{c}": video for c in cameras} | {"observation.state": numbers, "action": numbers}
    ds = LeRobotDataset.create("craft/film", 30, features, root=root, use_videos=True, rgb_encoder=RGBEncoderConfig(vcodec=codec))
    for e, (task, n) in enumerate(episodes):
        for i in range(n):
            x = np.cos(np.arange(4) + np.pi * i / (n - 1)).astype(np.float32)
            pictures = {}
            for k, c in enumerate(cameras):
                pictures[f"observation.images.{c}"] = p = np.full((64, 64, 3), 60 + 40 * k, np.uint8)
                p[:, 4 * i : 4 * i + 8, e % 3] = 220
            ds.add_frame(pictures | {"observation.state": x, "action": x[::-1].copy(), "task": task})
        ds.save_episode()
    ds.finalize()
    return Path(root)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Old data in AV1, new ones with other cameras in H.264."
    folder = tmp_path_factory.mktemp("films")
    record(folder / "dataset", "libsvtav1", *OLD)
    record(folder / "new", "h264", *NEW)
    return folder


@pytest.fixture
def inside(films, monkeypatch):
    monkeypatch.chdir(films)
    monkeypatch.setattr(sys, "argv", ["craft"])
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(name, "1")
    return films


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("which", ["dataset", "new"])
def test_every_item_is_lerobots_own(inside, which):
    from craft_nb.video import ForwardFrames
    from lerobot.datasets import LeRobotDataset
    def data(**kw): return LeRobotDataset("craft/film", root=which, video_backend="pyav", delta_timestamps={"action": [0, 1 / 30]}, **kw)
    for ds in (data(), data(episodes=[1], return_uint8=True)):
        forward = ForwardFrames(ds)
        assert len(forward) == len(ds)
        for i in (*range(0, len(ds), 2), len(ds) - 1, 3, 1, 1, 0): assert same(forward[i], ds[i]), i  # the last ones go back
    before, forward.process = forward.files, -1  # as in a worker that was forked while the files are open
    assert same(forward[2], ds[2]) and forward.files is not before and all(f is not before[c] for c, f in forward.files.items())
