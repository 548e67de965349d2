"""Data sets as users have them: other rates, missing files, episodes that are not there; what a cache says it was made
of."""
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from craft_nb import cli
from craft_nb.anchors import AnchorCacheDataset, AnchorCacheError, cache_info, read_manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("own")


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["craft"])
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(name, "1")
    return place


@pytest.fixture
def no_hub(monkeypatch):
    "A hub may be asked, but whoever does is found out."
    import huggingface_hub
    from huggingface_hub import constants
    from lerobot.datasets import dataset_metadata, lerobot_dataset, utils
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    def asked(*a, **kw): raise AssertionError(f"a hub was asked: {a} {kw}")
    for module in (dataset_metadata, lerobot_dataset, utils, huggingface_hub):
        for name in ("snapshot_download", "get_safe_version", "HfApi"):
            if hasattr(module, name): monkeypatch.setattr(module, name, asked)


def build(work, out, *flags, data=None):
    cli.build_cache([f"--policy.path={work.policy_path}", f"--dataset.repo_id={data or work.root}", f"--out_dir={out}",
                     "--batch_size=8", *flags])
    return AnchorCacheDataset(out)


def train(work, out, cache, *flags, data=None):
    shutil.rmtree(out, ignore_errors=True)
    cli.train([f"--policy.path={work.policy_path}", f"--dataset.repo_id={data or work.root}", f"--output_dir={out}",
               "--steps=1", "--batch_size=2", "--num_workers=0", "--save_checkpoint=false", "--env_eval_freq=0",
               f"--craft.anchor_cache_dir={cache}", "--craft.anchor_batch_size=4", *flags])


def evaluate(work, out, *flags):
    shutil.rmtree(out, ignore_errors=True)
    cli.evaluate([f"--policy.path={work.policy_path}", f"--out_dir={out}", "--max_frames=16", *flags])


def refused(main, *args, **kw):
    with pytest.raises(SystemExit) as stop: main(*args, **kw)
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def copy(work, name, **info):
    shutil.copytree(work.root, name)
    file = Path(name) / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))
    return name


# what anchors are of

def test_rows_say_which_episode_frame_task_and_prompt(inside, work, capsys):
    data = work.dataset()
    ds = build(work, "filtered", "--num_anchors=12", "--dataset.episodes=[1, 3]")
    index, m = data.hf_dataset.data["index"].to_numpy(), ds.manifest["dataset"]
    frames, episodes = ds.column("frame_index").tolist(), ds.column("episode_index").tolist()
    assert set(episodes) == {1, 3} and m["fps"] == work.meta.fps and m["chunk"] == 10 and m["episodes"] == 2
    for row, (f, e) in enumerate(zip(frames, episodes, strict=True)):  # absolute: the same frame of the whole data set
        x = data[int(np.flatnonzero(index == f)[0])]
        assert (int(x["episode_index"]) == e and ds.instructions()[row] == x["task"]
                and m["tasks"][str(int(x["task_index"]))] == x["task"])
        seen = ds[row]["pixel_values"][0].float() / 255
        assert torch.allclose(seen, x["observation.image"].float(), atol=1e-2)
    whole = build(work, "whole", "--num_anchors=12")
    assert (set(m["episode_hashes"]) == {"1", "3"}
            and m["episode_hashes"].items() <= whole.manifest["dataset"]["episode_hashes"].items())
    assert len(set(whole.manifest["dataset"]["episode_hashes"].values())) == 4
    Path("prompts.txt").write_text("wave\nstop\nopen\n")
    own = build(work, "prompted", "--num_anchors=7", "--prompts_file=prompts.txt")
    assert (own.instructions() == ["wave", "stop", "open", "wave", "stop", "open", "wave"]
            and own.manifest["prompts"] == ["wave", "stop", "open"])
    capsys.readouterr()
    for name, says in (("filtered", ["2 tasks, 2 episodes", "1, 3 of local/dataset", "6 anchors"]),
                       ("prompted", ["'wave' 3; 'stop' 2; 'open' 2"])):
        with pytest.raises(SystemExit) as stop: cli.cache(["info", name])
        out = capsys.readouterr().out
        assert not stop.value.code and all(s in out for s in says), out
    info = cache_info("filtered")
    assert (info["episodes"] == [dict(repo_id="local/dataset", episodes=[1, 3])]
            and [t["anchors"] for t in info["tasks"]] == [6, 6])


def test_an_episode_is_known_wherever_its_data_set_lies(inside, work):
    from craft_nb.lerobot import episode_hashes
    from lerobot.datasets import LeRobotDataset
    shutil.copytree(work.root, "elsewhere")
    mine, theirs = work.dataset(), LeRobotDataset("other/name", root="elsewhere", episodes=[2])
    assert episode_hashes(theirs) == {"2": episode_hashes(mine)["2"]}


# recording rates

def test_another_recording_rate_is_refused_unless_waived(inside, work, capsys):
    build(work, "at80", "--num_anchors=8")
    slow = copy(work, "slow", fps=work.meta.fps // 2)
    says = refused(train, work, "run", "at80", data=slow)
    assert ("dataset.fps: cache 80, this run 40" in says and "--craft.allow_mismatch=fps" in says
            and not Path("run").exists())
    train(work, "run", "at80", "--craft.allow_mismatch=fps", data=slow)
    says = refused(evaluate, work, "ev", f"--dataset.repo_id={slow}", "--anchors=at80")
    assert "dataset.fps: cache 80, this run 40" in says and "--allow_mismatch=fps" in says and not Path("ev").exists()
    evaluate(work, "ev", f"--dataset.repo_id={slow}", "--anchors=at80", "--allow_mismatch=fps")
    # nothing to compare with, and nothing to complain about
    evaluate(work, "ev", "--anchors=at80", "--allow_mismatch=fps")
    says = refused(train, work, "run", "at80", "--policy.chunk_size=5", "--policy.n_action_steps=5")
    assert "dataset.chunk: cache 10, this run 5" in says
    old = read_manifest("at80")["dataset"] | {}
    foreign("undated", "at80", dataset={k: old[k] for k in ("repo_id", "frames")})
    logging.disable(logging.NOTSET)
    capsys.readouterr()
    train(work, "run", "undated", data=slow)
    assert capsys.readouterr().err.count("does not say at which recording rate") == 1


def foreign(folder, cache, **change):
    from craft_nb.anchors import AnchorWriter
    ds = AnchorCacheDataset(cache)
    keep = {k: ds.manifest[k]
            for k in ("policy_type", "layers", "pooling", "width", "dtype", "hashes", "extra", "dataset")} | change
    views = {n: {k: v[k] for k in ("tensors", "distance", "unit")} for n, v in ds.manifest["views"].items()}
    with AnchorWriter(folder, len(ds), views, **keep) as w: w.add(ds.batch(range(len(ds))))


# what is not there

def every(work, data, *flags):
    "The refusals of build, train and eval."
    flags = [f"--dataset.repo_id={data}", *flags]
    return (refused(cli.build_cache, [f"--policy.path={work.policy_path}", "--out_dir=no", *flags]),
            refused(cli.train, [f"--policy.path={work.policy_path}", "--output_dir=no", "--steps=1",
                                "--craft.anchor_cache_dir=there", *flags]),
            refused(cli.evaluate, [f"--policy.path={work.policy_path}", "--out_dir=no", *flags]))


def test_episodes_that_are_not_there_are_named(inside, work, no_hub):
    if not Path("there").exists(): build(work, "there", "--num_anchors=8")
    for episodes, bad in (("[7]", "7 of [7] is"), ("[0, 4, 9]", "4, 9 of [0, 4, 9] are"),
                          ("[]", "at least one episode")):
        for says in every(work, work.root, f"--dataset.episodes={episodes}"):
            assert (bad in says and ("has episodes 0 … 3" in says or bad.startswith("at least"))
                    and "hub" not in says), says
        assert not Path("no").exists()
    assert "7 of [7] is" in every(work, work.root, "--dataset.episodes=[7]", "--dataset.eval_split=0.5")[1]


@pytest.mark.parametrize("lose, says", [
    (lambda root: (root / "data/chunk-000/file-000.parquet").unlink(),
     "data/chunk-000/file-000.parquet (episodes 0 … 3)"),
    (lambda root: (root / "meta/tasks.parquet").unlink(), "meta/tasks.parquet"),
    (lambda root: shutil.rmtree(root / "meta/episodes"), "meta/episodes"),
    (lambda root: (root / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1 nothing"),
     "file-000.parquet: cannot be read"),
    (lambda root: cut(root / "data/chunk-000/file-000.parquet", 3), "no frame of episode 3"),
    (lambda root: (root / "meta/info.json").write_text("{"), "is not JSON"),
])
def test_missing_parts_of_a_local_data_set_are_named(inside, work, no_hub, tmp_path, lose, says):
    if not Path("there").exists(): build(work, "there", "--num_anchors=8")
    shutil.copytree(work.root, root := tmp_path / "lost")
    lose(root)
    for said in every(work, root):
        assert says in said and "hub" not in said and "local/" not in said, said
    assert not Path("no").exists()


def cut(path, episode):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    t = pq.read_table(path)
    pq.write_table(t.filter(pc.not_equal(t["episode_index"], episode)), path)


def test_a_missing_video_is_named_with_its_episodes(inside, work, no_hub, tmp_path):
    from lerobot.datasets import LeRobotDataset
    features = {"observation.images.top": dict(dtype="video", shape=(64, 64, 3), names=["height", "width", "channels"]),
                "observation.state": dict(dtype="float32", shape=(4,), names=None),
                "action": dict(dtype="float32", shape=(4,), names=None)}
    ds = LeRobotDataset.create("me/x", 10, features, root=tmp_path / "film", use_videos=True)
    for e in range(2):
        for i in range(6):
            ds.add_frame({"observation.images.top": np.full((64, 64, 3), 20 * i, np.uint8),
                          "observation.state": np.ones(4, np.float32) * i,
                          "action": np.zeros(4, np.float32), "task": f"task {e}"})
        ds.save_episode()
    ds.finalize()
    from craft_nb.lerobot import localise, missing_files
    from lerobot.configs.default import DatasetConfig
    root = tmp_path / "film"
    info = json.loads((root / "meta/info.json").read_text())
    assert missing_files(root, info) == []
    for f in root.glob("videos/*/*/*.mp4"): f.unlink()
    with pytest.raises(FileNotFoundError,
                       match=r"videos/observation.images.top/chunk-000/file-000.mp4 \(episodes 0, 1\)"):
        localise(DatasetConfig(repo_id=str(root)))
    with pytest.raises(FileNotFoundError, match=r"\(episode 1\)"):
        localise(DatasetConfig(repo_id=str(root), episodes=[1]))


# answers that are none

def test_an_untrained_teachers_answers_are_refused_and_counted(inside, work, capsys):
    flags = ["--num_anchors=8", "--views=pooled,action_tokens"]
    for mode in ("keep", "skip", "dataset"):
        says = refused(build, work, "untrained", *flags, f"--undecodable={mode}")
        assert ("8 of the 8 answers" in says and "untrained" in says and "--allow_undecodable=true" in says
                and not Path("untrained").exists())
    assert ("undecodable: expected one of keep, skip, dataset"
            in refused(build, work, "untrained", *flags, "--undecodable=drop"))
    build(work, "kept", *flags, "--allow_undecodable=true")
    out = capsys.readouterr().out
    assert "8 of 8 answers undecodable (100.0%), kept" in out
    for verb in ("info", "verify"):
        with pytest.raises(SystemExit): cli.cache([verb, "kept"])
        assert "8 of 8 answers undecodable" in capsys.readouterr().out
    ds = build(work, "data", *flags, "--allow_undecodable=true", "--undecodable=dataset")
    plain = build(work, "plain", *flags, "--actions=dataset")
    assert "undecodable" in ds.names and "undecodable" not in plain.names and "answers" not in plain.manifest
    assert torch.equal(ds.column("action_ids"), plain.column("action_ids")) and ds.column("undecodable").all()
    a, b = ds.batch(range(8)), plain.batch(range(8))
    assert torch.equal(a["action_hidden"], b["action_hidden"])
    with pytest.raises(AnchorCacheError, match="rows are marked undecodable"):
        from craft_nb.anchors import _check_answers
        ds.manifest["answers"]["undecodable"] = 3; _check_answers(ds)


def test_sizes_and_numbers_of_a_build(inside, work):
    n = len(work.dataset())
    assert len(build(work, "every", "--num_anchors=all")) == n
    small = build(work, "small", "--max_bytes=60kB")
    assert 60_000 * .6 < sum(p.stat().st_size for p in Path("small").iterdir()) <= 60_000 and len(small) < n
    assert (len(build(work, "fifth", "--max_bytes=1GB", "--num_anchors=5")) == 5
            and len(build(work, "most", "--max_bytes=1GB")) == n)
    for flag, says in (("--max_bytes=1kB", "expected at least"), ("--max_bytes=lots", "expected a size"),
                       ("--num_anchors=many", "expected a number or all"), ("--num_anchors=0", "expected 1 to")):
        assert says in refused(build, work, "none", flag) and not Path("none").exists()


# what eval tells, and keeps

def test_drift_by_instruction_and_caches_of_a_few_anchors(inside, work):
    for n in (1, 3, 9):
        shutil.rmtree("few", ignore_errors=True)
        ds = build(work, "few", f"--num_anchors={n}", "--views=pooled,tokens")
        evaluate(work, "ev", "--anchors=few", f"--dataset.repo_id={work.root}", "--batch_size=2")
        found = json.loads(Path("ev/eval.json").read_text())
        d, told = found["drift"], ds.instructions()
        assert d["anchors"] == n and set(d["by_instruction"]) == set(told) and "error" not in found
        for text, x in d["by_instruction"].items():
            assert (x["anchors"] == told.count(text) and (x["cka"][0][0] is None) == (x["anchors"] < 4)
                    and set(x["losses"]) == {"pooled", "tokens"})
        assert (d["cka"][0][0] is None) == (n < 4)
        assert (all(t in Path("ev/eval.md").read_text() for t in told)
                and ("CKA needs 4 anchors" in Path("ev/eval.md").read_text()) == (n < 4))


def test_parts_add_up(inside, work, monkeypatch):
    "A student that has moved: the whole is the mean of its instructions, weighted by anchors."
    from craft_nb.lerobot import anchor_drift
    ds = build(work, "nine", "--num_anchors=9", "--views=pooled,tokens")
    policy = work.policy()
    with torch.no_grad():
        for p in policy.parameters(): p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    d, other = anchor_drift(policy, "nine", 2), anchor_drift(policy, "nine", 9)
    parts = d["by_instruction"].values()
    assert d["losses"]["pooled"] > 0 and len(parts) == 2 and len({x["losses"]["pooled"] for x in parts}) == 2
    for get in (lambda x: x["losses"]["pooled"], lambda x: x["relative_l2"][1][0], lambda x: x["cosine"][0][1]):
        assert (get(d) == pytest.approx(sum(x["anchors"] * get(x) for x in parts) / 9, rel=1e-5)
                == pytest.approx(get(other), rel=1e-4))


def test_what_eval_measured_is_kept_when_a_later_part_fails(inside, work, monkeypatch, caplog):
    import craft_nb.lerobot as ours
    build(work, "eight", "--num_anchors=8") if not Path("eight").exists() else None
    def fails(*a, **kw): raise RuntimeError("the disk | went\naway")
    monkeypatch.setattr(ours, "anchor_drift", fails)
    says = refused(evaluate, work, "part", "--anchors=eight", f"--dataset.repo_id={work.root}")
    found = json.loads(Path("part/eval.json").read_text())
    assert ("the disk | went" in says and found["task_loss"]["loss"] > 0
            and found["error"] == dict(part="drift", message="RuntimeError: the disk | went\naway"))
    assert "| drift | not measured |" in Path("part/eval.md").read_text() and "drift" not in found
    refused(evaluate, work, "part", "--anchors=eight")  # nothing was measured, so nothing is in the way of the next try
    assert not Path("part").exists()


# caches of more than one task

def moved(work, folder):
    "The same policy after some training: the teacher of the next task."
    shutil.copytree(work.policy_path, folder)
    from safetensors.torch import load_file, save_file
    w = load_file(f"{folder}/model.safetensors")
    save_file({k: x * 1.01 if x.is_floating_point() else x for k, x in w.items()}, f"{folder}/model.safetensors",
              metadata={"format": "pt"})
    return folder


def test_a_later_tasks_anchors_are_appended(inside, work, monkeypatch):
    first = build(work, "first", "--num_anchors=8", "--dataset.episodes=[0, 1]")
    both = build(work, "both", "--num_anchors=6", "--dataset.episodes=[2, 3]", "--append=first")
    m = both.manifest
    assert (len(both) == 14 and set(both.column("episode_index").tolist()) == {0, 1, 2, 3}
            and len(m["dataset"]["episode_hashes"]) == 4)
    assert (torch.equal(both.batch(range(8))["teacher_hidden"], first.batch(range(8))["teacher_hidden"])
            and not Path(".both.new").exists())
    train(work, "run", "both")
    later = moved(work, "student")
    again = [f"--policy.path={later}", f"--dataset.repo_id={work.root}", "--num_anchors=6", "--append=first",
             "--batch_size=8"]
    says = refused(cli.build_cache, [*again, "--out_dir=seq"])
    assert ("hashes.weights: cache" in says and "--allow_mismatch=weights" in says and not Path("seq").exists()
            and not Path(".seq.new").exists())
    for flag, says in (("--layers_to_save=-1", "layers: cache [-2, -1]"), ("--views=tokens", "the same --views"),
                       ("--out_dir=both", "holds a finished"), ("--append=gone", "no such folder")):
        flags = [f for f in [*again, "--out_dir=seq", "--allow_mismatch=weights"]
                 if f.split("=")[0] != flag.split("=")[0]] + [flag]
        assert says in refused(cli.build_cache, flags), flag
    import craft_nb.caches as ours
    whole, merge = [], ours.merge_caches
    monkeypatch.setattr(ours, "merge_caches", lambda *a, **kw: (_ for _ in ()).throw(OSError("killed here")))
    refused(cli.build_cache, [*again, "--out_dir=seq", "--allow_mismatch=weights"])
    monkeypatch.setattr(ours, "merge_caches", merge)
    monkeypatch.setattr(ours, "build_anchor_cache", lambda *a, **kw: pytest.fail("was built already"))
    cli.build_cache([*again, "--out_dir=seq", "--allow_mismatch=weights"])
    m = read_manifest("seq")
    assert (m["num_anchors"] == 14 and [s["teacher"] for s in m["dataset"]["sources"]]
            == [first.manifest["hashes"]["weights"], m["hashes"]["weights"]])
    assert not Path(".seq.new").exists()


def test_the_tools_from_the_command_line(inside, work, capsys):
    build(work, "mine", "--num_anchors=20") if not Path("mine").exists() else None
    def run(*argv):
        with pytest.raises(SystemExit) as stop: cli.cache(list(argv))
        return stop.value.code or 0, "".join(capsys.readouterr())
    assert (run("split", "mine", "t", "h", "--heldout=.5")[0] == 0 and run("disjoint", "t", "h")
            == (0, "disjoint: 2 and 2 episodes, none in common (compared by what they hold)\n"))
    code, out = run("disjoint", "mine", "h")
    assert code == 1 and "2 episodes in common" in out and "of local/dataset" in out
    foreign("blind", "mine", dataset={})
    assert run("disjoint", "mine", "blind")[0] == 2
    assert (run("thin", "t", "thin", "--to=4")[0] == 0 and run("merge", "m", "h", "thin")[0] == 0
            and run("verify", "m")[0] == 0)
    assert "more than once" in run("merge", "m2", "mine", "h")[1]
    train(work, "run", "m")
    foreign("other", "mine", hashes={"weights": "f" * 64})
    code, out = run("merge", "m3", "mine", "other")
    assert code == 1 and "hashes.weights" in out and "--allow=weights" in out and not Path("m3").exists()
    code, out = run("merge", "m3", "mine", "other", "--allow=weights")
    assert code == 0 and "2 teachers" in out
    for argv in (("thin", "mine", "x", "--to=21"), ("split", "mine", "x", "y", "--heldout=2"), ("merge", "x", "mine"),
                 ("thin", "mine", "t", "--to=4")):
        code, out = run(*argv)
        assert (code == 1 and out.startswith("craft-cache: ") and len(out.splitlines()) == 1
                and not Path("x").exists()), out
