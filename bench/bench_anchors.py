"""What a cache costs: `python bench/bench_anchors.py [--anchors 1000000]
[--only bytes,build,rss,open,batch,video,video_build]` writes outputs/bench/anchors.json. Timings are ratios of runs
that take turns, so that a busy machine hits both sides."""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as the commands do; `GOMP_SPINCOUNT=300000` shows what it is without
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from craft_nb.anchors import AnchorCacheDataset, AnchorWriter, build_anchor_dataloader, cache_info

TASKS = 'window-open-v3', 'button-press-topdown-v3', 'drawer-close-v3'


def bytes_per_anchor(tmp, n=48, px=224, tt=200, words=40, d=2048, ta=64, said=40, k=32):
    "Full pi0_fast shapes, real frames of three tasks, two layers; hidden states float32 on both sides."
    from craft_nb.small import make_small_env, record_episode
    frames = []
    for t in TASKS:
        env = make_small_env(t, size=px, episode_length=48); e = record_episode(env, 0); env.close()
        pick = torch.linspace(0, len(e['image']) - 1, n // len(TASKS)).long().tolist()
        frames += [torch.from_numpy(e['image'][i].copy()).permute(2, 0, 1) for i in pick]
    g = torch.Generator().manual_seed(0); p = px // 14; prefix = p * p + tt
    ids = torch.randint(0, 257_152, (n, tt), generator=g); seen = (torch.arange(tt) < words).expand(n, tt)
    mask = torch.cat([torch.ones(n, p * p, dtype=torch.bool), seen], 1); act = (torch.arange(ta) < said).expand(n, ta)
    inputs = lambda i: dict(pixel_values=frames[i][None, None], image_mask=torch.ones(1, 1), input_ids=ids[i:i + 1],
                            attention_mask=seen[i:i + 1])
    actions = lambda i: dict(action_ids=torch.randint(0, 257_152, (1, ta + 1), generator=g),
                             action_mask=torch.ones(1, ta + 1), predict_mask=act[i:i + 1])
    targets = dict(
        pooled=lambda i: dict(teacher_hidden=torch.randn(1, 2, 2, d, generator=g)),
        tokens=lambda i: dict(tokens_hidden=torch.randn(1, 2, prefix, d, generator=g), tokens_mask=mask[i:i + 1]),
        action_tokens=lambda i: dict(action_hidden=torch.randn(1, 2, ta, d, generator=g)) | actions(i),
        action_logits=lambda i: dict(action_logp=-torch.rand(1, ta, k, generator=g),
                                     action_topk=torch.randint(0, 257_152, (1, ta, k), generator=g)) | actions(i),
        token_ce=lambda i: dict(labels=ids[i:i + 1, :ta]) | actions(i))
    packed = dict(tokens_hidden=('tokens_mask', 1), action_hidden=('predict_mask', 1),
                  action_logp=('predict_mask', 0), action_topk=('predict_mask', 0))
    info = {}
    for view, make in targets.items():
        names = [t for t in make(0) if t not in ('action_ids', 'action_mask')]
        k = n if view == 'pooled' else 12                                        # sizes of the others hardly vary
        with AnchorWriter(tmp/view, k, {view: dict(tensors=names)}, 12, packed=packed) as w:
            for i in range(0, n, n // k): w.add(inputs(i) | make(i))
        info[view] = cache_info(tmp/view)
    hidden = 2 * 2 * d * 4; origin = 3 * px * px * 4 + 2 * tt * 8 + hidden  # float32 pixels, int64 ids and mask, hidden
    pooled = info['pooled']; all_prefix = 2 * prefix * d * 4
    return dict(bytes_per_anchor={v: i['bytes_per_anchor'] for v, i in info.items()},
                target_bytes_per_anchor={v: i['views'][v]['bytes_per_anchor'] for v, i in info.items()},
                image_bytes_per_anchor=pooled['tensors']['pixel_values'],
                image_ratio=3 * px * px / pooled['tensors']['pixel_values'],
                origin_bytes_per_anchor=origin, bytes_ratio_to_origin=pooled['bytes_per_anchor'] / origin,
                targets_ratio=all_prefix / pooled['views']['pooled']['bytes_per_anchor'],
                targets_ratio_to_stored_tokens=(info['tokens']['views']['tokens']['bytes_per_anchor']
                                                / pooled['views']['pooled']['bytes_per_anchor']))


class Again(torch.utils.data.Dataset):
    "A data set repeated to `n` frames."
    def __init__(self, ds, n): self.ds, self.n = ds, n
    def __len__(self): return self.n
    def __getitem__(self, i): return self.ds[i % len(self.ds)]


def builds(tmp, n=512, batch=16, turns=3, views=('pooled', 'action_logits'), **sizes):
    """Anchors a second of a build over those of the loop without writing, and over forward passes alone on batches held
    in memory."""
    from craft_nb.builder import AnchorFrames, anchor_batch_targets, build_anchor_cache
    from craft_nb.losses import make_views
    from craft_nb.policies import adapter_for, eval_mode
    from craft_nb.small import new_policy, tiny_workload
    work = tiny_workload(tmp/'work', tasks=TASKS[:2]); policy, pre, _ = new_policy(work, **sizes); policy.eval()
    data, chosen, adapter = Again(work.dataset(), n), make_views(views), adapter_for(policy)
    spans = [(i, min(i + batch, n)) for i in range(0, n, batch)]; frames = AnchorFrames(data, list(range(n)), spans)
    def build():
        build_anchor_cache(policy, pre, data, tempfile.mkdtemp(dir=tmp), episode_index=[0] * n, task_index=[0] * n,
                           num_anchors=n, views=views, batch_size=batch, progress=False, allow_undecodable=True)
    def loop():
        with eval_mode(policy):
            for b in torch.utils.data.DataLoader(frames, batch_size=None): anchor_batch_targets(policy, pre(b), chosen)
    with eval_mode(policy), torch.no_grad(): held = [adapter.inputs(policy, pre(frames[i])) for i in range(len(spans))]
    def forward():
        with eval_mode(policy), torch.no_grad():
            for x in held:
                adapter.features(policy, adapter.prepare(policy, x | adapter.decode(policy, x)), [-2, -1], True, True)
    took = {f.__name__: [] for f in (build, loop, forward)}
    for f in (build, loop, forward): f()
    for _ in range(turns):
        for f in (build, loop, forward): t = time.perf_counter(); f(); took[f.__name__].append(time.perf_counter() - t)
    b, l, f = (median(took[k]) for k in ('build', 'loop', 'forward'))
    return dict(build_over_forward=l / b, build_over_forward_preloaded=f / b, build_anchors_per_second=n / b,
                forward_ms_per_anchor=f / n * 1e3)


RSS = '''
import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[1] + '/bench')
import torch; torch.set_num_threads(1)
from pathlib import Path
from bench_anchors import Again
from craft_nb.builder import build_anchor_cache
from craft_nb.small import tiny_workload
work, n = tiny_workload(sys.argv[2] + '/work'), int(sys.argv[3])
build_anchor_cache(work.policy(), work.processors()[0], Again(work.dataset(), n), f'{sys.argv[2]}/rss{n}',
                   episode_index=[0] * n, task_index=[0] * n, num_anchors=n, batch_size=16, progress=False)
print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')))
'''


def run(code, *args):
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True,
                          check=True).stdout.split()[-1]


def rss(tmp, small=500, large=5000):
    "Peak resident memory of a build of 5,000 anchors over that of one of 500."
    run(RSS, ROOT, tmp, 16)  # makes the workload, which is not to be measured
    peak = [int(run(RSS, ROOT, tmp, n)) for n in (small, large)]
    return dict(rss_growth=peak[1] / peak[0] - 1, rss_mb={str(n): p / 1024 for n, p in zip((small, large), peak)})


def generate(path, n, block=4096):
    g = torch.Generator().manual_seed(0)
    x = dict(pixel_values=torch.randint(0, 256, (block, 3, 8, 8), generator=g, dtype=torch.uint8),
             input_ids=torch.randint(0, 999, (block, 32), generator=g),
             teacher_hidden=torch.randn(block, 2, 2, 32, generator=g), frame_index=torch.arange(block))
    with AnchorWriter(path, n, dict(pooled=dict(tensors=['teacher_hidden'])), block, 'raw') as w:
        for lo, hi in w.ranges(block): w.add({k: v[:hi - lo] for k, v in x.items()})


def film(root, episodes=16, frames=125, size=(240, 320), codec='h264'):
    "Two cameras at 30 frames a second, a key frame in two as LeRobot encodes by default; smooth pictures that move."
    import numpy as np
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset
    h, w = size; cams = [f'observation.images.{c}' for c in ('top', 'wrist')]
    features = {c: dict(dtype='video', shape=(h, w, 3), names=['height', 'width', 'channels']) for c in cams}
    features |= {k: dict(dtype='float32', shape=(7,), names=None) for k in ('observation.state', 'action')}
    ds = LeRobotDataset.create('bench/film', 30, features, root=root, use_videos=True,
                               rgb_encoder=RGBEncoderConfig(vcodec=codec))
    y, x = np.mgrid[:h, :w] / 40
    for e in range(episodes):
        for i in range(frames):
            picture = lambda k: np.stack([127 + 120 * np.sin(x + c + e + .1 * i) * np.cos(y * (k + 1) - .07 * i)
                                          for c in range(3)], -1).astype(np.uint8)
            z = np.sin(np.arange(7) + .05 * i + e).astype(np.float32)
            ds.add_frame({c: picture(k) for k, c in enumerate(cams)}
                         | {'observation.state': z, 'action': z, 'task': f'task {e % 3}'})
        ds.save_episode()
    ds.finalize()


def video(tmp, n=1000, chunk=50):
    """Frames a second of 1,000 anchors as a build reads them, over `dataset[i]` of the same frames in random order.
    PyAV on both sides."""
    import random
    from craft_nb.tools import sample_anchors
    from craft_nb.video import ForwardFrames
    from lerobot.datasets import LeRobotDataset
    film(tmp/'film')
    ds = LeRobotDataset('bench/film', root=tmp/'film', video_backend='pyav',
                        delta_timestamps={'action': [i / 30 for i in range(chunk)]})
    column = lambda k: ds.hf_dataset.data[k].to_pylist()
    picked = sample_anchors(column('episode_index'), column('task_index'), n)
    mixed = random.Random(0).sample(picked, n)
    ForwardFrames(ds)[0], ds[0]
    took = {}
    for turn in range(4):  # quarters that take turns, so that a busy machine hits both sides
        a, b = turn * n // 4, (turn + 1) * n // 4
        for name, data, which in (('video', ForwardFrames(ds), picked[a:b]), ('random', ds, mixed[a:b])):
            t = time.perf_counter()
            for i in which: data[i]
            took[name] = took.get(name, 0) + time.perf_counter() - t
    return dict(video_over_random=took['random'] / took['video'], video_frames_per_second=n / took['video'],
                random_frames_per_second=n / took['random'],
                video_frames=len(ds), video_shape=list(ds.meta.shapes['observation.images.top']))


def video_build(tmp, n=192, batch=16, turns=3, views=('pooled',)):
    """Build from films over the bare loop that decodes the same frames forward and runs the teacher, as often by turns;
    two cameras of 240 × 320, a small pi0_fast at 64 × 64."""
    from craft_nb.builder import AnchorFrames, anchor_batch_targets, build_anchor_cache
    from craft_nb.losses import make_views
    from craft_nb.policies import eval_mode
    from craft_nb.small import Workload, new_policy, save_tokenizers
    from craft_nb.tools import sample_anchors
    from craft_nb.video import ForwardFrames
    work = Workload(tmp/'films'); film(work.root, episodes=6, frames=64)
    ds = work.dataset(); save_tokenizers(ds, work.tokenizers); policy, pre, _ = new_policy(work); policy.eval()
    index = {k: ds.hf_dataset.data[k].to_pylist() for k in ('episode_index', 'task_index')}
    picked, chosen = sample_anchors(*index.values(), n), make_views(views)
    spans = [(i, min(i + batch, n)) for i in range(0, n, batch)]
    def build():
        build_anchor_cache(policy, pre, ForwardFrames(ds), tempfile.mkdtemp(dir=tmp), **index, num_anchors=n,
                           views=views, batch_size=batch, progress=False)
    def loop():
        with eval_mode(policy):
            for b in torch.utils.data.DataLoader(AnchorFrames(ForwardFrames(ds), picked, spans), batch_size=None):
                anchor_batch_targets(policy, pre(b), chosen)
    took = {f: [] for f in (build, loop)}
    def clocks(): return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)
    for f in took: f()
    for _ in range(turns):
        for f in took: t = clocks(); f(); took[f].append(clocks() - t)
    b, l = (torch.stack(took[f]).median(0).values.tolist() for f in (build, loop))
    return dict(build_over_bare_loop=l[0] / b[0], build_over_bare_loop_processor=l[1] / b[1],
                video_build_anchors_per_second=n / b[0])


OPEN = '''
import sys, time, json; sys.path.insert(0, sys.argv[1])
import torch
from craft_nb.anchors import AnchorCacheDataset
def now(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) / 1024
before, t = now(), time.perf_counter(); ds = AnchorCacheDataset(sys.argv[2]); took, opened = time.perf_counter() - t, now()
t = time.perf_counter(); ds.batch(range(0, len(ds), len(ds) // 16))
first, used = time.perf_counter() - t, now()
t = time.perf_counter(); ds.check_headers()
print(json.dumps([took, opened - before, used - before, used, first, time.perf_counter() - t]).replace(' ', ''))
'''


def opening(cache):
    "Seconds and resident memory that opening takes; `import torch` alone is in the last figure."
    took = [json.loads(run(OPEN, ROOT, cache)) for _ in range(3)]
    s, o, b, total, first, headers = (median(c) for c in zip(*took))
    return dict(open_seconds=s, open_rss_mb=o, open_rss_mb_with_a_batch=b, process_rss_mb=total,
                first_batch_seconds=first, headers_seconds=headers, open_anchors=len(AnchorCacheDataset(cache)))


def batches(tmp, cache, steps=40):
    "Time that a training step waits for a random batch of 16, 2 workers, over the step (small pi0_fast, batch 32)."
    from craft_nb.small import tiny_workload
    work = tiny_workload(tmp/'work'); policy = work.policy().train(); data = work.batch(32)
    opt = torch.optim.AdamW(policy.parameters(), 1e-4)
    line = build_anchor_dataloader(cache, 16, num_workers=2).forever(); next(line); wait, step = [], []
    for _ in range(steps):
        t = time.perf_counter(); next(line); u = time.perf_counter()
        opt.zero_grad()
        policy(data)[0].backward()
        opt.step()
        wait.append(u - t)
        step.append(time.perf_counter() - u)
    return dict(batch_over_step=median(wait) / median(step), batch_wait_ms=median(wait) * 1e3,
                step_ms=median(step) * 1e3)


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--only', default='bytes,build,rss,open,batch,video,video_build')
    p.add_argument('--anchors', type=int, default=1_000_000)
    a, _ = p.parse_known_args()
    out = ROOT/'outputs'/'bench'/'anchors.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); cache = tmp/'million'
        if {'open', 'batch'} & set(a.only.split(',')):
            t = time.time()
            generate(cache, a.anchors)
            found['generate_anchors_per_second'] = a.anchors / (time.time() - t)
        for name, f in dict(bytes=lambda: bytes_per_anchor(tmp), build=lambda: builds(tmp), rss=lambda: rss(tmp),
                            open=lambda: opening(cache), batch=lambda: batches(tmp, cache),
                            video=lambda: video(tmp), video_build=lambda: video_build(tmp)).items():
            if name not in a.only.split(','): continue
            found |= (new := f()); out.write_text(json.dumps(found, indent=1) + '\n')
            for k, v in new.items(): print(f'{k:<32} {json.dumps(v)}', flush=True)
    print(f'written to {out.relative_to(ROOT)}')


if __name__ == '__main__': main()
