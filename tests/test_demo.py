"""The demo's parts on real input: one tiny workload from the simulator serves every test here."""
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

pytest.importorskip("metaworld", reason="the simulator: pip install 'craft_nb[sim]'")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    from craft_nb.demo import tiny_workload
    return tiny_workload(tmp_path_factory.mktemp("demo") / "tiny", tasks=("plate-slide-v3", "window-open-v3"),
                         episodes=2)


def test_help_answers_without_lerobot():
    code = ("import sys, craft_nb.demo as d\ntry: d.demo_main(['--help'])\nexcept SystemExit: "
            "pass\nassert not {'lerobot', 'transformers', 'mujoco'} & set(sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and "check-tasks" in out.stdout, out.stderr


def test_a_killed_demo_leaves_no_workers(tmp_path):
    code = ("import sys, time\nfrom craft_nb.demo import Run\nif __name__ == '__main__':\n    run = "
            "Run(sys.argv[1])\n    print(*run.pool._processes, flush=True)\n    time.sleep(60)")
    (tmp_path / "run.py").write_text(code)
    demo = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "demo"], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(x)) for x in demo.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(3)  # they have begun to import
    demo.kill(); demo.wait(); demo.stdout.close()
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlived the demo"


@pytest.mark.parametrize(
    "argv, says", [(["teach"], "unknown stage teach"), (["--sieze=tiny"], "unrecognized arguments"),
                   (["--size=huge"], "invalid choice"), (["--arms=craft:nothing"], "unknown arm craft:nothing"),
                   (["--policy=act", "--arms=sft,craft:tokens"],
                    "--policy=act has no arm craft:tokens: choose from sft, replay, constant, craft:answer"),
                   (["--arms=craft:answer"], "--policy=pi0_fast has no arm craft:answer: choose from sft, origin"),
                   (["--policy=diffusion"], "invalid choice: 'diffusion' (choose from"),
                   (["check-tasks", "--policy=act"], "act has no twin that sees grey pictures"),
                   (["--spread=5,5"], "one number above 0, or one for each of handle-press-v3, "
                    "button-press-topdown-v3, button-press-v3; found '5,5'")])
def test_wrong_use_is_one_line_and_writes_nothing(argv, says, tmp_path, capsys):
    from craft_nb.demo import demo_main
    with pytest.raises(SystemExit) as e: demo_main([*argv, f"--folder={tmp_path / 'x'}"])
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_dataset_holds_the_pixels_of_the_simulator(work):
    from craft_nb.small import make_small_env
    env = make_small_env("plate-slide-v3")
    for episode in (0, 1):
        frame = work.dataset([episode])[0]
        seen = env.reset(seed=episode)[0]
        assert np.array_equal((frame["observation.image"] * 255).round().byte().permute(1, 2, 0).numpy(),
                              seen["pixels"])
        assert np.allclose(frame["observation.state"], seen["agent_pos"], atol=1e-6)


def test_checkpoint_trains_and_evaluates_in_stock_lerobot(work, tmp_path):
    "Nothing of LeRobot is patched: its own training script takes the checkpoint, and its own evaluation the result."
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.scripts.lerobot_train import train
    from craft_nb.small import roll_out, vector_env
    policy = PreTrainedConfig.from_pretrained(work.policy_path)
    policy.pretrained_path = work.policy_path
    cfg = TrainPipelineConfig(DatasetConfig(work.repo_id, root=str(work.root)), policy=policy, output_dir=tmp_path
                              / "run", steps=2, batch_size=2, save_freq=2, num_workers=0, env_eval_freq=0, seed=1)
    train.__wrapped__(cfg)
    path = tmp_path / "run/checkpoints/last/pretrained_model"
    before, after = work.policy(), work.policy(path)
    assert type(after).__name__ == "PI0FastSmallPolicy"
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
    success, actions = roll_out(after, work.processors(path), vector_env("plate-slide-v3", 2, 12), [1, 2])
    assert success == [False, False] and [np.shape(a) for a in actions] == [(12, 4)] * 2


def test_expert_that_fails_is_named():
    from craft_nb.small import record_episodes
    with pytest.raises(RuntimeError, match="expert of window-open-v3 failed .* raise episode_length"):
        list(record_episodes(["window-open-v3"], 3, episode_length=10))


def test_missing_renderer_names_the_packages(monkeypatch):
    from craft_nb import small
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(small.ctypes.util, "find_library", lambda lib: None)
    with pytest.raises(RuntimeError, match="apt-get install libegl1"): small.pick_gl()


def test_policy_predicts_what_it_was_taught(work, tmp_path):
    """Enough steps on a handful of frames, and greedy decoding gives the demonstrated chunks back: tokenizers, masks
    and decoding agree."""
    import torch
    from craft_nb.small import new_policy
    policy = new_policy(work)[0].train()
    batch, opt = work.batch(4), torch.optim.AdamW(policy.parameters(), 2e-3)
    for _ in range(60):
        opt.zero_grad(); policy(batch)[0].backward(); opt.step()
    error = (policy.predict_action_chunk(batch) - batch["action"]).abs().mean()
    assert error < 0.08, error


def test_stages_are_skipped_or_refused(work, tmp_path):
    "A finished stage is not run again; with other settings it stops and names them."
    from craft_nb.demo import DATA, Run, SIZES, replace
    said = []
    run = Run(tmp_path, SIZES["tiny"], say=said.append)
    run.marker("record").parent.mkdir(parents=True)
    settings = {k: getattr(run.settings, k) for k in DATA}
    run.marker("record").write_text(json.dumps(dict(settings=settings, seconds=1, result={})))
    run.stage("record")
    assert said and "done before" in said[0]
    with pytest.raises(ValueError, match="episodes: 3 then, 4 now"):
        Run(tmp_path, replace(run.settings, episodes=4)).stage("record")
    with pytest.raises(FileNotFoundError, match="run craft-demo teacher first"): run.result("teacher")


@pytest.fixture
def here(monkeypatch):
    "The demo's jobs in this process: no workers that import LeRobot first."
    from craft_nb import demo
    monkeypatch.setattr(demo, "run_jobs", lambda run, name, jobs, total=0: [f(*args) for f, args, _ in jobs])
    monkeypatch.setattr(demo.Run, "pool", None)


TINY = ["tokenizers", "teacher", "caches", "finetune", "evaluate", "report", "--size=tiny", "--old=plate-slide-v3",
        "--new=window-open-v3", "--spread=1", "--episodes=2",
        "--episode-length=20", "--teacher-steps=2", "--steps=2", "--eval-episodes=1"]


@pytest.mark.slow
def test_whole_demo_of_a_policy_that_answers_in_numbers(work, here, tmp_path):
    from craft_nb.demo import demo_main
    shutil.copytree(work.root, tmp_path / "dataset")
    demo_main([*TINY, "--policy=act", "--arms=sft,constant,craft:answer", f"--folder={tmp_path}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["settings"]["policy"] == "act" and report["default"] == "craft:answer"
            and list(report["views"]) == ["answer"] and report["drift"] == {})
    assert (all(a["held_out"] > 0 and a["train"] > 0 for a in report["arms"].values())
            and set(report["arms"]) == {"sft", "constant", "craft:answer"})
    page = (tmp_path / "report.html").read_text()
    assert "squared distance of the chunk of actions" in page and "Kullback" not in page and "data:image/gif" in page
    first = json.loads((tmp_path / "runs/craft-answer/metrics.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1 and first["retention_loss"] <= 1e-6 and list(first["retention_losses"]) == ["answer"]
    with pytest.raises(ValueError, match="policy: act then, pi0_fast now"): demo_main([*TINY, f"--folder={tmp_path}"])


@pytest.mark.slow  # two minutes of CPU
def test_whole_demo_tiny(tmp_path, capsys):
    "Every stage, from the simulator to report.html, on next to nothing."
    from craft_nb.demo import demo_main
    args = ["--size=tiny", f"--folder={tmp_path}", "--old=plate-slide-v3", "--new=window-open-v3", "--spread=1",
            "--arms=sft,craft:action_logits", "--episodes=2", "--eval-episodes=2"]
    demo_main(args)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"] == dict(old=["plate-slide-v3"], new=["window-open-v3"])
    cells = [c for by in report["success"].values() for c in by.values()]
    assert len(cells) == 6 and all(c["n"] == 2 and 0 <= c["low"] <= c["rate"] <= c["high"] <= 1 for c in cells)
    assert (set(report["step_seconds"]) == set(report["drift"]) == set(report["arms"]) == {"sft", "craft:action_logits"}
            and report["default"] == "craft:action_logits")
    assert all(a["held_out"] > 0 and a["train"] > 0 and (a["projected"], a["steps"]) == (0, 4)
               for a in report["arms"].values()), report["arms"]
    page = (tmp_path / "report.html").read_text()
    # opens without network
    assert "data:image/gif" in page and not re.search(r"""(src|href)=["']?https?:|@import|url\(["']?https?:""", page)
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert ({*runs["runs"]} == {"sft", "craft-action_logits"} and runs["tasks"]["new"] == ["window-open-v3"]
            and "teacher" in runs["measured"])
    first = json.loads((tmp_path / "runs/craft-action_logits/metrics.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1 and first["retention_loss"] <= 1e-6  # the student is the teacher
    capsys.readouterr()
    demo_main(args)
    assert capsys.readouterr().out.count("done before") == 7
