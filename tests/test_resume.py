"A killed run goes on as if nothing had happened: small here; `make kill-test N=…` does many."
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import kill_training as K


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return *K.prepare(folder, work), folder


def run(argv, folder, code=0):
    "craft-train in a process → what it said."
    log = Path(folder) / f"{time.monotonic_ns()}.log"
    assert K.wait(K.child(argv, log)) == code, log.read_text()[-3000:]
    return log.read_text()


def test_kills(place):
    work, cache, folder = place
    runs, writing = K.kill_runs(folder / "kills", work, cache, 3, seed=int(time.time()))
    assert runs == 1 and writing >= 1  # the first and the third kill wait for a checkpoint write


@pytest.fixture(scope="module")
def done(place):
    work, cache, folder = place
    run(K.first_line(work, cache, folder / "done", steps=4), folder)
    return folder / "done"


def test_a_finished_run_is_left_as_it_is(done, place):
    before = K.result(done)
    assert "Trained to step 4/4" in run(K.resume_line(done), place[2]) and not K.difference(K.result(done), before)


def test_a_resumed_run_writes_over_an_abandoned_continuation(done, place):
    "From step 2 again, with a larger budget: step 4 is then that of the new run, and `last` is right at every moment."
    shutil.copytree(done, other := place[2] / "again", symlinks=True)
    config = other / "checkpoints/000002/pretrained_model/train_config.json"
    run(["--resume", f"--config_path={config}", f"--output_dir={other}", "--craft.epsilon_end=5"], place[2])
    assert os.readlink(other / "checkpoints/last") == "000004"
    assert sorted(p.name for p in (other / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    a, b = K.result(done), K.result(other)
    assert [r["step"] for r in b["rows"]] == [1, 2, 3, 4] and a["rows"][:2] == b["rows"][:2] and a["rows"][2] != b["rows"][2]
    assert a["training_state/craft_state.json"] != b["training_state/craft_state.json"]


def test_a_checkpoint_holds_all_that_craft_knows(done):
    state = json.loads((done / "checkpoints/last/training_state/craft_state.json").read_text())
    assert set(state["retention"]["duals"]["shared"]) >= {"lam", "memory", "pending", "drift", "epsilon_scale"}
    assert state["step"] == 4
    assert state["retention"]["anchors"]["anchors_seen"] == 8 and state["retention"]["anchors"]["cache_id"]
    assert set(state["hashes"]) >= {"weights", "normalisation"}


def test_resume_with_another_cache_or_without_one_is_refused(done, place):
    work, cache, folder = place
    _, other = K.prepare(folder / "other", work, seed=1)
    before = K.result(done)
    longer = ["--steps=6"]
    assert "another cache" in run(K.resume_line(done, *longer, f"--craft.anchor_cache_dir={other}"), folder, 1)
    assert "there is no anchor cache at /gone" in run(K.resume_line(done, *longer, "--craft.anchor_cache_dir=/gone"), folder, 1)
    assert "with the same --craft.enabled" in run(K.resume_line(done, *longer, "--craft.enabled=false"), folder, 1)
    assert not K.difference(K.result(done), before)


def test_resume_refuses_what_it_would_not_take(done, place):
    "λ, its limits and the gate go on from the checkpoint; a silent override would stand in the config as if it had been used."
    said = run(K.resume_line(done, "--steps=6", "--craft.projection_gate=never", "--craft.lambda_max=50"), place[2], 1)
    assert "cannot change projection_gate (" in said and "lambda_max (" in said and "--policy.path=" in said
    assert "checkpoint stands at step 4" in run(K.resume_line(done, "--steps=3"), place[2], 1)


def test_adapters_resume(place):
    "LoRA: the base stays, the adapters and their optimizer go on bit for bit."
    work, cache, folder = place
    lora = ["--peft.method_type=LORA", "--peft.r=4", r"--peft.target_modules=.*language_model.*\.(q_proj|v_proj)"]
    run(K.first_line(work, cache, whole := folder / "lora", *lora, steps=4), folder)
    run(["--resume", f"--config_path={whole}/checkpoints/000002/pretrained_model/train_config.json",
         f"--output_dir={folder / 'lora2'}"], folder)
    a, b = K.result(whole), K.result(folder / "lora2")
    assert "pretrained_model/adapter_model.safetensors" in a and a.pop("rows")[2:] == b.pop("rows") and not K.difference(a, b)
    from safetensors.torch import load
    moved = load(a["pretrained_model/adapter_model.safetensors"])
    assert any(v.abs().max() > 0 for k, v in moved.items() if "lora_B" in k)
    assert all(torch.isfinite(v).all() for v in moved.values())
