"""Before a commit: clean the notebooks, drop saved widgets and warnings, export the modules, write README.md and the
pages made from modules. What `make check` checks."""
import subprocess, sys
from checks import notebooks, root, without_widgets
from execnb.nbio import read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.doclinks import nbdev_export


def passing(out): return out.get('name') == 'stderr'


for p in notebooks():
    nb = read_nb(p)
    clean_nb(nb)
    without_widgets(nb)
    for c in nb.cells:
        if 'outputs' in c: c['outputs'] = [o for o in c.outputs if not passing(o)]
    write_nb(nb, p)
nbdev_export()
for page in 'readme', 'pages': subprocess.run([sys.executable, root/f'tools/{page}.py'], check=True)
