"""`craft-check`: everything that speaks against a run is found before it, all at once, and looking leaves no trace."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from craft_nb import cli
from test_check import make_teacher, write

LONG = " ".join(["push the red button and then open the window again"] * 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Sound data, a teacher of it, a cache, and data with faults."
    import datasets
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("preflight")
    write(folder / "sound", names=["x", "y", "z", "grip"])
    make_teacher(folder / "teacher", folder / "sound")
    cli.build_cache([f"--policy.path={folder / 'teacher/policy'}", f"--dataset.repo_id={folder / 'sound'}",
                     f"--out_dir={folder / 'cache'}", "--num_anchors=8"])
    def hole(e, i, a): a[1] = np.nan if (e, i) == (1, 7) else a[1]; return a
    def far(e, i, s): s[2] *= 40; return s
    write(folder / "uneven", episodes=(*[("push the button", 6)] * 3, ("open the window", 6)))
    write(folder / "faulty", episodes=(("push the button", 12), (LONG, 12)), cams=("front",), action=hole, state=far,
          names=["x", "y", "z", "grip"])
    return folder


@pytest.fixture
def inside(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["craft"])
    monkeypatch.setattr("lerobot.utils.utils.init_logging", lambda: None)
    return place


def line(place, data="sound", *more, cache="cache", output="run"):
    return [f"--policy.path={place / 'teacher/policy'}", f"--dataset.repo_id={place / data}",
            f"--craft.anchor_cache_dir={place / cache}", "--craft.anchor_batch_size=4", f"--output_dir={output}",
            "--steps=40", "--batch_size=2", "--num_workers=0", "--env_eval_freq=0", "--save_freq=10", *more]


def check(capsys, *argv):
    "→ exit code, what was printed."
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: cli.check(list(argv))
    code = stop.value.code if isinstance(stop.value.code, int) else 0 if stop.value.code is None else 1
    return code, capsys.readouterr().out + (stop.value.code if isinstance(stop.value.code, str) else "")


def facts(capsys, *argv):
    code, said = check(capsys, *argv, "--json")
    return code, json.loads(said)


def refused(facts): return {f["what"] for f in facts["findings"] if f["level"] == "refuse"}


def test_a_sound_run(inside, capsys, tmp_path):
    code, said = check(capsys, *line(inside))
    assert code == 0 and "nothing speaks against it" in said and len(said.splitlines()) <= 40
    for words in ("observation.image ← observation.image", "'push the button'",
                  "10 frames a second, 10 actions a chunk: 1 s", "(x)" if "(x)" in said else " x ", "8 in ", "agree in",
                  "at the peak of a step", "for 40 steps", "4 checkpoints of", "run.check.png"):
        assert words in said, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.check.png"]  # nothing else is written
    code, said = facts(capsys, *line(inside), "--sheet", "seen/sheet.png")
    assert (code == 0 and said["verdict"] == "ok" and Path(said["sheet"]) == Path("seen/sheet.png")
            and Path("seen/sheet.png").is_file())
    assert (said["times"]["chunk_seconds"] == 1 and said["disk"]["checkpoints"] == 4 and said["time"]["total"] > 0
            and said["memory"]["peak"] > said["memory"]["weights"])
    assert ([d["name"] for d in said["numbers"]["action"]["dimensions"]] == ["x", "y", "z", "grip"]
            and said["tasks"]["train"]["push the button"] == dict(episodes=1, frames=12))


def test_anchors_that_are_yet_to_be_built(inside, capsys):
    own = [a for a in line(inside) if "anchor_cache_dir" not in a] + [
        f"--craft.anchor_dataset.repo_id={inside / 'sound'}", f"--craft.anchor_dataset.repo_id={inside / 'uneven'}",
        "--craft.anchor_dataset.tasks=open the window", "--craft.check=false"]
    code, said = check(capsys, *own, "--craft.anchor_dataset.num_anchors=all")
    said = " ".join(said.split())
    assert (code == 0 and "without retention" not in said
            and "CRaFT every 5 steps, ascent, ε 1 → 0.1, once its anchors are built" in said), said
    assert ("18 to be built first, from the 18 frames of local/sound, local/uneven with 'open the window'" in said
            and not Path("run").exists()), said
    code, said = check(capsys, *own, "--craft.anchor_dataset.num_anchors=7", "--craft.anchor_batch_size=8")
    assert code == 1 and "1 … 7 (anchors of run/anchors to train on)" in said, said
    code, said = check(capsys, *own, "--craft.method=aegis")
    assert code == 0 and "method aegis, once its anchors are built" in " ".join(said.split()), said
    code, said = check(capsys, *own, "--craft.method=l2sp")
    assert (code == 0 and f"the method l2sp looks at no anchors, so none are made of {inside / 'sound'}, "
            in " ".join(said.split()) and "to be built" not in said), said
    code, said = check(capsys, *own, "--craft.method=nosuch")
    assert code == 1 and said.count("method: expected one of craft") == 1, said
    code, said = check(capsys, *own, "--craft.anchor_dataset.tasks=fly", "--env.type=metaworld", "--env.task=fly-v3",
                       "--env_eval_freq=1", "--wandb.enable=true", "--wandb.mode=no")
    assert code == 1 and all(s in said for s in ("no task 'fly'", "KeyError: 'fly-v3'", "wandb.mode: expected")), said


def test_all_faults_at_once(inside, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    code, said = facts(capsys, *line(inside, "faulty", cache="gone"))
    assert code == 1 and said["verdict"] == "refused" and not Path("run/checkpoints").exists()
    assert refused(said) >= {"output", "cache", "no_pictures", "nonfinite", "range", "instructions"}, refused(said)
    text = " ".join(f["text"] for f in said["findings"])
    for words in ("run exists", "no anchor cache at", "observation.images.front", "action[1] (y)", "episode 1, frame 7",
                  "observation.state[2] (z)", "longer than the 40 tokens"):
        assert words in text, words
    code, said = check(capsys, *line(inside, "faulty", cache="gone"))
    assert code == 1 and "refused" in said.splitlines()[0] and said.count("✗") >= 6 and len(said.splitlines()) < 60


@pytest.mark.parametrize("more,what", [
    (['--rename_map={"observation.imag": "observation.image"}'], "cameras"), (["--dataset.eval_split=0.5"], "setup"),
    (["--dataset.repo_id=uneven", "--dataset.eval_split=0.2"], "split"), (["--craft.views=tokens"], "cache"),
    (["--dataset.episodes=[0,9]"], "setup"), (["--policy.path=nowhere"], None), (["--steps=0"], "setup"),
    (["--craft.retention_mode=token_ce"], "cache"), (["--dataset.repo_id=/gone/data"], "setup")])
def test_each_is_refused_before_training(inside, capsys, more, what):
    own = {m.split("=")[0] for m in more}
    argv = ([f for f in line(inside) if f.split("=")[0] not in own]
            + [m.replace("uneven", str(inside / "uneven")) for m in more])
    code, said = facts(capsys, *argv) if what else (check(capsys, *argv)[0], None)
    assert code == 1 and (what is None or what in refused(said)), said and said["findings"]
    with pytest.raises(SystemExit) as stop: cli.train(argv)
    assert stop.value.code and not Path("run").exists()


def test_warnings_end_it_with_2_where_asked(inside, capsys):
    waived = line(inside, "faulty", "--craft.allow_mismatch=range",
                  '--rename_map={"observation.images.front": "observation.image"}', "--dataset.episodes=[0]")
    code, said = check(capsys, *waived)
    assert code == 0 and "warning" in said.splitlines()[0] and "waived: " in said
    assert check(capsys, *waived, "--strict")[0] == 2 and check(capsys, *line(inside), "--strict")[0] == 0


def test_the_slow_half_can_be_left_out(inside, capsys):
    code, said = facts(capsys, *line(inside), "--craft.check=false")
    assert code == 0 and said["sheet"] is None and not {"memory", "time", "disk"} & said.keys() and "numbers" in said


def test_training_says_it_and_is_the_same_run(inside, capsys):
    from safetensors.torch import load_file
    def run(name, *more):
        capsys.readouterr()
        cli.train([f for f in line(inside, output=name) if not f.startswith(("--steps", "--save_freq"))]
                  + ["--steps=3", "--save_freq=3", *more])
        return capsys.readouterr().out, load_file(f"{name}/checkpoints/last/pretrained_model/model.safetensors")
    said, looked = run("looked")
    quiet, unseen = run("unseen", "--craft.check=false")
    assert ("at the peak of a step" in said and "at the peak of a step" not in quiet
            and "observation.image ← observation.image" in quiet)
    assert (json.loads(Path("looked/check.json").read_text())["verdict"] == "ok" and Path("looked/check.png").is_file()
            and not Path("unseen/check.json").exists())
    assert looked.keys() == unseen.keys() and all(torch.equal(looked[k], unseen[k]) for k in looked)


def test_resume_is_looked_at_without_a_trace(inside, capsys, tmp_path):
    cli.train([f for f in line(inside) if not f.startswith(("--steps", "--save_freq"))]
              + ["--steps=4", "--save_freq=2", "--craft.check=false"])
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()}
    config = "--config_path=run/checkpoints/000002/pretrained_model/train_config.json"
    code, said = facts(capsys, config, "--resume=true", "--steps=9")
    assert (code == 0 and (Path("run/checkpoints/last").resolve().name == "000004")
            and {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()} == before)
    code, said = facts(capsys, config, "--resume=true", "--steps=1")
    assert code == 1 and any("the checkpoint stands at step 2" in f["text"] for f in said["findings"])


def test_the_sheet_shows_blanks_and_policies_without_an_adapter(inside, capsys):
    from PIL import Image
    code, said = check(capsys, *line(inside, "faulty"))
    print(said)
    blank = np.asarray(Image.open("run.check.png").convert("RGB")).astype(int)
    assert ((blank[..., 0] > 200) & (blank[..., 1] < 60) & (blank[..., 2] < 60)).sum() > 100  # "no picture", in red
    argv = [f for f in line(inside) if not f.startswith(("--policy", "--craft"))]
    code, said = facts(capsys, *argv, "--policy.type=act", "--policy.device=cpu", "--craft.enabled=false",
                       "--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=32",
                       "--policy.pretrained_backbone_weights=null", "--sheet=act.png")
    assert (code == 0 and Image.open("act.png").width > 300
            and said["cameras"]["cameras"][0]["data"] == "observation.image")


def test_data_without_pictures_have_no_sheet(tmp_path, monkeypatch, capsys):
    "A policy of states alone is as welcome; that there is nothing to draw is no fault."
    from lerobot.datasets import LeRobotDataset
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["craft"])
    features = {k: dict(dtype="float32", shape=(4,), names=None)
                for k in ("observation.state", "observation.environment_state", "action")}
    ds, rng = (LeRobotDataset.create("me/states", 10, features, root=tmp_path / "states", use_videos=False),
               np.random.default_rng(0))
    for task in ("push", "open"):
        for _ in range(12): ds.add_frame({k: rng.normal(size=4).astype(np.float32) for k in features} | dict(task=task))
        ds.save_episode()
    ds.finalize()
    flags = [f"--dataset.repo_id={tmp_path / 'states'}", "--policy.type=act", "--policy.device=cpu",
             "--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=32",
             "--policy.push_to_hub=false", "--craft.enabled=false", "--output_dir=run", "--steps=4", "--batch_size=4",
             "--num_workers=0", "--env_eval_freq=0"]
    code, said = facts(capsys, *flags)
    assert code == 0 and said["sheet"] is None and said["cameras"]["cameras"] == [] and said["time"]["total"] > 0
    assert list(tmp_path.glob("*.png")) == []
