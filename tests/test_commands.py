"""The commands: the origin's lines as they are, every kind of cache, and one clear line for wrong use."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from craft_nb import cli


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    "A folder with the origin's cache, made by its own command line, to run commands in."
    folder = tmp_path_factory.mktemp("commands")
    out = command(folder, "craft-build-cache", f"--policy.pretrained_path={work.policy_path}",
                  f"--dataset.repo_id={work.root}",
                  "--out_dir=data/anchor_cache_hidden", "--num_anchors=64", "--layers_to_save=-2,-1")
    quiet(out)
    assert "Wrote 64 anchors" in out and (folder / "data/anchor_cache_hidden/anchors.json").is_file()
    return folder


def command(folder, name, *flags):
    run = subprocess.run([Path(sys.executable).with_name(name), *flags], cwd=folder, capture_output=True, timeout=300)
    out = (run.stdout + run.stderr).decode()  # as it comes: text=True would make new lines of a progress bar's returns
    assert run.returncode == 0, out[-3000:]
    return out


# nothing that one could act on, in a run that is sound
IDLE = ("Traceback", "Warning:", "WARNING", "deprecated", "ERROR", "libtorchcodec", "direct port", "key might need")


def seen(out):
    "What is left on a terminal, where a progress bar writes over itself."
    return [x for line in out.split("\n") if (x := line.rpartition("\r")[2].rstrip())]


def quiet(out):
    "At most 25 lines, none of which is a traceback or a warning that nobody can act on."
    lines = seen(out)
    assert len(lines) <= 25 and not [x for x in lines if any(w in x for w in IDLE)], out


def test_the_terminal_is_judged():
    assert seen("1\r2\r3\n\nlast  \n") == ["3", "last"]
    quiet("\n".join(map(str, range(25))))
    for loud in ("\n".join(map(str, range(26))), "x\nTraceback (most recent call last):", "f.py:3: FutureWarning: old"):
        with pytest.raises(AssertionError): quiet(loud)


def test_the_origins_lines(place, work):
    out = command(place, "craft-train", f"--dataset.repo_id={work.root}", f"--policy.path={work.policy_path}",
                  "--output_dir=outputs/train", "--steps=2", "--batch_size=2",
                  "--eval_freq=0", "--save_checkpoint=false", "--num_workers=0")
    quiet(out)
    assert ("cache_type=hidden" in out and "Trained to step 2/2" in out and "L_ret" in out and "(step 1)" in out
            and not (place / "outputs/train/checkpoints").exists())
    assert len((place / "outputs/train/metrics.jsonl").read_text().splitlines()) >= 2


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["craft"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return place


def run_config(work, out, **craft):
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from craft_nb.config import CraftConfig
    from craft_nb.lerobot import CraftTrainConfig
    policy = PreTrainedConfig.from_pretrained(work.policy_path)
    policy.pretrained_path, policy.push_to_hub = Path(work.policy_path), False
    return CraftTrainConfig(
        dataset=DatasetConfig(repo_id=str(work.root)), policy=policy, output_dir=Path(out), steps=3, batch_size=2,
        num_workers=0, save_checkpoint=False, dataloader_multiprocessing_context=None,
        craft=CraftConfig(anchor_batch_size=4, retention_freq=1, **craft))


def old_cache(folder, kind):
    "A cache as the origin wrote it: pickled shards of stacked tensors, float32 pixels, int64 ids."
    from craft_nb.anchors import AnchorCacheDataset
    rows = AnchorCacheDataset("data/anchor_cache_hidden").batch(range(16))
    old = {"pixel_values": rows["pixel_values"][:, 0].float() / 255.0 * 2.0 - 1.0,
           "input_ids": rows["input_ids"].long(), "attention_mask": rows["attention_mask"].long()}
    if kind == "hidden": old["teacher_hidden"] = rows["teacher_hidden"]
    if kind == "pooled_features": old["target_features"] = rows["teacher_hidden"].mean((1, 2))
    if kind == "token_level":
        old["labels"] = torch.where(torch.arange(old["input_ids"].shape[1]) < 6, old["input_ids"], -100)
    Path(folder).mkdir()
    (Path(folder) / "metadata.json").write_text(json.dumps(
        {"num_anchors": 16} | ({"layers_to_save": [-2, -1]} if kind == "hidden" else {})))
    for i in (0, 8):
        torch.save({k: v[i : i + 8].clone() for k, v in old.items()}, Path(folder) / f"shard_{i // 8:04d}.pt")


@pytest.mark.parametrize("kind", ["hidden", "pooled_features", "token_level"])
def test_old_caches_train_and_are_named(inside, work, caplog, kind):
    from craft_nb.lerobot import train
    import logging
    logging.disable(logging.NOTSET)
    old_cache(f"old-{kind}", kind)
    with caplog.at_level("INFO"):
        trainer = train(run_config(work, f"run-{kind}", anchor_cache_dir=f"old-{kind}",
                                   retention_mode="token_ce" if kind == "token_level" else "hidden"), quiet=True)
    assert trainer.record["cache_type"] == kind and f"cache_type={kind}" in caplog.text
    assert trainer.record["retention_loss"] > 0 and trainer.record["step"] == 3


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop: main(list(flags))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def test_wrong_use_of_build_is_refused(inside, work):
    teacher, data = f"--policy.path={work.policy_path}", f"--dataset.repo_id={work.root}"
    for flags, says in [
            ([teacher, data, "--out_dir=data/anchor_cache_hidden"], "holds a finished anchor cache"),
            ([teacher, data, "--out_dir=new", "--num_anchors=100000"], "num_anchors: expected 1 to"),
            ([teacher, data, "--out_dir=new", "--num_anchors=4", "--layers_to_save=-2,-9"],
             r"layers [-9] are out of range"),
            ([teacher, data, "--out_dir=new", "--num_anchors=4", "--views=nose"], "unknown views"),
            ([data, "--out_dir=new"], "no teacher"),
            (["--policy.path=/gone", data, "--out_dir=new"], "no policy at /gone"),
            ([teacher, "--dataset.repo_id=/gone/data", "--out_dir=new"], "no data set at /gone/data"),
            ([teacher, data, "--out_dir=new", "--num_anchors=4", "--batch_size=-3"],
             "batch_size: expected 0 or more, found -3"),
            ([teacher, data, "--out_dir=new", "--num_anchors=4", "--layers_to_save=-1,-1"], "the same hidden state"),
            ([teacher, data, "--out_dir=new", "--layers_to_save=a,b"], "layers_to_save: expected numbers"),
            ([teacher, "--dataset.repo_id=gone/away", "--out_dir=new"], ""),
    ]:
        assert says in refused(cli.build_cache, *flags), flags
        assert not Path("new").exists(), flags


def test_wrong_use_of_train_is_refused(inside, work):
    base = [f"--policy.path={work.policy_path}", f"--dataset.repo_id={work.root}", "--output_dir=new", "--steps=2",
            "--num_workers=0"]
    Path("empty").mkdir(exist_ok=True)
    Path("there").mkdir(exist_ok=True)
    shutil.copytree("data/anchor_cache_hidden", "damaged")
    shard = max(Path("damaged").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 4  # in the header
    shard.write_bytes(raw)
    for more, says in [
        (["--craft.anchor_cache_dir=nowhere"], "there is no anchor cache at nowhere"),
        (["--craft.anchor_cache_dir=empty"], "empty"),
        (["--craft.anchor_cache_dir=damaged"], shard.name),
        (["--craft.lamda_max=3"], "did you mean 'lambda_max'"),
        (["--craft.projection_mode=sideways"], "projection_mode"),
        (["--craft.views=tokens"], "has no view"),
        (["--craft.retention_mode=token_ce"], "needs --craft.retention_mode=hidden"),
        (["--output_dir=there"], "exists"),
        (["--craft.anchor_cache_dir", "nowhere"], "there is no anchor cache at nowhere"),
        (["--steps=0"], "steps: expected at least 1, found 0"),
        (["--dataset.repo_id=/gone/data"], "no data set at /gone/data"),
        (["--policy.path=/gone/teacher"], "no policy at /gone/teacher"),
        (["--resume=true"], "give it"),
        (["--resume=true", "--config_path=somewhere"], "give --resume or --policy.path, not both"),
        (["--craft.layer_weights=-1:0"], "layer_weights are all 0"),
    ]:
        flags = [f for f in base if f.split("=")[0] not in {m.split("=")[0] for m in more}] + more
        assert says in refused(cli.train, *flags), more
        assert not Path("new").exists(), more
    assert refused(cli.train, *base, "--no_such_flag=1") == "2"  # argparse's own message and exit code


def test_the_student_normalises_as_its_teacher(inside, work):
    """New data have other statistics. LeRobot takes them over; with CRaFT the teacher's stay, or its skills would mean
    something else."""
    from craft_nb.lerobot import check_features, data_findings, require_fit, run_hashes, train
    shutil.copytree(work.root, "shifted")
    stats = json.loads(Path("shifted/meta/stats.json").read_text())
    for name in ("observation.state", "action"):
        stats[name] = {k: v if k == "count" else [2 * x + 1 for x in v] for k, v in stats[name].items()}
    Path("shifted/meta/stats.json").write_text(json.dumps(stats))
    teachers = json.loads(Path("data/anchor_cache_hidden/anchors.json").read_text())["hashes"]["normalisation"]
    def normalisation(out, **craft):
        cfg = run_config(work, out, anchor_cache_dir="data/anchor_cache_hidden", **craft)
        cfg.dataset.repo_id = "shifted"
        parts = (trainer := train(cfg, quiet=True)).parts
        return run_hashes(trainer.policy, parts.pre)["normalisation"], parts
    kept, parts = normalisation("run-kept")
    # the data do not move as these statistics say
    assert kept == teachers and normalisation("run-waived", allow_mismatch="normalisation,range")[0] != teachers
    class Longer: features = parts.dataset.meta.features | {"action": dict(dtype="float32", shape=(7,))}
    with pytest.raises(ValueError, match="action: the policy was made for 4 numbers, the data set has 7"):
        check_features(parts.pre, Longer)
    class Blind:
        features = {k: v for k, v in parts.dataset.meta.features.items() if k not in ("action", "observation.state")}
    with pytest.raises(ValueError, match="the policy needs observation.state and action; the data set has"):
        check_features(parts.pre, Blind)
    with pytest.raises(ValueError, match="the policy needs observation.state; the data set has"):
        check_features(parts.pre, Blind, actions=False)
    norm = next(x for x in parts.pre.steps if hasattr(x, "norm_map") and hasattr(x, "stats"))
    norm.stats = {k: v for k, v in norm.stats.items() if k != "action"}
    with pytest.raises(ValueError, match="action: MIN_MAX normalises with 'min' and 'max', "
                       "which the statistics in the policy.s checkpoint"):
        require_fit(data_findings(parts.cfg.policy, parts.pre, parts.post, parts.dataset))


@pytest.mark.parametrize("field,value,says",
                         [("policy_type", "act", "policy_type: cache act"),
                          ("width", 999, "width: cache 999"), ("extra", {"depth": 7}, "depth: cache 7")])
def test_a_cache_of_another_policy_is_refused(inside, work, field, value, says):
    from craft_nb.anchors import AnchorCacheError
    from craft_nb.lerobot import make_trainer
    cfg = run_config(work, "new")
    foreign(f"foreign-{field}", {field: value})
    cfg.craft.anchor_cache_dir = f"foreign-{field}"
    with pytest.raises(AnchorCacheError, match=says): make_trainer(cfg)
    assert not Path("new").exists()


def foreign(folder, change):
    "The same anchors in a cache that says it was made for another policy."
    from craft_nb.anchors import AnchorCacheDataset, AnchorWriter
    ds = AnchorCacheDataset("data/anchor_cache_hidden")
    keep = ({k: ds.manifest[k] for k in ("policy_type", "layers", "pooling", "width", "dtype", "hashes", "extra")}
            | change)
    views = {n: {k: v[k] for k in ("tensors", "distance", "unit")} for n, v in ds.manifest["views"].items()}
    with AnchorWriter(folder, len(ds), views, **keep) as w: w.add(ds.batch(range(len(ds))))


def test_eval_writes_a_table(inside, work):
    cli.evaluate([f"--policy.path={work.policy_path}", "--anchors=data/anchor_cache_hidden", "--out_dir=evaluated"])
    assert "retention loss pooled" in Path("evaluated/eval.md").read_text()
    assert "exists" in refused(cli.evaluate, f"--policy.path={work.policy_path}", "--anchors=data/anchor_cache_hidden",
                               "--out_dir=evaluated")
    for more, says in [("--max_frames=0", "max_frames: expected at least 1"),
                       ("--batch_size=0", "batch_size: expected at least 1")]:
        assert says in refused(cli.evaluate, f"--policy.path={work.policy_path}", "--anchors=data/anchor_cache_hidden",
                               "--out_dir=other", more)
    foreign("foreign-eval", {"extra": {"depth": 7}})
    assert "depth: cache 7" in refused(cli.evaluate, f"--policy.path={work.policy_path}", "--anchors=foreign-eval",
                                       "--out_dir=other")
    assert "nothing to evaluate" in refused(cli.evaluate, f"--policy.path={work.policy_path}", "--out_dir=other")


def test_a_second_eval_into_the_same_folder_is_refused_while_the_first_measures(inside, work, monkeypatch):
    from craft_nb import lerobot
    flags, seen = [f"--policy.path={work.policy_path}", "--anchors=data/anchor_cache_hidden"], []
    def measured(*_):  # the first is at work
        seen.append(refused(cli.evaluate, *flags, "--out_dir=twice"))
        cli.evaluate([*flags, "--out_dir=twice-too"]) if len(seen) == 1 else None  # another folder is free
        return dict(anchors=1, losses={})
    monkeypatch.setattr(lerobot, "anchor_drift", measured)
    cli.evaluate([*flags, "--out_dir=twice"])
    assert len(seen) == 2 and all("this very process" in s and "writes here" in s and "--out_dir" in s for s in seen)
    assert (sorted(p.name for p in Path("twice").iterdir()) == sorted(p.name for p in Path("twice-too").iterdir())
            == ["eval.json", "eval.md"])
    # of a run that was killed
    Path("stale").mkdir(); Path("stale/.craft.lock").write_text('{"pid": 999999999, "host": "elsewhere"}')
    cli.evaluate([*flags, "--out_dir=stale"])
    assert "exists" in refused(cli.evaluate, *flags, "--out_dir=stale") and not Path("stale/.craft.lock").exists()
    def fails(*_): raise ValueError("made up")
    monkeypatch.setattr(lerobot, "anchor_drift", fails)
    assert "made up" in refused(cli.evaluate, *flags, "--out_dir=made/for/nothing") and not Path("made").exists()


def test_cache_commands(inside, work, capsys):
    for flags, says in [(["info", "data/anchor_cache_hidden"], "64"), (["verify", "data/anchor_cache_hidden"], ""),
                        (["verify", "data/anchor_cache_hidden", "--policy", str(work.policy_path)], "")]:
        with pytest.raises(SystemExit) as stop: cli.cache(flags)
        out = capsys.readouterr()
        assert not stop.value.code, out.err
        assert says in out.out
    foreign("another-teacher", {"hashes": {"weights": "a" * 64}})
    with pytest.raises(SystemExit) as stop: cli.cache(["verify", "another-teacher", "--policy", str(work.policy_path)])
    assert stop.value.code and "is not the teacher of this cache" in str(stop.value.code) + capsys.readouterr().err
    with pytest.raises(SystemExit) as stop: cli.cache(["verify", "nowhere"])
    assert stop.value.code and "nowhere" in capsys.readouterr().err
