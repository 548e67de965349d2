"""Kill cache builds with SIGKILL: `python tests/kill_anchors.py 20 [seed [policy]]`; without a policy one is drawn.
Synthetic anchors first, then the answers of a small policy, a fifth as many kills. Each build is killed at a random
moment until it gets through; then the folder must be byte-identical to one of an unbroken build.
`each_door` kills once before every single rename and fsync of a build."""
import os, random, shutil, signal, sys, tempfile, time
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parent)); sys.path.insert(0, str(Path(__file__).parents[1]))
from anchor_data import build, content

N = dict(n=120, shard_size=16, batch=8)

def child(run): # pid of a process that does `run` and leaves
    pid = os.fork()
    if pid: return pid
    try: torch.set_num_threads(1); os.dup2(os.open(os.devnull, os.O_WRONLY), 2); run(); os._exit(0)
    except FileExistsError as e: os._exit(0 if 'finished' in str(e) else 3)
    except BaseException: os._exit(2)

def work(d): return lambda: build(d, each=lambda lo: time.sleep(.004), **N)

def of_policy(folder, kind): # a build as `craft-build-cache` does it, of the answers of a small policy
    from craft_nb.lerobot import BuildCacheConfig, build_cache
    from craft_nb.small import tiny_workload
    from kill_training import policy_of
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    w = tiny_workload(folder, episodes=1); path = policy_of(w, kind)
    def make(d):
        policy = PreTrainedConfig.from_pretrained(path); policy.pretrained_path, policy.push_to_hub = path, False
        views = 'pooled,action_logits' if kind == 'pi0_fast' else 'pooled,answer'
        return lambda: build_cache(BuildCacheConfig(dataset=DatasetConfig(repo_id=str(w.root)), policy=policy,
                                                    out_dir=str(d), num_anchors=24, views=views,
                                                    batch_size=4, shard_size=8, allow_undecodable=True), progress=False)
    return make

def random_kills(n, seed=0, work=work):
    rng, kills, builds = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); t = time.time(); _, code = os.waitpid(child(work(tmp/'whole')), 0); span = time.time() - t
        assert code == 0; whole = content(tmp/'whole')
        while kills < n:
            d = tmp/f'{builds}'; builds += 1
            for attempt in range(100):
                pid = child(work(d)); time.sleep(rng.uniform(0, span)) if kills < n else None
                if kills < n: os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status): kills += 1; continue
                assert os.WEXITSTATUS(status) == 0, f'a resumed build failed with exit code {os.WEXITSTATUS(status)}'
                break
            assert content(d) == whole, f'build {builds} differs: {[k for k in whole if content(d).get(k) != whole[k]]}'
            shutil.rmtree(d)
    return kills, builds

def each_door():
    def guarded(d, at):
        real, count = (os.replace, os.fsync), [0]
        def door(f):
            def g(*a):
                if count[0] == at: os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1; return f(*a)
            return g
        os.replace, os.fsync = map(door, real)
        build(d, n=40, shard_size=16, batch=8)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); whole = content(build(tmp/'whole', n=40, shard_size=16, batch=8)); at = 0
        while True:
            d = tmp/f'{at}'; _, status = os.waitpid(child(lambda: guarded(d, at)), 0)
            if not os.WIFSIGNALED(status): assert status == 0; return at
            _, status = os.waitpid(child(lambda: build(d, n=40, shard_size=16, batch=8)), 0)
            assert status == 0, f'resume after door {at}: exit {os.WEXITSTATUS(status)}'
            assert content(d) == whole, f'killed at door {at}: the resumed cache differs'; at += 1

if __name__ == '__main__':
    n, seed = (int(sys.argv[1]) if len(sys.argv) > 1 else 20,
               int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1000))
    kind = sys.argv[3] if len(sys.argv) > 3 else random.Random(seed).choice(('pi0_fast', 'pi0', 'smolvla'))
    os.environ['HF_HUB_OFFLINE'] = '1'; torch.set_num_threads(1); print(f'{kind}, seed {seed}', flush=True)
    k, b = random_kills(n, seed); print(f'{k} random kills over {b} builds: every resumed cache is byte-identical')
    print(f'{each_door()} kills, one before each rename and fsync: every resumed cache is byte-identical')
    with tempfile.TemporaryDirectory() as tmp:
        k, b = random_kills(max(1, n // 5), seed, of_policy(Path(tmp)/'work', kind))
        print(f'{kind}: {k} random kills over {b} builds of its answers: every resumed cache is byte-identical')
