"""What the origin documents, value by value: its functions under its names, its defaults, its caches. Its command
lines: test_commands."""
import json
import math

import pytest
import torch
from torch import nn

from craft_nb import (AnchorCacheDataset, CraftConfig, compute_dot, compute_retention_loss_hidden, epsilon_schedule,
                      merge_grads, project_if_conflict, update_lambda)
from craft_nb.features import Features, pool
from craft_nb.losses import TokenCEView, View, make_views
from craft_nb.surgery import StreamingSurgery, Surgery
from craft_nb.trainer import CraftTrainer, Retention

G, R = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
MERGED = {"weighted": [2.0, 1.0], "equal": [0.75, 0.75], "task_priority": [1.5, 1.5]}  # λ = 2


def test_dot():
    assert compute_dot([G, torch.ones(3)], [R, 2 * torch.ones(3)]).item() == -0.5 + 6
    assert compute_dot([G, None], [R, R]).item() == -0.5


@pytest.mark.parametrize("mode", MERGED)
def test_merges(mode):
    want = torch.tensor(MERGED[mode])
    torch.testing.assert_close(merge_grads([G], [R], 2.0, mode)[0], want)
    g = [G.clone()]
    found = Surgery([("w", G)], mode=mode, conflict_threshold=-1).merge_(g, [R], 2.0, True)
    torch.testing.assert_close(g[0], want)
    assert found.merged_norm == pytest.approx(want.norm().item()) and not found.projected
    torch.testing.assert_close(merge_grads([G], [None], 2.0, mode)[0], G * (0.5 if mode == "equal" else 1))
    torch.testing.assert_close(merge_grads([None], [R], 2.0, mode)[0],
                               R * {"weighted": 2, "equal": 0.5, "task_priority": 1}[mode])


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("mode", MERGED)
def test_merges_after_a_projection_and_clipped(mode, scope):
    torch.manual_seed(0)
    g, r = ([torch.randn(4, 3), torch.randn(5)] for _ in range(2))
    for a, b in zip(g, r): a -= 0.9 * b
    parts = [[0, 1]] if scope == "global" else [[0], [1]]
    want = [None, None]
    for part in parts:
        p, q, conflict = project_if_conflict([g[i] for i in part], [r[i] for i in part])
        assert conflict
        for i, m in zip(part, merge_grads(p, q, 2.0, mode)): want[i] = m
    norm = compute_dot(want, want).sqrt().item()
    result = Surgery([("layers.0.w", g[0]), ("layers.1.w", g[1])], scope,
                     mode=mode).merge_(g, r, 2.0, True, max_norm=norm / 2)
    assert result.projected and result.clipped and result.merged_norm == pytest.approx(norm, rel=1e-5)
    for a, b in zip(g, want): torch.testing.assert_close(a, b / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MERGED)
def test_merges_streamed(mode):
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 4)
    def task(): return net(x).square().mean()
    def kept(): return (net(x[:3]) - 1).square().mean()
    params = list(net.parameters())
    g, r = (torch.autograd.grad(f(), params) for f in (task, kept))
    streaming = StreamingSurgery(net, mode=mode, use_projection=False)
    with streaming.record(): loss = kept()
    with streaming.merge_(loss, 2.0, True) as found: task().backward()
    want = merge_grads(g, r, 2.0, mode)
    for p, m in zip(params, want): torch.testing.assert_close(p.grad, m)
    assert found.merged_norm == pytest.approx(compute_dot(want, want).sqrt().item(), rel=1e-5)


class Toy(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(2))
    def forward(self, batch): return (self.w * G).sum(), {}  # ∇ = g


class Given(View):  # ∇ = x
    tensors, distances, zero_at_start = (), ("mse",), False
    def __init__(self, x): super().__init__(layers=[-1]); self.x = x
    def loss(self, f, anchors): return 1 + (f.hidden[-1] * self.x).sum()


class Adapter:
    def prepare(self, policy, anchors): return anchors
    def features(self, policy, anchors, *how): return Features({-1: policy.w}, None, None)


@pytest.mark.parametrize("mode", MERGED)
@pytest.mark.parametrize("shared", [True, False], ids=["one λ", "one λ a view"])
@pytest.mark.parametrize("project", [True, False])
def test_merges_in_training(mode, shared, project):
    "With views whose gradients add up to r (weights 2 and 1), the step is along the merge that the origin documents."
    policy = Toy()
    views = {"a": Given(R / 4), "b": Given(R / 2)}
    cfg = CraftConfig(initial_lambda=2.0, projection_mode=mode, shared_lambda=shared, views="a:2,b:1", retention_freq=1,
                      use_grad_projection=project, conflict_threshold=-0.1)
    ret = Retention(policy, iter(lambda: {"input_ids": torch.zeros(1)}, None), views, Adapter(), cfg, 1)
    record = CraftTrainer(policy, iter(lambda: {}, None), torch.optim.SGD(policy.parameters(), 1.0), steps=1,
                          retention=ret, grad_clip_norm=0).fit()
    g = project_if_conflict([G], [R])[0] if project else [G]
    want = merge_grads(g, [R], 2.0, mode)[0]
    torch.testing.assert_close(-policy.w.detach(), want)
    assert (record["conflict"] and record["projected"] == project
            and record["grad_norm"] == pytest.approx(want.norm().item(), rel=1e-5))


def test_projection():
    "g ← g − (⟨g,r⟩ / ‖r‖²) r if the cosine is below −.1; without conflict the tensors themselves."
    (p,), (q,), conflict = project_if_conflict([G], [R])
    assert conflict and q is R  # cosine −.32
    torch.testing.assert_close(p, G + R)  # ⟨g,r⟩ = −½ = −‖r‖²
    (same,), _, conflict = project_if_conflict([G], [R], conflict_threshold=-0.4)
    assert not conflict and same is G


def test_schedules():
    def at(kind, *steps): return [epsilon_schedule(s, 1.0, 0.1, 100, kind) for s in steps]
    assert at("linear", 0, 50, 100, 200) == pytest.approx([1, 0.55, 0.1, 0.1])
    assert at("cosine", 0, 50, 100, 200) == pytest.approx([1, 0.55, 0.1, 0.1])
    assert at("exponential", 0, 100, 101, 10**6) == pytest.approx([1, 0.1061, 0.1061, 0.1061], abs=5e-5)
    for u in (0.0, 0.13, 0.5, 1.0):
        assert at("exponential", round(100 * u))[0] == pytest.approx(0.1 + 0.9 * math.exp(-5 * u))
    assert epsilon_schedule(3, 2.0, 0.0, 10, "exponential") == pytest.approx(2 * math.exp(-1.5))
    # upwards as well
    assert epsilon_schedule(5, 0.1, 1.0, 10, "exponential") == pytest.approx(1 - 0.9 * math.exp(-2.5))
    assert at("geometric", 0, 50, 100) == pytest.approx([1, 0.1**0.5, 0.1])  # ours


def test_lambda():
    "λ ← clip(λ + λ_lr (L_ret − ε), 0, λ_max)"
    assert update_lambda(1.0, 0.5, 0.1, 0.01, 10.0) == pytest.approx(1.004)
    assert update_lambda(1e-4, 0.0, 0.1, 0.01, 10.0) == 0.0 and update_lambda(10.0, 9.0, 0.1, 0.01, 10.0) == 10.0


SAMPLES = dict(mse=lambda s, t: ((s - t) ** 2).mean(), l1=lambda s, t: (s - t).abs().mean(),
               cosine=lambda s, t: 1 - (s * t).sum() / (s.norm() * t.norm()))


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("shape", [(3, 2, 2, 5), (1, 1, 1, 4), (4, 1, 3, 2)])
def test_losses(kind, shape):
    "`none`: one number a sample, of all its layers, vectors and width; `mean` and `sum` of these."
    s, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    want = torch.stack([SAMPLES[kind](a.double(), b.double()) for a, b in zip(s, t)]).float()
    none = compute_retention_loss_hidden(s, t, kind, "none")
    assert none.shape == shape[:1]
    torch.testing.assert_close(none, want)
    torch.testing.assert_close(compute_retention_loss_hidden(s, t, kind), want.mean())
    torch.testing.assert_close(compute_retention_loss_hidden(s, t, kind, "sum"), want.sum())
    assert (compute_retention_loss_hidden(s, s.clone(), kind, "none") == 0).all()


def test_losses_written_out():
    s, t = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # (1, 1, 2, 2)
    assert ([compute_retention_loss_hidden(s, t, k, "none").tolist() for k in ("mse", "l1", "cosine")]
            == [[0.5], [0.5], [pytest.approx(0.5)]])
    s, t = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, -1.0]]]])
    # 1 − 8/10: the long vector speaks louder
    assert compute_retention_loss_hidden(s, t, "cosine").item() == pytest.approx(0.2)
    # ours: the mean of 0 and 2
    assert compute_retention_loss_hidden(s, t, "cosine_vectors").item() == pytest.approx(1.0)


def test_cosine_of_a_cache_is_the_origins():
    """Training on `pooled` with `--craft.distance=cosine` minimises what the origin's `cosine` says, whatever the batch
    is cut into."""
    f = {s: Features({i: torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(s + i)) for i in (-2, -1)},
                     torch.tensor([[1, 1, 0, 0, 0]] * 4).bool(), torch.tensor([[0, 0, 1, 1, 0]] * 4).bool())
         for s in (0, 10)}
    view = make_views(["pooled"], distance="cosine")["pooled"]
    stored, student = view.targets(f[0]), pool(f[10], [-2, -1], ["vision_token_mean", "text_token_last"])
    torch.testing.assert_close(view.loss(f[10], stored),
                               compute_retention_loss_hidden(student, stored["teacher_hidden"], "cosine"))
    assert len(view.per_row(f[10], stored)) == view.terms(stored) == 4


def test_two_vectors_a_layer():
    h = torch.arange(12.0).view(1, 6, 2)
    f = Features({-1: h, -2: -h}, torch.tensor([[1, 1, 1, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 1, 1, 0]]).bool())
    got = pool(f, [-2, -1], ["vision_token_mean", "text_token_last"])
    assert got[0].tolist() == [[[-2.0, -3.0], [-8.0, -9.0]], [[2.0, 3.0], [8.0, 9.0]]]


def test_defaults():
    cfg = CraftConfig()
    want = dict(enabled=True, anchor_cache_dir="data/anchor_cache_hidden", anchor_batch_size=16, retention_freq=5,
                retention_mode="hidden", initial_lambda=1.0, lambda_lr=0.01, lambda_max=10.0, epsilon_start=1.0,
                epsilon_end=0.1, epsilon_decay_steps=0, use_grad_projection=True, conflict_threshold=-0.1,
                projection_mode="weighted", epsilon_schedule="linear")
    assert {k: getattr(cfg, k) for k in want} == want
    view = make_views(["pooled"])["pooled"]
    assert (view.layers, view.pooling, view.distance) == ([-2, -1], ["vision_token_mean", "text_token_last"], "mse")


@pytest.mark.parametrize("kind,rows", [("hidden", dict(teacher_hidden=torch.randn(6, 2, 2, 4))),
                                       ("pooled_features", dict(target_features=torch.randn(6, 4))),
                                       ("token_level", dict(labels=torch.tensor([[-100, 3, 4]] * 6)))])
def test_old_caches_are_told_apart(tmp_path, kind, rows):
    inputs = dict(pixel_values=torch.zeros(6, 3, 8, 8), input_ids=torch.ones(6, 3, dtype=torch.long),
                  attention_mask=torch.ones(6, 3))
    torch.save(inputs | rows, tmp_path / "shard_0000.pt")
    (tmp_path / "metadata.json").write_text(json.dumps(dict(num_anchors=6, layers_to_save=[-2, -1])))
    cache = AnchorCacheDataset(tmp_path)
    assert len(cache) == 6 and cache.cache_type == kind
    batch = cache.batch(range(6))
    for k, x in rows.items(): torch.testing.assert_close(batch[k].to(x.dtype), x)


def test_token_cross_entropy_ignores_what_is_not_labelled():
    f = Features({}, None, None, torch.tensor([[True, True, True]]), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))
    loss = TokenCEView().loss(f, {"labels": torch.tensor([[0, -100, 1]])})
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-3))) / 2)
