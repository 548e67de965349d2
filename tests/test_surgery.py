"""Surgery against a float64 oracle, A-GEM, TorchJD and itself; invariants; memory; everything a trainer does around
it."""
import math
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import craft_nb.surgery as S
from craft_nb.surgery import StreamingSurgery, Surgery, compute_dot, merge_grads, project_if_conflict, retention_grads

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from memory import extra_copies  # noqa: E402

SHAPES = [(3, 4), (5,), (), (2, 3, 2), (0, 4), (17,)]
NAMES = ["layers.0.w", "layers.0.b", "scale", "layers.1.w", "layers.1.empty", "layers.2.w"]


def named(dtype=torch.float32, names=NAMES): return [(n, torch.zeros(s, dtype=dtype)) for n, s in zip(names, SHAPES)]
def dots(g, r): return tuple(compute_dot(a, b).item() for a, b in ((g, r), (g, g), (r, r)))
def copies(ts): return [None if t is None else t.clone() for t in ts]


@st.composite
def gradients(draw, min_scale=-25, max_scale=12):
    "Two gradient lists of random agreement, scale and holes."
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mix, sg, sr = draw(st.floats(-3, 3)), *(10.0 ** draw(st.floats(min_scale, max_scale)) for _ in range(2))
    holes = [draw(st.sets(st.integers(0, len(SHAPES) - 1), max_size=3)) for _ in range(2)]
    base = [torch.randn(s, generator=gen) for s in SHAPES]
    other = [mix * b + torch.randn(b.shape, generator=gen) for b in base]
    g, r = ([None if i in h else t * k for i, t in enumerate(ts)]
            for ts, k, h in ((base, sg, holes[0]), (other, sr, holes[1])))
    return g, r


@pytest.fixture(autouse=True)
def chunk(monkeypatch): monkeypatch.setitem(S.CHUNK, "cpu", 5)  # small tensors cross many chunk borders


# invariants

@settings(max_examples=150, deadline=None)
@given(gradients(), st.sampled_from(["global", "layer", "tensor"]))
def test_projection_never_leaves_a_conflict(grads, scope):
    g, r = grads
    task = copies(g)
    result = Surgery(named(), scope, conflict_threshold=0.0).merge_(g, r, 0.0, True)
    assert result.finite
    for index in S.scope_groups(NAMES, scope).values():
        part = [[t[i] for i in index] for t in (g, r, task)]
        assert dots(part[0], part[1])[0] >= -1e-6 * math.sqrt(dots(part[2], part[1])[1] * dots(part[2], part[1])[2])


@settings(max_examples=100, deadline=None)
@given(gradients(), st.sampled_from(["global", "layer", "tensor"]))
def test_no_conflict_is_bit_identical(grads, scope):
    g, r = grads
    before = copies(g)
    Surgery(named(), scope, conflict_threshold=-1.0).merge_(g, r, 0.0, True)
    for a, b in zip(g, before): assert a is b is None or torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(gradients(-3, 3), st.integers(-60, 40), st.integers(-60, 40))
def test_scale_equivariance(grads, i, j):
    "Scaling g by 2^i and r by 2^j, and λ to match, scales the result by 2^i: exact, since powers of two do not round."
    g, r = grads
    a, b = 2.0**i, 2.0**j
    scaled = [None if t is None else t * a for t in g], [None if t is None else t * b for t in r]
    one, two = Surgery(named(), conflict_threshold=0.2), Surgery(named(), conflict_threshold=0.2)
    first, second = one.merge_(g, r, 0.5, True), two.merge_(scaled[0], scaled[1], 0.5 * a / b, True)
    if abs(first.cosine - 0.2) > 1e-5: assert first.conflict == second.conflict
    for x, y in zip(g, scaled[0]):
        if x is not None:
            torch.testing.assert_close(y / a, x, rtol=1e-5, atol=1e-6 * max(first.merged_norm, first.norm_task))


@settings(max_examples=50, deadline=None)
@given(gradients(-3, 3), st.floats(0, 5))
def test_one_layer_is_global(grads, lam):
    g, r = grads
    h = copies(g)
    one = Surgery(named(names=[f"layers.0.{n}" for n in NAMES]), "layer").merge_(g, r, lam, True)
    two = Surgery(named(), "global").merge_(h, r, lam, True)
    assert (one.dot, one.merged_norm, one.conflict) == (two.dot, two.merged_norm, two.conflict)
    for a, b in zip(g, h): assert a is b is None or torch.equal(a, b)


def test_zero_and_absent_retention_gradient():
    g = [torch.randn(s) for s in SHAPES]
    for r in ([torch.zeros(s) for s in SHAPES], [None] * len(SHAPES)):
        h = copies(g)
        result = Surgery(named()).merge_(h, r, 3.0, True)
        assert (result.finite and not result.conflict and math.isnan(result.cosine)
                and all(torch.equal(a, b) for a, b in zip(g, h)))
    result = Surgery(named()).merge_(h := [None] * len(SHAPES), [torch.ones(s) for s in SHAPES], 2.0, True)
    assert all(torch.equal(a, torch.full(s, 2.0)) for a, s in zip(h, SHAPES))
    assert result.merged_norm == pytest.approx(2 * math.sqrt(12 + 5 + 1 + 12 + 17))


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-38, 1e18])
def test_tiny_and_huge_r_project_exactly(size):
    "One rounding of g is all the error there is; no ε in a denominator, no underflow of ‖r‖²."
    torch.manual_seed(0)
    g, r = [torch.randn(4000)], [torch.randn(4000)]
    g[0] -= 0.5 * r[0]
    r[0] *= size
    result = Surgery([("w", torch.zeros(4000))]).merge_(g, r, 0.0, True)
    assert result.projected
    dot, gg, rr = dots(g, r)
    assert abs(dot) <= 3e-8 * math.sqrt(gg) * math.sqrt(rr)


# references

@settings(max_examples=150, deadline=None)
@given(gradients(-3, 3), st.floats(0, 10), st.sampled_from(list(S.MERGES)), st.booleans(), st.floats(-1, 1),
       st.one_of(st.none(), st.floats(1e-3, 1e3)))
def test_float64_oracle(grads, lam, mode, project, threshold, max_norm):
    g, r = grads
    wide = [[None if t is None else t.double() for t in ts] for ts in (g, r)]
    dot, gg, rr = dots(*wide)
    cosine = dot / math.sqrt(gg * rr) if gg * rr else 0.0
    if abs(cosine - threshold) < 1e-5: return
    want = merge_grads(project_if_conflict(*wide, threshold)[0] if project else wide[0], wide[1], lam, mode)
    norm = math.sqrt(compute_dot(want, want))
    if max_norm is not None and norm + 1e-6 > max_norm:
        want = [None if t is None else t * max_norm / (norm + 1e-6) for t in want]
    result = Surgery(named(), gate="always" if project else "never", mode=mode, conflict_threshold=threshold).merge_(
        g, r, lam, True, max_norm)
    close = dict(rtol=1e-5, atol=1e-5 * math.sqrt(gg) + 1e-6 * math.sqrt(rr) * lam)
    assert result.cosine == pytest.approx(cosine, rel=1e-5, abs=1e-6)
    assert result.merged_norm == pytest.approx(norm, rel=1e-5, abs=1e-3 * (math.sqrt(gg) + lam * math.sqrt(rr)))
    for a, b in zip(g, want):
        if a is None: assert b is None or not b.any()  # c = 0 makes no gradient where there was none
        else: torch.testing.assert_close(a.double(), b, **close)


def test_a_gem_formula():
    "Chaudhry et al. 2019, eq. 11: g − (gᵀr / rᵀr) r if gᵀr < 0."
    torch.manual_seed(1)
    for _ in range(20):
        g, r = torch.randn(50), torch.randn(50)
        want = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
        got = [g.clone()]
        Surgery([("w", g)], conflict_threshold=0.0).merge_(got, [r], 0.0, True)
        torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)


def test_torchjd_dual_projection():
    "With one constraint, GEM's dual projection (TorchJD's DualProj, preferring the task) is the one-sided projection."
    DualProj = pytest.importorskip("torchjd.aggregation").DualProj
    aggregate = DualProj(pref_vector=torch.tensor([1.0, 0.0]))
    torch.manual_seed(2)
    for _ in range(20):
        g, r = torch.randn(50), torch.randn(50)
        got = [g.clone()]
        Surgery([("w", g)], conflict_threshold=0.0).merge_(got, [r], 0.0, True)
        torch.testing.assert_close(got[0], aggregate(torch.stack([g, r])), rtol=1e-3, atol=2e-3)


# storage

@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_layouts(layout):
    torch.manual_seed(3)
    make = {"channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "transposed": lambda: torch.randn(6, 7).t(), "strided": lambda: torch.randn(6, 8)[:, ::2],
            "expanded": lambda: torch.randn(6, 1).expand(6, 4)}[layout]
    g, r = [make()], [make()]
    want = merge_grads(project_if_conflict(g, r, 0.9)[0], r, 0.3)
    pointer = g[0].data_ptr()
    Surgery([("w", g[0])], conflict_threshold=0.9).merge_(g, r, 0.3, True)
    torch.testing.assert_close(g[0], want[0], rtol=1e-5, atol=1e-6)
    assert layout == "expanded" or g[0].data_ptr() == pointer


def test_bfloat16_and_mixed_storage():
    torch.manual_seed(4)
    g32, r32 = torch.randn(3000), torch.randn(3000)
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        g, r = [g32.to(dtypes[0])], [r32.to(dtypes[1])]
        want = merge_grads(project_if_conflict([g[0].double()], [r[0].double()], 0.9)[0], [r[0].double()], 0.3)[0]
        Surgery([("w", g[0])], conflict_threshold=0.9).merge_(g, r, 0.3, True)
        assert g[0].dtype == dtypes[0]
        torch.testing.assert_close(g[0].double(), want, rtol=2**-8 if dtypes[0] != torch.float32 else 1e-5, atol=1e-6)


def test_bfloat16_retention_copy_error_is_as_stated():
    torch.manual_seed(5)
    g, r = [torch.randn(20_000)], [torch.randn(20_000)]
    g[0] -= 0.5 * r[0]
    Surgery([("w", g[0])]).merge_(g, [r[0].bfloat16()], 0.0, True)
    dot, gg, rr = dots(g, r)
    assert abs(dot) / math.sqrt(gg * rr) < 2**-8


def test_tied_frozen_and_shared_tensors():
    w, frozen = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3), requires_grad=False)
    surgery = Surgery([("embed", w), ("frozen", frozen), ("head", w)], conflict_threshold=-1)
    g, r = torch.randn(5), torch.randn(5)
    grads = [g.clone(), None, None]
    result = surgery.merge_(grads, [r, None, None], 2.0, True)
    torch.testing.assert_close(grads[0], g + 2 * r)
    assert result.norm_task == pytest.approx(g.norm().item(), rel=1e-6)
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    x = torch.randn(4)
    g, r = (list(torch.autograd.grad(((a + b) * x).sum() * k, [a, b])) for k in (1.0, 2.0))
    assert g[0].data_ptr() == g[1].data_ptr(), "autograd no longer shares: this test has lost its subject"
    Surgery([("a", a), ("b", b)], conflict_threshold=-1).merge_(g, r, 1.0, True)
    for t in g: torch.testing.assert_close(t, 3 * x)


@pytest.mark.parametrize("where", ["g", "r", "lam"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_writes_nothing(where, value):
    g, r = ([torch.randn(s) for s in SHAPES] for _ in range(2))
    if where != "lam": dict(g=g, r=r)[where][1][2] = value
    before = copies(g)
    result = Surgery(named(), "layer").merge_(g, r, value if where == "lam" else 1.0, True, max_norm=1.0)
    assert not result.finite and all(torch.equal(a, b) or a.isnan().any() for a, b in zip(g, before))


def test_clipping_is_torchs():
    torch.manual_seed(6)
    for max_norm in (0.1, 1.0, 1e6):
        params = [nn.Parameter(torch.zeros(s)) for s in SHAPES]
        g, r = ([torch.randn(s) for s in SHAPES] for _ in range(2))
        want = merge_grads(project_if_conflict(g, r)[0], r, 0.5)
        for p, t in zip(params, want): p.grad = t
        norm = nn.utils.clip_grad_norm_(params, max_norm)
        result = Surgery(zip(NAMES, params)).merge_(g, r, 0.5, True, max_norm)
        assert result.merged_norm == pytest.approx(norm.item(), rel=1e-5) and result.clipped == (norm > max_norm).item()
        for p, t in zip(params, g): torch.testing.assert_close(t, p.grad, rtol=1e-5, atol=1e-7)


def test_gate_and_wrong_use():
    g, r = [torch.ones(3)], [-torch.ones(3)]
    for gate, violated, want in (("always", False, True), ("violated", False, False), ("violated", True, True),
                                 ("never", True, False)):
        result = Surgery([("w", g[0])], gate=gate).merge_(copies(g), r, 0.0, violated)
        assert result.conflict and result.projected == want
    assert not Surgery([("w", g[0])], use_projection=False).merge_(copies(g), r, 0.0, True).projected
    with pytest.raises(ValueError, match="expected 1 gradients in g and in r"):
        Surgery([("w", g[0])]).merge_(g + g, r, 0.0, True)
    with pytest.raises(ValueError, match="weighted, equal, task_priority"): Surgery([("w", g[0])], mode="mean")


def test_sharded_sums_are_reduced():
    """Two threads hold one half of each gradient, as FSDP ranks do; their result is that of the whole, also where r is
    tiny."""
    torch.manual_seed(7)
    whole = [torch.randn(40) for _ in range(2)], [torch.randn(40), 1e-22 * torch.randn(40)]
    halves = [tuple([t[k * 20 : k * 20 + 20].clone() for t in ts] for ts in whole) for k in range(2)]
    barrier, box, calls, out = threading.Barrier(2), {}, [0, 0], {}
    def rank(k):
        def all_reduce(sums):
            calls[k] += 1
            box[k] = sums.clone(); barrier.wait(); total = box[0] + box[1]; barrier.wait()
            return total
        out[k] = Surgery([("a", halves[k][0][0]), ("b", halves[k][0][1])], "tensor", conflict_threshold=0.5,
                         all_reduce=all_reduce).merge_(*halves[k], 0.2, True, max_norm=1.0)
    threads = [threading.Thread(target=rank, args=(k,)) for k in range(2)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    want = Surgery([("a", whole[0][0]), ("b", whole[0][1])], "tensor", conflict_threshold=0.5).merge_(
        *whole, 0.2, True, max_norm=1.0)
    assert calls == [2, 2] and out[0].merged_norm == out[1].merged_norm == pytest.approx(want.merged_norm, rel=1e-6)
    for k in range(2):
        for a, b in zip(halves[k][0], whole[0]):
            torch.testing.assert_close(a, b[k * 20 : k * 20 + 20], rtol=1e-5, atol=1e-7)


# streaming and the things a trainer does

class Layer(nn.TransformerEncoderLayer):
    recompute = False
    def __init__(self, d): super().__init__(d, 2, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
    def __call__(self, *args):  # as transformers does it: hooks run inside the checkpoint
        return checkpoint(super().__call__, *args, use_reentrant=False) if self.recompute else super().__call__(*args)


class Policy(nn.Module):
    "A small decoder beside a small tower, embeddings tied to the head, one block used twice."
    def __init__(self, d=16, vocab=13, depth=4):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, d), nn.Tanh(), nn.Linear(d, d))
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d) for _ in range(depth))
        self.norm, self.head, self.unused = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False), nn.Linear(3, 3)
        self.head.weight = self.embed.weight

    def forward(self, batch, stop=None):
        ids, pixels = batch
        h = torch.cat([self.tower(pixels), self.embed(ids)], 1)
        states = [h]
        for layer in self.layers[:stop]: states.append(h := layer(h))
        h = self.layers[0](h)
        return states, self.head(self.norm(h))[:, pixels.shape[1] :]


def batch(n, seed):
    return (torch.randint(13, (n, 6), generator=(g := torch.Generator().manual_seed(seed))),
            torch.randn(n, 2, 8, generator=g))
def task_loss(model, b=batch(4, 0)): return cross_entropy(model(b)[1].flatten(0, 1), b[0].roll(1, 1).flatten())
VIEWS = {"one layer": lambda states, logits: (states[2] - 0.3).square().mean(),
         "two layers": lambda states, logits: sum((s - 0.3).square().mean() for s in states[-2:]),
         "logits": lambda states, logits: logits.log_softmax(-1).square().mean()}
def retention_loss(model, view="two layers", stop=3): return VIEWS[view](*model(batch(3, 1), stop))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("variant", ["plain", "checkpointed", "frozen", "double"])
def test_streaming_equals_layer_scope(view, variant):
    torch.manual_seed(8)
    model = Policy().to(torch.float64 if variant == "double" else torch.float32)
    b = [tuple(t.double() if variant == "double" and t.is_floating_point() else t for t in batch(n, s))
         for n, s in ((4, 0), (3, 1))]
    for layer in model.layers: layer.recompute = variant == "checkpointed"
    if variant == "frozen":
        model.embed.requires_grad_(False); model.layers[1].requires_grad_(False); model.tower.requires_grad_(False)
    def anchors(): return VIEWS[view](*model(b[1], 3))
    kw = dict(conflict_threshold=0.9)
    params = list(model.parameters())
    r = retention_grads(anchors(), params)
    task_loss(model, b[0]).backward()
    g = [p.grad for p in params]
    want = Surgery(model.named_parameters(), "layer", **kw).merge_(g, r, 0.7, True, max_norm=0.4)
    model.zero_grad()
    streaming = StreamingSurgery(model, **kw)
    with streaming.record(): loss = anchors()
    with streaming.merge_(loss, 0.7, True, max_norm=0.4) as got: task_loss(model, b[0]).backward()
    assert want.projected and want.clipped and got.names == want.names
    torch.testing.assert_close(got.table, want.table, rtol=1e-3, atol=1e-6, equal_nan=True)
    for p, t in zip(params, g):
        assert (p.grad is None) == (t is None) and (t is None or torch.allclose(p.grad, t, rtol=1e-4, atol=1e-6))
    model.zero_grad()
    with streaming.record(): loss = anchors()
    loss.backward()  # recording alone does not spoil the model: hooks are gone and the next forward pass is whole
    anchors().backward()
    assert not any(m._forward_hooks for m in model.modules())


def test_streaming_reports_non_finite_and_cleans_up():
    model = Policy()
    streaming = StreamingSurgery(model)
    with streaming.record(): loss = retention_loss(model) * math.nan
    with streaming.merge_(loss, 1.0, True) as result: task_loss(model).backward()
    assert not result.finite and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with streaming.record(): loss = retention_loss(model)
    with pytest.raises(RuntimeError, match="boom"):
        with streaming.merge_(loss, 1.0, True): raise RuntimeError("boom")
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()
                   if p._post_accumulate_grad_hooks is not None)
    with pytest.raises(ValueError, match="one process"): StreamingSurgery(model, all_reduce=lambda s: s)


def surgery_step(model, opt, autocast=False, lam=1.0, scope="global"):
    params = list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast): anchor, task = retention_loss(model), task_loss(model)
    r = retention_grads(anchor, params)
    opt.zero_grad(); task.backward()
    g = [p.grad for p in params]
    result = Surgery(model.named_parameters(), scope).merge_(g, r, lam, True, max_norm=1.0)
    for p, t in zip(params, g): p.grad = t
    opt.step()
    return result, anchor.item(), task.item()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointed"])
def test_trains_with_autocast_checkpointing_weight_decay_and_a_schedule(autocast, recompute):
    torch.manual_seed(9)
    model = Policy()
    for layer in model.layers: layer.recompute = recompute
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30)
    first = surgery_step(model, opt, autocast)
    for _ in range(29): sched.step(); last = surgery_step(model, opt, autocast)
    assert last[0].finite and last[1] < 0.7 * first[1] and last[2] < first[2] and opt.param_groups[0]["lr"] < 3e-4
    assert model.unused.weight.grad is None


def test_checkpointing_changes_no_bit():
    torch.manual_seed(10)
    models = [Policy(), Policy()]
    models[1].load_state_dict(models[0].state_dict())
    for layer in models[1].layers: layer.recompute = True
    for m in models: surgery_step(m, torch.optim.SGD(m.parameters(), lr=0.1))
    for a, b in zip(*(m.parameters() for m in models)): assert torch.equal(a, b)


@pytest.mark.parametrize("streamed", [False, True])
def test_lora(streamed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(11)
    model = peft.get_peft_model(Policy(),
                                peft.LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert set(S.scope_groups([n for n, _ in trainable])) == {f"base_model.model.layers.{i}" for i in range(4)}
    opt = torch.optim.AdamW([p for _, p in trainable], lr=1e-2)
    if streamed:
        streaming = StreamingSurgery(model, trainable)
        with streaming.record(): loss = retention_loss(model)
        with streaming.merge_(loss, 1.0, True, 1.0) as result: task_loss(model).backward()
        opt.step()
    else: result = surgery_step(model, opt, scope="layer")[0]
    assert result.finite and result.norm_retain > 0
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


class Wide(nn.Module):
    "Parameters dominate activations, as in a large model with a small batch."
    def __init__(self, d=192, depth=24):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.GELU()) for _ in range(depth))
    def forward(self, x):
        for layer in self.layers: x = x + layer(x)
        return x


def test_memory(monkeypatch):
    monkeypatch.setitem(S.CHUNK, "cpu", 1 << 12)  # as small beside a layer as the real chunk is beside a real layer
    model, x, y = Wide(), torch.randn(2, 192), torch.randn(1, 192)
    params, streaming = list(model.parameters()), StreamingSurgery(model)
    surgery = Surgery(model.named_parameters())
    def task(): return model(x).square().mean()
    def anchors(): return (model(y) - 1).square().mean()
    def plain(): task().backward()
    def whole():
        r = retention_grads(anchors(), params)
        plain()
        surgery.merge_([p.grad for p in params], r, 1.0, True, 0.1)
    def streamed():
        with streaming.record(): loss = anchors()
        with streaming.merge_(loss, 1.0, True, 0.1): task().backward()
    extra = {k: extra_copies(plain, f, model) for k, f in dict(whole=whole, streamed=streamed).items()}
    assert 0.9 < extra["whole"] <= 1.05, extra
    assert extra["streamed"] <= 0.10, extra


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_host_synchronisation():
    g, r = ([torch.randn(100_000, device="cuda") for _ in range(8)] for _ in range(2))
    surgery = Surgery([(f"layers.{i}.w", t) for i, t in enumerate(g)], "layer")
    surgery.merge_(g, r, 1.0, True, 1.0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            surgery.merge_(g, r, 1.0, True, 1.0)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) == 1
