"""Put the demo's figures into nbs/index.ipynb: `make results` after `make demo`, and after bench/seeds.py if you ran
it. Nothing is typed by hand."""
import math, json, shutil, subprocess, sys
from pathlib import Path
from craft_nb.evaluate import success_markdown, summarise

root = Path(__file__).resolve().parent.parent
mark = '<!-- results of the demo, written by `make results` -->'
report_file = root/'outputs/demo/report.json'
if not report_file.exists(): sys.exit(f'{report_file.relative_to(root)} is not there: run `make demo` first')
report = json.loads(report_file.read_text())
nb_file = root/'nbs/index.ipynb'
nb = json.loads(nb_file.read_text())
cells = [c for c in nb['cells'] if mark in ''.join(c['source'])]
if len(cells) != 1: sys.exit(f'nbs/index.ipynb: expected one cell with {mark}, found {len(cells)}')
(root/'nbs/images').mkdir(exist_ok=True)
shutil.copy(root/'outputs/demo/success.png', root/'nbs/images/demo_success.png')
seeds_file, repeated = root/'outputs/demo/seeds.json', ''
if seeds_file.exists():
    seeds = json.loads(seeds_file.read_text())
    arms = {a: c for a, c in summarise(seeds).items() if a != 'teacher'}
    said = '; '.join(f"`{a}` {c['retention']['ratio']:.0%}, {c['new']['rate']:.0%}".replace('%', ' %')
                     for a, c in arms.items())
    repeated = f"""
With {len(seeds['seeds'])} training seeds and {seeds['episodes']} episodes a cell (`python bench/seeds.py`), kept of the old and reached on the new task: {said}.
"""
def number(x): return '–' if x is None else f'{x:.3f}'
drift = ('Drift from the teacher on old episodes that no cache holds, in nats per action token (on the cache\'s): '
         + '; '.join(f"`{a}` {number(x['held_out'])} ({number(x['train'])})" for a, x in report['arms'].items())
         + '. Steps that projected: '
         + ', '.join(f"`{a}` {x['projected']} of {x['steps']}" for a, x in report['arms'].items()) + '.')
episodes = min(c['n'] for row in report['success'].values() for c in row.values())
text = f'''{mark}
Measured by `make demo` in {math.ceil(report["minutes"])} minutes on 2 CPU cores, {episodes} episodes a cell, 95 % intervals in brackets. `teacher` is the policy before fine-tuning, `sft` plain
fine-tuning, `origin` the settings of the first CRaFT, `replay` 16 old demonstrations beside the 32 new of each step, `constant` λ = 1 throughout, `{report['default']}` what we recommend; *kept* is the success on the old tasks together, after over before.

{success_markdown(report)}

{drift}
{repeated}
![Success by task and arm](images/demo_success.png)'''
cells[0]['source'] = text.splitlines(keepends=True)
nb_file.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
subprocess.run([sys.executable, root/'tools/readme.py'], check=True)
