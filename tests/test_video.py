"""Data sets of videos, as robots record them: two cameras, several tasks, episodes of different lengths, H.264 and AV1,
through every command."""
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from craft_nb import cli

OLD = (("top", "wrist"),
       [("Push and open a window", 11), ("Press a button from the top", 7), ("Push and open a window", 9)])
NEW = ("front", "side"), [("Push and close a window", 12), ("Push and open a window", 8)]
RENAME = '{"observation.images.front": "observation.images.top", "observation.images.side": "observation.images.wrist"}'


def record(root, codec, cameras, episodes):
    "A LeRobot data set whose frames are told apart by a bar that moves."
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset
    video, numbers = (dict(dtype="video", shape=(64, 64, 3), names=["height", "width", "channels"]),
                      dict(dtype="float32", shape=(4,), names=None))
    features = {f"observation.images.{c}": video for c in cameras} | {"observation.state": numbers, "action": numbers}
    ds = LeRobotDataset.create("craft/film", 30, features, root=root, use_videos=True,
                               rgb_encoder=RGBEncoderConfig(vcodec=codec))
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
    "Old data (AV1) with a small policy that was made for them, new ones (H.264) with other cameras."
    from craft_nb.small import Workload, new_policy, save_checkpoint_folder, save_tokenizers
    folder = tmp_path_factory.mktemp("films")
    work = Workload(folder)
    record(work.root, "libsvtav1", *OLD)
    save_tokenizers(work.dataset(), work.tokenizers)
    save_checkpoint_folder(*new_policy(work), work.policy_path)
    record(folder / "new", "h264", *NEW)
    return work


@pytest.fixture
def inside(films, monkeypatch):
    monkeypatch.chdir(films.folder)
    monkeypatch.setattr(sys, "argv", ["craft"])
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(name, "1")
    return films


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop: main(list(flags))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def same(a, b):
    return (a.keys() == b.keys()
            and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a))


@pytest.mark.parametrize("which", ["dataset", "new"])
def test_every_item_is_lerobots_own(inside, which):
    from craft_nb.frames import Room
    from craft_nb.video import ForwardFrames
    from lerobot.datasets import LeRobotDataset
    def data(**kw):
        return LeRobotDataset("craft/film", root=which, video_backend="pyav", delta_timestamps={"action": [0, 1 / 30]},
                              **kw)
    for ds in (data(), data(episodes=[1], return_uint8=True)):
        forward, kept = ForwardFrames(ds), Room().keep(ds, 2 * len(ds), "films")
        assert len(forward) == len(ds) == len(kept)
        # the last ones go back
        for i in (*range(0, len(ds), 2), len(ds) - 1, 3, 1, 1, 0):
            assert same(forward[i], ds[i]) and same(kept[i], ds[i]), i
        assert kept.rows.filled == len({*range(0, len(ds), 2), len(ds) - 1, 3, 1, 0})
    before, forward.process = forward.files, -1  # as in a worker that was forked while the files are open
    assert (same(forward[2], ds[2]) and forward.files is not before
            and all(f is not before[c] for c, f in forward.files.items()))


def line(work, out, *more):
    return [f"--policy.path={work.policy_path}", "--dataset.repo_id=new", f"--rename_map={RENAME}",
            f"--output_dir={out}", "--steps=4", "--save_freq=2", "--batch_size=2", "--num_workers=0", "--seed=3",
            "--craft.anchor_batch_size=4", "--craft.retention_freq=1", "--craft.check=false", *more]


def weights(run, step): return (Path(run) / f"checkpoints/{step:06}/pretrained_model/model.safetensors").read_bytes()


def test_one_command_builds_and_trains_and_goes_on_wherever_it_was_killed(inside, monkeypatch):
    import craft_nb.training as ours
    from craft_nb.anchors import AnchorCacheDataset, AnchorWriter
    own = ["--craft.anchor_dataset.repo_id=dataset", "--craft.anchor_dataset.num_anchors=12"]
    assert ("give one of them" in refused(cli.train, *line(inside, "a", *own, "--craft.anchor_cache_dir=elsewhere"))
            and not Path("a").exists())
    monkeypatch.setattr(ours, "BuildCacheConfig", functools.partial(ours.BuildCacheConfig, shard_size=4, batch_size=4))
    cli.train(line(inside, "a", *own))
    cache = AnchorCacheDataset("a/anchors")
    assert (len(cache) == 12 and sorted(set(cache.instructions())) == sorted({t for t, _ in OLD[1]})
            and cache.manifest["dataset"]["fps"] == 30)
    data = inside.dataset()
    for row, f in zip(cache.batch(range(12))["pixel_values"], cache.column("frame_index").tolist(), strict=True):
        for picture, camera in zip(row, OLD[0], strict=True):
            assert torch.allclose(picture.float() / 255, data[f][f"observation.images.{camera}"], atol=3e-3)
    add, calls = AnchorWriter.add, []
    def killed(self, rows):
        calls.extend([1] * (Path(self.dir) == Path("b/anchors")))  # others are the few of the rehearsal
        if len(calls) == 3: raise KeyboardInterrupt
        add(self, rows)
    monkeypatch.setattr(AnchorWriter, "add", killed)
    refused(cli.train, *line(inside, "b", *own))
    monkeypatch.setattr(AnchorWriter, "add", add)
    assert not Path("b/anchors/anchors.json").exists() and len(list(Path("b/anchors").glob("*.safetensors"))) == 2
    written = {p.name: p.stat().st_mtime_ns for p in Path("b/anchors").glob("*.safetensors")}
    cli.train(line(inside, "b", *own))
    # went on
    assert written.items() <= {p.name: p.stat().st_mtime_ns for p in Path("b/anchors").glob("*.safetensors")}.items()
    assert weights("a", 2) == weights("b", 2) and weights("a", 4) == weights("b", 4)
    before = weights("b", 4)
    cli.train(["--resume=true", "--config_path=b/checkpoints/000002/pretrained_model/train_config.json"])
    assert weights("b", 4) == before
    assert "exists" in refused(cli.train, *line(inside, "b", *own))
    Path("c").mkdir()
    # finished anchors of an earlier call are taken, if they are what is asked for
    Path("a/anchors").rename("c/anchors")
    assert ("num_anchors ('12' then, '13' now)"
            in refused(cli.train, *line(inside, "c", *own[:1], "--craft.anchor_dataset.num_anchors=13")))
    cli.train(line(inside, "c", *own))
    assert weights("c", 4) == before


def test_other_cameras_need_a_map(inside):
    plain = [f for f in line(inside, "d", "--craft.enabled=false") if not f.startswith("--rename_map")]
    says = refused(cli.train, *plain)
    assert "observation.images.front" in says and "--rename_map" in says and not Path("d").exists()
    says = refused(cli.evaluate, f"--policy.path={inside.policy_path}", "--dataset.repo_id=new", "--out_dir=e")
    assert "observation.images.front" in says and not Path("e").exists()
    cli.evaluate([f"--policy.path={inside.policy_path}", "--dataset.repo_id=new", f"--rename_map={RENAME}",
                  "--out_dir=e", "--max_frames=8", "--batch_size=4"])
    assert "task loss: Push and close a window" in Path("e/eval.md").read_text()


def test_a_damaged_video_is_named(inside, tmp_path):
    import shutil
    shutil.copytree("new", tmp_path / "film")
    lost = next((tmp_path / "film/videos/observation.images.side").rglob("*.mp4"))
    whole = lost.read_bytes()
    flags = [f"--policy.path={inside.policy_path}", f"--dataset.repo_id={tmp_path / 'film'}", f"--rename_map={RENAME}",
             f"--out_dir={tmp_path / 'out'}", "--num_anchors=6"]
    for damage in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        lost.write_bytes(damage)
        says = refused(cli.build_cache, *flags)
        assert lost.name in says and "observation.images.side" in says and not (tmp_path / "out").exists(), says


def test_a_spoilt_or_short_video_is_one_line_in_every_command(inside, tmp_path):
    import shutil
    shutil.copytree("new", film := tmp_path / "film")
    lost = next((film / "videos/observation.images.side").rglob("*.mp4"))
    whole = lost.read_bytes()
    flags = [f"--policy.path={inside.policy_path}", f"--dataset.repo_id={film}", f"--rename_map={RENAME}"]
    commands = ((cli.build_cache, f"--out_dir={tmp_path / 'no'}", "--num_anchors=all"),
                (cli.evaluate, f"--out_dir={tmp_path / 'no'}", "--max_frames=30", "--action_frames=0"),
                (cli.train, f"--output_dir={tmp_path / 'no'}", "--steps=20", "--batch_size=10", "--num_workers=0",
                 "--craft.enabled=false", "--craft.check=false", "--save_checkpoint=false"))
    holed = bytearray(whole)
    holed[len(whole) // 3 : len(whole) // 2] = b"\xff" * (len(whole) // 2 - len(whole) // 3)
    for spoil in (lambda: lost.write_bytes(whole[: len(whole) * 2 // 3]), lambda: lost.write_bytes(holed),
                  lambda: cut_film(lost, 14)):
        spoil()
        for main, *more in commands:
            says = refused(main, *flags, *more).replace("(CRAFT_DEBUG=1 shows where)", "").strip()
            # at most: what is wrong, where, what to do
            assert (lost.name in says and "observation.images.side" in says and "Traceback" not in says
                    and len(says.splitlines()) <= 3 and sum(lost.name in x for x in says.splitlines()) == 1), says
            shutil.rmtree(tmp_path / "no", ignore_errors=True)
        lost.write_bytes(whole)


def cut_film(file, frames): filmed(file, lambda x: x[:frames])


def filmed(file, change=lambda x: x, rate=30):
    "The same film again, H.264, with its pictures changed, or so many of them a second."
    import av
    with av.open(str(file)) as box: kept = change([f.to_ndarray(format="rgb24") for f in box.decode(video=0)])
    with av.open(str(file), "w") as box:
        s = box.add_stream("h264", rate=rate)
        s.height, s.width, s.pix_fmt = *kept[0].shape[:2], "yuv420p"
        for x in kept: box.mux(s.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        box.mux(s.encode(None))


def starts(film, change):
    "Change the table that says where in a film an episode lies."
    import pandas as pd
    for file in (film / "meta/episodes").rglob("*.parquet"): change(pd.read_parquet(file)).to_parquet(file)


def info(film, **change):
    file = film / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


SIDE = "videos/observation.images.side"
UNLIKE = {
    "half as many pictures a second": (lambda d, f: filmed(f, rate=15), "shows 15 pictures a second"),
    "smaller pictures": (lambda d, f: filmed(f, lambda x: [p[::2, ::2].copy() for p in x]), "pictures of 32×32"),
    "a sound": (lambda d, f: f.write_bytes(b"RIFF$\0\0\0WAVEfmt " + b"\0" * 64), "cannot be read"),
    "no start": (lambda d, f: starts(d, lambda e: e.assign(**{f"{SIDE}/from_timestamp": float("nan")})),
                 "is to be read"),
    "a start before the first picture": (lambda d, f: starts(d, lambda e: e.assign(**{f"{SIDE}/from_timestamp": -5.0})),
                                         "is to be read from -5.0 s on"),
    "no column of starts": (lambda d, f: starts(d, lambda e: e.drop(columns=[c for c in e if c.startswith(SIDE)])),
                            f"there is no column {SIDE}"),
    "no pattern": (lambda d, f: info(d, video_path=None), "video_path"),
    "a pattern of nobody": (lambda d, f: info(d, video_path="films/{camera}.mp4"), "video_path"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_films_that_are_not_what_their_data_set_says(inside, tmp_path, name):
    import shutil
    shutil.copytree("new", film := tmp_path / "film")
    spoil, words = UNLIKE[name]
    spoil(film, next((film / SIDE).rglob("*.mp4")))
    main, out = ((cli.build_cache, "out_dir"), (cli.evaluate, "out_dir"),
                 (cli.train, "output_dir"))[[*UNLIKE].index(name) % 3]
    says = refused(main, f"--policy.path={inside.policy_path}", f"--dataset.repo_id={film}", f"--rename_map={RENAME}",
                   f"--{out}={tmp_path / 'no'}", *["--craft.enabled=false"] * (main is cli.train))
    assert words in says and "Traceback" not in says and len(says.splitlines()) <= 6, says
    assert not (tmp_path / "no").exists()


def test_words_of_lerobot_annotate_are_no_hindrance(inside, tmp_path):
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.language import language_feature_info
    shutil.copytree("new", film := tmp_path / "film")
    table = pq.read_table(file := next((film / "data").rglob("*.parquet")))
    now = dict(role="assistant", content="reach", style="subtask", timestamp=0.0, camera=None, tool_calls=None)
    say = dict(role="assistant", content=None, style=None, camera=None,
               tool_calls=[dict(type="function", function=dict(name="say", arguments=dict(text="ok")))])
    words = dict(language_persistent=[[now] * (i % 3) for i in range(len(table))],
                 language_events=[[say] * (i % 5 == 0) for i in range(len(table))])
    for k, v in words.items(): table = table.append_column(k, pa.array(v))
    pq.write_table(table, file)
    features = json.loads((film / "meta/info.json").read_text())["features"]
    info(film, features=features | json.loads(json.dumps(language_feature_info())))
    assert LeRobotDataset("craft/film", root=film).meta.has_language_columns
    flags = [f"--policy.path={inside.policy_path}", f"--dataset.repo_id={film}", f"--rename_map={RENAME}"]
    cli.train([*flags, f"--output_dir={tmp_path / 'run'}", "--steps=1", "--batch_size=3", "--num_workers=0",
               "--save_checkpoint=false", "--craft.anchor_dataset.repo_id=dataset", "--craft.anchor_batch_size=4",
               "--craft.anchor_dataset.num_anchors=4", "--craft.retention_freq=1", "--craft.check=false"])
    cli.evaluate([*flags, f"--out_dir={tmp_path / 'eval'}", "--max_frames=6", "--batch_size=3", "--action_frames=0"])
    assert json.loads((tmp_path / "eval/eval.json").read_text())["task_loss"]["frames"] <= 6
