"Kills, damage, full disks, two builders: small here; `make kill-test N=…` and `make fuzz N=…` do many."
import os, resource, signal, sys, time
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from anchor_data import VIEWS, INFO, anchors, build, content
from craft_nb import anchors as A
import fuzz_anchors, kill_anchors

def test_random_kills(): assert kill_anchors.random_kills(3, seed=int(time.time()))[0] == 3
def test_kill_before_each_rename_and_fsync(): assert kill_anchors.each_door() >= 12

def test_fuzz():
    tally, grown = fuzz_anchors.fuzz(250, seed=1)
    assert (sum(tally.values()) == 250 and sum(k for (_, end), k in tally.items() if end == 'refused') > 150
            and grown < 300)

def test_full_disk_leaves_a_resumable_build(tmp_path):
    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try: build(tmp_path/'c', images='raw', shard_size=16, n=40)  # a shard has 32 kB: the disk is full in the first
        except OSError as e:
            os._exit(7 if 'make room and run the same command again' in str(e) and 'anchors-00000.safetensors' in str(e)
                     else 8)
    _, status = os.waitpid(kill_anchors.child(run), 0); assert os.WEXITSTATUS(status) == 7
    assert not list((tmp_path/'c').glob('*.tmp'))
    assert content(build(tmp_path/'c', images='raw')) == content(build(tmp_path/'d', images='raw'))

def test_one_builder_a_folder(tmp_path):
    first = A.AnchorWriter(tmp_path/'c', 40, VIEWS, **INFO); first.add(anchors(0, 8))
    with pytest.raises(FileExistsError,
                       match='this very process .* writes here; wait for it, stop it, or give another out_dir'):
        A.AnchorWriter(tmp_path/'c', 40, VIEWS, **INFO)
    first.close()

def test_damage_in_an_unfinished_build_is_found_on_resume(tmp_path):
    def stop(lo):
        if lo == 32: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): build(tmp_path/'c', each=stop)
    p = tmp_path/'c'/'anchors-00000.safetensors'; b = bytearray(p.read_bytes()); b[-2000] ^= 1; p.write_bytes(b)
    with pytest.raises(A.AnchorCacheError, match='anchors-00000.safetensors'): build(tmp_path/'c')

def test_an_out_dir_that_cannot_be(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='file'): A.AnchorWriter(tmp_path/'file'/'c', 40, VIEWS, **INFO)

class Dying:
    def __call__(self, i): os.kill(os.getpid(), signal.SIGKILL)

def test_a_worker_that_dies_ends_clearly(tmp_path):
    build(tmp_path/'c', images='reference')
    dl = A.build_anchor_dataloader(tmp_path/'c', 4, num_workers=1, frames=Dying())
    with pytest.raises(RuntimeError, match=r'an anchor worker \(process \d+\) was killed by SIGKILL, '
                       r'most often .* Lower anchor_num_workers \(now 1; 0 decodes'):
        next(dl.forever())

def test_errors_of_a_worker_name_the_file(tmp_path):
    d = build(tmp_path/'c'); p = d/'anchors-00001.safetensors'
    b = bytearray(p.read_bytes()); b[3000:3400] = bytes(400); p.write_bytes(b)
    with pytest.raises(A.AnchorCacheError, match='anchors-00001.safetensors'):
        list(A.build_anchor_dataloader(d, 4, num_workers=1))
