"""What users write on a command line, taken as they wrote it: paths, names, flags that our own messages advise."""
import os
import sys
from pathlib import Path

import pytest

from craft_nb import cli

ODD = ["01", "null", "{a}", "'q'", '"q"', "1e3", "1_000", "[x]", "yes", "a b", "a #b", "a: b", "0x1f", "~x", "- x",
       "!!int 3", "2026-11-26", "*a", "ü&", "include/x", "%a", "12:30"]


@pytest.fixture
def place(work, tmp_path, monkeypatch):
    "An empty folder to run commands in, with the user's home in it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["craft"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop: main(list(flags))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def configs():
    from craft_nb import lerobot as ours
    return ours


FIELDS = {"BuildCacheConfig": ("out_dir", "prompts_file", "dataset.repo_id", "dataset.root"),
          "CraftEvalConfig": ("anchors", "out_dir", "dataset.root"),
          "CraftTrainConfig": ("output_dir", "craft.anchor_cache_dir", "policy.pretrained_path", "dataset.repo_id",
                               "dataset.root", "wandb.project")}


@pytest.mark.parametrize("odd", ODD)
def test_both_readers_get_a_text_as_written(odd):
    import json
    import yaml
    ours = configs()
    for config, fields in FIELDS.items():
        for f in fields:
            (a,), (b,) = (cli.as_written(getattr(ours, config), argv) for argv in ([f"--{f}={odd}"], [f"--{f}", odd]))
            value = a.removeprefix(f"--{f}=")
            assert a == b and yaml.safe_load(value) == json.loads(value) and json.loads(value).removeprefix("./") == odd


@pytest.mark.parametrize("space", [False, True])
def test_a_whole_line_is_taken_as_written(place, space):
    ours, rest = configs(), [o for o in ODD if o != "include/x"]
    for config, fields in FIELDS.items():
        odd = dict(zip(fields, rest[3 * space:] if config == "CraftTrainConfig" else rest[6 + 3 * space:]))
        cfg = cli.parsed(getattr(ours, config),
                         [a for f, v in odd.items() for a in ([f"--{f}", v] if space else [f"--{f}={v}"])]
                         + ["--policy.type=act"] + ["--dataset.repo_id=include/x"] * ("dataset.repo_id" not in odd)
                         + ["--craft.layer_weights=-2:30,-1:1"] * ("output_dir" in odd))
        for f, v in odd.items():
            found = cfg
            for part in f.split("."): found = getattr(found, part)
            assert str(found) == v, (config, f)


def test_null_means_none_where_a_field_is_no_path(place, work):
    ours = configs()
    cfg = cli.parsed(ours.CraftTrainConfig,
                     [f"--dataset.repo_id={work.root}", "--env=null", "--dataloader_multiprocessing_context=null",
                      "--seed=null", "--wandb.entity", "null", "--dataset.episodes=[0,1]", "--dataset.root=",
                      "--output_dir=null", '--rename_map={"a": "b"}'])
    assert ((cfg.env, cfg.dataloader_multiprocessing_context, cfg.seed, cfg.wandb.entity, cfg.dataset.root)
            == (None,) * 5)
    assert cfg.output_dir == Path("null") and cfg.dataset.episodes == [0, 1] and cfg.rename_map == {"a": "b"}


def test_a_policys_overrides_and_a_config_file_are_taken_as_written(place, work):
    "These go through LeRobot's other parser, which reads JSON."
    ours = configs()
    for name in ("1e3", "null", "[x]", "01"):
        cfg = cli.with_path(cli.parsed(ours.BuildCacheConfig, [
            f"--policy.path={work.policy_path}", f"--dataset.repo_id={work.root}",
            f"--policy.text_tokenizer_name={name}", f"--out_dir={name}", "--policy.device", "cpu"]))
        assert (cfg.policy.text_tokenizer_name, cfg.out_dir, cfg.policy.device) == (name, name, "cpu")
        with open("train_config.json", "w") as f: f.write('{"dataset": {"repo_id": "x"}, "steps": 3}')
        cfg = cli.parsed(ours.CraftTrainConfig,
                         ["--config_path=train_config.json", f"--output_dir={name}", f"--dataset.root={name}"])
        assert ((str(cfg.output_dir), cfg.dataset.root, cfg.steps) == (name, name, 3)
                and f"--output_dir={name}" in sys.argv)


def test_a_home_is_found_by_every_command(place, work, capsys):
    home = place / "home"
    os.symlink(work.policy_path, home / "teacher")
    os.symlink(work.root, home / "data")
    (home / "say.txt").write_text("push the button\n")
    cli.build_cache(["--policy.path=~/teacher", "--dataset.repo_id=~/data", "--out_dir=~/[x]", "--num_anchors=8",
                     "--prompts_file", "~/say.txt"])
    cli.train(["--policy.path=~/teacher", "--dataset.root=~/data", "--dataset.repo_id=me/data", "--output_dir=~/{run}",
               "--steps=1", "--batch_size=2",
               "--num_workers=0", "--env_eval_freq=0", "--craft.anchor_cache_dir=~/[x]", "--craft.anchor_batch_size=2"])
    cli.train(["--config_path=~/{run}/checkpoints/last/pretrained_model/train_config.json", "--resume=true",
               "--steps=2"])
    cli.evaluate(["--policy.path", "~/{run}/checkpoints/last/pretrained_model", "--anchors=~/[x]", "--out_dir=~/1e3"])
    for argv in (["info", "~/[x]"], ["verify", "~/[x]", "--policy=~/teacher"], ["push", "~/[x]", "~/null"]):
        with pytest.raises(SystemExit) as stop: cli.cache(argv)
        assert not stop.value.code, capsys.readouterr().err
    assert ((home / "1e3/eval.json").is_file() and (home / "null/anchors.json").is_file()
            and (home / "{run}/checkpoints/000002").is_dir())
    assert sorted(p.name for p in place.iterdir()) == ["home"]
    assert "no policy at" in refused(cli.build_cache, "--policy.path=~/gone", "--dataset.repo_id=~/data",
                                     "--out_dir=~/no")


def test_odd_names_from_end_to_end(place, work):
    for name in ("null", "{a}", "a #b: c"):
        os.symlink(work.policy_path, f"{name} teacher")
        os.symlink(work.root, f"{name} data")
        cli.build_cache([f"--policy.path={name} teacher", f"--dataset.repo_id={name} data", f"--out_dir={name}",
                         "--num_anchors=4"])
        cli.evaluate([f"--policy.path={name} teacher", f"--anchors={name}", f"--dataset.repo_id={name} data",
                      "--max_frames=2", f"--out_dir={name} seen"])
        cli.train([f"--policy.path={name} teacher", f"--dataset.root={name} data", f"--dataset.repo_id={name}",
                   f"--output_dir={name} run", "--steps=1", "--batch_size=2", "--num_workers=0", "--env_eval_freq=0",
                   f"--craft.anchor_cache_dir={name}", "--craft.anchor_batch_size=2", "--save_checkpoint=false"])
        made = {p.name for p in place.iterdir()}
        assert {name, f"{name} seen", f"{name} run"} <= made
    assert len(made) == 1 + 3 * 5


def test_python_takes_a_home_too(place, work):
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from craft_nb.anchors import AnchorCacheDataset, read_manifest, verify_cache
    from craft_nb.config import CraftConfig, config_from_json, config_to_json
    from craft_nb.lerobot import BuildCacheConfig, CraftEvalConfig, CraftTrainConfig, build_cache, evaluate, train
    from craft_nb.monitor import read_records
    os.symlink(work.policy_path, place / "home/teacher")
    os.symlink(work.root, place / "home/data")
    def policy():
        cfg = PreTrainedConfig.from_pretrained(work.policy_path)
        cfg.pretrained_path, cfg.push_to_hub = Path("~/teacher"), False
        return cfg
    data = lambda: DatasetConfig(repo_id="~/data")
    build_cache(BuildCacheConfig(dataset=data(), policy=policy(), out_dir="~/cache", num_anchors=4), progress=False)
    assert (len(AnchorCacheDataset("~/cache")) == read_manifest("~/cache")["num_anchors"]
            == verify_cache("~/cache")["anchors"] == 4)
    train(CraftTrainConfig(dataset=data(), policy=policy(), output_dir=Path("~/run"), steps=1, batch_size=2,
                           num_workers=0, save_checkpoint=False,
                           craft=CraftConfig(anchor_cache_dir="~/cache", anchor_batch_size=2)), quiet=True)
    assert len(read_records("~/run/metrics.jsonl")) >= 1
    evaluate(CraftEvalConfig(policy=policy(), anchors="~/cache", out_dir="~/seen"))
    config_to_json(CraftConfig(), "~/craft.json")
    assert config_from_json("~/craft.json") == config_from_json(Path("~/craft.json")) == CraftConfig()
    assert sorted(p.name for p in place.iterdir()) == ["home"]


def advised(*modules):
    "Flags that the messages of modules of this package name, but those of LeRobot's own commands."
    import ast
    import re
    root, out = Path(cli.__file__).parent, {}
    for m in modules:
        for x in ast.walk(ast.parse((root / f"{m}.py").read_text())):
            if (isinstance(x, ast.Constant) and isinstance(x.value, str) and "lerobot-edit-dataset" not in x.value
                and "operation." not in x.value):
                for f in re.findall(r"(?<![\w-])--([a-z][a-z_]*(?:\.[a-z_]+)*)(?=[\s=,;:)'\]\"]|$)", x.value):
                    out.setdefault(f, x.value[:100])
    return out


def test_every_flag_that_is_advised_is_there():
    """In some command each; those of messages that build, train and eval share, in each of the three (by its own name).
    `--root` and `--new_root` are of a LeRobot command that we print."""
    from craft_nb import cards, demo
    ours = configs()
    commands = dict(build=ours.BuildCacheConfig, train=ours.CraftTrainConfig, eval=ours.CraftEvalConfig)
    lerobots = {"help", "config_path", "resume", "strict", "json", "sheet", "policy.path", "policy.type", "env.type",
                "policy.dtype", "policy.device", "policy.pretrained_path", "policy.tokenizer_max_length"}
    help_of = lambda p: p.format_help() + "".join(s.format_help() for a in p._actions for s in (
        getattr(a, "choices", None) or {}).values() if hasattr(s, "format_help"))
    others = help_of(cards._parser()) + open(demo.__file__).read()
    for flag, where in advised("anchors", "builder", "cards", "check", "cli", "demo", "instructions", "lerobot",
                               "policies", "preflight", "trainer", "dual", "losses").items():
        known = [n for n, c in commands.items() if cli.kinds(c, flag)]
        assert (known or flag in lerobots or f"--{flag}" in others or flag in ("eval_freq", "name", "root", "new_root")
                or flag.split(".")[0] in ("policy", "env")), (flag, where)
    for flag in ("rename_map", "dataset.episodes", "dataset.root", "dataset.repo_id"):
        assert all(cli.kinds(c, flag) for c in commands.values()), flag
    for build_eval, train in (("allow_mismatch", "craft.allow_mismatch"),
                              ("long_instructions", "craft.long_instructions")):
        assert (cli.kinds(ours.BuildCacheConfig, build_eval) and cli.kinds(ours.CraftEvalConfig, build_eval)
                and cli.kinds(ours.CraftTrainConfig, train))


def test_the_advice_of_a_command_is_its_own(place, work):
    "What is said names the flag as this command spells it, and taking the advice works."
    import json
    from test_instructions import CHAT, retold
    import pandas as pd
    retold(work.root, place / "long", lambda i, t: f"{CHAT} again" if i == 0 else t)
    for f in (place / "long/data").rglob("*.parquet"):
        d = pd.read_parquet(f).rename(columns={"observation.image": "observation.images.front"})
        d.to_parquet(f)
    info = json.loads((place / "long/meta/info.json").read_text())
    info["features"] = {"observation.images.front" if k == "observation.image" else k: v for k, v in info["features"]
                        .items()}
    (place / "long/meta/info.json").write_text(json.dumps(info))
    common = [f"--policy.path={work.policy_path}", "--dataset.repo_id=long"]
    for main, more in ((cli.build_cache, ["--out_dir=made", "--num_anchors=4"]),
                       (cli.evaluate, ["--out_dir=seen", "--max_frames=4"]),
                       (cli.train, ["--output_dir=run", "--craft.enabled=false", "--steps=1", "--batch_size=2",
                                    "--num_workers=0", "--env_eval_freq=0", "--save_checkpoint=false"])):
        taken, said = [], ""
        for _ in range(3):  # each refusal names a flag; it is taken as it stands
            try: main([*common, *more, *taken]); break
            except SystemExit as e: said = str(e.code)
            if "--rename_map=" in said:
                taken += ['--rename_map={"observation.images.front": "observation.image"}']
                assert taken[-1].split("=", 1)[1] in said
            else:
                taken += [next(w for w in said.split()
                               if w.startswith("--") and w.endswith("long_instructions=shorten"))]
        else: raise AssertionError(said)
        assert len(taken) == 2, (taken, said)
    assert (json.loads((place / "made/anchors.json").read_text())["dataset"]["rename_map"]
            == {"observation.images.front": "observation.image"})


@pytest.mark.parametrize("wrong", [False, True])
def test_a_command_called_from_python_leaves_the_command_line_as_it_was(place, work, monkeypatch, wrong):
    """LeRobot's training reads `sys.argv`: with a command's flags left there, the next policy trained in the process is
    that command's."""
    import sys
    from lerobot.configs import parser
    (place / "build.yaml").write_text(f"policy:\n  path: {work.policy_path}\n")
    monkeypatch.setattr(sys, "argv", ["notebook", "--mine"])
    flags = [f"--config_path={place / 'build.yaml'}", f"--dataset.repo_id={work.repo_id}",
             f"--dataset.root={work.root}", f"--out_dir={place / 'from_python'}"]
    if wrong:
        with pytest.raises(SystemExit): cli.build_cache([*flags, "--num_anchors=0"])
    else: cli.build_cache([*flags, "--num_anchors=4", "--allow_undecodable=true"])
    assert sys.argv == ["notebook", "--mine"] and parser.get_path_arg("policy") is None


@pytest.mark.parametrize("main,flag", [("build_cache", "--num_anchors"), ("train", "--craft.heldout_every"),
                                       ("check", "--craft.heldout_every"), ("evaluate", "--anchors"),
                                       ("cache", "verify"), ("demo", "--size"), ("report", "--gate")])
def test_help_can_be_printed(main, flag, capsys, monkeypatch):
    """argparse formats help texts with %: a per cent sign in the comment of one field ended craft-train --help with a
    ValueError."""
    monkeypatch.setattr(sys, "argv", ["craft", "--help"])
    with pytest.raises(SystemExit) as stop: getattr(cli, main)(["--help"])
    assert stop.value.code in (0, None) and flag in capsys.readouterr().out
