"""What real users hand over: wrong, odd and damaged inputs. Each gives one clear line or a right result, writes nothing
where it refuses, and never a traceback."""
import json
import logging
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


def call(main, own, flags):
    main([*(f"{k}={v}" for k, v in own.items() if k not in {f.partition("=")[0] for f in flags}), *flags])
def of(work): return {"--policy.path": work.policy_path, "--dataset.repo_id": "data"}
def build(work, *flags): call(cli.build_cache, of(work) | {"--out_dir": "cache", "--num_anchors": 6}, flags)
def train(work, *flags):
    call(cli.train, of(work) | {"--output_dir": "run", "--steps": 1, "--batch_size": 2, "--num_workers": 0,
                                "--save_checkpoint": "false", "--craft.enabled": "false", "--craft.check": "false"},
         flags)
def evaluate(work, *flags):
    call(cli.evaluate, of(work) | {"--out_dir": "eval", "--max_frames": 4, "--batch_size": 4}, flags)


def refused(main, work, *flags, leaves=()):
    with pytest.raises(SystemExit) as stop: main(work, *flags)
    says = str(stop.value.code)
    assert (stop.value.code not in (0, None) and "Traceback" not in says and "object at 0x" not in says
            and not any(Path(p).exists() for p in ("cache", "run", "eval") if p not in leaves)), says
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
    table.to_parquet(file, index=False)


def episodes(root, change):
    import pandas as pd
    for file in (root / "meta/episodes").rglob("*.parquet"): change(pd.read_parquet(file)).to_parquet(file, index=False)


def tasks(root, change):
    import pandas as pd
    change(t := pd.read_parquet(root / "meta/tasks.parquet"))
    t.to_parquet(root / "meta/tasks.parquet")


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
    "a still older format": (lambda d: info(d, codebase_version="v2.0"), "older LeRobot"),
    "rate true": (lambda d: info(d, fps=True), "fps"),
    "info.json with a byte order mark": (lambda d: (f := d / "meta/info.json")
                                         .write_bytes(b"\xef\xbb\xbf" + f.read_bytes()), "is not JSON"),
    "info.json in another encoding": (lambda d: (f := d / "meta/info.json").write_bytes(
        f.read_bytes().replace(b"window", b"f\xfcnster").replace(b"{", b"{\"caf\xe9\": 1,", 1)), "is not JSON"),
    "a feature without a shape": (lambda d: features(d, lambda f: f["action"].pop("shape")), "action"),
    "a shape in words": (lambda d: features(d, lambda f: f["action"].update(shape="four")), "action"),
    "no table": (lambda d: next((d / "data").rglob("*.parquet")).unlink(), "file-000.parquet"),
    "a table cut short": (lambda d: (f := next((d / "data").rglob("*.parquet"))).write_bytes(f.read_bytes()[:1000]),
                          "file-000.parquet"),
    "an empty table file": (lambda d: next((d / "data").rglob("*.parquet")).write_bytes(b""), "file-000.parquet"),
    "no list of tasks": (lambda d: (d / "meta/tasks.parquet").unlink(), "tasks.parquet"),
    "no list of episodes": (lambda d: shutil.rmtree(d / "meta/episodes"), "meta/episodes"),
    "a gap in the episodes": (lambda d: episodes(d, lambda e: e[e["episode_index"] != 1]), "episode 1"),
    "an index written by pandas": (lambda d: rows(d, lambda t: t.__setitem__("__index_level_0__", 0)),
                                   "__index_level_0__"),
    "a camera renamed in info.json": (lambda d: features(
        d, lambda f: f.update({"observation.images.top": f.pop("observation.image")})), "observation.image"),
    "states with NaN": (lambda d: rows(d, lambda t: t.at[5, "observation.state"].__setitem__(1, np.nan)),
                        "episode 0, frame 5"),
    "tasks out of order": (lambda d: tasks(d, lambda t: t.__setitem__("task_index", [1, 0])), "task_index"),
    "statistics of text": (lambda d: (d / "meta/stats.json").write_text('{"action": "big"}'), "stats.json"),
    "info.json empty": (lambda d: (d / "meta/info.json").write_text(""), "is not JSON"),
    "info.json a list": (lambda d: (d / "meta/info.json").write_text("[]"), "info.json"),
    "no features": (lambda d: info(d, features={}), "observation"),
    "features not there": (lambda d: [(f := d / "meta/info.json"), f.write_text(
        json.dumps({k: v for k, v in json.loads(f.read_text()).items() if k != "features"}))], "features"),
    "no episodes": (lambda d: info(d, total_episodes=0), "no episode"),
    "more episodes than there are": (lambda d: info(d, total_episodes=9), "episode"),
    "episodes in words": (lambda d: info(d, total_episodes="four"), "total_episodes"),
    "a feature without a column": (lambda d: features(d, lambda f: f.update(
        {"observation.force": dict(dtype="float32", shape=[3], names=None)})), "observation.force"),
    "state of another size": (lambda d: features(d, lambda f: f["observation.state"].update(shape=[6])),
                              "observation.state"),
    "tasks file damaged": (lambda d: (d / "meta/tasks.parquet").write_bytes(b"PAR1"), "tasks.parquet"),
    "statistics damaged": (lambda d: (d / "meta/stats.json").write_text("{"), "stats.json"),
    "a task that nobody named": (lambda d: rows(d, lambda t: t.__setitem__("task_index", 7)), "task"),
    "a huge task number": (lambda d: rows(d, lambda t: t.__setitem__("task_index", 2**40)), "task"),
    "a task below 0": (lambda d: rows(d, lambda t: t.__setitem__("task_index", -1)), "task"),
    "a picture that is none": (lambda d: rows(d, lambda t: t.__setitem__(
        "observation.image", [dict(bytes=b"\x89PNG nothing", path="a.png")] * len(t))), "observation.image"),
    "a picture without bytes": (lambda d: rows(d, lambda t: t.__setitem__(
        "observation.image", [dict(bytes=None, path="gone.png")] * len(t))), "observation.image"),
    "no column of states": (lambda d: rows(d, lambda t: t.drop(columns="observation.state", inplace=True)),
                            "observation.state"),
    "states that are words": (lambda d: rows(d, lambda t: t.__setitem__("observation.state", "x")),
                              "observation.state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_data_are_named(inside, work, name):
    spoil, says = REFUSED[name]
    spoil(inside)
    main = (build, evaluate, train)[[*REFUSED].index(name) % 3]
    # met by the first batch, when the run has its folder
    said = refused(main, work, leaves=["run"] * ("picture" in name))
    assert says in said and len(said.splitlines()) <= 9, said


TASKS = {"empty": ["", "Push and open a window"], "blank": ["  ", "x"],
         "alike but for a space": ["open it", "open  it"], "alike but for case": ["open it", "Open it"],
         "another language": ["öffne das Fenster", "打开窗户"], "a line break": ["open\nthe window", "push"],
         "quotes and bars": ["open the 'window' | \"now\"", "50 % {x}"]}


@pytest.mark.parametrize("name", TASKS)
def test_odd_words_are_taken_as_they_are(inside, work, name):
    renamed(inside, TASKS[name])
    build(work, "--num_anchors=2")
    assert set(AnchorCacheDataset("cache").instructions()) == set(TASKS[name])
    if name != "empty": return
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
    "a name with spaces": lambda d: d.rename("my robot's data"), "a name in another script": lambda d: d.rename("数据 é"),
    "a name that looks like a number": lambda d: d.rename("1e3"),
    "a link to a folder": lambda d: (d.rename("far"), Path("near").symlink_to("far")),
    "a slash at the end": lambda d: d.rename("data2"),
    "a folder that cannot be written": lambda d: [os.chmod(p, 0o555) for p in (d, *d.rglob("*")) if p.is_dir()],
    "a column that nobody uses": lambda d: (features(d, lambda f: f.update(
        note=dict(dtype="int64", shape=[1], names=None))), rows(d, lambda t: t.__setitem__("note", 3))),
    "files that do not belong there": lambda d: ((d / "data/.DS_Store").write_bytes(b"x"),
                                                 (d / "README.txt").write_text("mine")),
    "rate with a fraction": lambda d: info(d, fps=80.0),
}


PLACES = {"a name with spaces": "my robot's data", "a name in another script": "数据 é",
          "a name that looks like a number": "1e3", "a link to a folder": "near", "a slash at the end": "data2/"}


@pytest.mark.parametrize("name", RIGHT)
def test_odd_data_work(inside, work, name):
    RIGHT[name](inside)
    at = f"--dataset.repo_id={PLACES.get(name, 'data')}"
    if [*RIGHT].index(name) % 2: return build(work, at)
    evaluate(work, at)
    assert json.loads(Path("eval/eval.json").read_text())["task_loss"]["frames"] == 4


FLAGS = [
    (build, ["--dataset.episodes=[0,0]"], "duplicates"), (build, ["--dataset.episodes=[-1]"], "non-negative"),
    (build, ["--dataset.episodes=[0.5]"], "episodes"), (build, ["--dataset.episodes=first"], "episodes"),
    (build, ["--dataset.repo_id="], "data set"), (build, ["--dataset.repo_id=data/meta/info.json"], "data set"),
    (build, ["--dataset.repo_id=data/meta"], "data set"), (build, ["--prompts_file=nowhere.txt"], "nowhere.txt"),
    (build, ["--prompts_file=data"], "data"), (build, ["--prompts_file=binary.txt"], "binary.txt"),
    (build, ["--prompts_file=broken.jsonl"], "line 2"), (build, ["--prompts_file=empty.txt"], "found none"),
    (build, ["--num_anchors=-3"], "num_anchors"), (build, ["--num_anchors=1e3"], "num_anchors"),
    (build, ["--out_dir=empty.txt"], "empty.txt"), (build, ["--out_dir=empty.txt/cache"], "empty.txt"),
    (build, ["--out_dir="], "out_dir"), (build, ["--out_dir=data"], "data"), (build, ["--policy.path=data"], "policy"),
    (build, ["--policy.path=empty.txt"], "policy"),
    (build, ["--policy.path=empty"], "policy"), (build, ["--policy.path=json"], "config.json"),
    (build, ["--policy.path=alien"], "config.json"), (build, ["--policy.path=data", "--policy.path=empty"], "2 times"),
    (build, ["--rename_map={"], "rename_map"), (build, ['--rename_map={"a": "b"}'], "a"),
    (build, ["--seed=first"], "seed"), (build, ["--shard_size=0"], "shard_size"),
    (build, ["--top_k=0", "--views=action_logits"], "top-k"), (build, ["--views=hidden"], "views"),
    (build, ["--layers_to_save=9"], "layer"), (build, ["--layers_to_save="], "layers_to_save"),
    (build, ["--draws=0"], "draws"), (build, ["--images=jpg"], "images"), (build, ["--store_dtype=int8"], "dtype"),
    (evaluate, ["--anchors=data"], "anchors"), (evaluate, ["--policy.path=data"], "is a LeRobot data set"),
    (evaluate, ["--dataset.repo_id=nowhere"], "nowhere"),
    (evaluate, ["--dataset.repo_id=a", "--dataset.repo_id=b"], "found 2"),
    (evaluate, ["--batch_size=0"], "batch_size"), (evaluate, ["--dataset.episodes=[99999999999]"], "99999999999"),
    (train, ["--policy.path=data"], "is a LeRobot data set"), (train, ["--dataset.repo_id=[data, other]"], "found 2"),
    (train, ["--steps=-5"], "steps"), (train, ["--seed=-1"], "seed"), (train, ["--num_workers=-1"], "num_workers"),
    (train, ["--craft.enabled=true", "--craft.anchor_cache_dir=data"], "anchors.json"),
    (evaluate, ["--max_frames=-1"], "max_frames"), (evaluate, ["--seed=x"], "seed"),
    (evaluate, ["--out_dir=data"], "data"), (train, ["--dataset.eval_split=1.5"], "eval_split"),
    (train, ["--tolerance_s=-1"], "tolerance_s"), (train, ["--tolerance_s=nan"], "tolerance_s"),
    (train, ["--batch_size=0"], "batch_size"), (train, ["--craft.anchor_dataset.root=data"], "anchor_dataset.repo_id"),
    (train, ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=data", "--craft.anchor_dataset.episodes=[9]"],
     "has episodes 0"), (train, ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=nowhere"], "nowhere"),
    (train, ["--craft.anchor_dataset.frames=3"], "anchor_dataset.frames"),
]


@pytest.mark.parametrize("case", FLAGS, ids=[" ".join(f) for _, f, _ in FLAGS])
def test_odd_flags_are_refused(inside, work, case, capsys):
    main, flags, says = case
    Path("empty.txt").write_text("\n \n")
    for name, text in (("json", "{"), ("alien", '{"model_type": "gpt2"}'), ("empty", None)):
        Path(name).mkdir()
        if text: Path(name, "config.json").write_text(text)
    Path("binary.txt").write_bytes(bytes(range(256)))
    Path("broken.jsonl").write_text('"push"\n{"prompt": 3}')
    before = sorted(str(p) for p in Path(".").rglob("*"))
    capsys.readouterr()
    said = refused(main, work, *flags)
    if said in "12": said = capsys.readouterr().err  # argparse has printed it
    assert says in said and len(said.splitlines()) <= 9, said
    assert sorted(str(p) for p in Path(".").rglob("*")) == before


def test_a_run_where_one_thing_of_it_is_wanted(inside, work, capsys):
    "The folder of a run, of its checkpoints or a cache's manifest: what was meant is named."
    last = Path("was/checkpoints/last/pretrained_model")
    shutil.copytree(work.policy_path, last)
    (last / "train_config.json").write_text("{}")
    Path("was/metrics.jsonl").write_text("")
    build(work, "--out_dir=was/anchors")
    craft = "--craft.enabled=true"
    for main, flags, says in (
            (evaluate, ["--policy.path=was"], "is a run of craft-train, whose last policy is in checkpoints/last"),
            (train, ["--policy.path=was/checkpoints"], "last policy is in last/pretrained_model"),
            (build, ["--policy.path=was/checkpoints/last"], "whose policy is in pretrained_model"),
            (train, [craft, "--craft.anchor_cache_dir=was"], "was/anchors holds one"),
            (evaluate, ["--anchors=was"], "was/anchors holds one"),
            (evaluate, ["--anchors=was/anchors/anchors.json"], "give was/anchors")):
        assert says in refused(main, work, *flags), flags
    for path in ("was", "was/checkpoints", "was/checkpoints/last"):
        with pytest.raises(SystemExit) as stop: cli.train(["--resume=true", f"--config_path={path}"])
        assert f"give {last / 'train_config.json'}" in str(stop.value.code)
    for argv, says in ((["info", "was"], "was/anchors holds one"),
                       (["info", "was/anchors/anchors.json"], "give was/anchors")):
        with pytest.raises(SystemExit) as stop: cli.cache(argv)
        assert stop.value.code == 1 and says in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop: cli.report([str(last)])
    assert "belongs to a run, give that" in str(stop.value.code)


def test_prompts_as_editors_write_them(inside, work):
    for name, text in (("p.txt", "\ufefföffne das Fenster\r\npush\r\n\r\n"),
                       ("p.jsonl", '\ufeff{"prompt": "öffne das Fenster", "id": 1}\r\n\r\n"push"')):
        Path(name).write_bytes(text.encode())
        build(work, f"--prompts_file={name}")
        assert AnchorCacheDataset("cache").manifest["prompts"] == ["öffne das Fenster", "push"]
        shutil.rmtree("cache")


def test_a_full_disk_while_a_run_builds_its_anchors(inside, work, monkeypatch):
    from craft_nb.anchors import AnchorWriter
    whole = AnchorWriter.add
    def full(self, x):
        if self.dir.parts[0] == "run": raise OSError(28, "No space left on device")
        whole(self, x)  # the few of the rehearsal
    monkeypatch.setattr(AnchorWriter, "add", full)
    copy(work, "other", ["lift it", "drop it"])
    own = ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=data", "--craft.anchor_dataset.repo_id=other",
           "--craft.anchor_dataset.num_anchors=6", "--craft.anchor_batch_size=2"]
    with pytest.raises(SystemExit) as stop: train(work, *own)
    assert "No space left on device" in str(stop.value.code)
    monkeypatch.setattr(AnchorWriter, "add", whole)
    train(work, *own)  # the same line, once there is room
    assert (sorted(set(AnchorCacheDataset("run/anchors").column("source_index").tolist())) == [0, 1]
            and not list(Path("run").glob(".anchors*")))


BEFORE = [(["--dataset.eval_split=0.99"], "eval_split"), (["--craft.method=share", "--craft.anchor_batch_size=6"],
                                                           "1 … 5 (anchors of run/anchors to train on)"),
          (["--craft.heldout_fraction=.9"], "leaves none to train on"), (["--craft.heldout_cache_dir=gone"], "at gone"),
          (["--craft.method_options=foo:1"], "takes none"), (["--craft.method=der"], "the view action_logits"),
          (["--peft.method_type=NO"], "expected one of ADALORA"), (["--dataset.streaming=true"], "num_workers"),
          (["--policy.dtype=float8"], "float8"), (["--wandb.enable=true"], "no login here (No API key configured)"),
          (["--env.type=metaworld", "--env.task=push-v3,fly-v3", "--env_eval_freq=1"], "(KeyError: 'fly-v3')")]


@pytest.mark.parametrize("flags,says", BEFORE, ids=[" ".join(f) for f, _ in BEFORE])
def test_what_speaks_against_a_run_is_said_before_its_anchors_are_built(inside, work, monkeypatch, flags, says):
    "A build takes hours, and nothing is found out behind it that could have been said before."
    import craft_nb.training as ours
    monkeypatch.setattr(ours, "Lock", lambda *a: pytest.fail("the anchors were built"))
    monkeypatch.setenv("WANDB_SILENT", "True")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    def no_login(**kw): raise RuntimeError("No API key configured")
    monkeypatch.setattr("wandb.login", no_login)
    Path("temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", "temporary")
    own = {"--craft.enabled": "true", "--craft.anchor_dataset.repo_id": "data", "--craft.anchor_dataset.num_anchors": 6,
           "--craft.anchor_batch_size": 2}
    assert says in refused(train, work, *(f"{k}={v}" for k, v in own.items() if k not in flags[-1]), *flags)
    assert not list(Path("temporary").glob("craft-*")) and sorted(os.listdir()) == ["data", "temporary"]


def test_low_memory_is_said_before_anchors_are_built(inside, work, monkeypatch):
    import craft_nb.training as ours
    said = []
    def begins(*a): raise OSError(f"the build begins, {len(said)} said")
    monkeypatch.setattr(ours, "Lock", begins)
    monkeypatch.setattr(ours, "free_memory", lambda: 1)
    monkeypatch.setattr(ours.logging, "warning", lambda text, *_: said.extend([text] * ("a step needs" in text)))
    says = refused(train, work, "--craft.enabled=true", "--craft.anchor_dataset.repo_id=data",
                   "--craft.anchor_dataset.num_anchors=6", "--craft.anchor_batch_size=2")
    assert "the build begins, 1 said" in says and "lower --batch_size (now 2)" in said[0], (says, said)


def test_anchors_that_were_built_need_their_source_no_more(inside, work, capsys):
    """The old data and the prompts are moved, or gone: a run goes on with what lies in its folder, to the same bits;
    `craft-check` says the same."""
    copy(work, "other")
    Path("prompts.txt").write_text("open it\npush it\n")
    own = ["--craft.enabled=true", "--craft.anchor_dataset.repo_id=other",
           "--craft.anchor_dataset.prompts_file=prompts.txt", "--craft.anchor_dataset.num_anchors=6",
           "--craft.anchor_batch_size=2"]
    train(work, *own, "--steps=2", "--save_freq=1", "--save_checkpoint=true")
    def weights(): return Path("run/checkpoints/000002/pretrained_model/model.safetensors").read_bytes()
    whole, again = (weights(),
                    ["--resume=true", "--config_path=run/checkpoints/000001/pretrained_model/train_config.json"])
    Path("other").rename("elsewhere")
    Path("prompts.txt").rename("told.txt")
    cli.train([*again, "--craft.anchor_dataset.repo_id=elsewhere", "--craft.anchor_dataset.prompts_file=told.txt"])
    assert weights() == whole
    says = refused(lambda work, *f: cli.train([*f]), work, *again, "--craft.anchor_dataset.repo_id=nowhere",
                   leaves=("run",))
    assert "what was built needs its data no more: leave the flag out" in says
    with pytest.raises(SystemExit) as stop: cli.check(again)
    assert stop.value.code == 0, capsys.readouterr().out
    Path("run/anchors").rename("begun")
    with pytest.raises(SystemExit) as stop: cli.check(again)
    said = " ".join(capsys.readouterr().out.split())
    assert (stop.value.code == 1 and "1 refused" in said
            and "run/anchors: the anchors that this run was trained with are not there" in said
            and "craft-check-" not in said)


# old data in several places, some tasks of many, pictures alone

def copy(work, name, tasks=None, change=None):
    shutil.copytree(work.root, name)
    if tasks: renamed(Path(name), tasks)
    if change: change(Path(name))
    return name


def test_several_data_sets_give_one_cache_even_over_tasks(inside, work, capsys):
    copy(work, "other", ["Push and open a window", "lift it"])
    (f := Path("other/meta/info.json")).write_text(f.read_text()
                                                   .replace('"observation.image"', '"observation.images.top"'))
    rows(Path("other"), lambda t: t.rename(columns={"observation.image": "observation.images.top"}, inplace=True))
    both = ["--dataset.repo_id=data", "--dataset.repo_id=other", "--num_anchors=24",
            "--rename_map={\"observation.images.top\": \"observation.image\"}"]
    build(work, *both)
    ds = AnchorCacheDataset("cache")
    told, source = ds.instructions(), ds.column("source_index").tolist()
    assert {t: told.count(t) for t in set(told)} == {"Push and open a window": 8, "Press a button from the top": 8,
                                                     "lift it": 8}
    assert ({s for s, t in zip(source, told, strict=True) if t == "Push and open a window"} == {0, 1}
            and not list(Path(".").glob(".*")))
    frames = work.dataset().hf_dataset.data["episode_index"].to_pylist()  # both hold the same episodes
    assert [frames[f] for f in ds.column("frame_index").tolist()] == ds.column("episode_index").tolist()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: cli.cache(["info", "cache"])
    assert (not stop.value.code and all(x in capsys.readouterr().out for x in ("of local/data",))
            and [x["repo_id"] for x in ds.manifest["dataset"]["sources"]] == ["local/data", "local/other"])


SEVERAL = {
    "one twice": (lambda d: None, ["--dataset.repo_id=data", "--dataset.repo_id=./data"], "given twice"),
    "one that is not there": (lambda d: None, ["--dataset.repo_id=[data, nowhere]"], "nowhere"),
    "another rate": (lambda d: info(d, fps=40), ["--dataset.repo_id=[data, other]"], "other: fps is 40, in"),
    "another action": (lambda d: (features(d, lambda f: f["action"].update(shape=[3])),
                                  rows(d, lambda t: t.__setitem__("action", [a[:3] for a in t["action"]]))),
                       ["--dataset.repo_id=[data, other]", "--actions=dataset"], "action"),
    "another state": (
        lambda d: (features(d, lambda f: f["observation.state"].update(shape=[3])),
                   rows(d, lambda t: t.__setitem__("observation.state", [a[:3] for a in t["observation.state"]]))),
        ["--dataset.repo_id=[data, other]"], "observation.state"),
    "another camera": (
        lambda d: (features(d, lambda f: f.update({"observation.images.top": f.pop("observation.image")})),
                   rows(d, lambda t: t.rename(columns={"observation.image": "observation.images.top"}, inplace=True))),
        ["--dataset.repo_id=[data, other]"], "observation.images.top"),
    "a map that fits none": (lambda d: None, ["--dataset.repo_id=[data, other]",
                                              '--rename_map={"observation.images.x": "observation.image"}'],
                             "observation.images.x"),
    "fewer folders than names": (lambda d: None, ["--dataset.repo_id=[a, b]", "--dataset.root=data"], "dataset.root"),
    "episodes of which": (lambda d: None, ["--dataset.repo_id=[data, other]", "--dataset.episodes=[0]"], "--tasks"),
    "bytes for all": (lambda d: None, ["--dataset.repo_id=[data, other]", "--max_bytes=1MB"], "max_bytes"),
    "a task of neither": (lambda d: None, ["--dataset.repo_id=[data, other]", "--tasks=fly"],
                          "'Press a button from the top', 'Push and open a window'"),
    "a task of one": (lambda d: renamed(d, ["x", "y"]), ["--dataset.repo_id=[data, other]", "--tasks=x"],
                      "leave it out"),
    "damage in one": (lambda d: (d / "meta/stats.json").write_text("{"), ["--dataset.repo_id=[data, other]"],
                      "other/meta/stats.json"),
    "a task misspelt": (lambda d: None, ["--tasks=Push and open a widow"], "did you mean 'Push and open a window'?"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_that_do_not_fit_are_refused(inside, work, name):
    spoil, flags, says = SEVERAL[name]
    copy(work, "other", change=spoil)
    said = refused(build, work, *flags)
    assert (says in said and ("other" in said or name not in ("another action", "another state", "another camera"))
            and not list(Path(".").glob(".cache*"))), said


def test_anchors_of_some_tasks(inside, work):
    build(work, "--tasks=push and open a window", "--num_anchors=4")
    ds = AnchorCacheDataset("cache")
    assert (set(ds.instructions()) == {"Push and open a window"} == set(ds.manifest["dataset"]["tasks"].values())
            and ds.manifest["dataset"]["episodes"] == 2)


def test_some_tasks_are_trained_on_evaluated_and_answered_for(inside, work, capsys):
    one, other = "Push and open a window", "Press a button from the top"
    def made(*flags):
        from craft_nb.lerobot import CraftTrainConfig, make_trainer
        cfg = cli.parsed(CraftTrainConfig,
                         cli.today([f"--policy.path={work.policy_path}", "--dataset.repo_id=data", "--output_dir=run",
                                    "--steps=1", "--batch_size=2", "--num_workers=0", "--save_checkpoint=false",
                                    "--craft.anchor_batch_size=4", *flags], training=True))
        t = make_trainer(cfg, quiet=True)
        t.parts.lock.release()
        return t
    def told(d): return {d.meta.tasks.iloc[i].name for i in d.hf_dataset.data["task_index"].to_pylist()}
    t = made("--craft.enabled=false", "--tasks=push and  open a window")  # as the build: case and spaces do not matter
    assert (told(t.parts.dataset) == {one} and t.parts.cfg.dataset.episodes == t.parts.dataset.episodes
            and len(t.parts.dataset.episodes) == 2)
    assert (made("--craft.enabled=false", f"--tasks={one}", f"--tasks={other}").parts.cfg.dataset.episodes
            == [0, 1, 2, 3])
    frames = ["--craft.teacher=" + str(work.policy_path), "--craft.anchor_dataset.repo_id=data", "--craft.views=pooled"]
    live = made(f"--tasks={one}", *frames, f"--craft.anchor_dataset.tasks={other}",
                "--craft.anchor_dataset.num_anchors=6").parts.cache
    assert (set(live.instructions()) == {other} and len(live) == 6
            and set(live.frames.load([0], [live.frames.picked[0]])["task"]) == {other})
    whole = made(*frames, f"--craft.anchor_dataset.tasks={other}").parts.cache
    assert len(whole) == sum(work.meta.tasks.iloc[i].name == other
                             for i in work.dataset().hf_dataset.data["task_index"].to_pylist())
    evaluate(work, f"--tasks={other}", "--action_frames=0")
    result = json.loads(Path("eval/eval.json").read_text())
    assert (set(result["task_loss"]["tasks"]) == {other} and result["task_loss"]["frames"] <= 4
            and result["data"]["tasks"] == [other])
    shutil.rmtree("eval")
    for main, flags, says in ((train, ["--tasks=open the widow"], "no task 'open the widow'"),
                              (train, [f"--tasks={one}", "--dataset.episodes=[]"], "at least one"),
                              (evaluate, ["--tasks=fly"], "no task 'fly'"),
                              (train, ["--craft.enabled=true", *frames, "--craft.anchor_dataset.tasks=fly"],
                               "no task 'fly'"),
                              (train, ["--craft.enabled=true", *frames, "--craft.anchor_dataset.repo_id=other"],
                               "frames of one data set")):
        assert says in refused(main, work, *flags)
    def mix(t): t.at[1, "tasks"] = np.array([one, other]); return t
    episodes(Path("data"), mix)
    said = refused(train, work, f"--tasks={one if one in work.meta.episodes['tasks'][1] else other}")
    assert "episode 1 of" in said and "also holds" in said and "--dataset.episodes" in said


def test_old_data_of_a_run_are_looked_at_however_it_asks(inside, work):
    """A build, a teacher that answers at frames, a replay: each refuses what the others refuse, and says of which data;
    each sees old cameras under the names of its teacher where the new data have others."""
    def spoilt(t): t.at[5, "observation.state"][1] = np.nan
    copy(work, "old", change=lambda d: rows(d, spoilt))
    ways = (["--craft.anchor_dataset.repo_id=OLD", "--craft.anchor_dataset.num_anchors=6"],
            ["--craft.anchor_dataset.repo_id=OLD", f"--craft.teacher={work.policy_path}", "--craft.views=pooled"],
            ["--craft.method=replay", "--craft.method_options=dataset:OLD"])
    mine = ["--craft.enabled=true", "--craft.anchor_batch_size=2"]
    for way, flag in zip(ways, ("anchor_dataset.episodes", "anchor_dataset.episodes", "method_options=episodes"),
                         strict=True):
        said = refused(train, work, *mine, *(f.replace("OLD", "old") for f in way))
        assert ("old" in said.splitlines()[0] and "episode 0, frame 5" in said and f"--craft.{flag}" in said
                and "--dataset.episodes" not in said), said
    features(inside, lambda f: f.update({"observation.images.front": f.pop("observation.image")}))
    rows(inside, lambda t: t.rename(columns={"observation.image": "observation.images.front"}, inplace=True))
    shutil.copytree(work.root, "sound")
    for way in ways:
        shutil.rmtree("run", ignore_errors=True)
        train(work, *mine, *(f.replace("OLD", "sound") for f in way),
              '--rename_map={"observation.images.front": "observation.image"}')
        assert Path("run/metrics.jsonl").is_file()


def test_pictures_and_prompts_alone(inside, work, caplog):
    from PIL import Image
    Path("seen").mkdir()
    for i in range(3): Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(f"seen/{i}.png")
    (tag := Image.Exif())[0x0112] = 6  # as a phone that was held upright
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save("seen/2.png", exif=tag)
    for name in ("IMG_1.HEIC", "2.tiff", "notes.txt", ".DS_Store"): Path("seen", name).write_bytes(b"x")
    Path("p.txt").write_text("Push and open a window\nPress a button from the top\n")
    alone = ["--dataset.repo_id=", "--image_dir=seen", "--prompts_file=p.txt"]
    logging.disable(logging.NOTSET)
    build(work, *alone)
    logging.disable(logging.WARNING)
    said = [t for t in map(logging.LogRecord.getMessage, caplog.records) if t.startswith("image_dir:")]
    assert len(said) == 1 and said[0].startswith("image_dir: 2 left out (2.tiff, IMG_1.HEIC): "), said
    ds = AnchorCacheDataset("cache")
    m, state = (ds.manifest["dataset"],
                np.asarray(json.loads((work.root / "meta/stats.json").read_text())["observation.state"]["mean"]))
    assert (sorted(zip(ds.column("episode_index").tolist(), ds.instructions(), strict=True))
            == sorted((i, t) for i in range(3) for t in Path("p.txt").read_text().splitlines()))
    assert (m["repo_id"] == "pictures/seen" and m["pictures"] == ["0.png", "1.png", "2.png"]
            and np.allclose(m["state"], state, atol=1e-4) and "mean" in m["state_is"])
    x = ds[ds.column("episode_index").tolist().index(2)]["pixel_values"][0].float()  # (3, h, w)
    left, top = x[..., :32].mean() - x[..., 32:].mean(), x[:, :32].mean() - x[:, 32:].mean()
    assert left > 100 > 5 > abs(top)
    shutil.rmtree("cache")
    for flags, says in ((["--dataset.repo_id=data", *alone[1:]], "in the place of a data set"),
                        (alone[:2], "--prompts_file"), ([*alone, "--actions=dataset"], "no actions"),
                        ([*alone, "--state=1,2"], "expected 4 numbers"), ([*alone, "--tasks=x"], "tasks"),
                        (["--dataset.repo_id=", "--image_dir=data", "--prompts_file=p.txt"], "no picture"),
                        (["--dataset.repo_id=", "--image_dir=gone", "--prompts_file=p.txt"], "no folder at gone"),
                        (["--state=1,2,3,4"], "image_dir"), (["--dataset.repo_id="], "nothing to take anchors from")):
        assert says in refused(build, work, *flags)
    Path("seen/9.png").write_bytes(b"no picture")
    assert "9.png is no picture" in refused(build, work, *alone)
    os.remove("seen/9.png")
    Image.new("RGB", (32, 48)).save("seen/small.png")  # the policy brings it to its own size
    build(work, *alone, "--num_anchors=all")
    assert len(AnchorCacheDataset("cache")) == 8
