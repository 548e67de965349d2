"Synthetic anchors for the tests: a pure function of the row number, as a real build is."
import torch
from craft_nb.anchors import AnchorWriter

VIEWS = dict(pooled=dict(tensors=['teacher_hidden'], distance='relative'),
             tokens=dict(tensors=['tokens_hidden', 'tokens_mask'], distance='relative'),
             action_logits=dict(tensors=['action_logp', 'action_topk', 'action_mask'], distance='kl'))
INFO = dict(policy_type='pi0_fast', layers=[-2, -1], pooling=['vision_token_mean', 'text_token_last'], width=8,
            dtype='float32', hashes=dict(weights='a' * 64), prompts=['open the window', 'close the drawer'])

def anchor(i, px=16, d=8):
    g = torch.Generator().manual_seed(i); mask = torch.arange(7) < 2 + i % 5; act = torch.arange(4) < 1 + i % 4
    return dict(
        pixel_values=torch.randint(0, 256, (2, 3, px, px), generator=g, dtype=torch.uint8),
        image_mask=torch.tensor([True, i % 3 > 0]), input_ids=torch.arange(7) + i, attention_mask=mask,
        tokens_mask=mask, teacher_hidden=torch.randn(2, 2, d, generator=g),
        tokens_hidden=torch.randn(2, 7, d, generator=g) * mask[:, None],
        action_mask=act, action_logp=-torch.rand(4, 3, generator=g) * act[:, None],
        action_topk=torch.randint(0, 99, (4, 3), generator=g) * act[:, None],
        frame_index=torch.tensor(10 * i), prompt_index=torch.tensor(i % 2))

def anchors(lo, hi, **kw):
    rows = [anchor(i, **kw) for i in range(lo, hi)]
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

def build(d, n=40, shard_size=16, batch=8, images='webp', each=None, **kw):
    with AnchorWriter(d, n, VIEWS, shard_size, images, **{**INFO, **kw}) as w:
        for lo, hi in w.ranges(batch):
            w.add(anchors(lo, hi))
            if each: each(lo)
    return d

def content(d): return {p.name: p.read_bytes() for p in sorted(d.iterdir())}
