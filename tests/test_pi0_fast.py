"""The adapter of pi0_fast: hidden states bit for bit, several cameras, missing cameras, bfloat16, L_ret = 0 at the
start."""
import contextlib

import pytest
import torch

from craft_nb.builder import anchor_batch_targets
from craft_nb.losses import make_views, rounding_error
from craft_nb.policies import adapter_for

VIEWS = ["pooled", "tokens", "action_tokens", "action_logits"]


def with_cameras(work, present: int, missing: int = 0, dtype: str = "float32"):
    "A policy with `present + missing` cameras, and a batch that holds the present ones."
    from lerobot.configs.types import FeatureType, PolicyFeature
    from craft_nb.small import PI0FastSmallPolicy
    cfg = work.policy().config
    cfg.dtype = dtype
    batch = work.processors()[0](work.batch(4))
    own = next(iter(k for k, f in cfg.input_features.items() if f.type == FeatureType.VISUAL))
    for i in range(1, present + missing):
        cfg.input_features[f"observation.images.extra{i}"] = PolicyFeature(
            type=FeatureType.VISUAL, shape=cfg.input_features[own].shape)
        if i < present: batch[f"observation.images.extra{i}"] = batch[own].roll(i, 0).flip(-1)
    torch.manual_seed(0)
    return PI0FastSmallPolicy(cfg).train(), batch


@contextlib.contextmanager
def all_hidden_states(decoder):
    "What transformers itself returns for the passes inside."
    seen, own = [], decoder.forward
    def forward(*args, **kw):
        out = own(*args, **kw, output_hidden_states=True)
        seen.append(out.hidden_states)
        return out
    decoder.forward = forward
    try: yield seen
    finally: del decoder.forward


@pytest.mark.parametrize("present,missing", [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_captured_states_equal_transformers(work, present, missing):
    policy, batch = with_cameras(work, present, missing)
    adapter = adapter_for(policy)
    decoder, anchors = adapter.decoder(policy), adapter.prepare(policy, adapter.inputs(policy, batch))
    assert anchors["pixel_values"].shape[1] == present + missing
    assert anchors["image_mask"].sum(1).tolist() == [present] * 4
    depth = len(decoder.layers)
    with torch.no_grad():
        with all_hidden_states(decoder) as seen: adapter.features(policy, anchors, [-1], True, True)
        for i in range(-depth - 1, depth + 1):
            got = adapter.features(policy, anchors, [i], True, False).hidden[i]
            assert torch.equal(got, seen[0][i]), i
    assert policy.training


@pytest.mark.parametrize("present,missing", [(1, 0), (2, 1)])
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-6), ("bfloat16", 1e-4)])
def test_retention_loss_is_zero_at_the_start(work, present, missing, dtype, limit):
    policy, batch = with_cameras(work, present, missing, dtype)
    adapter, views = adapter_for(policy), make_views(VIEWS, layers=[-2, -1], top_k=16)
    with whole_attention():
        stored = anchor_batch_targets(policy, batch, views)
        part = adapter.prepare(policy, {k: v[1:3] for k, v in stored.items()})  # another batch size than the teacher's
        f = adapter.features(policy, part, [-2, -1], True, True)
    for name, view in views.items():
        loss = view.loss(f, part)
        assert abs(loss.item()) <= limit, (name, loss.item())
        # so that training takes it for 0
        assert loss <= view.rounding(part, rounding_error(getattr(torch, dtype))), (name, loss.item())
        other = view.loss(perturbed(f), part)
        assert other > 100 * limit, (name, other.item())  # the view does see a difference


def whole_attention():
    """PyTorch's fused attention in bfloat16 needs AVX-512 where the processor has it, also if ATEN_CPU_CAPABILITY hides
    it."""
    hidden = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if hidden else contextlib.nullcontext()


@pytest.mark.parametrize("lr,least", [(1e-5, 100), (1e-4, 1000)])
def test_one_small_step_is_drift(work, lr, least):
    """What rounding shows is far below what a step shows, whatever the batch is cut into: ratios of numbers off, not of
    their squares."""
    policy, batch = with_cameras(work, 1)
    adapter, views = adapter_for(policy), make_views(VIEWS, layers=[-2, -1], top_k=16)
    stored, limit = anchor_batch_targets(policy, batch, views), rounding_error()
    opt = torch.optim.AdamW(policy.parameters(), lr)
    policy(batch)[0].backward(); opt.step()
    for n in (4, 1):
        part = adapter.prepare(policy, {k: v[:n] for k, v in stored.items()})
        with torch.no_grad(): f = adapter.features(policy, part, [-2, -1], True, True)
        for name, view in views.items():
            for view.distance in view.distances:
                power = 1 if view.distance == "l1" else 0.5
                assert (view.loss(f, part) / view.rounding(part, limit)) ** power > least, (name, view.distance)


def perturbed(f):
    from dataclasses import replace
    g = torch.Generator().manual_seed(0)
    noise = lambda x: x + 10 * x.float().std() * torch.randn(x.shape, generator=g).to(x.dtype)
    return replace(f, hidden={k: noise(h) for k, h in f.hidden.items()}, logits=noise(f.logits))


def test_pass_is_no_deeper_than_it_must_be(work):
    policy, batch = with_cameras(work, 1)
    adapter = adapter_for(policy)
    anchors, decoder = adapter.prepare(policy, adapter.inputs(policy, batch)), adapter.decoder(policy)
    ran = []
    hooks = [b.register_forward_hook(lambda *a, i=i: ran.append(i)) for i, b in enumerate(decoder.layers)]
    hooks.append(
        policy.model.paligemma_with_expert.paligemma.lm_head.register_forward_hook(lambda *a: ran.append("head")))
    adapter.features(policy, anchors, [2], False, False)
    assert ran == [0, 1]
    ran.clear()
    adapter.features(policy, anchors, [-1], True, True)
    assert ran == [*range(len(decoder.layers)), "head"]
    for h in hooks: h.remove()


def test_a_pass_for_logits_works_on_what_predicts_alone(work):
    """The last block's feed-forward part sees the rows that the head sees; logits and gradients are those of a whole
    pass."""
    policy, batch = with_cameras(work, 2, 1)
    adapter, params = adapter_for(policy), list(policy.parameters())
    anchors, block = adapter.prepare(policy, adapter.inputs(policy, batch)), adapter.decoder(policy).layers[-1]
    rows = []
    hook = block.mlp.act_fn.register_forward_hook(lambda m, args, y: rows.append(y.shape[:-1].numel()))
    some, whole = (adapter.features(policy, anchors, layers, True, True) for layers in ([], [-1]))
    hook.remove()
    assert rows[0] == some.action_mask.sum() < rows[1] == whole.hidden[-1].shape[:2].numel() and not some.hidden
    torch.testing.assert_close(some.logits, whole.logits, rtol=1e-4, atol=1e-5)
    one, all_ = (torch.autograd.grad(f.logits.logsumexp(-1).sum(), params, allow_unused=True) for f in (some, whole))
    for a, b in zip(one, all_, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-6)


def test_decoding_is_what_the_policy_does(work):
    policy, batch = with_cameras(work, 2)
    policy.eval()
    adapter = adapter_for(policy)
    anchors = adapter.inputs(policy, batch)
    got = adapter.decode(policy, anchors)
    images, masks = policy._preprocess_images(batch)
    said = policy.model.sample_actions_fast_kv_cache(images, masks, anchors["input_ids"].long(),
                                                     anchors["attention_mask"],
                                                     max_decoding_steps=policy.config.max_action_tokens - 1)
    n = min(said.shape[1], got["action_ids"].shape[1] - 1)
    want = torch.where(got["action_mask"][:, 1 : n + 1], said[:, :n], 0)
    assert torch.equal(got["action_ids"][:, 1 : n + 1].long(), want)
    assert (got["action_ids"][:, 0] == policy._paligemma_tokenizer.bos_token_id).all()


def test_lerobots_own_class(work, monkeypatch):
    "`PI0FastPolicy` and `PI0FastPytorch` themselves, nothing subclassed; only the transformer inside them is small."
    from lerobot.policies.pi0_fast import modeling_pi0_fast as own
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from craft_nb.small import PI0FastSmallPaliGemma
    small = work.policy()
    vocab = small.model.paligemma_with_expert.paligemma.config.text_config.vocab_size
    monkeypatch.setattr(own, "PI0FastPaliGemma", lambda *args, **kw: PI0FastSmallPaliGemma(small.config, vocab))
    same = ("chunk_size", "n_action_steps", "max_action_tokens", "max_decoding_steps", "fast_skip_tokens",
            "image_resolution", "tokenizer_max_length", "text_tokenizer_name", "action_tokenizer_name",
            "input_features", "output_features", "normalization_mapping", "device")
    policy = own.PI0FastPolicy(PI0FastConfig(**{k: getattr(small.config, k) for k in same}))
    assert type(policy) is own.PI0FastPolicy and type(policy.model) is own.PI0FastPytorch
    adapter, views = adapter_for(policy), make_views(VIEWS, layers=[-2, -1], top_k=16)
    stored = anchor_batch_targets(policy, work.processors()[0](work.batch(4)), views)
    part = adapter.prepare(policy, {k: v[1:3] for k, v in stored.items()})
    f = adapter.features(policy, part, [-2, -1], True, True)
    for name, view in views.items(): assert abs(view.loss(f, part).item()) <= 1e-6, name
