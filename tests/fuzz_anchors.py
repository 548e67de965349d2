"""Damage caches in N random ways: `python tests/fuzz_anchors.py 1000 [seed]`, or `make fuzz N=1000`.
Each damaged cache must be refused with an error that names a file, or read back exactly as it was written; no code in
it may run, and memory may not follow what it claims. (The metadata.json of the origin's format has no checksum: there
only its shards are damaged.)"""
import hashlib, json, os, pickle, random, resource, shutil, struct, sys, tempfile
from collections import Counter
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parent)); sys.path.insert(0, str(Path(__file__).parents[1]))
from anchor_data import anchors, build
from craft_nb import anchors as A

class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)

HUGE = [2**31, 2**40, 2**53, 2**62, -1, -2**40, 10**30]
ODD = [None, True, '', 'x', [], {}, [[[]]], 0, 1.5, float('nan'), *HUGE]

def leaves(x, at=()):
    if isinstance(x, (dict, list)) and x:
        for k, v in (x.items() if isinstance(x, dict) else enumerate(x)): yield from leaves(v, (*at, k)); yield (*at, k)
def sign(m): # a manifest whose checksum was made good again
    m.pop('manifest_sha256', None)
    try: m['manifest_sha256'] = hashlib.sha256(A._canonical(m)).hexdigest()
    except (TypeError, ValueError): pass
    return m

def pick(rng, d, other): return rng.choice(sorted(d.glob('*.safetensors')))
def any_file(rng, d): return rng.choice(sorted(p for p in d.iterdir() if p.name != 'metadata.json'))
def truncate(rng, d, other): p = any_file(rng, d); os.truncate(p, rng.randrange(p.stat().st_size))
def extend(rng, d, other):
    with open(any_file(rng, d), 'ab') as f: f.write(rng.randbytes(rng.choice([1, 8, 4096])))
def flip(rng, d, other):
    p = any_file(rng, d); b = bytearray(p.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 20])): b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    p.write_bytes(b)
def swap(rng, d, other):
    a, b = rng.sample(sorted(d.glob('*.safetensors')), 2)
    t = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(t)
def missing(rng, d, other): rng.choice(sorted(d.iterdir())).unlink()
def foreign(rng, d, other): p = pick(rng, d, other); p.write_bytes((other/p.name).read_bytes())
def foreign_signed(rng, d, other): # a shard of another cache, with size and hash made good in the manifest
    p = pick(rng, d, other); p.write_bytes((other/p.name).read_bytes()); m = json.loads((d/A.MANIFEST).read_text())
    for s in m['shards']:
        if s['file'] == p.name: s.update(sha256=A.hash_file(p), bytes=p.stat().st_size)
    (d/A.MANIFEST).write_text(json.dumps(sign(m)))
def pickled(rng, d, other):
    p = any_file(rng, d); e = Evil(d.parent/'ran')
    rng.choice([lambda: p.write_bytes(pickle.dumps(e)),
                lambda: torch.save({'teacher_hidden': torch.zeros(2), 'x': e}, p)])()
def header(rng, d, other): # claims in a shard's header, lengths kept or not
    p = pick(rng, d, other); raw = p.read_bytes(); n = struct.unpack('<Q', raw[:8])[0]; h = json.loads(raw[8:8 + n])
    path = rng.choice(list(leaves(h))); x = h
    for k in path[:-1]: x = x[k]
    x[path[-1]] = rng.choice(ODD + ['F32', 'I64', 'U8', 'BOOL', [rng.choice(HUGE)], [0, rng.choice(HUGE)]])
    new = json.dumps(h).encode(); p.write_bytes(struct.pack('<Q', len(new)) + new + raw[8 + n:])
def header_size(rng, d, other):
    p = pick(rng, d, other); raw = p.read_bytes()
    p.write_bytes(struct.pack('<Q', rng.choice([0, 1, 2, 10**6, 2**31, 2**63, 2**64 - 1])) + raw[8:])
def offsets(rng, d, other): # the ragged offsets of one tensor point anywhere
    p = pick(rng, d, other); at, _ = A.read_header(p)
    k = rng.choice([k for k in at if k.endswith('.offsets')]); _, (n,), lo, _ = at[k]
    b = bytearray(p.read_bytes()); i = rng.randrange(n)
    b[lo + 8 * i:lo + 8 * i + 8] = struct.pack('<q', rng.choice([0, 1, -1, 2**40, 2**62, rng.randrange(5000)]))
    p.write_bytes(b)
def manifest(rng, d, other, signed=False):
    p = d/A.MANIFEST; m = json.loads(p.read_text()); path = rng.choice(list(leaves(m))); x = m
    for k in path[:-1]: x = x[k]
    if rng.random() < .2: del x[path[-1]]
    else: x[path[-1]] = rng.choice(ODD) if rng.random() < .7 else (x[path[-1]] + 1 if type(x[path[-1]]) is int else 'y')
    p.write_text(json.dumps(sign(m) if signed else m))
def manifest_signed(rng, d, other): manifest(rng, d, other, signed=True)
def manifest_sizes(rng, d, other): # huge counts that agree with each other, signed
    p = d/A.MANIFEST
    m = json.loads(p.read_text())
    n = rng.choice([2**31, 2**40, 2**53])
    m['num_anchors'] = m['shard_size'] = n
    m['shards'] = m['shards'][:1]; m['shards'][0]['rows'] = n
    m['shards'][0]['bytes'] = rng.choice([m['shards'][0]['bytes'], n * 8 * len(m['tensors'])])
    m['cache_id'] = A._cache_id(m); p.write_text(json.dumps(sign(m)))
def manifest_shapes(rng, d, other): # huge shapes of one tensor, signed, identity made good
    p = d/A.MANIFEST; m = json.loads(p.read_text()); f = m['tensors'][rng.choice(sorted(m['tensors']))]
    f['shape'] = rng.choice([[2**31], [2**20, 2**20], f['shape'] + [2**33], [2, 3, 16383, 16383], [2**62]])
    m['cache_id'] = A._cache_id(m); p.write_text(json.dumps(sign(m)))
def nested(rng, d, other): (d/A.MANIFEST).write_text('[' * 10**5 + ']' * 10**5)
def spaces(rng, d, other):  # harmless
    p = d/A.MANIFEST; p.write_text(json.dumps(json.loads(p.read_text()), indent=rng.choice([None, 0, 7])))

OLD = [truncate, extend, flip, missing, pickled]
NEW = OLD + [flip, swap, foreign, foreign_signed, header, header, header_size, offsets, manifest, manifest,
             manifest_signed, manifest_sizes, manifest_shapes, nested, spaces]

def examine(d, truth, meta): # 'refused' or 'harmless'; anything else raises
    names = {p.name for p in (d.parent/'sound').iterdir()} | {d.name}
    try:
        ds = A.AnchorCacheDataset(d)
        got = [ds.batch(range(i, min(i + 8, len(ds)))) for i in range(0, min(len(ds), 64), 8)]
        A.verify_cache(d)
    except A.AnchorCacheError as e:
        assert any(n in str(e) for n in names), f'error names no file: {e}'; return 'refused'
    got = {k: torch.cat([b[k] for b in got]) for k in got[0]}
    for k in got: assert torch.equal(got[k].to(truth[k].dtype), truth[k]), f'{k} is silently wrong'
    lost = set(truth) - set(got); assert not lost or ds.manifest['format'] == 'pt', f'{lost} silently lost'
    assert {k: ds.manifest[k] for k in meta} == meta, 'the manifest is silently wrong'
    return 'harmless'

def fuzz(n, seed=0):
    rng, tally = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); sound = dict(new=tmp/'new', zlib=tmp/'zlib', old=tmp/'old')
        build(sound['new']); build(sound['zlib'], images='zlib')
        build(tmp/'other', hashes=dict(weights='b' * 64)); sound['old'].mkdir(); truth = anchors(0, 40)
        for i in range(0, 40, 16):
            torch.save({k: v.clone() for k, v in anchors(i, min(i + 16, 40)).items()},
                       sound['old']/f'shard_{i // 16:04d}.pt')
        (sound['old']/'metadata.json').write_text(json.dumps(dict(num_anchors=40, layers_to_save=[-2, -1])))
        keys = ('kind', 'num_anchors', 'layers', 'pooling', 'policy_type', 'width')
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(n):
            name = rng.choice(['new', 'new', 'zlib', 'old'])
            how = rng.choice(OLD if name == 'old' else NEW)
            d = tmp/'sound'
            for x in (d, tmp/'hurt'): shutil.rmtree(x, ignore_errors=True); shutil.copytree(sound[name], x)
            full = A.AnchorCacheDataset(d).manifest; meta = {k: full[k] for k in keys}
            how(rng, tmp/'hurt', tmp/'other')
            try: tally[how.__name__, examine(tmp/'hurt', truth, meta)] += 1
            except Exception as e:
                raise AssertionError(f'mutation {i} of seed {seed}: {how.__name__} on a {name} cache: '
                                     f'{type(e).__name__}: {e}') from e
            assert not (tmp/'ran').exists(), f'mutation {i} ({how.__name__}) ran code'
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    assert grown < 300, f'memory grew by {grown:.0f} MB'
    return tally, grown

if __name__ == '__main__':
    n, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tally, grown = fuzz(n, seed)
    for (how, end), k in sorted(tally.items()): print(f'{how:<16} {end:<9} {k}')
    print(f'{n} mutations: {sum(k for (_, e), k in tally.items() if e == "refused")} refused, '
          f'{sum(k for (_, e), k in tally.items() if e == "harmless")} harmless, peak memory +{grown:.0f} MB')
