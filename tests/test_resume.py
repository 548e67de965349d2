"A killed run goes on as if nothing had happened: small here; `make kill-test N=…` does many."
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import kill_training as K
import ranks as R
from craft_nb import Callback


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


# the same bits from every step on

EPOCH = ["--dataset.episodes=[0]"]


def three_epochs(work, ranks=1, steps_an_epoch=3):
    "Frames a rank and step, so that an epoch of one episode has that many steps, the last of them incomplete."
    from lerobot.datasets import LeRobotDatasetMetadata
    frames = int(LeRobotDatasetMetadata("local/x", root=work.root).episodes["length"][0])
    size = next(b for b in range(1, frames) if -(-(-(-frames // b)) // ranks) == steps_an_epoch and frames % b)
    assert frames % (size * ranks)
    return size


class Draws(Callback):
    "Writes down what the random state gives before each step: it must go on as well."
    def __init__(self, file): self.file = file
    def before_step(self, trainer):
        with open(self.file, "a") as f: f.write(f"{trainer.step} {torch.rand(()).item()}\n")


@pytest.mark.parametrize("ranks,workers,more", [(1, 0, {}), (1, 2, {}), (2, 0, {}), (2, 2, {}),
                                                (1, 2, dict(accumulate=2, persistent_workers="false"))])
def test_bit_equal_from_every_step(place, ranks, workers, more):
    "Three epochs with incomplete last batches; the anchors cross their own."
    work, cache, folder = place
    accumulate, persistent = more.get("accumulate", 1), more.get("persistent_workers", "true")
    name = folder / f"every-{ranks}-{workers}-{accumulate}"
    size = three_epochs(work, ranks, 3 * accumulate)
    whole = name / "whole"
    flags = [f for f in K.first_line(work, cache, whole, *EPOCH, steps=9, save_freq=1, anchor_batch_size=8 // ranks,
                                     anchor_num_workers=int(workers > 0), gradient_accumulation_steps=accumulate)
             if not f.startswith(("--batch_size", "--num_workers"))]
    flags += [f"--batch_size={size}", f"--num_workers={workers}", f"--persistent_workers={persistent}"]
    name.mkdir()
    def train(argv, out):
        R.on_ranks(ranks, f"{out}.log",
                   lambda rank: R.train_rank(argv, "ddp", [Draws(f"{out}.draws")] if rank == 0 else []))
    def draws(out): return Path(f"{out}.draws").read_text().splitlines()
    def go_on(run, k, out, save_freq=100):
        config = f"{run}/checkpoints/{k:06d}/pretrained_model/train_config.json"
        train(["--resume", f"--config_path={config}", f"--output_dir={out}", f"--save_freq={save_freq}"], out)
        a, b = K.result(whole), K.result(out)
        assert a.pop("rows")[k:] == b.pop("rows") and not K.difference(a, b), k
        assert draws(whole)[k:] == draws(out), k
    train(flags, whole)
    state = K.result(whole)["training_state/craft_state.json"]
    assert (json.loads(state)["data"] == dict(epoch=3, start_index=0)
            and json.loads(state)["retention"]["anchors"]["anchors_seen"] == 40)
    for k in range(1, 9): go_on(whole, k, name / str(k), save_freq=1 if k == 2 else 100)
    go_on(name / "2", 5, name / "again")  # a resumed run


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
    assert ([r["step"] for r in b["rows"]] == [1, 2, 3, 4] and a["rows"][:2] == b["rows"][:2]
            and a["rows"][2] != b["rows"][2])
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
    assert "there is no anchor cache at /gone" in run(K.resume_line(done, *longer, "--craft.anchor_cache_dir=/gone"),
                                                      folder, 1)
    assert "with the same --craft.enabled" in run(K.resume_line(done, *longer, "--craft.enabled=false"), folder, 1)
    assert not K.difference(K.result(done), before)


def test_resume_refuses_what_it_would_not_take(done, place):
    """λ, its limits and the gate go on from the checkpoint; a silent override would stand in the config as if it had
    been used."""
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
    assert ("pretrained_model/adapter_model.safetensors" in a and a.pop("rows")[2:] == b.pop("rows")
            and not K.difference(a, b))
    from safetensors.torch import load
    moved = load(a["pretrained_model/adapter_model.safetensors"])
    assert any(v.abs().max() > 0 for k, v in moved.items() if "lora_B" in k)
    assert all(torch.isfinite(v).all() for v in moved.values())
