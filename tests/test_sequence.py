"""Task after task on real, tiny data: one memory that does not grow, and stages that are not run again."""
import json
import shutil

import pytest

pytest.importorskip("metaworld", reason="the simulator: pip install 'craft_nb[sim]'")


def test_a_memory_is_carried_from_stage_to_stage(work, tmp_path, monkeypatch):
    from craft_nb import demo
    from craft_nb import sequence as q
    for name in ("dataset", "tokenizers"): shutil.copytree(work.folder / name, tmp_path / name)
    s = q.sequence_settings(demo.replace(demo.SIZES["tiny"], episodes=2, teacher_steps=2, steps=2, anchors=16,
                                         held_out=2), ["window-open-v3", "button-press-topdown-v3"])
    args = str(tmp_path), s
    q.first_job(args, 0)
    for arm in ("share", "replay"): q.chain_job(args, arm, 0, 0)
    found = q.collect(tmp_path)
    by = {arm: x["0"] for arm, x in found["arms"].items()}
    assert set(by) == {"share", "replay"} and {x["room"] for x in by.values()} == {by["share"]["bytes"][0]}
    assert all(x["success"] is None and x["bytes"][0] > 0 for x in by.values())
    matrix = by["share"]["loss"]["matrix"]
    assert (by["share"]["loss"]["nbt"] == pytest.approx(matrix[1][0] - matrix[0][0])
            and matrix[0] == by["replay"]["loss"]["matrix"][0] != matrix[1])
    # the next task's anchors, of the student, are appended; a run may start from it, and the bytes stay
    out, run = tmp_path / "sequence", demo.Run(*args)
    room = by["share"]["room"]
    memory = q.remember(run, out / "share-0/policy-1", "button-press-topdown-v3", 2, out / "first-anchors",
                        tmp_path / "second", room)
    m = json.loads((memory / "anchors.json").read_text())
    assert q.size_of(memory) <= room and len({x["weights"] for x in m["extra"]["merged_from"]}) == 2
    cfg, used = q.stage_config(run, "share", 1, 0, out / "share-0/policy-1", memory, room)
    q.fit(cfg, tmp_path / "third")
    assert (tmp_path / "third/model.safetensors").exists() and used <= room
    monkeypatch.setattr(q, "fit", lambda *a: pytest.fail("it is trained"))
    q.chain_job(args, "share", 0, 0)
    assert q.sequence_report(tmp_path).exists()


@pytest.mark.slow  # two minutes of CPU
@pytest.mark.timeout(1800)
def test_whole_sequence_tiny(tmp_path, capsys):
    from craft_nb.study import study_main
    study_main(["--size=tiny", "--sequence=window-open-v3,plate-slide-v3,button-press-v3", "--arms=constant,replay",
                "--seeds=0", "--episodes=1", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "sequence.json").read_text())
    assert (found["tasks"] == ["window-open-v3", "plate-slide-v3", "button-press-v3"]
            and set(found["arms"]) == {"constant", "replay"})
    row = found["arms"]["constant"]["0"]
    assert len(row["loss"]["matrix"]) == 3 and max(row["bytes"]) <= row["room"] and row["success"]["nbt"] is not None
    assert "By success" in capsys.readouterr().out
