"""LIBERO-Goal as a workload. What needs the simulator is skipped where the extra is not installed."""
import json
import subprocess
import sys

import pytest

from craft_nb import libero_demo
from craft_nb.demo import WORKLOADS, MetaWorld, Settings, door, parse

with_libero = pytest.mark.skipif(WORKLOADS["libero_goal"].missing() is not None,
                                 reason="the simulator: pip install 'craft_nb[libero]'")


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(libero_demo.importlib.util, "find_spec", lambda name: None)


def test_without_the_extra_one_line_says_what_to_install(absent, tmp_path):
    with pytest.raises(SystemExit) as e: parse(["--workload=libero_goal", f"--folder={tmp_path / 'x'}"])
    said = str(e.value)
    assert said.count("\n") == 0 and "pip install 'craft_nb[libero]'" in said and not (tmp_path / "x").exists()


def test_a_study_without_the_extra_says_it_too(absent, tmp_path):
    from craft_nb.study import study_main
    with pytest.raises(SystemExit, match="craft-study: --workload=libero_goal: .*craft_nb.libero."):
        study_main(["--workload=libero_goal", f"--out={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_help_needs_neither_extra_nor_lerobot():
    code = ("import sys, craft_nb.cli as c\nsys.argv = ['craft-demo', '--workload=libero_goal', '--help']\ntry: "
            "c.demo()\nexcept SystemExit as e: assert not e.code, e.code\nassert not {'lerobot', 'transformers', "
            "'mujoco', 'torch'} & set(sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.returncode == 0 and "outputs/libero_goal" in out.stdout and "--others" in out.stdout
            and "--spread" not in out.stdout), out.stderr


def test_a_workload_brings_its_settings_and_leaves_meta_world_alone(monkeypatch):
    monkeypatch.setattr(libero_demo.LiberoGoal, "missing", lambda self: None)
    args, s = parse(["--workload=libero_goal", "--others=7"])
    assert (args.folder, s.workload, s.others, type(door(s))) == ("outputs/libero_goal", "libero_goal", 7,
                                                                  libero_demo.LiberoGoal)
    assert [s.episodes_of(t) for t in s.tasks] == [72, 7, 7]
    args, s = parse([])
    assert (args.folder, s, type(door(s))) == ("outputs/demo", Settings(), MetaWorld)


def test_check_tasks_says_that_nothing_is_claimed_of_sight(tmp_path):
    from craft_nb.demo import Run, check_tasks
    with pytest.raises(SystemExit, match="told apart by their instruction alone"):
        check_tasks(Run(tmp_path, libero_demo.GoalSettings()))


def test_told_and_done_counts_every_episode():
    rows = [dict(task="a", arm=arm, done=done) for arm, done in (("teacher", ["a", "a", None]), ("sft", ["b", "b"]),
                                                                 ("sft", ["<c>"]))]
    found = libero_demo.confusion(rows)
    assert found == {"a": {"teacher": {"a": 2, "": 1}, "sft": {"b": 2, "<c>": 1}}} == json.loads(json.dumps(found))
    page = libero_demo.confusion_section(found, ["a", "b"])
    assert (page.count("<th scope=col>") == 1 + 4 and "&lt;c&gt;" in page and "<c>" not in page
            and libero_demo.OBEDIENCE in page)


def test_the_picture_is_of_a_state_where_the_new_is_done_for_the_old():
    from types import SimpleNamespace
    from craft_nb.demo import picked
    run = SimpleNamespace(settings=libero_demo.GoalSettings(old="a", new="b"))
    def row(arm, done):
        return dict(task="a", arm=arm, seeds=[5, 6, 7], success=[d == "a" for d in done], done=done,
                    actions=[[arm, i] for i in range(3)])
    rows = [row("sft", ["a", None, "b"]), row("craft", ["a", "a", "a"])]
    assert picked(run, rows, ["sft", "craft"]) == {"a": (7, {"sft": (["sft", 2], "b"), "craft": (["craft", 2], "a")})}
    assert picked(run, rows, ["craft"])["a"][0] == 5


@with_libero
def test_experts_do_their_tasks_and_episodes_play_again():
    from craft_nb.libero import GOALS, expert_actions, Expert, goal_scene, replay_episode
    scene = goal_scene()
    for task in GOALS:
        scene.reset(task, 44, seed=1)
        actions = []
        for a in expert_actions(Expert(scene), task):
            actions.append(a.round(4).tolist())
            scene.step(actions[-1])
            if scene.holds(task): break
        assert scene.holds(task), task
        frames, done = replay_episode(scene, task, 14, actions, size=32)
        assert done == task and len(frames) == 2 + (len(actions) - 1) // 4


@with_libero
def test_a_scene_that_was_played_in_is_as_good_as_new():
    "Number by number and pixel by pixel, whatever the task was before; also when its pictures were closed in between."
    import numpy as np
    from craft_nb.libero import CAMERAS, GOALS, GoalScene, goal_scene
    def watched(scene, task, seed):
        push, seen = np.random.default_rng(seed), []
        scene.reset(task, seed, seed=seed)
        for i in range(8):
            if i % 4 == 0: seen += map(scene.picture, CAMERAS.values())
            scene.step(push.uniform(-1, 1, 7))
            seen += [scene.data.qpos.copy(), scene.data.qvel.copy(), scene.state(), scene.holds(task)]
        return seen
    new, (task, other, *_) = GoalScene(), GOALS
    want = watched(new, task, 43)
    new.close()
    for t, seed in ((other, 7), (task, 8)): watched(goal_scene(), t, seed)
    for _ in range(2):
        assert all(map(np.array_equal, watched(goal_scene(), task, 43), want))
        goal_scene().close()


@with_libero
def test_lerobots_own_environment_runs_in_craft_eval(tmp_path):
    "The package has no pickled initial states: LeRobot alone refuses it."
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import make_pre_post_processors
    from craft_nb import cli
    from craft_nb.fast import fit_action_tokenizer, make_text_tokenizer
    from craft_nb.libero import GoalWorkload
    from craft_nb.small import PI0FastSmallPolicy, save_checkpoint_folder
    work, ones = GoalWorkload(tmp_path), torch.ones(8)
    fit_action_tokenizer(torch.rand(8, 10, 7, generator=torch.Generator().manual_seed(0))
                         .numpy()).save_pretrained(work.tokenizers / "action")
    make_text_tokenizer(work.texts.values()).save_pretrained(work.tokenizers / "text")
    inputs = ({f"observation.images.{k}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for k in ("image", "image2")}
              | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))})
    cfg = work.config(input_features=inputs, output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
                      max_state_dim=8, tokenizer_max_length=30)
    stats = {k: dict(min=-x, max=x) for k, x in (("observation.state", ones), ("action", ones[:7]))}
    save_checkpoint_folder(PI0FastSmallPolicy(cfg), *make_pre_post_processors(cfg, dataset_stats=stats),
                           tmp_path / "policy")
    cli.evaluate([f"--policy.path={tmp_path / 'policy'}", "--env.type=libero", "--env.task=libero_goal",
                  "--env.task_ids=[8]", "--env.observation_height=64", "--env.observation_width=64",
                  "--env.episode_length=11", "--eval.n_episodes=1", "--eval.batch_size=1",
                  f"--out_dir={tmp_path / 'eval'}"])
    (cell,) = json.loads((tmp_path / "eval/eval.json").read_text())["success"].values()
    assert cell["n"] == 1
