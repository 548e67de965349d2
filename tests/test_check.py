"""Users' own data against a policy: what does not fit is refused before the first step, by name, in build, train and
eval."""
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from craft_nb import cli
from craft_nb.check import (FAR, FARTHEST, READS, Known, Scan, check_range, check_statistics, known_range,
                            recompute_line, scan)

DIM = 4


def write(root, episodes=(("push the button", 12), ("open the window", 12)), cams=("image",), state=None, action=None,
          names=None, px=32, fps=10, video=False):
    """A LeRobot data set of noise pictures; `state` and `action` change the numbers of a frame: (episode, frame,
    numbers) → numbers."""
    from lerobot.datasets import LeRobotDataset
    shutil.rmtree(root, ignore_errors=True)
    rng, of = (np.random.default_rng(0),
               {c: "observation.image" if c == "image" else f"observation.images.{c}" for c in cams})
    shape = px if isinstance(px, tuple) else (px, px, 3)
    features = {n: dict(dtype="video" if video else "image", shape=shape, names=["height", "width", "channels"])
                for n in of.values()}
    features |= {n: dict(dtype="float32", shape=(DIM,), names=names) for n in ("observation.state", "action")}
    ds = LeRobotDataset.create("me/x", fps, features, root=root, use_videos=video)
    for e, (task, n) in enumerate(episodes):
        for i in range(n):
            s, a = (f(np.arange(DIM) + 0.3 * i + e).astype(np.float32) for f in (np.sin, np.cos))
            frame = {"observation.state": s if state is None else np.float32(state(e, i, s.copy())),
                     "action": a if action is None else np.float32(action(e, i, a.copy()))}
            ds.add_frame(frame | {c: rng.integers(0, 255, shape, np.uint8) for c in of.values()} | {"task": task})
        ds.save_episode()
    ds.finalize()
    return Path(root)


def make_teacher(folder, root, norm="MIN_MAX", **more):
    "A tiny pi0_fast with processors of that data set's statistics."
    from lerobot.configs import NormalizationMode
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies import make_policy, make_pre_post_processors
    from craft_nb import small
    from craft_nb.fast import fit_action_tokenizer, make_text_tokenizer
    folder = Path(folder)
    ds = LeRobotDataset("me/x", root=root, delta_timestamps={"action": [i / 10 for i in range(10)]})
    fit_action_tokenizer(small.action_chunks(ds, 10), 5.0, 256).save_pretrained(folder / "tok/action")
    make_text_tokenizer([*ds.meta.tasks.index], 256).save_pretrained(folder / "tok/text")
    torch.manual_seed(0)
    cfg = small.PI0FastSmallConfig(
        text_tokenizer_name=str(folder / "tok/text"), action_tokenizer_name=str(folder / "tok/action"),
        push_to_hub=False, width=32, depth=3, mlp_dim=64, num_heads=2, head_dim=16, vision_width=32, vision_heads=2,
        vision_mlp_dim=64, tokenizer_max_length=40, image_resolution=(32, 32),
        normalization_mapping={"VISUAL": NormalizationMode.IDENTITY,
                               **dict.fromkeys(("STATE", "ACTION"), NormalizationMode(norm))}, **more)
    policy = make_policy(cfg, ds_meta=ds.meta)
    pre, post = make_pre_post_processors(policy.config, dataset_stats=ds.meta.stats)
    return small.save_checkpoint_folder(policy, pre, post, folder / "policy")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Sound data, a teacher of it and a cache, to run commands in."
    import datasets
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("check")
    write(folder / "sound")
    make_teacher(folder / "teacher", folder / "sound")
    cli.build_cache([f"--policy.path={folder / 'teacher/policy'}", f"--dataset.repo_id={folder / 'sound'}",
                     f"--out_dir={folder / 'cache'}", "--num_anchors=8"])
    return folder


@pytest.fixture
def inside(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["craft"])
    monkeypatch.setattr("lerobot.utils.utils.init_logging", lambda: None)  # it removes pytest's handlers
    return place


def run(command, place, data, *more, teacher="teacher", cache="cache"):
    "What a command says when it ends with an error, '' if it does not."
    flags = [f"--policy.path={place / teacher / 'policy'}", f"--dataset.repo_id={data}"]
    if command == "train":
        flags += ["--output_dir=out", "--steps=1", "--batch_size=2", "--num_workers=0", "--env_eval_freq=0",
                  "--save_checkpoint=false"]
        if "--craft.enabled=false" not in more:
            flags += [f"--craft.anchor_cache_dir={place / cache}", "--craft.anchor_batch_size=4",
                      "--craft.retention_freq=1"]
    else: flags += ["--out_dir=out"] + ["--num_anchors=4"] * (command == "build")
    try: dict(build=cli.build_cache, train=cli.train, eval=cli.evaluate)[command]([*flags, *more])
    except SystemExit as e:
        if e.code: return str(e.code)
    finally: shutil.rmtree("out", ignore_errors=True)
    return ""


EVERY = [("build", ()), ("train", ()), ("train", ("--craft.enabled=false",)), ("eval", ())]


@pytest.mark.parametrize("command,more", EVERY)
def test_sound_data_pass(inside, command, more): assert run(command, inside, inside / "sound", *more) == ""


# numbers that are not finite

def at(where, i, value):
    def change(e, f, x):
        if (e, f) == where: x[i] = value
        return x
    return change


@pytest.mark.parametrize("what,value,where,i", [("state", math.inf, (1, 11), 0), ("state", math.nan, (0, 0), 3),
                                                ("action", -math.inf, (1, 0), 2)])
def test_not_finite_is_refused_everywhere(inside, tmp_path, what, value, where, i):
    data, name = (write(tmp_path / "bad", **{what: at(where, i, value)}),
                  dict(state="observation.state", action="action")[what])
    says = (f"{name}[{i}]: 1 of 24 frames of the data set are NaN or infinite, the first in episode {where[0]}, "
            f"frame {where[1]}")
    for command, more in EVERY:
        unused = command == "build" and what == "action"
        assert (says in run(command, inside, data, *more)) != unused, (command, more)
    if what == "action": assert says in run("build", inside, data, "--actions=dataset", "--views=action_logits")
    # no word waives it
    if value is math.inf: assert says in run("train", inside, data, "--craft.allow_mismatch=range,normalisation")
    assert run("train", inside, data, f"--dataset.episodes=[{1 - where[0]}]") == ""  # the other episode is sound


def test_not_finite_in_held_out_data(inside, tmp_path):
    data = write(tmp_path / "bad", [("push the button", 6)] * 4, state=at((3, 2), 1, math.nan))
    assert ("observation.state[1]: 1 of 6 frames of the held-out data are NaN or infinite, "
            "the first in episode 3, frame 2" in run("train", inside, data, "--dataset.eval_split=0.25"))
    assert "of the training data" not in run("train", inside, data, "--dataset.eval_split=0.25")


def test_many_are_counted_and_named(inside, tmp_path):
    def nans(e, i, x): return x * (np.nan if e == 1 and i >= 3 else 1)
    data = write(tmp_path / "bad", action=nans, names=["x", "y", "z", "grip"])
    assert ("action[3] (grip): 9 of 24 frames of the data set are NaN or infinite, the first in episode 1, frame 3"
            in run("train", inside, data))


def test_missing_numbers_count_as_nan():
    for column, bad in ((pa.array([[1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32(), 2)), [1, 2]),
                        (pa.array([1.0, None, 3.0]), [1]),
                        (pa.array([[[1.0, 2.0]], [[math.nan, 0.0]]], pa.list_(pa.list_(pa.float64()))), [1, 0]),
                        (pa.array([[1, 2]] * 3, pa.list_(pa.int64())), [0, 0])):
        assert scan(column, len(bad)).bad.tolist() == bad


# ranges

def fixed(value, i=3):
    def change(e, f, x):
        x[i] = value
        return x
    return change


@pytest.mark.parametrize("norm", ["MIN_MAX", "MEAN_STD", "QUANTILES", "QUANTILE10"])
def test_a_dimension_that_never_moved(inside, tmp_path, norm):
    old = write(tmp_path / "old", state=fixed(0.1), action=fixed(250.7), names=["x", "y", "z", "grip"])
    make_teacher(tmp_path / "teacher", old, norm)
    assert run("build", tmp_path, old) == "" and run("eval", tmp_path, old) == ""
    new = write(tmp_path / "new", names=["x", "y", "z", "grip"])
    for command, more, words in (("build", (), "--allow_mismatch=range"), ("eval", (), "--allow_mismatch=range")):
        said = run(command, tmp_path, new, *more)
        assert ("observation.state[3] (grip) is constant at 0.1 in the policy's statistics" in said
                and f"({norm})" in said and words in said and "[0]" not in said)
        assert ("action[3] (grip) is constant at 250.7" in said) == (command == "eval")
        assert run(command, tmp_path, new, words) == ""


def test_ranges_of_a_training_run(inside, tmp_path):
    # jitter, where the teacher moved: nothing is lost
    still = write(tmp_path / "still", state=lambda e, i, x: x * [1, 1, 1, 1e-4])
    assert run("train", inside, still) == ""
    # a new task reaches further
    further = write(tmp_path / "further", state=lambda e, i, x: 2.5 * x, action=lambda e, i, x: 2 * x + 1)
    assert run("train", inside, further) == ""
    scaled = write(tmp_path / "scaled", action=lambda e, i, x: 57.3 * x)  # degrees for radians
    said = run("train", inside, scaled)
    assert (all(f"action[{i}] is" in said for i in range(4)) and "observation.state" not in said
            and "--craft.allow_mismatch=range" in said)
    assert run("train", inside, scaled, "--craft.allow_mismatch=range") == ""
    assert run("train", inside, scaled, "--craft.enabled=false") == ""  # normalised with its own statistics
    assert run("train", inside, scaled, "--craft.allow_mismatch=normalisation") == ""
    one = write(tmp_path / "one", state=at((0, 4), 2, 1e4))  # one wild frame
    assert "observation.state[2] is" in run("train", inside, one)


def seen(low, high, rows=1000, outside=0, beyond=0):
    one = lambda x: np.array([x])
    return Scan(rows, one(low), one(high), one(0), one(-1), one(outside), one(beyond))


def test_the_limits_of_a_range():
    known = known_range("MIN_MAX", dict(min=[0.0], max=[2.0]))  # a unit is 1
    def level(*a, mode="MIN_MAX", **k): return [f.level for f in check_range("x", seen(*a, **k), known, mode)][:-1]
    assert level(0, 2) == level(-0.5, 2.5, outside=10) == []
    assert level(-0.5, 2.5, outside=11) == ["warn"]
    assert level(0, 2 + FAR + 1, outside=1, beyond=1) == [] and level(0, 2 + FAR + 1, outside=2, beyond=2) == ["refuse"]
    assert (level(0, 2 + FARTHEST - 1, outside=1, beyond=1) == []
            and level(0, 2 + FARTHEST + 1, outside=1, beyond=1) == ["refuse"])
    assert level(-1e9, 1e9, outside=1000, beyond=1000, mode="IDENTITY") == ["warn"]


@pytest.mark.parametrize("value", [0.1, -3.3, 1e6 / 3, 0.0])
def test_a_constant_that_stays_is_no_motion(value):
    x = np.full((500, 1), value, np.float32)
    stats = dict(min=[x.min()], max=[x.max()], mean=[x.astype(np.float64).mean()], std=[0.0], q01=[np.float64(value)],
                 q99=[np.float32(value)], q10=[value], q90=[value])
    for mode in READS:
        k = known_range(mode, stats)
        s = scan(pa.array(list(x)), 1, k.widened(), k.widened(FAR))
        assert [f.level for f in check_range("x", s, k, mode)] == ["info"], mode


def test_relative_actions_are_compared_as_they_are_normalised(tmp_path):
    "Absolute positions far from 0, small differences: only the differences are in the statistics."
    from craft_nb.check import Numbers, check_numbers
    n, rng = 200, np.random.default_rng(0)
    state = np.float32(100 + np.cumsum(rng.normal(size=(n, 2)) * 0.1, 0))
    for shift, level in ((0, ["info"]), (50, ["refuse", "info"])):
        action = state + np.float32([0.2, shift])
        table = pa.table(dict(action=pa.array(list(action)), state=pa.array(list(state)),
                              episode_index=np.arange(n) // 50, frame_index=np.arange(n) % 50))
        f = Numbers("action", "action", 2, None, "MIN_MAX", dict(min=[-1.0, -1.0], max=[1.0, 1.0]),
                    ("state", 2, [True, True], 5))
        assert [x.level for x in check_numbers(table, [f])] == level
    f.relative = None
    assert [x.level for x in check_numbers(table, [f])] == ["refuse", "refuse", "info"]


# cameras

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A teacher of two cameras."
    folder = tmp_path_factory.mktemp("two")
    write(folder / "sound", cams=("a", "b"))
    make_teacher(folder / "teacher", folder / "sound")
    cli.build_cache([f"--policy.path={folder / 'teacher/policy'}", f"--dataset.repo_id={folder / 'sound'}",
                     f"--out_dir={folder / 'cache'}", "--num_anchors=8"])
    write(folder / "xy", cams=("x", "y"))
    write(folder / "abc", cams=("a", "b", "c"))
    write(folder / "a", cams=("a",))
    return folder


def rename(**m):
    return f"--rename_map={json.dumps({f'observation.images.{a}': f'observation.images.{b}' for a, b in m.items()})}"


@pytest.mark.parametrize("data,mapping,says,word", [
    ("xy", dict(x="b"), ["observation.images.a would see no picture", "observation.images.y would not be seen"],
     "cameras"),
    ("xy", dict(x="b", y="A"), ["observation.images.A is no feature of the policy"], "cameras"),
    ("xy", dict(x="b", Y="a"),
     ["observation.images.Y is no feature of the data set (did you mean observation.images.y?)"], "cameras"),
    ("xy", dict(x="b", y="b"), ["observation.images.x and observation.images.y both become observation.images.b",
                                "observation.images.a would see no picture"], "cameras"),
    ("abc", dict(c="a"), ["observation.images.a and observation.images.c both become observation.images.a"], "cameras"),
    ("abc", {}, ["observation.images.c would not be seen"], "unused_cameras"),
    ("a", {}, ["observation.images.b would see no picture"], "cameras"),
    ("xy", {}, ["observation.images.a and observation.images.b would see no picture"], ""),
])
def test_cameras_without_a_picture_or_a_place(two, inside, data, mapping, says, word):
    more = [rename(**mapping)] if mapping else []
    for command, prefix in (("build", ""), ("train", "craft."), ("eval", "")):
        said = run(command, two, two / data, *more)
        assert all(s in said for s in says) and (f"--{prefix}allow_mismatch={word}" in said if word
                                                 else "allow_mismatch" not in said), (command, said)
    if word:
        assert (run("train", two, two / data, *more, f"--craft.allow_mismatch={word}")
                == run("eval", two, two / data, *more, "--allow_mismatch=cameras") == "")
    else: assert "would see no picture" in run("train", two, two / data, "--craft.allow_mismatch=cameras")


def test_cameras_that_fit(two, inside):
    right = rename(x="a", y="b")
    for command in ("build", "train", "eval"): assert run(command, two, two / "xy", right) == ""
    assert ("rename_map: action cannot be renamed"
            in run("train", two, two / "xy", '--rename_map={"action": "observation.images.a"}'))


def test_blanks_that_a_policy_wants(inside, tmp_path):
    make_teacher(tmp_path / "teacher", inside / "sound", empty_cameras=2)
    assert run("build", tmp_path, inside / "sound") == run("eval", tmp_path, inside / "sound") == ""


def test_a_rename_map_stays_with_the_policy(two, inside):
    """What was fine-tuned with a rename map is measured on the same data without saying it again, and on data with the
    policy's own names."""
    flags = [f"--policy.path={two / 'teacher/policy'}", f"--dataset.repo_id={two / 'xy'}", rename(x="a", y="b"),
             "--output_dir=tuned", "--steps=1", "--batch_size=2", "--num_workers=0",
             "--env_eval_freq=0", f"--craft.anchor_cache_dir={two / 'cache'}", "--craft.anchor_batch_size=4"]
    cli.train(flags)
    for data in ("xy", "sound"):
        cli.evaluate(["--policy.path=tuned/checkpoints/last/pretrained_model", f"--dataset.repo_id={two / data}",
                      f"--out_dir=seen-{data}"])
        assert json.loads(Path(f"seen-{data}/eval.json").read_text())["task_loss"]["frames"] == 24


@pytest.mark.parametrize("px,level", [((32, 32, 1), "refused"), ((24, 48, 3), "said"), ((64, 64, 3), "said")])
def test_pictures_of_another_shape(inside, tmp_path, caplog, px, level):
    data = write(tmp_path / "data", px=px if px[2] == 3 else 32)
    if px[2] == 1:  # as its metadata say
        info = json.loads((file := data / "meta/info.json").read_text())
        info["features"]["observation.image"]["shape"] = px
        file.write_text(json.dumps(info))
    with caplog.at_level("WARNING"): said = run("eval", inside, data)
    if level == "refused": assert "observation.image has 1 channel, the policy takes 3" in said
    else:
        assert (said == "" and f"observation.image is {px[0]}×{px[1]} (height × width), the policy was made for 32×32; "
                f"it brings pictures to 32×32" in caplog.text)


# statistics

def without(place, tmp_path, change):
    data = tmp_path / "part"
    shutil.copytree(place / "sound", data)
    stats = json.loads((file := data / "meta/stats.json").read_text())
    change(stats)
    file.write_text(json.dumps(stats))
    return data


@pytest.mark.parametrize("change,says", [
    (lambda s: s["observation.state"].pop("max"),
     "observation.state: MIN_MAX normalises with 'max', which the data set's statistics"),
    (lambda s: s.pop("observation.state"),
     "observation.state: MIN_MAX normalises with 'min' and 'max', which the data set's statistics"),
    (lambda s: s["action"].update(max=[1, math.inf, 1, 1]),
     "action: MIN_MAX normalises with 'max', which the data set's statistics"),
    (lambda s: s["action"].update(min=[2, 2, 2, 2]), "upside down in dimension 0"),
    (lambda s: s.clear(), "action: MIN_MAX normalises with 'min' and 'max', which the data set's statistics"),
])
def test_statistics_that_are_read_and_not_there(inside, tmp_path, change, says):
    data = without(inside, tmp_path, change)
    for more in ("--craft.enabled=false", "--craft.allow_mismatch=normalisation"):
        said = run("train", inside, data, more)
        assert (says in said and f"lerobot-edit-dataset --repo_id local/part --root {data} --new_root {data} "
                f"--operation.type recompute_stats" in said)
    assert run("train", inside, data) == ""  # normalised as the teacher


@pytest.mark.parametrize("change",
                         [lambda s: s.pop("observation.image"), lambda s: [x.pop("count") for x in s.values()],
                          lambda s: [s[n].pop(k, None) for n in ("action", "observation.state")
                                     for k in ("mean", "std", "q01", "q50", "q99")]])
def test_statistics_that_nothing_reads(inside, tmp_path, change):
    data = without(inside, tmp_path, change)
    assert run("train", inside, data, "--craft.enabled=false") == run("build", inside, data) == ""


def test_the_command_that_computes_statistics_is_lerobots(inside, tmp_path):
    "What the message says works, and mends it."
    from lerobot.scripts.lerobot_edit_dataset import EditDatasetConfig, RecomputeStatsConfig, handle_recompute_stats
    data = without(inside, tmp_path, lambda s: s.pop("action"))
    said = run("train", inside, data, "--craft.enabled=false")
    line = next(x for x in said.splitlines() if "lerobot-edit-dataset" in x)
    words = shlex.split(line[line.index("lerobot-edit-dataset"):])
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    assert flags.pop("--operation.type") == "recompute_stats" and flags.pop("--operation.overwrite") == "true"
    handle_recompute_stats(EditDatasetConfig(operation=RecomputeStatsConfig(overwrite=True),
                                             **{k.removeprefix("--"): v for k, v in flags.items()}))
    assert run("train", inside, data, "--craft.enabled=false") == ""
    assert "--operation.skip_image_video false" in recompute_line("x", "y", images=True)


@pytest.mark.parametrize("norm,key",
                         [("MIN_MAX", "action.max"), ("MEAN_STD", "observation.state.std"), ("QUANTILES", "action")])
def test_statistics_of_a_damaged_teacher(inside, tmp_path, norm, key):
    import safetensors.torch as st
    make_teacher(tmp_path / "teacher", inside / "sound", norm)
    for f in (tmp_path / "teacher/policy").glob("policy_*processor*.safetensors"):
        st.save_file({k: v for k, v in st.load_file(f).items() if k != key and not k.startswith(f"{key}.")}, f)
    feature = key if key == "action" else key.rsplit(".", 1)[0]
    for command in ("build", "eval"):
        said = run(command, tmp_path, inside / "sound")
        assert (f"{feature}: {norm} normalises with" in said
                and "which the statistics in the policy's checkpoint" in said and "KeyError" not in said)
    assert check_statistics({"x": "MIN_MAX"}, {}, "a", "b")[0].what == "statistics"


# tasks

def test_a_task_that_is_only_held_out(inside, tmp_path, caplog):
    data = write(tmp_path / "data", [("push the button", 4)] * 5 + [("open the window", 5)])
    said = run("train", inside, data, "--dataset.eval_split=0.2")
    assert ("task 'open the window' has 1 episode and all are held out" in said
            and "--craft.allow_mismatch=split" in said and "push" not in said)
    assert "only held out" not in run("train", inside, data)
    with caplog.at_level("INFO"):
        assert run("train", inside, data, "--dataset.eval_split=0.2", "--craft.allow_mismatch=split") == ""
    assert ("'push the button' 4 + 1 episodes (16 + 4 frames); 'open the window' 0 + 1 episodes (0 + 5 frames)"
            in caplog.text)


@pytest.mark.parametrize("episodes,split,more,lost", [
    ((("a", 4), ("b", 4), ("c", 4), ("c", 4)), .5, (), ["a", "b"]), ((("a", 4),) * 3 + (("b", 4),) * 2, .5, (), []),
    ((("a", 4),) * 3 + (("b", 4),) * 2, .4, ("--dataset.episodes=[0,1,2,4]",), ["b"])])
def test_other_splits(inside, tmp_path, episodes, split, more, lost):
    make_teacher(tmp_path / "teacher", data := write(tmp_path / "data", episodes))
    said = run("train", tmp_path, data, f"--dataset.eval_split={split}", "--craft.enabled=false", *more)
    assert [t for t in "abc" if f"task '{t}' has" in said] == lost and bool(said) == bool(lost)


def test_the_held_out_loss_is_told_by_task_and_weighted_by_frames(inside, tmp_path, monkeypatch):
    data = write(tmp_path / "data",
                 [("push the button", 3), ("push the button", 3), ("open the window", 7), ("open the window", 7)])
    from craft_nb import checkpoints as ours
    events, real = [], ours.loss_by_task
    monkeypatch.setattr(ours, "loss_by_task",
                        lambda policy, loader, *a: events.append((loader.tasks, real(policy, loader, *a)))
                        or events[-1][1])
    assert run("train", inside, data, "--dataset.eval_split=0.5", "--eval_steps=1") == ""
    (batches, found), = events
    assert batches == [("push the button", 2), ("push the button", 1), *[("open the window", 2)] * 3,
                       ("open the window", 1)]
    assert (found["frames"] == 10
            and {t: x["frames"] for t, x in found["tasks"].items()} == {"push the button": 3, "open the window": 7})
    assert found["loss"] == pytest.approx(sum(x["loss"] * x["frames"] for x in found["tasks"].values()) / 10)


def test_a_loss_by_task_is_that_of_its_frames_alone(inside):
    "Against the loss of each frame by itself, and with another batch size; eval says the same."
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from craft_nb.lerobot import load_dataset, load_policy, loader_by_task, loss_by_task, once
    cfg = PreTrainedConfig.from_pretrained(inside / "teacher/policy")
    cfg.pretrained_path = inside / "teacher/policy"
    ds = load_dataset(DatasetConfig(repo_id=str(inside / "sound")), cfg)
    policy, pre, _ = load_policy(cfg, ds.meta)
    whole = loss_by_task(policy, loader_by_task(ds, 1), ["observation.image"], pre)
    with torch.no_grad():
        alone = [policy(b)[0].item()
                 for b in once(torch.utils.data.DataLoader(ds, batch_size=1), ["observation.image"], pre)]
    assert ([x["loss"] for x in whole["tasks"].values()]
            == pytest.approx([np.mean(alone[:12]), np.mean(alone[12:])], rel=1e-5))
    assert whole["loss"] == pytest.approx(np.mean(alone), rel=1e-5)
    cli.evaluate([f"--policy.path={inside / 'teacher/policy'}", f"--dataset.repo_id={inside / 'sound'}",
                  "--out_dir=said", "--batch_size=1", "--max_frames=8"])
    said = json.loads(Path("said/eval.json").read_text())["task_loss"]
    assert (said["frames"] == 8
            and {t: x["frames"] for t, x in said["tasks"].items()} == {"push the button": 4, "open the window": 4})


# times and files

def test_an_episode_that_is_longer_than_its_rows(inside, tmp_path):
    for name, keep, says in (("cut", lambda t: t.slice(0, 20), "episode 1: its metadata say 12 frames, "
                              "the data files have 8, the first that is missing is frame 8"),
                             ("twice", lambda t: pa.concat_tables([t, t.slice(23)]),
                              "episode 1: its metadata say 12 frames, the data files have 13")):
        shutil.copytree(inside / "sound", data := tmp_path / name)
        file, = (data / "data").glob("*/*.parquet")
        pq.write_table(keep(pq.read_table(file)), file)
        for command in ("build", "train", "eval"): assert says in run(command, inside, data), command


def test_times_that_are_not_those_of_the_frames(inside, tmp_path, caplog):
    shutil.copytree(inside / "sound", data := tmp_path / "late")
    info = json.loads((file := data / "meta/info.json").read_text())
    file.write_text(json.dumps(info | {"fps": 20}))
    # nothing reads the times of pictures in rows
    with caplog.at_level("WARNING"): assert run("eval", inside, data) == ""
    assert ("22 of 24 timestamps are not frame / fps within 0.0001 s, the first in episode 0, frame 1: "
            "0.1 s where 0.05 s is expected at 20 fps" in caplog.text)


def test_a_video_that_is_shorter_than_its_episodes(inside, tmp_path):
    import av
    data = write(tmp_path / "video", [("push the button", 12), ("open the window", 12)], video=True)
    file, = (data / "videos").rglob("*.mp4")
    assert run("eval", inside, data) == ""
    frames = [f.to_ndarray(format="rgb24") for f in av.open(str(file)).decode(video=0)][:17]
    with av.open(str(file), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for x in frames: out.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        out.mux(stream.encode(None))
    says = f"episode 1, observation.image: {file} ends after 1.7 s, so frame 5 of 12 is the first without a picture"
    for command in ("build", "train", "eval"):
        said = run(command, inside, data)
        assert says in said and "episode 0" not in said, command
    assert run("eval", inside, data, "--dataset.episodes=[0]") == ""
    file.write_bytes(file.read_bytes()[:900])
    assert f"episodes 0, 1, observation.image: {file} cannot be read" in run("eval", inside, data)


# words

def test_words_that_waive_nothing_are_refused(inside):
    for command, flag in (("build", "--allow_mismatch"), ("train", "--craft.allow_mismatch"),
                          ("eval", "--allow_mismatch")):
        said = run(command, inside, inside / "sound", f"{flag}=camera,weights")
        assert ("no such check camera (did you mean cameras?); there are range, cameras" in said
                and "normalisation" in said), command
    assert "no such check all" in run("train", inside, inside / "sound", "--craft.allow_mismatch=all",
                                      "--craft.enabled=false")
    assert run("train", inside, inside / "sound", "--craft.allow_mismatch=range, cameras ,dtype") == ""


def test_a_rollout_needs_whole_statistics_too(inside, tmp_path):
    "Without a data set nothing else would see that actions come out as they are."
    from lerobot.configs.policies import PreTrainedConfig
    from craft_nb.lerobot import load_policy_alone, normaliser, sizes_of, statistics_findings
    cfg = PreTrainedConfig.from_pretrained(inside / "teacher/policy")
    cfg.pretrained_path = inside / "teacher/policy"
    _, pre, post = load_policy_alone(cfg)
    assert statistics_findings(pre, post, cfg, sizes_of(cfg)) == []
    normaliser(post).stats = {}
    found, = statistics_findings(pre, post, cfg, sizes_of(cfg))
    assert found.level == "refuse" and found.data["feature"] == "action" and "the policy's checkpoint" in found.text


def test_known_ranges_need_no_more_than_their_mode_reads():
    for mode, reads in READS.items():
        known = known_range(mode, {s: [i, 1 + i] for i, s in enumerate(reads)})
        assert (known is None) == (mode == "IDENTITY") and (known is None or isinstance(known, Known))
