"""What `craft-check` costs beside its imports: on the data of the demo's kind, and on a synthetic data set of 1 M
frames. Writes outputs/bench/check.json.  python bench/bench_check.py [--frames 1000000] [--data FOLDER --policy FOLDER --cache FOLDER]"""
import argparse, contextlib, io, json, os, subprocess, sys, tempfile, time
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')


def long_dataset(root, frames, length=1000, d=14):
    """A LeRobot data set of `frames` frames in episodes of `length`: states and actions of `d` numbers, four tasks, no
    pictures."""
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq
    from lerobot.datasets import LeRobotDataset
    names = [f'joint_{i}' for i in range(d)]
    features = {k: dict(dtype='float32', shape=(d,), names=names)
                for k in ('observation.state', 'observation.environment_state', 'action')}
    ds, rng = LeRobotDataset.create('me/long', 30, features, root=root, use_videos=False), np.random.default_rng(0)
    for e in range(4):
        for i in range(length):
            ds.add_frame({k: rng.normal(size=d).astype(np.float32) for k in features} | dict(task=f'task {e}'))
        ds.save_episode()
    ds.finalize()
    times, (data,), (meta,) = (frames // length // 4, (root/'data').rglob('*.parquet'),
                               (root/'meta/episodes').rglob('*.parquet'))
    few, n = pq.read_table(data), 4 * length
    def put(t, name, x):
        return t.set_column(t.column_names.index(name), t.schema.field(name),
                            pa.array(x).cast(t.schema.field(name).type))
    parts = [put(put(few, 'index', few['index'].to_numpy() + k * n), 'episode_index',
                 few['episode_index'].to_numpy() + 4 * k) for k in range(times)]
    pq.write_table(pa.concat_tables(parts), data)
    e = pq.read_table(meta)
    parts = [put(put(put(e, 'dataset_from_index', e['dataset_from_index'].to_numpy() + k * n), 'dataset_to_index',
                     e['dataset_to_index'].to_numpy() + k * n), 'episode_index', e['episode_index'].to_numpy() + 4 * k)
             for k in range(times)]
    pq.write_table(pa.concat_tables(parts), meta)
    info = json.loads((root/'meta/info.json').read_text())
    (root/'meta/info.json').write_text(
        json.dumps(info | dict(total_episodes=4 * times, total_frames=n * times, splits=dict(train=f'0:{4 * times}'))))
    return n * times


def checked(*argv):
    "Seconds of one call, and what it said."
    from craft_nb import cli
    out, start, code = io.StringIO(), time.perf_counter(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try: cli.check([*argv, '--json'])
        except SystemExit as e: code = e.code
    seconds = time.perf_counter() - start
    if code not in (0, None): raise SystemExit(f'craft-check ended with {code}: {out.getvalue()[-2000:]}')
    return seconds, json.loads(out.getvalue()[out.getvalue().index('{'):])


def main():
    p = argparse.ArgumentParser(description=__doc__)
    (p.add_argument('--frames', type=int, default=1_000_000), p.add_argument('--data'), p.add_argument('--policy'),
     p.add_argument('--cache'))
    a, folder = p.parse_args(), Path(tempfile.mkdtemp(prefix='bench-check-'))
    imports = subprocess.run([sys.executable, '-c',
                              'import time; t = time.perf_counter(); from craft_nb import cli; cli.opened(); '
                              'import craft_nb.small, craft_nb.preflight; print(time.perf_counter() - t)'],
                             capture_output=True, text=True, check=True)
    from craft_nb import cli
    cli.opened(); import craft_nb.preflight
    from craft_nb.small import tiny_workload
    sys.argv, result = (['craft-check'],
                        dict(imports_seconds=round(float(imports.stdout.split()[-1]), 2), cores=os.cpu_count()))
    if not a.data:
        work = tiny_workload(folder/'work', episodes=20)
        a.data, a.policy, a.cache = work.root, work.policy_path, folder/'cache'
        with contextlib.redirect_stdout(io.StringIO()):
            cli.build_cache([f'--policy.path={a.policy}', f'--dataset.repo_id={a.data}', f'--out_dir={a.cache}',
                             '--num_anchors=64'])
    common = ['--steps=1000', '--batch_size=16', '--num_workers=0', '--env_eval_freq=0']
    seconds, said = checked(f'--policy.path={a.policy}', f'--dataset.repo_id={a.data}',
                            f'--craft.anchor_cache_dir={a.cache}', f'--output_dir={folder}/run', *common)
    result['demo'] = dict(seconds=round(seconds, 2), frames=sum(t['frames'] for t in said['tasks']['train'].values()))
    n = long_dataset(folder/'long', a.frames)
    seconds, said = checked('--policy.type=act', '--policy.device=cpu', '--policy.dim_model=64', '--policy.n_heads=2',
                            '--policy.dim_feedforward=128', f'--dataset.repo_id={folder}/long', '--craft.enabled=false',
                            f'--output_dir={folder}/run', *common)
    assert sum(t['frames'] for t in said['tasks']['train'].values()) == n
    result |= dict(long=dict(seconds=round(seconds, 2), frames=n),
                   seconds_per_million_frames=round(seconds * 1e6 / n, 2))
    Path('outputs/bench').mkdir(parents=True, exist_ok=True)
    Path('outputs/bench/check.json').write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__': main()
