"The anchor cache: what goes in comes out, in the order that seed, epoch and rank say; old caches; hub; command."
import json, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
sys.path.insert(0, str(Path(__file__).parent))
from anchor_data import INFO, anchors, build, content
from craft_nb import anchors as A, cards as C

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return build(tmp_path_factory.mktemp('a')/'cache')

# what goes in comes out

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 9), shard=st.integers(1, 5), b=st.integers(1, 4), code=st.sampled_from(['webp', 'zlib', 'raw']),
       dtype=st.sampled_from(['float32', 'float16', 'bfloat16']),
       l=st.integers(1, 3), t=st.integers(1, 5), d=st.integers(1, 4), cams=st.integers(0, 2), seed=st.integers(0, 99))
def test_round_trip(tmp_path_factory, n, shard, b, code, dtype, l, t, d, cams, seed):
    torch.manual_seed(seed); mask = torch.rand(n, t) > .5
    x = dict(pixel_values=torch.randint(0, 256, (n, *([cams] if cams else []), 3, 5, 7), dtype=torch.uint8),
             tokens_hidden=(torch.randn(n, l, t, d) * mask[:, None, :, None]).to(getattr(torch, dtype)),
             tokens_mask=mask, input_ids=torch.randint(0, 2**31 - 1, (n, t)), frame_index=torch.randint(0, 2**62, (n,)))
    p = tmp_path_factory.mktemp('r')/'c'
    with A.AnchorWriter(p, n, dict(tokens=dict(tensors=['tokens_hidden', 'tokens_mask'])), shard, code) as w:
        for lo, hi in w.ranges(b): w.add({k: v[lo:hi] for k, v in x.items()})
    order = torch.randperm(n); y = A.AnchorCacheDataset(p).batch(order.tolist())
    for k in x: assert torch.equal(y[k].to(x[k].dtype), x[k][order]), k
    assert (y['tokens_hidden'].dtype == getattr(torch, dtype) and y['input_ids'].dtype == torch.int32
            and y['frame_index'].dtype == torch.int64)

def test_shards_are_plain_safetensors(cache):
    from safetensors import safe_open
    with safe_open(cache/'anchors-00001.safetensors', 'pt') as f:
        assert torch.equal(f.get_tensor('teacher_hidden'), anchors(16, 32)['teacher_hidden'])

def test_image_codecs_are_lossless_on_noise_and_on_pictures():
    yy, xx = torch.meshgrid(torch.arange(33), torch.arange(50), indexing='ij'); g = torch.Generator().manual_seed(0)
    for x in (torch.randint(0, 256, (3, 33, 50), generator=g, dtype=torch.uint8),
              torch.stack([yy, xx, yy * xx % 256]).to(torch.uint8), torch.zeros(3, 33, 50, dtype=torch.uint8)):
        for code in ('webp', 'zlib', 'raw'):
            assert torch.equal(A.decode_image(A.encode_image(x, code), tuple(x.shape), code), x)

def test_spread_is_the_teachers_variance(cache):
    ds = A.AnchorCacheDataset(cache)
    x = anchors(0, 40)
    kept = x['tokens_hidden'].movedim(1, 2)[x['tokens_mask']].double()
    assert ds.spread('pooled') == pytest.approx(x['teacher_hidden'].double().var(0, unbiased=False).mean().item(),
                                                rel=1e-5)
    assert ds.spread('tokens') == pytest.approx(kept.var(0, unbiased=False).mean().item(), rel=1e-5)
    with pytest.raises(A.AnchorCacheError, match="'action_logits' has no spread"): ds.spread('action_logits')

def test_memory_is_flat_whatever_the_number_of_anchors(tmp_path):
    code = '''if 1:
        import sys, torch; sys.path[:0] = [sys.argv[1], sys.argv[2]]; torch.set_num_threads(1)
        from craft_nb.anchors import AnchorWriter
        x = dict(pixel_values=torch.randint(0, 256, (50, 1, 3, 32, 32), dtype=torch.uint8),
                 teacher_hidden=torch.randn(50, 2, 2, 64))
        with AnchorWriter(sys.argv[3], int(sys.argv[4]), dict(pooled=dict(tensors=['teacher_hidden'])), 100, 'zlib') as w:
            for lo, hi in w.ranges(50): w.add(x)
        print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))'''
    here = Path(__file__).parent
    peak = [int(subprocess.run([sys.executable, '-c', code, here, here.parent, tmp_path/str(n), str(n)],
                               capture_output=True, text=True, check=True).stdout) for n in (500, 5000)]
    assert peak[1] < 1.05 * peak[0], peak

# order

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), b=st.integers(1, 6), world=st.integers(1, 4), seed=st.integers(0, 5))
def test_ranks_share_an_epoch_without_overlap(n, b, world, seed):
    steps = 3 * n // (b * world) + 1
    line = [i for s in range(steps) for r in range(world) for i in A.anchor_batch(s, n, b, seed, r, world)]
    for e in range(len(line) // n): assert sorted(line[e * n:(e + 1) * n]) == list(range(n))
    assert line == [i for s in range(steps) for i in A.anchor_batch(s, n, b * world, seed)]

@pytest.mark.parametrize('workers', [0, 2])
def test_resume_is_exact_whatever_was_fetched_ahead(cache, workers):
    make = lambda: A.build_anchor_dataloader(cache, 6, seed=3, num_workers=workers)
    ids = lambda b: b['frame_index'].tolist()
    a = make(); line = a.forever(); [next(line) for _ in range(9)]
    state = json.loads(json.dumps(a.state_dict())); want = [ids(next(line)) for _ in range(9)]
    b = make(); b.load_state_dict(state); line = b.forever()
    assert [ids(next(line)) for _ in range(9)] == want and b.state_dict() == a.state_dict()

def test_loading_leaves_the_global_random_state_alone(cache):
    torch.manual_seed(5); before = torch.get_rng_state()
    next(A.build_anchor_dataloader(cache, 4, num_workers=1).forever())
    assert torch.equal(before, torch.get_rng_state())

def test_state_of_another_cache_or_batch_is_refused(cache, tmp_path):
    other = build(tmp_path/'o', n=20); a = A.build_anchor_dataloader(cache, 4); next(a.forever())
    with pytest.raises(A.AnchorCacheError, match='used another cache'):
        A.build_anchor_dataloader(other, 4).load_state_dict(a.state_dict())
    with pytest.raises(A.AnchorCacheError, match='no multiple of the global anchor batch 8'):
        A.build_anchor_dataloader(cache, 8).load_state_dict(a.state_dict())
    with pytest.raises(A.AnchorCacheError, match='1 … 40'): A.build_anchor_dataloader(cache, 41)

def test_a_pass_over_ranks_sees_each_anchor_once(cache):
    seen = [i for r in range(3) for b in A.build_anchor_dataloader(cache, 4, rank=r, world_size=3)
            for i in b['frame_index'].tolist()]
    assert sorted(seen) == [10 * i for i in range(40)]
    for r in range(3): dl = A.build_anchor_dataloader(cache, 4, rank=r, world_size=3); assert len(dl) == len(list(dl))

def test_workers_started_by_spawn_read_the_same(cache):
    import pickle; a, b = A.AnchorCacheDataset(cache), pickle.loads(pickle.dumps(A.AnchorCacheDataset(cache)))
    assert all(torch.equal(a[3][k], b[3][k]) for k in a[3])

# old caches

def old(d, rows, layout, meta, per=16):
    d.mkdir(); n = len(next(iter(rows.values())))
    for s, i in enumerate(range(0, n, per)):
        x = {k: v[i:i + per].clone() for k, v in rows.items()}
        if layout == 'list': x = [{k: v[j].clone() for k, v in x.items()} for j in range(len(x['input_ids']))]
        if layout == 'nested':
            x = dict(inputs={k: v for k, v in x.items() if k in INPUTS},
                     **{k: v for k, v in x.items() if k not in INPUTS})
        torch.save(x, d/f'shard_{s:05d}.pt')
    if meta == 'json':
        (d/'metadata.json').write_text(json.dumps(dict(num_anchors=n, layers_to_save=[-2, -1], policy_type='pi0_fast')))
    if meta == 'pt': torch.save(dict(num_anchors=n, layers_to_save=[-2, -1], policy_type='pi0_fast'), d/'metadata.pt')
    return d

INPUTS = ('pixel_values', 'input_ids', 'attention_mask')
KINDS = dict(hidden=lambda: dict(teacher_hidden=torch.randn(40, 2, 2, 8)),
             pooled_features=lambda: dict(target_features=torch.randn(40, 8)),
             token_level=lambda: dict(labels=torch.where(torch.rand(40, 7) > .3, torch.randint(0, 9, (40, 7)), -100)))

@pytest.mark.parametrize('layout,meta', [('dict', 'json'), ('list', 'pt'), ('nested', 'json')])
@pytest.mark.parametrize('kind', KINDS)
def test_old_kinds_load_and_convert(tmp_path, kind, layout, meta):
    torch.manual_seed(0); px = torch.randint(0, 256, (40, 2, 3, 8, 8))
    scale = dict(hidden=lambda x: x / 255, pooled_features=lambda x: x / 255 * 2 - 1,
                 token_level=lambda x: (x / 255 - .5) / .5)[kind]
    rows = dict(pixel_values=scale(px.float()), input_ids=torch.randint(0, 250_000, (40, 7)),
                attention_mask=torch.ones(40, 7, dtype=torch.int64)) | KINDS[kind]()
    d = old(tmp_path/'old', rows, layout, meta); ds = A.AnchorCacheDataset(d)
    assert (ds.cache_type == kind and len(ds) == 40 and ds.manifest['layers'] == [-2, -1]
            and ds.manifest['policy_type'] == 'pi0_fast')
    got = ds.batch(range(40)); assert all(torch.equal(got[k], rows[k]) for k in rows)
    A.convert_cache(d, tmp_path/'new'); new = A.AnchorCacheDataset(tmp_path/'new'); got = new.batch(range(40))
    assert (new.cache_type == kind and all(torch.equal(got[k].to(rows[k].dtype), rows[k]) for k in rows)
            and got['pixel_values'].dtype == torch.float32)
    assert new.manifest['tensors']['pixel_values']['code'] == 'webp' and A.verify_cache(tmp_path/'new')['anchors'] == 40

def test_a_cache_with_action_views_converts_unchanged(tmp_path):
    "The builder packs action tensors by `predict_mask`; a conversion keeps that."
    from craft_nb.builder import PACKED
    def rows(lo, hi):
        r = anchors(lo, hi); r['predict_mask'] = r.pop('action_mask')
        return r | dict(action_hidden=torch.randn(hi - lo, 2, 4, 8, generator=torch.Generator().manual_seed(lo))
                        * r['predict_mask'][:, None, :, None])
    views = dict(action_tokens=dict(tensors=['action_hidden', 'predict_mask'], distance='relative'),
                 action_logits=dict(tensors=['action_logp', 'action_topk', 'predict_mask'], distance='kl'))
    with A.AnchorWriter(tmp_path/'old', 24, views, 16, 'zlib', packed=PACKED, **INFO) as w:
        for lo, hi in w.ranges(8): w.add(rows(lo, hi))
    A.convert_cache(tmp_path/'old', tmp_path/'new', images='raw')
    before, after = (A.AnchorCacheDataset(tmp_path/d).batch(range(24)) for d in ('old', 'new'))
    assert (set(before) == set(after)
            and all(torch.equal(before[k], after[k]) for k in before if isinstance(before[k], torch.Tensor)))

def test_pixels_that_are_no_bytes_stay_floats(tmp_path):
    rows = dict(pixel_values=torch.rand(40, 3, 8, 8), input_ids=torch.zeros(40, 7, dtype=torch.int64),
                target_features=torch.randn(40, 8))
    A.convert_cache(old(tmp_path/'old', rows, 'dict', None), tmp_path/'new')
    assert torch.equal(A.AnchorCacheDataset(tmp_path/'new').batch(range(40))['pixel_values'], rows['pixel_values'])

def test_token_lists_of_unequal_length_are_padded(tmp_path):
    (tmp_path/'old').mkdir()
    rows = [dict(input_ids=torch.arange(1, 2 + i), attention_mask=torch.ones(1 + i, dtype=torch.int64),
                 labels=torch.arange(1, 2 + i)) for i in range(5)]
    torch.save(rows, tmp_path/'old'/'shard_0.pt'); b = A.AnchorCacheDataset(tmp_path/'old').batch(range(5))
    assert (b['labels'][0].tolist() == [1, -100, -100, -100, -100] and b['input_ids'][1].tolist() == [1, 2, 0, 0, 0]
            and b['attention_mask'].sum(1).tolist() == [1, 2, 3, 4, 5])

@pytest.mark.parametrize('converted', [False, True])
def test_a_token_level_cache_trains_with_cross_entropy(tmp_path, converted):
    torch.manual_seed(0); ids = torch.randint(0, 12, (40, 7))
    rows = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                labels=torch.where(torch.arange(7) > 1, (ids + 3) % 12, -100))
    d = old(tmp_path/'old', rows, 'dict', 'json')
    if converted: A.convert_cache(d, tmp_path/'new'); d = tmp_path/'new'
    net = torch.nn.Sequential(torch.nn.Embedding(12, 16), torch.nn.Linear(16, 12))
    opt = torch.optim.Adam(net.parameters(), .05); losses = []
    for _, b in zip(range(40), A.build_anchor_dataloader(d, 8, seed=1).forever()):
        loss = torch.nn.functional.cross_entropy(net(b['input_ids'].long()).flatten(0, 1), b['labels'].long().flatten(),
                                                 ignore_index=-100)
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < .2 < 2 < losses[0]

def test_old_caches_that_contradict_themselves_are_refused(tmp_path):
    rows = dict(input_ids=torch.zeros(40, 7, dtype=torch.int64), teacher_hidden=torch.randn(40, 3, 2, 8))
    with pytest.raises(A.AnchorCacheError, match='holds 3 layers'):
        A.AnchorCacheDataset(old(tmp_path/'a', rows, 'dict', 'json'))
    with pytest.raises(A.AnchorCacheError, match='names none'):
        A.AnchorCacheDataset(old(tmp_path/'b', rows, 'dict', None))
    d = old(tmp_path/'c', dict(input_ids=rows['input_ids'], labels=rows['input_ids']), 'dict', 'json')
    (d/'shard_00001.pt').unlink()
    with pytest.raises(A.AnchorCacheError, match='one is missing'): A.AnchorCacheDataset(d)
    torch.save(dict(labels=torch.zeros(1).expand(40, 10**9), input_ids=torch.zeros(40)),
               (tmp_path/'d').mkdir() or tmp_path/'d'/'shard_0.pt')
    with pytest.raises(A.AnchorCacheError, match='more than the file holds'): A.AnchorCacheDataset(tmp_path/'d')
    torch.save(dict(x=torch.zeros(4)), (tmp_path/'e').mkdir() or tmp_path/'e'/'shard_0.pt')
    with pytest.raises(A.AnchorCacheError, match='none of the three kinds'): A.AnchorCacheDataset(tmp_path/'e')

# compatibility, hashes

def test_every_mismatch_is_listed_with_both_values(cache):
    m = A.read_manifest(cache)
    run = dict(policy_type='smolvla', layers=[-1], width=9, dtype='bfloat16', hashes=dict(weights='c' * 64))
    with pytest.raises(A.AnchorCacheError) as e: A.check_compatible(m, run)
    for text in ('policy_type: cache pi0_fast, this run smolvla', 'layers: cache [-2, -1], this run [-1]',
                 'width: cache 8, this run 9', 'dtype: cache float32, this run bfloat16',
                 f'hashes.weights: cache {"a" * 64}, this run {"c" * 64}'):
        assert text in str(e.value)
    assert A.check_compatible(m, run, 'policy_type,layers,width,dtype,weights')['allowed'] == [
        'dtype', 'hashes.weights', 'layers', 'policy_type', 'width']

def test_hashes_see_every_change(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0); sd = dict(b=torch.randn(3, 4).bfloat16(), a=torch.arange(5))
    save_file(sd, tmp_path/'m.safetensors'); h = A.hash_tensors(sd)
    assert (A.hash_tensors(tmp_path/'m.safetensors') == A.hash_tensors(tmp_path)
            == A.hash_tensors(dict(reversed(sd.items()))) == h)
    for other in (dict(sd, a=sd['a'] + 1), dict(sd, a=sd['a'].int()), dict(sd, b=sd['b'].T.contiguous()),
                  dict(c=sd['a'], b=sd['b'])):
        assert A.hash_tensors(other) != h
    assert A.hash_tensors(dict(sd, b=sd['b'].T.contiguous().T)) == h  # the same values, laid out otherwise

# sharing, the command

def test_push_and_pull_through_a_hub(cache, tmp_path, monkeypatch):
    import huggingface_hub as hub
    store, said = {}, []
    class Api:
        def create_repo(self, repo, **k): said.append((repo, k['repo_type'], k['private']))
        def create_commit(self, repo, ops, **k):
            for o in ops:
                store[o.path_in_repo] = (o.path_or_fileobj if isinstance(o.path_or_fileobj, bytes)
                                         else Path(o.path_or_fileobj).read_bytes())
    def snapshot(repo, local_dir, **k):
        [(Path(local_dir)/n).write_bytes(b) for n, b in store.items() if n != 'README.md']
        (Path(local_dir)/'.cache').mkdir()
    monkeypatch.setattr(hub, 'HfApi', Api); monkeypatch.setattr(hub, 'snapshot_download', snapshot)
    assert C.push_cache(cache, 'me/anchors', private=True) == 'https://huggingface.co/datasets/me/anchors'
    assert said == [('me/anchors', 'dataset', True)]
    card = store['README.md'].decode()
    assert card.startswith('---\ntags: [craft-anchors') and '| pooled | relative |' in card and str(cache) not in card
    C.pull_cache('me/anchors', tmp_path/'got'); assert content(tmp_path/'got') == content(cache)
    store['anchors-00000.safetensors'] = store['anchors-00000.safetensors'][:-1]
    with pytest.raises(A.AnchorCacheError, match='anchors-00000.safetensors'):
        C.pull_cache('me/anchors', tmp_path/'bad')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['got']  # nothing half-fetched is left
    monkeypatch.setattr(hub, 'snapshot_download', lambda *a, **k: (_ for _ in ()).throw(ConnectionError('no route')))
    with pytest.raises(A.AnchorCacheError, match='the hub refused or was not reached.*no route'):
        C.pull_cache('me/anchors', tmp_path/'off')

def run(*args):
    code = ('import sys; from craft_nb.cards import cache_main; c = cache_main(); print(sorted({m.split(".")[0] for m '
            'in sys.modules} & {"lerobot", "transformers", "matplotlib", "ipywidgets"})); sys.exit(c)')
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])

def test_the_command(cache, tmp_path):
    r = run('info', cache, '--images', tmp_path/'x.png'); assert r.returncode == 0, r.stderr
    for text in ('cache_type hidden', 'view pooled', 'bytes/anchor', 'open the window', 'pi0_fast'):
        assert text in r.stdout
    assert r.stdout.splitlines()[-1] == '[]'  # nothing heavy was imported
    from PIL import Image; assert Image.open(tmp_path/'x.png').width == 8 * 96
    r = run('info', tmp_path/'nowhere'); assert r.returncode == 1 and r.stderr.startswith('craft-cache: ')
    assert 'no such folder; build a cache' in r.stderr and 'Traceback' not in r.stderr

def test_the_command_in_process(cache, tmp_path, capsys):
    assert C.cache_main(['verify', str(cache), '--policy', 'p', '--tolerance', '1e-6'],
                        recompute=lambda path, m: lambda b: dict(teacher_hidden=b['teacher_hidden'])) == 0
    assert 'teacher_hidden: largest error 0' in capsys.readouterr().out
    assert C.cache_main(['verify', str(cache), '--policy', 'p', '--tolerance', '1e-6'],
                        recompute=lambda path, m: lambda b: dict(teacher_hidden=b['teacher_hidden'] + 1)) == 1
    assert (C.cache_main(['info', str(cache), '--json']) == 0
            and json.loads(capsys.readouterr().out)['num_anchors'] == 40)
    with pytest.raises(SystemExit): C.cache_main(['inof', str(cache)])
    assert C.cache_main(['pull', 'nonsense', str(tmp_path/'x')]) == 1
    assert 'neither a data-set repository' in capsys.readouterr().err
