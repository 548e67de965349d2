"""What real users hand over: wrong, odd and damaged inputs. Each gives one clear line or a right result, writes nothing where it refuses, and never a traceback."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from craft_nb import cli
from craft_nb.anchors import AnchorCacheDataset


@pytest.fixture
def inside(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["craft"])
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(name, "1")
    shutil.copytree(work.root, "data")
    return Path("data")


def build(work, *flags): cli.build_cache([f"--policy.path={work.policy_path}", "--dataset.repo_id=data", "--out_dir=cache", "--num_anchors=6", *flags])
def train(work, *flags): cli.train([f"--policy.path={work.policy_path}", "--dataset.repo_id=data", "--output_dir=run", "--steps=1", "--batch_size=2", "--num_workers=0",
                                    "--save_checkpoint=false", "--craft.enabled=false", "--craft.check=false", *flags])
def evaluate(work, *flags): cli.evaluate([f"--policy.path={work.policy_path}", "--dataset.repo_id=data", "--out_dir=eval", "--max_frames=4", "--batch_size=4", *flags])


def refused(main, work, *flags):
    with pytest.raises(SystemExit) as stop: main(work, *flags)
    says = str(stop.value.code)
    assert stop.value.code not in (0, None) and "Traceback" not in says and not any(Path(p).exists() for p in ("cache", "run", "eval")), says
    return says


def info(root, **change):
    file = root / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def features(root, change):
    f = json.loads((root / "meta/info.json").read_text())["features"]
    change(f)
    info(root, features=f)


def rows(root, change):
    "Change the table of the numbers as pandas has it."
    import pandas as pd
    file = next((root / "data").rglob("*.parquet"))
    change(table := pd.read_parquet(file))
    table.to_parquet(file)


def renamed(root, names):
    "Give the tasks other words, in both places where they stand."
    import pandas as pd
    file = root / "meta/tasks.parquet"
    tasks = pd.read_parquet(file)
    words = dict(zip(tasks.index, names, strict=True))
    tasks.index = pd.Index(list(names), name=tasks.index.name)
    tasks.to_parquet(file)
    for file in (root / "meta/episodes").rglob("*.parquet"):
        e = pd.read_parquet(file)
        e["tasks"] = [[words[t] for t in x] for x in e["tasks"]]
        e.to_parquet(file)


REFUSED = {
    "an older format": (lambda d: info(d, codebase_version="v2.1"), "v2.1"),
    "a format of the future": (lambda d: info(d, codebase_version="v9.0"), "v9.0"),
    "no format": (lambda d: info(d, codebase_version=None), "codebase_version"),
    "rate 0": (lambda d: info(d, fps=0), "fps"),
    "negative rate": (lambda d: info(d, fps=-30), "fps"),
    "rate in words": (lambda d: info(d, fps="thirty"), "fps"),
    "info.json empty": (lambda d: (d / "meta/info.json").write_text(""), "is not JSON"),
    "info.json a list": (lambda d: (d / "meta/info.json").write_text("[]"), "info.json"),
    "no features": (lambda d: info(d, features={}), "observation"),
    "features not there": (lambda d: [(f := d / "meta/info.json"), f.write_text(json.dumps({k: v for k, v in json.loads(f.read_text()).items() if k != "features"}))], "features"),
    "no episodes": (lambda d: info(d, total_episodes=0), "no episode"),
    "more episodes than there are": (lambda d: info(d, total_episodes=9), "episode"),
    "episodes in words": (lambda d: info(d, total_episodes="four"), "total_episodes"),
    "a feature without a column": (lambda d: features(d, lambda f: f.update({"observation.force": dict(dtype="float32", shape=[3], names=None)})), "observation.force"),
    "state of another size": (lambda d: features(d, lambda f: f["observation.state"].update(shape=[6])), "observation.state"),
    "tasks file damaged": (lambda d: (d / "meta/tasks.parquet").write_bytes(b"PAR1"), "tasks.parquet"),
    "statistics damaged": (lambda d: (d / "meta/stats.json").write_text("{"), "stats.json"),
    "a task that nobody named": (lambda d: rows(d, lambda t: t.__setitem__("task_index", 7)), "task"),
    "a huge task number": (lambda d: rows(d, lambda t: t.__setitem__("task_index", 2**40)), "task"),
    "a task below 0": (lambda d: rows(d, lambda t: t.__setitem__("task_index", -1)), "task"),
    "a picture that is none": (lambda d: rows(d, lambda t: t.__setitem__("observation.image", [dict(bytes=b"\x89PNG nothing", path="a.png")] * len(t))), "observation.image"),
    "a picture without bytes": (lambda d: rows(d, lambda t: t.__setitem__("observation.image", [dict(bytes=None, path="gone.png")] * len(t))), "observation.image"),
    "no column of states": (lambda d: rows(d, lambda t: t.drop(columns="observation.state", inplace=True)), "observation.state"),
    "states that are words": (lambda d: rows(d, lambda t: t.__setitem__("observation.state", "x")), "observation.state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_data_are_named(inside, work, name):
    spoil, says = REFUSED[name]
    spoil(inside)
    said = refused((build, evaluate)[len(name) % 2], work)
    assert says in said and len(said.splitlines()) <= 9, said


TASKS = {"empty": ["", "Push and open a window"], "blank": ["  ", "x"], "another language": ["öffne das Fenster", "打开窗户"], "a line break": ["open\nthe window", "push"],
         "quotes and bars": ["open the 'window' | \"now\"", "50 % {x}"]}


@pytest.mark.parametrize("name", TASKS)
def test_odd_words_are_taken_as_they_are(inside, work, name):
    renamed(inside, TASKS[name])
    build(work)
    assert set(AnchorCacheDataset("cache").instructions()) == set(TASKS[name])
    evaluate(work)
    assert set(json.loads(Path("eval/eval.json").read_text())["task_loss"]["tasks"]) == set(TASKS[name])


def short(d):
    "The first episode is left with one frame."
    import pandas as pd
    rows(d, lambda t: t.drop(index=[i for i in t.index[t["episode_index"] == 0][1:]], inplace=True))
    rows(d, lambda t: t.__setitem__("index", np.arange(len(t))))
    for file in (d / "meta/episodes").rglob("*.parquet"):
        e = pd.read_parquet(file)
        lost = int(e["length"][0]) - 1
        e.loc[0, "length"] = 1
        e["dataset_to_index"] -= lost
        e.loc[1:, "dataset_from_index"] -= lost
        e.to_parquet(file)
    info(d, total_frames=json.loads((d / "meta/info.json").read_text())["total_frames"] - lost)


RIGHT = {
    "an episode of one frame": short,
    "statistics not there": lambda d: (d / "meta/stats.json").unlink(),
    "a column that nobody uses": lambda d: (features(d, lambda f: f.update(note=dict(dtype="int64", shape=[1], names=None))), rows(d, lambda t: t.__setitem__("note", 3))),
    "files that do not belong there": lambda d: ((d / "data/.DS_Store").write_bytes(b"x"), (d / "README.txt").write_text("mine")),
    "rate with a fraction": lambda d: info(d, fps=80.0),
}


@pytest.mark.parametrize("name", RIGHT)
def test_odd_data_work(inside, work, name):
    RIGHT[name](inside)
    build(work)
    assert len(AnchorCacheDataset("cache")) == 6
    train(work)


FLAGS = [
    (build, ["--dataset.episodes=[0,0]"], "duplicates"), (build, ["--dataset.episodes=[-1]"], "non-negative"), (build, ["--dataset.episodes=[0.5]"], "episodes"),
    (build, ["--dataset.episodes=first"], "episodes"), (build, ["--dataset.repo_id="], "data set"), (build, ["--dataset.repo_id=data/meta/info.json"], "data set"),
    (build, ["--dataset.repo_id=data/meta"], "data set"), (build, ["--prompts_file=nowhere.txt"], "nowhere.txt"), (build, ["--prompts_file=data"], "data"),
    (build, ["--prompts_file=binary.txt"], "binary.txt"), (build, ["--prompts_file=empty.txt"], "found none"), (build, ["--num_anchors=-3"], "num_anchors"),
    (build, ["--num_anchors=1e3"], "num_anchors"), (build, ["--out_dir=empty.txt"], "empty.txt"), (build, ["--out_dir=empty.txt/cache"], "empty.txt"),
    (build, ["--out_dir="], "out_dir"), (build, ["--out_dir=data"], "data"), (build, ["--policy.path=data"], "policy"), (build, ["--policy.path=empty.txt"], "policy"),
    (build, ["--rename_map={"], "rename_map"), (build, ['--rename_map={"a": "b"}'], "a"), (build, ["--seed=first"], "seed"), (build, ["--shard_size=0"], "shard_size"),
    (build, ["--top_k=0", "--views=action_logits"], "top_k"), (build, ["--draws=0"], "draws"), (build, ["--images=jpg"], "images"), (build, ["--store_dtype=int8"], "dtype"),
    (evaluate, ["--anchors=data"], "anchors"), (evaluate, ["--max_frames=-1"], "max_frames"), (evaluate, ["--seed=x"], "seed"), (evaluate, ["--out_dir=data"], "data"),
    (train, ["--dataset.eval_split=1.5"], "eval_split"), (train, ["--batch_size=0"], "batch_size"), (train, ["--craft.anchor_dataset.root=data"], "anchor_dataset.repo_id"),
    (train, ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=data", "--craft.anchor_dataset.episodes=[9]"], "has episodes 0"),
    (train, ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=nowhere"], "nowhere"), (train, ["--craft.anchor_dataset.frames=3"], "anchor_dataset.frames"),
]


@pytest.mark.parametrize("case", FLAGS, ids=[" ".join(f) for _, f, _ in FLAGS])
def test_odd_flags_are_refused(inside, work, case):
    main, flags, says = case
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(bytes(range(256)))
    before = sorted(str(p) for p in Path(".").rglob("*"))
    said = refused(main, work, *flags)
    assert (says in said or said == "2") and len(said.splitlines()) <= 9, said
    assert sorted(str(p) for p in Path(".").rglob("*")) == before


def test_prompts_as_editors_write_them(inside, work):
    for text in ("\ufefföffne das Fenster\r\npush\r\n\r\n", "öffne das Fenster\npush"):
        Path("prompts.txt").write_bytes(text.encode())
        build(work, "--prompts_file=prompts.txt")
        assert AnchorCacheDataset("cache").manifest["prompts"] == ["öffne das Fenster", "push"]
        shutil.rmtree("cache")


def test_a_full_disk_while_a_run_builds_its_anchors(inside, work, monkeypatch):
    from craft_nb.anchors import AnchorWriter
    whole = AnchorWriter.add
    def full(self, x): raise OSError(28, "No space left on device")
    monkeypatch.setattr(AnchorWriter, "add", full)
    own = ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=data", "--craft.anchor_dataset.num_anchors=6", "--craft.anchor_batch_size=2"]
    with pytest.raises(SystemExit) as stop: train(work, *own)
    assert "No space left on device" in str(stop.value.code)
    monkeypatch.setattr(AnchorWriter, "add", whole)
    train(work, *own)  # the same line, once there is room
    assert len(AnchorCacheDataset("run/anchors")) == 6
