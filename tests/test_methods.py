"Methods against straightforward loops of their own, on cases small enough to check."
import itertools
import math
import sys

import pytest
import torch
from torch import nn

from craft_nb import Callback, CraftConfig, CraftTrainer, Retention
from craft_nb.losses import make_views
from linear_run import Linear, LinearAdapter

D, STEPS, LR = 5, 24, 0.05


class Keep(Callback):
    def __init__(self): self.rows = []
    def after_step(self, trainer, record): self.rows.append(record)


def streams(seed=0):
    "Old and new weights, and the same batches and anchors for whoever asks with the same seed."
    g = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, D, D, generator=g)
    h = torch.Generator().manual_seed(seed + 1)
    xs = (torch.randn(8, D, generator=g) for _ in itertools.count())
    return old, ({"x": x, "y": x @ new.T} for x in xs), (torch.randn(6, D, generator=h) for _ in itertools.count())


def craft_run(clip=1.0, **config):
    old, batches, anchors = streams()
    policy = Linear(D, 0, 0)
    policy.w.weight.data.copy_(old)
    views = make_views(["pooled"], layers=[-1], pooling=["vision_token_mean"], distance="mse")
    ret = Retention(policy, ({"input_ids": x, "teacher_hidden": (x @ old.T)[:, None, None]} for x in anchors), views,
                    LinearAdapter(), CraftConfig(**config), STEPS)
    keep = Keep()
    CraftTrainer(policy, batches, torch.optim.SGD(policy.parameters(), LR), steps=STEPS, retention=ret,
                 grad_clip_norm=clip, callbacks=[keep]).fit()
    return policy.w.weight.detach(), keep.rows


def origin_loop(clip=1.0, K=5, lam=1.0, eps=(1.0, 0.1), lam_lr=0.01, threshold=-0.1, gate=True):
    "The origin's step written down plainly: no part of the package in it."
    old, batches, anchors = streams()
    w, rows = old.clone().requires_grad_(), []
    for step in range(STEPS):
        batch = next(batches)
        task = (batch["x"] @ w.T - batch["y"]).square().mean()
        g, = torch.autograd.grad(task, w)
        row = dict(task_loss=task.item(), cosine=None)
        if step % K == 0:
            x = next(anchors)
            ret = (x @ w.T - x @ old.T).square().mean()
            r, = torch.autograd.grad(ret, w)
            norms = (g.norm() * r.norm()).item()
            row |= dict(retention_loss=ret.item(), cosine=(g * r).sum().item() / norms if ret.item() > 1e-9 else None,
                        projected=False)
            if gate and row["cosine"] is not None and row["cosine"] < threshold:
                g, row["projected"] = g - (g * r).sum() / (r * r).sum() * r, True
            g = g + lam * r
            u = step / STEPS
            lam = min(max(lam + lam_lr * (ret.item() - (eps[0] * (1 - u) + eps[1] * u)), 0.0), 10.0)
        g = g * min(1.0, clip / (g.norm().item() + 1e-6))
        with torch.no_grad(): w -= LR * g
        rows.append(row | {"lambda": lam})
    return w.detach(), rows


def agree(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (math.isclose(a["task_loss"], b["task_loss"], rel_tol=1e-5)
                and math.isclose(a["lambda"], b["lambda"], rel_tol=1e-6))
        if "retention_loss" not in b: assert a["retention"] is False
        elif b["cosine"] is not None:
            assert (math.isclose(a["retention_loss"], b["retention_loss"], rel_tol=1e-4, abs_tol=1e-9)
                    and a["projected"] == b["projected"])
            assert a["cosine"] is None or math.isclose(a["cosine"], b["cosine"], abs_tol=1e-4)


@pytest.mark.parametrize("clip", [1.0, 100.0])
def test_the_origins_settings_take_the_origins_steps(clip):
    w, rows = craft_run(clip)  # every default is the origin's
    expected, plain = origin_loop(clip)
    agree(rows, plain)
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-6)


def test_projection_at_work():
    how = dict(K=2, lam_lr=0.5, eps=(0.01, 0.001), threshold=0.3)
    w, rows = craft_run(retention_freq=2, lambda_lr=0.5, epsilon_start=0.01, epsilon_end=0.001, conflict_threshold=0.3)
    expected, plain = origin_loop(**how)
    agree(rows, plain)
    assert 3 <= sum(bool(r["projected"]) for r in rows[2:])
    torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure_every", [1, 3])
def test_a_sum_is_enough_where_nothing_projects(measure_every):
    w, rows = craft_run(retention_freq=1, lambda_lr=0.1, projection_gate="never", measure_every=measure_every)
    expected, plain = origin_loop(K=1, lam_lr=0.1, gate=False)
    agree(rows, [{k: v for k, v in r.items() if k != "projected"} | {"projected": False} for r in plain])
    assert ([r["step"] for r in rows if r["grad_norm_retain"] is None]
            == [s + 1 for s in range(10, STEPS) if s % measure_every])
    torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-5)


def test_a_sum_needs_no_second_gradient():
    """Peak of storages that a step makes, in copies of the weights: one with g alone, and no more with anchors beside
    it."""
    from craft_nb.trainer import PeakMemory, nbytes, one_step
    def peak(**config):
        torch.manual_seed(0)
        policy, (x, y) = Linear(4, 0, 0), torch.randn(2, 8, 256)
        policy.w = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
        anchors = itertools.repeat({"input_ids": x, "teacher_hidden": y[:, None, None]})
        ret = Retention(policy, anchors, make_views(["pooled"], layers=[-1], pooling=["vision_token_mean"]),
                        LinearAdapter(), CraftConfig(retention_freq=1, **config), 1)
        t = CraftTrainer(policy, itertools.repeat({"x": x, "y": y}), torch.optim.SGD(policy.parameters(), LR), steps=30,
                         retention=ret)
        peaks = []
        for _ in range(12):
            with PeakMemory(*policy.parameters()) as memory: one_step(t)
            peaks.append(memory.peak / nbytes(policy.parameters()))
        return peaks
    apart, summed = peak(), peak(projection_gate="never")
    assert min(apart) > 1.9  # g and r
    assert max(summed) < 1.45, summed  # g, and one of eight layers' r; measured steps among them


# through the command

@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    import kill_training as K
    folder = tmp_path_factory.mktemp("methods")
    return *K.prepare(folder, work), folder


def run(place, name, *more, code=0, argv=None, **craft):
    "craft-train in a process → its folder, what it said."
    import kill_training as K
    work, cache, folder = place
    out, log = folder / name, folder / f"{name}.log"
    craft = dict(controller="share", projection_gate="never", retention_freq=1, views="action_logits",
                 heldout_fraction=0.25) | craft
    assert K.wait(K.child(argv or K.first_line(work, cache, out, *more, **craft), log)) == code, log.read_text()[-3000:]
    return out, log.read_text()


def events(out, kind):
    import json
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r.get("event") == kind]


def test_a_budget_is_judged_on_held_out_anchors(place):
    import kill_training as K
    from craft_nb.anchors import AnchorCacheDataset
    from craft_nb.trainer import cache_episodes, set_aside
    out, said = run(place, "share", "--craft.budget=1000", "--craft.require_budget=true", "--craft.heldout_every=3")
    c, = events(out, "certificate")
    rows = K.rows(out)
    assert [r["step"] for r in rows if r["held_out"] is not None] == [3, 6] and all(r["share"] >= 0 for r in rows[1:])
    kept, held = set_aside(cache_episodes(AnchorCacheDataset(place[1])), 0.25)
    assert ((c["anchors"], c["episodes"], c["met"]) == (len(held), 1, True) and c["held_out"] > 0
            and c["unit"] == "nats per action token")
    assert f"Budget 1e+03 nats per action token, held-out {c['held_out']:.3g} (1 episode), met" in said
    card = (out / "checkpoints/last/pretrained_model/README.md").read_text()
    assert (said[said.index("held-out"):].split(", met")[0] + ", met" in card
            and f"{len(held)} anchors that were not trained on" in card)
    # the report's own row
    assert all(x in card for x in ("| keeps by | ", "| held-out L_ret | ", ": met) |",
                                   "| old success, predicted, not measured | "))
    out, said = run(place, "missed", "--craft.budget=1e-9", "--craft.require_budget=true", code=2)
    assert "not met" in said and events(out, "certificate")[0]["met"] is False
    # the judge agrees with a pass of its own
    from craft_nb.lerobot import cache_views
    from lerobot.configs.policies import PreTrainedConfig
    from craft_nb.lerobot import load_policy_alone
    from craft_nb.trainer import AnchorPass
    from craft_nb.policies import adapter_for
    cfg = PreTrainedConfig.from_pretrained(out / "checkpoints/last/pretrained_model")
    cfg.pretrained_path = out / "checkpoints/last/pretrained_model"
    policy, *_ = load_policy_alone(cfg)
    cache = AnchorCacheDataset(place[1], views=["action_logits"])
    with torch.no_grad():
        loss = AnchorPass(adapter_for(policy), cache_views(cache, CraftConfig(views="action_logits")),
                          cache.batch(held))(policy)
    assert math.isclose(loss["action_logits"].item(), events(out, "certificate")[0]["held_out"], rel_tol=1e-4)


def test_a_share_resumes_bit_for_bit(place):
    import kill_training as K
    more = ["--craft.budget=0.001", "--craft.heldout_every=2"]
    whole, _ = run(place, "whole", *more)
    config = whole / "checkpoints/000004/pretrained_model/train_config.json"
    again, _ = run(place, "again", argv=["--resume", f"--config_path={config}", f"--output_dir={place[2] / 'again'}"])
    a, b = K.result(whole), K.result(again)
    assert a.pop("rows")[4:] == b.pop("rows") and not K.difference(a, b)
    assert events(whole, "certificate")[0]["held_out"] == events(again, "certificate")[0]["held_out"]


def test_what_cannot_be_judged_is_refused(place):
    assert "leaves none to train on" in run(place, "none", "--craft.heldout_fraction=0.9", code=1)[1]
    assert "is the cache that is trained on" in run(place, "same", f"--craft.heldout_cache_dir={place[1]}", code=1)[1]
    with pytest.raises(ValueError, match="require_budget"): CraftConfig(require_budget=True)


METHODS = dict(constant="", share="", sft="", l2sp="alpha:0.5", retain="alpha:0.5", consft="", der="", agem="",
               replay="episodes:2,3,batch_size:4", ewc="episodes:2,3,samples:4", lwf="top_k:8", mir="among:2", aegis="")
NEW = "--dataset.episodes=[0,1]"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_one_flag(place, method):
    import kill_training as K
    from craft_nb.monitor import read_records
    out, said = run(place, f"method-{method}", f"--craft.method={method}", f"--craft.method_options={METHODS[method]}",
                    NEW, "--steps=2", "--save_freq=2",
                    controller="ascent", heldout_fraction=0.0, views="pooled" if method == "aegis" else "action_logits")
    rows = K.rows(out)
    assert ([r["step"] for r in rows] == [1, 2] and all(r["skipped"] is None for r in rows)
            and "Trained to step 2/2" in said)
    assert (rows[-1]["retention_loss"] is not None) == (method not in ("sft", "retain", "consft"))
    assert read_records(out / "metrics.jsonl")[0]["craft"]["method"] == method


@pytest.mark.parametrize("method", ["l2sp", "replay", "ewc"])
def test_what_a_method_keeps_survives_a_resume(place, method):
    import kill_training as K
    more = [] if method == "l2sp" else [NEW]
    whole, _ = run(place, f"{method}-whole", f"--craft.method={method}", f"--craft.method_options={METHODS[method]}",
                   *more, heldout_fraction=0.0)
    config = whole / "checkpoints/000004/pretrained_model/train_config.json"
    again, _ = run(place, f"{method}-again",
                   argv=["--resume", f"--config_path={config}", f"--output_dir={place[2] / f'{method}-again'}"])
    a, b = K.result(whole), K.result(again)
    assert ("training_state/method.safetensors" in a) == (method != "replay")
    assert a.pop("rows")[4:] == b.pop("rows") and not K.difference(a, b)


def test_old_demonstrations_come_in_the_order_of_seed_and_rank(work):
    "Each old frame once an epoch, over all ranks, as the data set has it; from any step on; with workers as without."
    from collections import Counter
    from craft_nb.lerobot import OldDemonstrations
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    data = LeRobotDataset("local/old", root=work.root, episodes=[1, 3])
    rows, b = [*range(0, len(data), 5)], 3
    def line(rank, step=0, k=6, **how):
        old = OldDemonstrations(data, rows, b, lambda x: x, 7, rank, 2, **how)
        old.load_state_dict(old.state_dict() | dict(seen=step * 2 * b))
        return [x["index"].tolist() for x in itertools.islice(old.forever(), k)], old.state_dict()
    steps = math.lcm(len(rows), 2 * b) // (2 * b)  # whole epochs
    (left, _), (right, _) = line(0, k=steps), line(1, k=steps)
    assert len(set(Counter(i for x in left + right for i in x).values())) == 1 and left != right
    assert {i for x in left + right for i in x} == {int(data[i]["index"]) for i in rows}
    before = torch.get_rng_state()
    again, state = line(1, step=2, k=2, num_workers=1, multiprocessing_context="fork")
    assert again == right[2:4] and state["seen"] == 4 * 2 * b and torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="other old demonstrations"):
        OldDemonstrations(data, rows[1:], b, None).load_state_dict(state)


def test_old_demonstrations_that_do_not_fit_are_refused(work):
    from types import SimpleNamespace
    from craft_nb.lerobot import old_data, some_episodes
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    trained = LeRobotDataset("local/all", root=work.root, episodes=[0, 1])
    cfg = SimpleNamespace(dataset=DatasetConfig("local/all", root=str(work.root)), seed=0,
                          policy=PreTrainedConfig.from_pretrained(work.policy_path))
    def old(dataset="", root="", episodes="", fraction=1.0):
        return old_data(cfg, trained, dataset, root, episodes, fraction).episodes
    assert old(episodes="2-3") == [2, 3] == old(episodes="[3, 2]") and len(old(episodes="2-3", fraction=0.5)) == 1
    assert some_episodes(trained.meta, range(4), 0.1, 0) == some_episodes(trained.meta, range(4), 0.1, 0)
    # one of each task
    assert len({trained.meta.episodes["tasks"][e][0] for e in some_episodes(trained.meta, range(4), 0.01, 0)}) == 2
    for why, which in {"the episodes 0, 1 are trained on already": dict(episodes="0-3"),
                       "name the old demonstrations": dict(), "are trained on already": dict(root=str(work.root)),
                       "no data set at": dict(dataset="/nowhere/at/all"),
                       "fraction above 0": dict(episodes="2", fraction=0.0),
                       "has episodes 0 … 3": dict(episodes="2-9")}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=why): old(**which)


def test_an_unknown_method_is_refused(place):
    assert "method: expected one of craft, constant" in run(place, "nobody", "--craft.method=nobody", code=1)[1]
    assert "method_options: l2sp takes alpha" in run(place, "beta", "--craft.method=l2sp",
                                                     "--craft.method_options=beta:1", heldout_fraction=0.0, code=1)[1]


def test_osf_of_peft_is_a_flag_away(place):
    import kill_training as K
    whole, _ = run(place, "osf", "--peft.method_type=OSF", "--peft.target_modules=['q_proj','v_proj']",
                   "--craft.method=constant", "--steps=4", controller="ascent", heldout_fraction=0.0)
    config = whole / "checkpoints/000002/pretrained_model/train_config.json"
    again, _ = run(place, "osf-again",
                   argv=["--resume", f"--config_path={config}", f"--output_dir={place[2] / 'osf-again'}"])
    a, b = K.result(whole), K.result(again)
    assert (a.pop("rows")[2:] == b.pop("rows") and not K.difference(a, b)
            and "pretrained_model/adapter_model.safetensors" in a)


def test_a_method_of_ones_own_is_found_where_the_command_is_called(tmp_path, monkeypatch):
    from craft_nb.methods import MethodParts, find_method, make_method
    (tmp_path / "mine_alone.py").write_text("from craft_nb.trainer import Method\nclass Ball(Method):\n    name, "
                                            "options = 'ball', dict(radius=1.0)\n    def __init__(self, parts, "
                                            "radius): self.radius = radius\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert (make_method(MethodParts(None, CraftConfig(method="mine_alone:Ball", method_options="radius:0.5"), 1)).radius
            == 0.5)
    with pytest.raises(ValueError, match="cannot be loaded"): find_method("mine_alone:Box")
    with pytest.raises(ValueError, match="rehearses no labels"):
        make_method(MethodParts(None, CraftConfig(method="mine_alone:Ball", rehearsal=0.5), 1))


# labels beside the teacher's answers

def labelled(work, views=("action_logits",)):
    "A policy, its anchors fed with the data set's actions, the batch they were made of, and views."
    from craft_nb.builder import anchor_batch_targets
    policy, batch = work.policy(), work.processors()[0](work.batch(4))
    made = make_views(list(views))
    return policy, anchor_batch_targets(policy, batch, made, "dataset"), batch, made


def test_labels_cost_what_lerobots_own_forward_says(work, monkeypatch):
    from craft_nb.losses import LabelsView
    from craft_nb.policies import adapter_for
    from craft_nb.trainer import AnchorPass
    policy, anchors, batch, _ = labelled(work)
    found, own = [], nn.CrossEntropyLoss.forward
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda s, x, y: found.append(own(s, x, y)) or found[-1])
    with torch.no_grad():
        policy(batch)
        ours = AnchorPass(adapter_for(policy), {"rehearsal": LabelsView()}, anchors)(policy)["rehearsal"]
    theirs = found[0].reshape(len(anchors["action_ids"]), -1)  # a token each, the constant beginning and padding too
    counted = nn.functional.pad(anchors["predict_mask"], (0, theirs.shape[1] - anchors["predict_mask"].shape[1]))
    torch.testing.assert_close(ours, theirs[counted].mean(), rtol=1e-5, atol=1e-6)


def test_rehearsal_mixes_two_gradients(work):
    from types import SimpleNamespace
    from contextlib import nullcontext
    from craft_nb.policies import adapter_for
    from craft_nb.retention import retention_backward
    policy, anchors, _, views = labelled(work)
    with torch.no_grad():
        # a student that has moved
        for p in policy.parameters(): p.add_(torch.randn_like(p) * 1e-2 * p.std(correction=0))
    def gradient(**config):
        cfg = CraftConfig(method="share", controller="share", projection_gate="never", views="action_logits", **config)
        ret = Retention(policy, itertools.repeat(anchors), views, adapter_for(policy), cfg, 10)
        policy.zero_grad()
        trainer = SimpleNamespace(policy=policy, autocast=nullcontext, backward=lambda x: x.backward())
        loss = retention_backward(ret, trainer)
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), loss, ret.rehearsed
    kept, labels, mixed = (gradient(rehearsal=x) for x in (0.0, 1.0, 0.3))
    assert torch.allclose(kept[1], labels[1]) and torch.allclose(mixed[1], kept[1])  # L_ret stays what it was
    assert kept[2] == 0 and labels[2] > 0 and torch.allclose(mixed[2], labels[2])
    want = 0.7 * kept[0] + 0.3 * labels[0]
    assert (mixed[0] - want).norm() < 1e-4 * want.norm()
    parts = gradient(rehearsal=0.3, anchor_micro_batch=2, anchor_batch_size=4)
    assert (parts[0] - mixed[0]).norm() < 1e-4 * want.norm() and torch.allclose(parts[2], mixed[2])


def test_rehearsal_needs_labels(place, tmp_path):
    import kill_training as K
    from craft_nb.lerobot import BuildCacheConfig, build_cache
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    work, _, folder = place
    _, said = run(place, "unlabelled", "--craft.rehearsal=0.5", code=1)
    assert "rehearsal: " in said and "--actions=dataset" in said and not (folder / "unlabelled").exists()
    policy = PreTrainedConfig.from_pretrained(work.policy_path)
    policy.pretrained_path, policy.push_to_hub = work.policy_path, False
    build_cache(BuildCacheConfig(dataset=DatasetConfig(repo_id=str(work.root)), policy=policy, num_anchors=24,
                                 out_dir=str(tmp_path / "labels"), views="action_logits", batch_size=8,
                                 actions="dataset"), progress=False)
    mine = (work, tmp_path / "labels", tmp_path)
    # the judge needs no labels
    whole, _ = run(mine, "whole", "--craft.rehearsal=0.5", f"--craft.heldout_cache_dir={place[1]}")
    rows = K.rows(whole)
    assert all(r["rehearsal_loss"] > 0 and r["skipped"] is None for r in rows)
    # it is the teacher, which knows better nothing
    assert rows[0]["retention_loss"] <= 1e-6 < rows[0]["rehearsal_loss"]
    config = whole / "checkpoints/000004/pretrained_model/train_config.json"
    again, _ = run(mine, "again", argv=["--resume", f"--config_path={config}", f"--output_dir={tmp_path / 'again'}"])
    a, b = K.result(whole), K.result(again)
    assert a.pop("rows")[4:] == b.pop("rows") and not K.difference(a, b)
    # a teacher at hand answers frames, which have their labels with them; its own actions would be none
    lora = ["--peft.method_type=LORA", "--peft.r=4", "--peft.target_modules=['q_proj','v_proj']", "--steps=2"]
    inside, _ = run(mine, "inside", "--craft.rehearsal=0.5", "--craft.teacher=inside",
                    f"--craft.anchor_dataset.repo_id={work.root}", *lora)
    assert [r["rehearsal_loss"] > 0 for r in K.rows(inside)] == [True] * 2
    for wrong, word in ((dict(method="replay"), "goes with method"), (dict(rehearsal=1.5), "rehearsal"),
                        (dict(controller="landing"), "reads"),
                        (dict(teacher="inside", anchor_actions="teacher"), "anchor_actions=dataset")):
        with pytest.raises(ValueError, match=word): CraftConfig(**dict(rehearsal=0.5) | wrong)
    policy, anchors, _, views = labelled(work, ["pooled"])
    from craft_nb.policies import adapter_for
    with pytest.raises(ValueError, match="expected a view that looks at them"):
        Retention(policy, itertools.repeat(anchors), views, adapter_for(policy),
                  CraftConfig(rehearsal=0.5, views="pooled"), 10)
