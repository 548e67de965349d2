"""Policies that answer with numbers: pi0, pi05, SmolVLA, ACT, Diffusion, and any other through one named module."""
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from craft_nb import cli
from craft_nb.builder import Answered, anchor_batch_targets, draw_seeds
from craft_nb.config import CraftConfig
from craft_nb.features import pool
from craft_nb.losses import make_views
from craft_nb.passes import cut_padding
from craft_nb.policies import adapter_for
from craft_nb.trainer import AnchorPass, AnchorRows
from craft_nb.zoo import KINDS, zoo_checkpoint, zoo_data

MODULE = dict(pi0="model.action_out_proj", pi05="model.action_out_proj", smolvla="model.action_out_proj",
              act="model.action_head", diffusion="diffusion.unet")
ROWS = [0, 7, 23, 40, 41]


@pytest.fixture(scope="session")
def zoo(work):
    "kind → checkpoint folder; trained for some steps, since at its start pi05's expert does not look at its inputs."
    made = {}
    def get(kind):
        if kind not in made: made[kind] = zoo_checkpoint(work, kind, steps=4)
        return made[kind]
    return get


def loaded(work, zoo, kind):
    policy, (pre, _) = work.policy(zoo(kind)), work.processors(zoo(kind))
    data = zoo_data(work, policy.config)
    return policy, pre(torch.utils.data.default_collate([data[i] for i in ROWS]))


def stored(policy, batch, seeds, actions="teacher", **views):
    return anchor_batch_targets(policy, batch, make_views(["answer"], **views), actions, seeds=seeds)


def one_row(batch, i): return {k: v[i : i + 1].clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def said(policy, path, batch, seed):
    "What LeRobot's own `forward` makes the module at `path` say for one row whose draws come from `seed`."
    out = []
    hook = policy.get_submodule(path).register_forward_hook(lambda m, args, y: out.append(y.detach()))
    torch.manual_seed(seed)
    with torch.no_grad(): policy.forward(batch)
    hook.remove()
    return out[0][0, :, :4]


@pytest.mark.parametrize("actions", ["teacher", "dataset"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_what_lerobots_forward_says(work, zoo, kind, actions):
    policy, batch = loaded(work, zoo, kind)
    seeds = draw_seeds(3, range(len(ROWS)), 2)
    policy.train()
    got = stored(policy, batch, seeds, actions)
    assert policy.training and got["answer"].shape[:2] == (len(ROWS), 1 if kind == "act" else 2)
    policy.eval()
    for i in range(len(ROWS)):
        row = one_row(batch, i)
        if actions == "teacher" and kind != "act":
            torch.manual_seed(int(seeds[i, 0]) * 16 + 1)
            policy.reset()
            observed = {k: v for k, v in one_row(batch, i).items() if k != "action"}
            chunk = (policy.diffusion.conditional_sample(1, policy.diffusion._prepare_global_conditioning(
                as_diffusion(observed))) if kind == "diffusion" else policy.predict_action_chunk(observed))
            row["action"] = chunk.detach()
            torch.testing.assert_close(got["action"][i], row["action"][0], rtol=1e-5, atol=1e-5)
        for j in range(got["answer"].shape[1]):
            want = said(policy, MODULE[kind], one_row(row, 0), int(seeds[i, j]) * 16)
            mask = got["answer_mask"][i, j]
            torch.testing.assert_close(got["answer"][i, j][mask], want[mask], rtol=0, atol=1e-5)
            real = actions == "teacher" and kind != "act"
            assert torch.equal(mask, torch.ones_like(mask) if real else ~batch["action_is_pad"][i])
    if kind != "act": assert not torch.allclose(got["answer"][:, 0], got["answer"][:, 1], atol=1e-3)


def as_diffusion(batch): return batch | {"observation.images": batch["observation.image"][:, :, None]}


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_is_zero_and_rows_do_not_depend_on_their_batch(work, zoo, kind):
    policy, batch = loaded(work, zoo, kind)
    policy.train()
    adapter = adapter_for(policy)
    names = ["answer"] + (["pooled", "tokens", "action_tokens"] if "hidden" in adapter.gives else [])
    views = make_views(names, layers=[-2, -1])
    rows = anchor_batch_targets(policy, batch, views, seeds=draw_seeds(0, range(len(ROWS))))
    def losses(which): return AnchorPass(adapter, views, {k: v[which] for k, v in rows.items()})(policy)
    for which in (list(range(len(ROWS))), [3], [4, 1]):
        for name, loss in losses(which).items():
            assert loss.requires_grad and abs(loss.item()) <= 1e-6, (name, which, loss.item())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * p.std().nan_to_num(0.1) * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        alone = {n: [losses([i])[n].item() for i in range(len(ROWS))] for n in views}
        answer = views["answer"]
        for order in ([4, 2, 0, 1, 3], [1, 0], [3, 2, 4]):
            ready = adapter.prepare(policy, {k: v[order] for k, v in rows.items()})
            f = adapter.features(policy, ready, [], True, False)
            per = answer.per_row(f, ready).split(f.answer_mask.sum((1, 2)).tolist())
            want = [alone["answer"][i] for i in order]
            assert [round(x.mean().item(), 5) for x in per] != [0.0] * len(order)
            torch.testing.assert_close(torch.stack([x.mean() for x in per]), torch.tensor(want), rtol=1e-6, atol=1e-6)
        assert all(x > 1e-4 for n in views for x in alone[n])


def test_padding_of_actions_does_not_count(work, zoo):
    """A policy with 6 action dims for 4 real ones: the answer holds 4. Steps behind an episode's end count only where
    the chunk is the teacher's own."""
    policy, batch = loaded(work, zoo, "pi0")
    end = torch.arange(10) >= 3
    batch["action_is_pad"] = end.expand(len(ROWS), -1).clone()
    got = stored(policy, batch, draw_seeds(0, range(len(ROWS))), "dataset")
    assert policy.config.max_action_dim == 6 and got["answer"].shape[-1] == 4
    assert (got["answer_mask"] == ~end).all() and got["answer"][:, :, 3:].abs().sum() == 0
    assert stored(policy, batch, draw_seeds(0, range(len(ROWS))), "teacher")["answer_mask"].all()


def test_the_observation_is_seen_once_for_all_draws(work, zoo):
    policy, batch = loaded(work, zoo, "smolvla")
    rows, seen = stored(policy, batch, draw_seeds(0, range(len(ROWS)), 3)), []
    hook = policy.model.vlm_with_expert.vlm.model.vision_model.register_forward_hook(
        lambda m, a, kw, y: seen.append(len(kw["pixel_values"])), with_kwargs=True)
    adapter = adapter_for(policy)
    adapter.features(policy, adapter.prepare(policy, rows), [], True, False)
    hook.remove()
    assert rows["answer"].shape[1] == 3 and seen == [len(ROWS)]


@pytest.mark.parametrize("kind", ["pi0_fast", "pi0", "pi05", "smolvla"])
def test_padding_that_is_cut_off_changes_nothing(work, zoo, kind):
    "Loss and gradients of LeRobot's own `forward`, with sixteen columns of padding more and without what can be cut."
    policy, batch = loaded(work, (lambda _: work.policy_path) if kind == "pi0_fast" else zoo, kind)
    pairs, params = adapter_for(policy).padded, [p for p in policy.parameters() if p.requires_grad]
    long = batch | {k: torch.nn.functional.pad(batch[k], (0, 16)) for pair in pairs for k in pair}
    short = cut_padding(policy, adapter_for(policy), long)
    assert all(short[k].shape[1] <= long[k].shape[1] - 9 for pair in pairs for k in pair)
    def said(x):
        torch.manual_seed(0)
        return torch.autograd.grad(policy(x)[0], params, allow_unused=True)
    for a, b in zip(said(long), said(short), strict=True):
        if a is None: assert b is None
        else: assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7


@pytest.mark.parametrize("kind", ["pi0", "pi05", "smolvla"])
def test_draws_share_one_prefix(work, zoo, kind):
    """The language model reads each observation once for three draws, the expert three suffixes in a row; what comes
    out is that of three passes."""
    policy, batch = loaded(work, zoo, kind)
    adapter, seeds = adapter_for(policy), draw_seeds(0, range(len(ROWS)), 3)
    rows = adapter.condition(policy, adapter.inputs(policy, batch), "dataset", seeds)
    shapes, norm = [], policy.get_submodule(adapter.decoder).layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda m, args, kw: shapes.append(
        tuple((args[0] if args else kw["hidden_states"]).shape[:2])), with_kwargs=True)
    with torch.no_grad():
        f = adapter.features(policy, adapter.prepare(policy, rows), [-2, -1], True, False)
        alone = [adapter.features(policy, adapter.prepare(policy, rows | {"draw_seed": seeds[:, j : j + 1]}), [-2, -1],
                                  True, False) for j in range(3)]
    hook.remove()
    assert len(set(shapes)) == 1 and shapes[0][0] == len(ROWS)
    torch.testing.assert_close(f.answer, torch.cat([a.answer for a in alone], 1), rtol=1e-5, atol=1e-5)
    for i in (-2, -1):
        torch.testing.assert_close(f.actions(i), torch.cat([a.actions(i) for a in alone], 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(f.prefix(i)[f.prefix_mask], alone[0].prefix(i)[f.prefix_mask], rtol=1e-5, atol=1e-5)


def run_parity(kind, work, folder, root, monkeypatch):
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.scripts import lerobot_train
    from safetensors.torch import load_file
    from craft_nb.config import CraftConfig
    from craft_nb.lerobot import CraftTrainConfig, train
    monkeypatch.setattr("sys.argv", ["lerobot-train"])
    def config(cls, name, **more):
        policy = PreTrainedConfig.from_pretrained(folder)
        policy.pretrained_path, policy.push_to_hub = Path(folder), False
        return cls(dataset=DatasetConfig(repo_id=work.repo_id, root=str(work.root)), policy=policy,
                   output_dir=root / name, steps=10, batch_size=4, num_workers=0,
                   dataloader_multiprocessing_context=None, log_freq=5, save_freq=10, env_eval_freq=0, seed=7, **more)
    lerobot_train.train.__wrapped__(config(TrainPipelineConfig, "stock"))
    train(config(CraftTrainConfig, "ours", craft=CraftConfig(enabled=False)), quiet=True)
    return ([load_file(root / n / "checkpoints/last/pretrained_model/model.safetensors") for n in ("stock", "ours")]
            + [load_file(Path(folder) / "model.safetensors")])


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_craft_is_stock_lerobot(work, zoo, kind, tmp_path, monkeypatch):
    stock, ours, before = run_parity(kind, work, zoo(kind), tmp_path, monkeypatch)
    assert stock.keys() == ours.keys() and all(torch.equal(stock[k], ours[k]) for k in stock)
    assert any(not torch.equal(stock[k], before[k]) for k in stock)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["craft"])
    return tmp_path


def build(work, folder, out="cache", *more):
    cli.build_cache([f"--policy.path={folder}", f"--dataset.repo_id={work.root}", f"--out_dir={out}",
                     "--num_anchors=12", *more])
    return json.loads(Path(out, "anchors.json").read_text())


def train(work, folder, *more):
    flags = [f"--policy.path={folder}", f"--dataset.repo_id={work.root}", "--output_dir=run",
             "--craft.anchor_cache_dir=cache", "--batch_size=4",
             "--craft.anchor_batch_size=4", "--craft.retention_freq=1", "--num_workers=0", "--seed=3"]
    named = {m.split("=")[0] for m in more}
    cli.train([*(f for f in flags if f.split("=")[0] not in named), *more])


def steps(run="run"):
    return [r for r in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) if "event" not in r]


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands(work, zoo, kind, inside, capsys):
    folder = zoo(kind)
    m = build(work, folder)
    said_to_be = dict(act="action", diffusion="noise").get(kind, "velocity")
    assert (list(m["views"]) == ["answer"]
            and m["views"]["answer"]["unit"] == f"squared {said_to_be} per action dimension")
    with pytest.raises(SystemExit) as stop: cli.cache(["verify", "cache", "--policy", str(folder)])
    assert not stop.value.code, capsys.readouterr().err
    train(work, folder, "--steps=2", "--save_freq=1")
    cli.train(["--resume", "--config_path=run/checkpoints/last/pretrained_model/train_config.json", "--steps=3"])
    rows = steps()
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[0]["retention_loss"] <= 1e-6
    assert rows[2]["retention_loss"] > 1e4 * max(rows[0]["retention_loss"], 1e-14)  # Diffusion warms up for 500 steps
    cli.evaluate(["--policy.path=run/checkpoints/last/pretrained_model", "--anchors=cache",
                  f"--dataset.repo_id={work.root}", "--max_frames=8", "--out_dir=seen"])
    assert "retention loss answer" in Path("seen/eval.md").read_text()


def test_a_resumed_run_is_the_unbroken_one(work, zoo, inside):
    from safetensors.torch import load_file
    build(work, zoo("smolvla"))
    train(work, zoo("smolvla"), "--steps=4", "--save_freq=2")
    whole = load_file("run/checkpoints/last/pretrained_model/model.safetensors")
    Path("run/checkpoints/last").unlink()
    cli.train(
        ["--resume",
         f"--config_path=run/checkpoints/{sorted(p.name for p in Path('run/checkpoints').iterdir())[0]}/pretrained_model/train_config.json"])
    again = load_file("run/checkpoints/last/pretrained_model/model.safetensors")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop: main(list(flags))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def test_wrong_use_is_one_line_and_writes_nothing(work, zoo, inside):
    data = f"--dataset.repo_id={work.root}"
    for kind, flags, says in [
        ("act", ["--views=pooled"], "view pooled: act has no hidden states of a language model. It can have: answer"),
        ("act", ["--views=answer,action_logits"], "act has no action tokens"),
        ("pi0", ["--views=token_ce"], "It can have: pooled"),
        ("act", ["--capture=model.acton_head"], "has no module 'model.acton_head'; there are model.action_head"),
        ("act", ["--craft.capture=model.vae_encoder"], "called 0 times: name another module (out of "),
        ("act", ["--capture=model.backbone"], "found"),
        ("diffusion", ["--draws=0"], "draws: expected 1 or more"),
        ("smolvla", ["--actions=mine"], "actions: expected one of teacher, dataset"),
    ]:
        line = refused(cli.build_cache, f"--policy.path={zoo(kind)}", data, "--out_dir=new", "--num_anchors=4", *flags)
        assert says in line and not Path("new").exists(), (flags, line)
    pi0_fast = refused(cli.build_cache, f"--policy.path={work.policy_path}", data, "--out_dir=new", "--num_anchors=4",
                       "--views=answer")
    assert "pi0_fast_small has no action module. It can have: pooled" in pi0_fast and not Path("new").exists()


def test_a_cache_of_another_policy_type_is_refused(work, zoo, inside):
    build(work, zoo("act"))
    base = [data := f"--dataset.repo_id={work.root}", "--output_dir=new", "--craft.anchor_cache_dir=cache",
            "--craft.anchor_batch_size=4", "--steps=1"]
    for folder in (zoo("pi0"), work.policy_path):
        line = refused(cli.train, f"--policy.path={folder}", *base)
        assert ("policy_type: cache act, this run" in line and "Build one with this policy" in line
                and "mismatch=" not in line and not Path("new").exists()), line
    line = refused(cli.train, f"--policy.path={zoo('act')}", *base, "--craft.capture=model.decoder")
    assert "capture: cache model.action_head" in line and "cannot waive extra.capture" in line
    assert "policy_type: cache act" in refused(cli.evaluate, f"--policy.path={zoo('pi0')}", "--anchors=cache",
                                               "--out_dir=new")
    for word, own in (("policy_type", "policy_type"), ("weights,extra.capture", "capture")):
        for main, flags in ((cli.train, [*base, f"--craft.allow_mismatch={word}"]),
                            (cli.build_cache, [data, "--out_dir=new", f"--allow_mismatch={word}"]),
                            (cli.evaluate, ["--anchors=cache", "--out_dir=new", f"--allow_mismatch={word}"])):
            assert f"allow_mismatch: {own} cannot be waived" in refused(main, f"--policy.path={zoo('pi0')}", *flags)
    assert not Path("new").exists()


def test_a_type_in_no_table_needs_one_flag(work, zoo, inside, monkeypatch):
    """ACT as if nobody had heard of it: refused with what to name, then built, trained and evaluated through that
    module."""
    from craft_nb import policies
    whole = build(work, zoo("act"), "known")
    monkeypatch.setattr(policies, "ADAPTERS", {})
    line = refused(cli.build_cache, f"--policy.path={zoo('act')}", f"--dataset.repo_id={work.root}", "--out_dir=cache",
                   "--num_anchors=12")
    assert ("no anchor adapter for ACTPolicy" in line and "--craft.capture=MODULE (out of" in line
            and "model.action_head" in line and not Path("cache").exists())
    m = build(work, zoo("act"), "cache", "--craft.capture=model.action_head")
    assert m["extra"]["capture"] == "model.action_head" and m["extra"]["draws"] == 1
    train(work, zoo("act"), "--steps=2")
    assert steps()[0]["retention_loss"] <= 1e-6
    from craft_nb.anchors import AnchorCacheDataset
    a, b = (AnchorCacheDataset(n).batch(range(12))["answer"] for n in ("known", "cache"))
    assert torch.equal(a, b) and whole["num_anchors"] == 12


def test_a_draw_that_rows_share_is_refused(work, zoo):
    "xvla's times depend on the place in the batch: such an answer is no property of an anchor."
    policy, batch = loaded(work, zoo, "pi0")
    policy.model.sample_time = lambda b, device: (torch.rand(1) + torch.arange(b) / b) % 0.999
    with pytest.raises(RuntimeError, match="no row for each of"):
        adapter = adapter_for(policy)
        rows = adapter.inputs(policy, batch) | {"draw_seed": draw_seeds(0, range(len(ROWS)))}
        adapter.features(policy, adapter.prepare(policy, rows), [], True, False)
    with contextlib.suppress(AttributeError): del policy.model.sample_time


LORA = dict(act=["--peft.target_modules=.*model.decoder.*linear1"], pi0=[], smolvla=[])  # two have targets of their own


def adapters(kind): return ["--peft.method_type=LORA", "--peft.r=4", "--policy.optimizer_lr=0.01", *LORA[kind]]


@pytest.mark.parametrize("kind", LORA)
def test_lora_begins_at_zero_resumes_and_goes_on_from_an_adapter(work, zoo, kind, inside, monkeypatch):
    from safetensors.torch import load_file
    build(work, zoo(kind))
    train(work, zoo(kind), "--steps=4", "--save_freq=2", *adapters(kind))
    rows, end = steps(), Path("run/checkpoints/last/pretrained_model")
    assert rows[0]["retention_loss"] <= 1e-6 < rows[3]["retention_loss"]
    whole = load_file(end / "adapter_model.safetensors")
    first = sorted(p.name for p in Path("run/checkpoints").iterdir() if p.name != "last")[0]
    cli.train(["--resume", f"--config_path=run/checkpoints/{first}/pretrained_model/train_config.json"])
    again = load_file("run/checkpoints/last/pretrained_model/adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    cli.evaluate([f"--policy.path={end}", "--anchors=cache", "--out_dir=seen"])
    drift = json.loads(Path("seen/eval.json").read_text())["drift"]["losses"]["answer"]
    train(work, end, "--output_dir=more", "--steps=1", "--save_freq=1", "--craft.anchor_batch_size=12")
    assert steps("more")[0]["retention_loss"] == pytest.approx(drift, rel=1e-4)  # where the adapter stood
    more = load_file("more/checkpoints/last/pretrained_model/adapter_model.safetensors")
    # neither dropped nor wrapped anew
    assert {k: v.shape for k, v in more.items()} == {k: v.shape for k, v in whole.items()}
    from craft_nb.anchors import AnchorCacheDataset
    from craft_nb.lerobot import load_policy_alone
    from craft_nb.small import save_checkpoint_folder
    from lerobot.configs.policies import PreTrainedConfig
    cfg = PreTrainedConfig.from_pretrained(end)
    cfg.pretrained_path = end
    policy, pre, post = load_policy_alone(cfg)
    base = policy.merge_and_unload()
    base.config.use_peft = False
    merged = save_checkpoint_folder(base, pre, post, Path("merged").absolute())
    build(work, end, "of_adapter"), build(work, merged, "of_merged")
    a, b = (AnchorCacheDataset(n).batch(range(12)) for n in ("of_adapter", "of_merged"))
    torch.testing.assert_close(a["answer"], b["answer"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a["answer"], AnchorCacheDataset("cache").batch(range(12))["answer"], atol=1e-4)
    own, given = Answered.answer, []
    monkeypatch.setattr(Answered, "answer", lambda self, *asked: given.append(own(self, *asked)) or given[-1])
    train(work, zoo(kind), "--output_dir=taught", f"--craft.teacher={end}", "--steps=1", "--craft.anchor_batch_size=12",
          "--save_checkpoint=false", "--craft.check=false", *adapters(kind))
    # a student without its teacher's adapters is as far from it as that is from the student
    assert steps("taught")[0]["retention_loss"] == pytest.approx(drift, rel=1e-3)
    merged = Answered(None, base.requires_grad_(False), make_views(["answer"]), adapter_for(base))
    torch.testing.assert_close(given[-1]["answer"], own(merged, given[-1])["answer"], rtol=1e-4, atol=1e-4)


def event(what, run="run"):
    return next(r for r in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
                if r.get("event") == what)


@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_a_teacher_at_hand_is_the_cached_one(work, zoo, kind, inside, monkeypatch):
    """Inside a student with adapters, and as a second model: the losses of a cached run; the first is 0; a resumed run
    is the unbroken one. A frozen vision tower looks at each anchor of a cache once, alone, or anew each time."""
    from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
    from safetensors.torch import load_file
    looks, own = [], SmolVLMWithExpertModel.embed_image
    monkeypatch.setattr(SmolVLMWithExpertModel, "embed_image", lambda self, x: looks.append(len(x)) or own(self, x))
    build(work, zoo(kind))
    looks.clear()
    how = ["--steps=10", "--save_freq=5", "--craft.check=false", *adapters(kind)]
    train(work, zoo(kind), *how)
    train(work, zoo(kind), "--output_dir=live", "--craft.teacher=inside", *how)
    # of one anchor; no other batch has that size
    assert looks.count(1) == (24 if kind == "smolvla" else 0)
    train(work, zoo(kind), "--output_dir=second", f"--craft.teacher={zoo(kind)}", "--craft.keep_looks=none", *how)
    # and once more before the first step, for the gradient of the view
    assert looks.count(1) == (25 if kind == "smolvla" else 0)
    cached, live, second = steps(), steps("live"), steps("second")
    assert live[0]["retention_loss"] == 0 and cached[9]["retention_loss"] > 1e-6
    for rows in (live, second):
        assert [r["retention_loss"] for r in rows] == pytest.approx([r["retention_loss"] for r in cached], abs=1e-5,
                                                                    rel=0)
        assert [r["task_loss"] for r in rows] == pytest.approx([r["task_loss"] for r in cached], abs=1e-5, rel=0)
    m, mine = event("memory", "second"), event("memory", "live")
    assert "looks" not in m and mine.get("looks") == (12 * 4 * 64 * 4 if kind == "smolvla" else None)
    assert (m["peak"] - mine["peak"] > 0.99 * m["teacher"] and m["teacher"] > 0.5 * m["weights"]
            and "teacher" not in mine)
    whole = load_file("live/checkpoints/last/pretrained_model/adapter_model.safetensors")
    cli.train(["--resume", "--config_path=live/checkpoints/000005/pretrained_model/train_config.json"])
    again = load_file("live/checkpoints/last/pretrained_model/adapter_model.safetensors")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("kind, language", [("pi0_fast", "language_model"), ("pi0", "gemma_expert"),
                                            ("smolvla", "lm_expert")])
def test_a_teacher_inside_and_its_student_look_once(work, zoo, kind, language):
    """What a frozen vision tower says is worked out once for both, to the bit, also in pieces; one that learns looks
    twice. A second model that was taught answers with its adapters on."""
    folder, view = (work.policy_path, "action_logits") if kind == "pi0_fast" else (zoo(kind), "answer")
    bare, pre = work.policy(folder), work.processors(folder)[0]
    data = zoo_data(work, bare.config)
    views, adapter = make_views([view]), adapter_for(bare)
    rows = anchor_batch_targets(bare, pre(torch.utils.data.default_collate([data[i] for i in ROWS])), views, "dataset",
                                seeds=draw_seeds(0, range(len(ROWS))))
    def adapted(where):
        wanted = dict(method_type="LORA", r=2, target_modules=rf".*({where}).*(q_proj|v_proj)")
        return work.policy(folder).wrap_with_peft(peft_cli_overrides=wanted).train()
    def loss(policy, anchors): return AnchorPass(adapter, views, anchors)(policy)[view]
    def looks(policy, seen):
        hook = policy.get_base_model().get_submodule(adapter.eyes[0]).register_forward_hook(lambda *_: seen.append(1))
        out = Answered(None, policy, views, adapter).answer(rows)
        asked, once = len(seen), loss(policy, out)
        hook.remove()
        without = {k: x for k, x in out.items() if not k.startswith("frozen.")}
        assert torch.equal(once, loss(policy, without)) and once.requires_grad
        assert loss(policy, {k: x[3:] for k, x in out.items()}).item() == pytest.approx(
            loss(policy, {k: x[3:] for k, x in without.items()}).item(), rel=1e-4, abs=1e-9)
        return asked, len(seen) - asked, len(out) - len(without), once.item()
    from craft_nb.training import keep_looks
    policy = adapted(language)
    assert looks(policy, []) == (1, 0, 1, pytest.approx(0, abs=1e-9))
    with torch.no_grad():
        for n, p in policy.named_parameters(): "lora_B" in n and p.add_(0.5)
    *same, moved = looks(policy, [])
    assert same == [1, 0, 1] and moved > 1e-6
    again = Answered(None, policy.requires_grad_(False), views, adapter).answer(rows)
    assert loss(policy, again).item() <= 1e-9 and not any(k.startswith("frozen.") for k in again)
    loader = SimpleNamespace(dataset=AnchorRows(SimpleNamespace(store=None), ROWS), mark="")
    table = keep_looks(CraftConfig(), loader, policy, adapter)
    assert loader.mark == table.name and table.rows == len(ROWS)
    policy = adapted(f"{language}|vision")
    assert looks(policy, []) == (1, 1, 0, pytest.approx(0, abs=1e-9))
    assert keep_looks(CraftConfig(), loader, policy, adapter) is None


def test_frames_are_anchors_where_a_teacher_answers(work, zoo, inside):
    from safetensors.torch import load_file
    how = ["--craft.teacher=inside", f"--craft.anchor_dataset.repo_id={work.root}",
           "--craft.anchor_dataset.episodes=[0,1]", "--craft.views=answer,action_tokens,pooled",
           "--craft.heldout_fraction=0.5", "--craft.check=false", "--steps=4", "--save_freq=2", *adapters("pi0")]
    train(work, zoo("pi0"), *how)
    rows = steps()
    assert (rows[0]["retention_loss"] == 0 < rows[3]["retention_loss"]
            and set(rows[0]["retention_losses"]) == {"answer", "action_tokens", "pooled"})
    assert event("certificate")["held_out"] > 0 and rows[0]["cache_type"] == "frames"
    assert event("memory")["looks"] > 0  # kept, since nothing is augmented
    whole = load_file("run/checkpoints/last/pretrained_model/adapter_model.safetensors")
    cli.train(["--resume", "--config_path=run/checkpoints/000002/pretrained_model/train_config.json"])
    again = load_file("run/checkpoints/last/pretrained_model/adapter_model.safetensors")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_live_frames_are_augmented_as_the_task_is(work, zoo, inside, monkeypatch):
    """LeRobot's own `dataset.image_transforms`: another picture each turn, the same after a restart; what is held out
    and judged stays as it is."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.transforms import ImageTransforms, ImageTransformsConfig
    from safetensors.torch import load_file
    from craft_nb.anchors import AnchorLoader
    from craft_nb.builder import LiveFrames
    data = zoo_data(work, PreTrainedConfig.from_pretrained(zoo("act")), episodes=[0])
    with pytest.raises(ValueError, match="num_anchors: expected 1 to "): LiveFrames(data, "frames", {}, 10**6)
    frames = LiveFrames(data, "frames", {}, 4, transforms=ImageTransforms(ImageTransformsConfig(enable=True)))
    line = AnchorLoader(frames, 4).forever()
    turns = [next(line) for _ in range(3)]
    again = next(AnchorLoader(frames, 4, step=2).forever())
    assert torch.equal(again["observation.image"], turns[2]["observation.image"])
    plain = {int(i): x for i, x in zip(*(frames.batch(range(4))[k] for k in ("index", "observation.image")))}
    seen = [{int(i): x for i, x in zip(b["index"], b["observation.image"])} for b in turns]
    assert all(s.keys() == plain.keys() for s in seen)
    assert all(not torch.equal(a[i], b[i]) for i in plain
               for a, b in ((seen[0], plain), (seen[0], seen[1]), (seen[1], seen[2])))
    drawn, real = [], LiveFrames.drawn
    monkeypatch.setattr(LiveFrames, "drawn", lambda self, turns: drawn.append(turns) or real(self, turns))
    how = ["--craft.teacher=inside", f"--craft.anchor_dataset.repo_id={work.root}", "--craft.check=false", "--steps=4",
           "--save_freq=2", *adapters("act")]
    train(work, zoo("act"), *how, "--dataset.image_transforms.enable=true")
    rows = steps()
    # the memory estimate draws one more
    assert len(drawn) >= 4 and rows[0]["retention_loss"] == 0 < rows[3]["retention_loss"]
    whole = load_file("run/checkpoints/last/pretrained_model/adapter_model.safetensors")
    cli.train(["--resume", "--config_path=run/checkpoints/000002/pretrained_model/train_config.json"])
    again = load_file("run/checkpoints/last/pretrained_model/adapter_model.safetensors")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    drawn.clear()
    train(work, zoo("act"), "--output_dir=plain", *how)
    assert not drawn


def test_a_second_model_answers_in_views_that_no_cache_holds(work, inside):
    build(work, work.policy_path, "cache", "--views=pooled")
    train(work, work.policy_path, "--craft.views=pooled,tokens", f"--craft.teacher={work.policy_path}", "--steps=2")
    rows = steps()
    assert (set(rows[0]["retention_losses"]) == {"pooled", "tokens"} and rows[0]["retention_loss"] <= 1e-6
            and rows[1]["retention_loss"] > 0)


def test_autocast_is_a_precision(work, zoo, inside):
    """A cache says that its teacher ran in autocast; what is evaluated runs as it is trained; a second model computes
    as its student."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy
    from craft_nb.caches import make_teacher
    from craft_nb.lerobot import as_lerobot_evaluates, task_loss
    assert build(work, zoo("act"), "cache", "--policy.use_amp=true")["dtype"] == "bfloat16"
    line = refused(lambda flags: train(work, zoo("act"), *flags), "--steps=1")
    assert "dtype: cache bfloat16, this run float32" in line and not Path("run").exists()
    policy, pre = work.policy(zoo("act")), work.processors(zoo("act"))[0]
    data, seen = zoo_data(work, policy.config), {}
    for amp in (False, True):
        policy.config.use_amp = amp
        torch.manual_seed(0)
        seen[amp] = task_loss(policy, pre, data, 4, 4)["loss"]
        with as_lerobot_evaluates(policy): assert torch.is_autocast_enabled("cpu") == amp
    rows = [data[i] for i in range(0, len(data), -(-len(data) // 4))]
    def said(part):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return len(part) * policy(pre(torch.utils.data.default_collate(part)))[0].item()
    torch.manual_seed(0)
    tasks = list(dict.fromkeys(sorted(int(r["task_index"]) for r in rows)))
    want = sum(said([r for r in rows if int(r["task_index"]) == t]) for t in tasks) / len(rows)
    assert seen[True] == pytest.approx(want, rel=1e-6) and seen[True] != seen[False]
    cfg = PreTrainedConfig.from_pretrained(zoo("pi0"))
    cfg.pretrained_path, cfg.dtype = zoo("pi0"), "bfloat16"
    student, pre = make_policy(cfg, ds_meta=work.meta), work.processors(zoo("pi0"))[0]
    teacher = make_teacher(CraftConfig(teacher=str(zoo("pi0"))), student, pre, "cpu")
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(),
                                                                        strict=True))


def test_a_prefix_of_fixed_length_ends_in_padding(work, zoo):
    "SmolVLA's `prefix_length`: text and pictures are where they were."
    policy, batch = loaded(work, zoo, "smolvla")
    adapter, seen = adapter_for(policy), []
    rows = adapter.prepare(policy, adapter.inputs(policy, batch))
    for policy.model.prefix_length in (-1, 48):
        with torch.no_grad(): f = adapter.features(policy, rows, [-2, -1], False, False)
        seen.append([f.text_mask.sum(1), f.image_mask.sum(1), pool(f, [-2, -1], ["vision_token_mean",
                                                                                  "text_token_last"])])
        assert torch.equal(f.text_mask.sum(1), batch["observation.language.attention_mask"].sum(1))
    assert f.text_mask.shape[1] == 48
    for a, b in zip(*seen, strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_view_that_cannot_feel_the_training_is_refused(work, zoo, inside, capsys):
    """The prefix of a policy whose expert alone is trained: L_ret would be 0 for ever. Beside another view it is said;
    with anchors of its own a run says so before it builds them."""
    def trained(kind): return lambda flags: train(work, zoo(kind), *flags)
    every = "--views=answer,pooled,tokens,action_tokens"
    for kind, half in (("smolvla", adapters("smolvla")), ("pi0", ["--policy.train_expert_only=true"])):
        build(work, zoo(kind), kind, every)
        how = [f"--craft.anchor_cache_dir={kind}", "--steps=1", "--save_checkpoint=false", "--craft.check=false", *half]
        for more in (["--craft.views=pooled,tokens"], ["--craft.views=answer:0,pooled", "--craft.method=share"]):
            line = refused(trained(kind), *how, *more)
            assert ("nothing that is trained (from " in line and "Hold a view of what is trained (answer or action_tok"
                    in line and not Path("run").exists()), line
    line = refused(trained("pi0"), "--craft.views=pooled", f"--craft.anchor_dataset.repo_id={work.root}",
                   "--craft.anchor_cache_dir=data/anchor_cache_hidden", *half)
    assert "so the drift would be 0" in line and not Path("run").exists()
    line = refused(trained("act"), f"--craft.anchor_dataset.repo_id={work.root}", "--craft.teacher=inside",
                   "--peft.method_type=LORA", "--peft.r=4", "--peft.target_modules=.*vae_encoder.*linear1")
    assert "views: answer: nothing that is trained" in line and "whole policy)" in line and not Path("run").exists()
    train(work, zoo("pi0"), *how, "--craft.views=answer,pooled")
    assert "pooled: nothing that is trained has a say" in " ".join(capsys.readouterr().out.split())


def test_wrong_teachers_are_one_line(work, zoo, inside):
    build(work, zoo("act"), "cache")
    base = [f"--policy.path={zoo('act')}", f"--dataset.repo_id={work.root}", "--output_dir=new",
            "--craft.anchor_cache_dir=cache", "--steps=1", "--craft.anchor_batch_size=4"]
    frames = f"--craft.anchor_dataset.repo_id={work.root}"
    for flags, says in [
            (["--craft.teacher=inside"], "this run trains without adapters. Train some with --peft.method_type=LORA"),
            (["--craft.teacher=inside", frames, "--craft.anchor_cache_dir=none"], "this run trains without adapters"),
            (["--craft.teacher=insde"], "expected inside, or the folder of a policy"),
            ([f"--craft.teacher={zoo('pi0')}"], "is a pi0_small, this run trains a act"),
            (["--craft.teacher=inside", frames, "--craft.anchor_dataset.episodes=[9]"], "not there"),
            (["--craft.teacher=inside", frames, "--craft.anchor_dataset.prompts_file=x"],
             "keep their own instructions"),
            (["--craft.teacher=inside", "--craft.views=pooled", *adapters("act")],
             "act has no hidden states of a language model. It can have: answer"),
            (["--craft.teacher=inside", "--craft.anchor_cache_dir=none"], "there is no anchor cache at none"),
    ]:
        line = refused(cli.train, *base, *flags)
        assert (says in line and len(line.replace("(CRAFT_DEBUG=1 shows where)", "").strip().splitlines()) == 1
                and not Path("new").exists()), (flags, line)
    build(work, work.policy_path, "of_tokens", "--views=pooled")
    line = refused(cli.train, *[f"--policy.path={work.policy_path}" if "policy.path" in b else b for b in base],
                   f"--craft.teacher={work.policy_path}",
                   "--craft.anchor_cache_dir=of_tokens", "--craft.views=action_logits")
    assert ("hold no actions to ask about" in line and "--craft.anchor_dataset.repo_id" in line
            and not Path("new").exists())
