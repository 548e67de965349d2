"""The numeric notebooks and tests once more with rounding moved: kernels for another instruction set, as far as this
processor has one, and another number of threads. What passes only with the last bits of one machine fails here. With
words as arguments: which of them to run."""
import os, subprocess, sys, time
import torch

NOTEBOOKS = '0[0-4]_|08_'  # config, features, losses, surgery, dual, trainer
TESTS = 'test_surgery', 'test_dual', 'test_origin', 'test_pi0_fast'


def moved():
    "Environment variables under which sums are added up in another order than in the first run."
    has = torch.backends.cpu.get_cpu_capability()  # DEFAULT | AVX2 | AVX512 | …
    env = dict(OMP_NUM_THREADS='2' if os.environ.get('OMP_NUM_THREADS', '1') == '1' else '1')
    if has != 'DEFAULT': env['ATEN_CPU_CAPABILITY'] = 'default'
    if has.startswith('AVX512') and torch.backends.mkl.is_available(): env['MKL_ENABLE_INSTRUCTIONS'] = 'AVX2'
    return env


env, start = moved(), time.time()
print('rounding moved by', *(f'{k}={v}' for k, v in env.items()), flush=True)
only = sys.argv[1:]
tests = [f'tests/{t}.py' for t in TESTS if not only or t in only]
runs = ([['nbdev_test', '--path', 'nbs', '--file_re', rf'^({NOTEBOOKS}).*\.ipynb$', '--n_workers', '2']]
        * (not only or 'notebooks' in only))
runs += [[sys.executable, '-m', 'pytest', '-q', *tests]] * bool(tests)
failed = [r for r in runs if subprocess.run(r, env=os.environ | env).returncode]
print(f'{time.time() - start:.0f} s')
sys.exit(f"with rounding moved ({' '.join(f'{k}={v}' for k, v in env.items())}) these fail:\n"
         + '\n'.join(' '.join(r) for r in failed) if failed else 0)
