"""The monitor without a browser: faults of the log, decimation by property, widget traits, and notebooks under
nbclient."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_run import make_run
from nbclient import NotebookClient

from craft_nb import CraftMonitor
from craft_nb.control import Control
from craft_nb.monitor import Curve, History, Place, RecordLog, Tail, draw, read_records, status

ROOT = Path(__file__).parents[1]


# --- the log -------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from craft_nb.monitor import RecordLog
log = RecordLog(sys.argv[1])
for n in range(1, 10**6):
    log.append(dict(step=n, task_loss=1/n, note="x"*200))
    if n == 50: print("going", flush=True)
"""

def test_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path/"metrics.jsonl"
    p = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, cwd=ROOT)
    p.stdout.readline()
    time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    steps = [r["step"] for r in read_records(path)]
    assert len(steps) >= 50 and steps == list(range(1, len(steps) + 1))


FULL = """
import resource, sys, warnings
from craft_nb.monitor import RecordLog
log = RecordLog(sys.argv[1])
for n in range(1, 11): log.append(dict(step=n))
resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 7, resource.RLIM_INFINITY))   # room for half a line
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for n in range(11, 21): log.append(dict(step=n))
assert len(seen) == 1 and "free some space" in str(seen[0].message), seen
assert len(log.pending) == 10 and log.error is not None
print(open(log.path).read().count("\\n"), open(log.path).read().endswith("\\n"))
try: log.close()
except OSError as e: print("10 records" in str(e))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append(dict(step=21))
log.close()
"""

def test_full_disk_keeps_whole_lines_and_catches_up(tmp_path):
    "A file size limit cuts a line in the middle exactly as a full disk does."
    path = tmp_path/"metrics.jsonl"
    out = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["10", "True", "True"]
    assert [r["step"] for r in read_records(path)] == list(range(1, 22))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), resume=st.integers(1, 12))
def test_any_torn_file_is_readable_and_resumable(tmp_path_factory, cut, resume):
    path = tmp_path_factory.mktemp("log")/"m.jsonl"
    log = RecordLog(path)
    for n in range(1, 13): log.append(dict(step=n, task_loss=.1*n))
    log.close()
    os.truncate(path, min(cut, path.stat().st_size))
    kept = [r["step"] for r in read_records(path)]
    assert kept == list(range(1, len(kept) + 1))
    log.open(resume)
    log.append(dict(step=99))
    log.close()
    assert [r["step"] for r in read_records(path)] == [n for n in kept if n <= resume] + [99]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=30))
def test_tail_never_tears_a_line(tmp_path_factory, chunks):
    "A follower that looks at arbitrary moments sees each row once and in order."
    path = tmp_path_factory.mktemp("tail")/"m.jsonl"
    data = b"".join(json.dumps(dict(step=n)).encode() + b"\n" for n in range(40))
    tail, seen, at = Tail(path), [], 0
    for size in [*chunks, len(data)]:
        with open(path, "ab") as f: f.write(data[at:at + size])
        at += size
        seen += [r["step"] for r in tail.poll()]
    assert seen == list(range(40)) and tail.restarts == 0


# --- curves --------------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(-1e6, 1e6)), min_size=1, max_size=300),
       st.sampled_from([2, 8, 64]))
def test_decimation_keeps_min_and_max_of_every_bin(moves, cap):
    c, x, points = Curve(cap=cap), 0, []
    for dx, y in moves:
        x += dx
        points.append((x, y))
        c.add(x, y)
    want = {}
    for x, y in points: want.setdefault(x//c.w, []).append(y)
    assert {i: sorted((a, b)) for i, a, b in c.bins} == {i: [min(v), max(v)] for i, v in want.items()}
    assert len(c.bins) <= cap and (c.lo, c.hi, c.last) == (min(y for _, y in points), max(y for _, y in points),
                                                           points[-1][1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=60))
def test_path_written_piece_by_piece_is_the_path_written_at_once(ys):
    a, b = Curve(cap=16), Curve(cap=16)
    for x, y in enumerate(ys):
        a.add(x, y)
        a.path()
        b.add(x, y)
    assert a.path() == b.path() and "nan" not in a.path() and "inf" not in a.path()


def test_memory_is_flat_over_100k_records():
    h, sizes = History(), []
    for n in range(1, 100_001):
        h.add({"step": n, "task_loss": 1/n, "lambda": 1., "violation": .1, "epsilon": .1, "cosine": -.2,
               "conflict": True, "seconds": .1})
        if n in (10_000, 100_000): sizes.append(sum(len(c.bins) for c in h.curves.values()) + len(h.hover))
    assert sizes[1] <= 1.3*sizes[0] and sizes[1] < 5000
    assert len(draw([h])) < 150_000


def test_names_and_errors_cannot_inject_markup():
    h = History("<img src=x onerror=alert(1)>")
    h.add({"step": 1, "task_loss": 1., "lambda": 1.})
    h.state, h.error = "failed", "<script>alert(1)</script>"
    h.marks.append((1, "<b>"))
    markup = status(h) + draw([h]) + draw([h, h])
    assert "<img" not in markup and "<script" not in markup and "&lt;script&gt;" in markup


# --- a real trainer ------------------------------------------------------------------------------------------------

def until(true, what, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true(): return found
        time.sleep(.01)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


def settled(run):
    "Where a paused run stands: the step that was under way when Pause was pressed still ends."
    def waits():  # in `Control.wait`, between two steps
        frame, codes = sys._current_frames().get(run.thread.ident), set()
        while frame: codes, frame = codes | {frame.f_code}, frame.f_back
        return {Control.wait.__code__, threading.Condition.wait.__code__} <= codes
    until(waits, "the step in hand to end")
    return run.trainer.step


class Live(CraftMonitor):
    "A monitor with its widgets, as in a kernel, but with nobody to show them to."
    def settle(self):
        self.place = Place()
        self.place.picture = lambda bundle: setattr(self, "shown", bundle)


def text(m): return m.place.top.value

def test_buttons_and_knobs_drive_the_trainer(tmp_path):
    m = Live(tmp_path/"metrics.jsonl", interval=.02)
    trainer = make_run([m], steps=10**6, pace=.002)
    run = trainer.start()
    until(lambda: m.controls and trainer.step > 20 and "training" in text(m), "the run")
    assert m.controls.step.disabled
    m.controls.pause.click()
    until(lambda: "paused" in text(m) and m.controls.pause.description == "Resume", "the state paused")
    held = settled(run)
    time.sleep(.3)
    assert trainer.step == held and not m.controls.step.disabled
    m.controls.step.click()
    until(lambda: trainer.step == held + 1, "one step")
    m.controls.knobs["epsilon_scale"].value = .5
    m.controls.knobs["projection_gate"].value = "violated"
    m.controls.pause.click()
    until(lambda: trainer.step > held + 30, "steps after resuming")
    assert trainer.retention.duals["shared"].epsilon_scale == .5 and trainer.retention.surgery.gate == "violated"
    trainer.control.set("lambda_max", 3.0)   # from code: the widget follows and does not ask again
    until(lambda: m.controls.knobs["lambda_max"].value == 3.0, "the widget to follow")
    trainer.control.set("epsilon_scale", 20.0)   # beyond the slider's end
    until(lambda: m.controls.knobs["epsilon_scale"].value == 10.0, "the slider at its end")
    until(lambda: trainer.step > held + 60, "more steps")
    assert trainer.retention.duals["shared"].epsilon_scale == 20.0
    m.controls.stop.click()
    run.wait(60)
    assert "stopped" in text(m) and m.controls.pause.disabled and m.controls.knobs["lambda_lr"].disabled
    rows = read_records(tmp_path/"metrics.jsonl")
    assert [r["step"] for r in rows if "event" not in r] == list(range(1, trainer.step + 1))
    changes = [(r["name"], r["new"]) for r in rows if r.get("event") == "control"]
    assert sorted(changes[:2]) == [("epsilon_scale", .5), ("projection_gate", "violated")]
    assert changes[2:] == [("lambda_max", 3.0), ("epsilon_scale", 20.0)]
    assert [text for _, text in m.runs[0].marks][-1] == "ε × 20" and draw(m.runs).count('class="mark') == 4
    assert set(m.shown) == {"image/png", "text/plain"} and (tmp_path/"metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_two_dashboards_do_not_disturb_each_other(tmp_path):
    ms = [Live(tmp_path/f"{n}"/"metrics.jsonl", n, interval=.02) for n in ("one", "two")]
    trainers = [make_run([m], steps=10**6, pace=.002) for m in ms]
    runs = [t.start() for t in trainers]
    until(lambda: all(t.step > 10 for t in trainers), "both runs")
    ms[0].controls.pause.click()
    until(lambda: "paused" in text(ms[0]), "one paused")
    held, other = settled(runs[0]), trainers[1].step
    until(lambda: trainers[1].step > other + 20, "two to go on")
    assert trainers[0].step == held and "training" in text(ms[1]) and "one" not in text(ms[1])
    for run in runs: run.stop(60)


def test_drawing_that_breaks_is_shown_and_stops_nothing(tmp_path, monkeypatch):
    import craft_nb.monitor as monitor
    monkeypatch.setattr(monitor, "draw", lambda runs: 1/0)
    m = Live(tmp_path/"metrics.jsonl", interval=.02)
    with pytest.warns(UserWarning, match="dashboard has a fault.*ZeroDivisionError"):
        run = make_run([m], steps=60, pace=.002).start()
        run.wait(60)
    assert len([r for r in read_records(tmp_path/"metrics.jsonl") if "event" not in r]) == 60


def test_error_of_the_thread_is_shown_and_raised(tmp_path):
    m = Live(tmp_path/"metrics.jsonl", interval=.02)
    run = make_run([m], steps=60, fail_at=31).start()
    with pytest.raises(RuntimeError, match="upside down"): run.wait(60)
    assert "failed" in text(m) and "upside down" in text(m) and "upside down" in m.shown["text/plain"]
    rows = read_records(tmp_path/"metrics.jsonl")
    assert [r["step"] for r in rows if "event" not in r] == list(range(1, 31))
    assert rows[-1]["event"] == "error" and "upside down" in rows[-1]["error"]


def test_resume_continues_log_and_curve(tmp_path):
    path = tmp_path/"metrics.jsonl"
    make_run([CraftMonitor(path)], steps=30).fit()
    m = CraftMonitor(path)
    again = make_run([m], steps=40)
    again.step = 20
    again.fit()
    steps = [r["step"] for r in read_records(path) if "event" not in r]
    assert steps == list(range(1, 41)) and m.runs[0].rows == 40


def test_following_sees_a_run_elsewhere_grow_resume_and_end(tmp_path):
    path = tmp_path/"metrics.jsonl"
    d = CraftMonitor.from_jsonl(path, follow=True, interval=.01)   # before the file is there
    d.start()
    log = RecordLog(path)
    log.append(dict(event="start", step=0, steps=20))
    for n in range(1, 11): log.append(dict(step=n, task_loss=1.))
    until(lambda: d.runs[0].step == 10, "ten steps")
    log.close()
    log.open(5)
    log.append(dict(event="resume", step=5, steps=20))
    for n in range(6, 9): log.append(dict(step=n, task_loss=1.))
    until(lambda: d.runs[0].step == 8 and d.runs[0].rows == 8, "the cut file")
    log.append(dict(event="end", step=8, reason="stopped"))
    assert d.over.wait(60) and d.runs[0].state == "stopped"


# --- notebooks without a browser -----------------------------------------------------------------------------------

SETUP = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]; from linear_run import make_run; "
         "from craft_nb import CraftMonitor; import time")

def execute(tmp_path, *cells, errors=False):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (SETUP, *cells)])
    NotebookClient(nb, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path))),
                   allow_errors=errors, store_widget_state=False).execute()
    return nb.cells[1:]

def kinds(cell): return [set(o.data) for o in cell.outputs if o.output_type == "display_data"]

PICTURE = {"image/png", "text/plain"}

def test_notebooks_keep_the_picture_in_the_cell_that_started(tmp_path):
    cells = execute(tmp_path,
        "run = make_run([CraftMonitor('a/metrics.jsonl', 'first')], steps=40, pace=.01).start()",
        "print('a later cell'); time.sleep(.1)",
        "last = run.wait(60)",
        "runs = [make_run([CraftMonitor(name=n)], steps=30, pace=.01).start() for n in ('left', 'right')]",
        "for r in runs: r.wait(60)",
        "make_run([CraftMonitor(name='foreground')], steps=30).fit()['step']",
        "run = make_run([CraftMonitor(name='fails')], steps=30, pace=.01, fail_at=9).start()",
        "run.wait(60)",
        "time.sleep(.1)", errors=True)
    assert kinds(cells[0]) == [PICTURE] and kinds(cells[1]) == kinds(cells[2]) == []
    assert kinds(cells[3]) == [PICTURE, PICTURE] and kinds(cells[5]) == [PICTURE]
    assert cells[0].outputs[0].data["text/plain"].startswith("first: finished at step 40 of 40")
    assert kinds(cells[6]) == [PICTURE] and "upside down" in cells[6].outputs[0].data["text/plain"]
    assert cells[7].outputs[0].ename == "RuntimeError"
    assert len((tmp_path/"a"/"metrics.png").read_bytes()) > 3000


AGAIN = """
from craft_nb import monitor
def until(true):
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end: time.sleep(.01)
class Kernel:   # as JupyterLab: the same cell, run twice
    def __init__(self, n): self.n = n
    def get_parent(self): return dict(metadata=dict(cellId='c1'), header=dict(msg_id=f'run {self.n}'))
shells = iter([])
class Shell:
    def __init__(self, n): self.kernel, self.events = Kernel(n), monitor.sys.modules['IPython'].get_ipython().events
"""

def test_running_a_cell_again_replaces_its_first_run(tmp_path):
    cells = execute(tmp_path, AGAIN,
        "monitor._shell = lambda: Shell(1)\nfirst = CraftMonitor('m.jsonl', interval=.02); "
        "run1 = make_run([first], steps=10**6, pace=.01).start(); until(lambda: run1.trainer.step > 9)",
        "monitor._shell = lambda: Shell(2)\nsecond = CraftMonitor('m.jsonl', interval=.02); "
        "run2 = make_run([second], steps=10**6, pace=.01).start(); "
        "until(lambda: run2.trainer.step > 9 and not run1.thread.is_alive())",
        "print(run1.thread.is_alive(), first.runs[0].state, first.place.box is None, second.runs[0].state)",
        "run2.stop(60); print(second.runs[0].state)")
    assert cells[3].outputs[0].text.split() == ["False", "stopped", "True", "training"]
    assert cells[4].outputs[0].text.split() == ["stopped"]
    assert [r["event"] for r in read_records(tmp_path/"m.1.jsonl") if "event" in r] == ["start", "end"]
