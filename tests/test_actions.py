"""Open-loop error of actions: the policy's own path, row by row, in the action's own units."""
import math

import pytest
import torch

from craft_nb.actions import action_error, own_actions


def loader(work, config, rows):
    from craft_nb.zoo import zoo_data
    data = zoo_data(work, config)
    class Loader(list): tasks = []
    out = Loader()
    for k in range(0, len(rows), 3):
        out.append(torch.utils.data.default_collate([data[i] for i in rows[k : k + 3]]))
        out.tasks.append((out[-1]["task"][0], len(rows[k : k + 3])))
    return data, out


@pytest.mark.parametrize("kind", ["act", "diffusion", "smolvla"])
def test_it_is_the_policys_own_answer_row_by_row(work, kind):
    from craft_nb.policies import RowDraws
    from craft_nb.zoo import zoo_policy
    policy, pre, post = zoo_policy(work, kind)
    rows = [0, 7, 9, 20, 21]
    data, batches = loader(work, policy.config, rows)
    found = action_error(policy.train(), pre, post, batches, [], ["x", "y", "z", "grip"], seed=3)
    assert (policy.training and found["frames"] == 5 and found["undecodable"] == 0
            and list(found["joints"]) == ["x", "y", "z", "grip"])
    start, want = max(0, policy.config.action_delta_indices.index(0)), []
    for i in rows:  # one at a time, as a robot asks
        x = torch.utils.data.default_collate([data[i]])
        policy.reset()
        with RowDraws([(3 << 24) + int(x["index"][0])], salt=1):
            said = post(policy.eval().predict_action_chunk({k: v for k, v in pre(x).items() if k != "action"}))[0]
        done, pad = x["action"][0, start:][: len(said)], x["action_is_pad"][0, start:][: len(said)]
        want.append((said - done).abs()[~pad])
    want = torch.cat(want).double()
    assert math.isclose(found["mae"], want.mean().item(), rel_tol=1e-3)
    for j, w in zip(found["joints"].values(), want.mean(0).tolist(), strict=True):
        assert math.isclose(j["mae"], w, rel_tol=1e-3)
    assert sum(t["frames"] for t in found["tasks"].values()) == 5


def test_answers_that_are_no_chunk_are_counted_and_named_never_zero(work, monkeypatch):
    policy, (pre, post) = work.policy(), work.processors()
    rows = [0, 1, 2, 30]
    data, batches = loader(work, policy.config, rows)
    untrained = action_error(policy, pre, post, batches, [], list("xyzg"))
    assert untrained["undecodable"] == 4 and untrained["mae"] is None and [
        f["frame"] for f in untrained["undecodable_frames"]] == [int(data[i]["frame_index"]) for i in rows]
    truth = {}  # a decoder that says what was demonstrated, but for one frame
    for b in batches:
        ids, mask = (pre(dict(b))[f"action.{k}"] for k in ("tokens", "token_mask"))
        for i, row, m in zip(b["index"].tolist(), ids, mask, strict=True): truth[i] = row[m][1:]
    asked = iter([i for b in batches for i in b["index"].tolist()])
    def says(images, *a, **kw):
        said = [truth[next(asked)] for _ in range(len(images[0]))]
        said = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
        if says.first: said[1, 3] = 1  # a word, not an action
        says.first = False
        return said
    says.first = True
    monkeypatch.setattr(policy.model, "sample_actions_fast_kv_cache", says)
    found = action_error(policy, pre, post, batches, [], list("xyzg"))
    assert (found["undecodable"] == 1 and found["undecodable_frames"][0]["frame"] == int(data[1]["frame_index"])
            and found["frames"] == 4)
    assert 0 < found["mae"] < 0.1, "what is left is FAST's rounding"
    assert "detokenize_actions" not in vars(policy)


def test_craft_eval_writes_it_and_asks_questions(work, tmp_path, monkeypatch, capsys):
    import json
    import sys
    from PIL import Image
    from craft_nb import cli
    monkeypatch.setattr(sys, "argv", ["craft-eval"])
    def run(out, *flags):
        cli.evaluate([f"--policy.path={work.policy_path}", f"--out_dir={tmp_path / out}", "--batch_size=4",
                      *map(str, flags)])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    row = dict(image_path="red.png", question="Push a button", choices=["button", "window from the top"],
               answer_index=0)
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | dict(answer_index=1))}\n")
    run("both", f"--dataset.repo_id={work.root}", "--action_frames=6", "--max_frames=4",
        f"--mcq={tmp_path / 'q.jsonl'}", f"--compare={work.policy_path}")
    found, said = json.loads((tmp_path / "both/eval.json").read_text()), (tmp_path / "both/eval.md").read_text()
    a, m = found["action_error"], found["mcq"]
    assert (a["frames"] == a["undecodable"] > 3 and a["mae"] is None and len(a["tasks"]) == 2
            and "of them undecodable" in said and found["data"]["repo_id"] == "local/dataset")
    assert (m["accuracy"] == .5 and m["n"] == 2 and m["other"]["accuracy"] == .5
            and m["mcnemar"] == dict(only_first=0, only_second=0, p=1.0))
    samples = [json.loads(x) for x in (tmp_path / "both/mcq.jsonl").read_text().splitlines()]
    assert (samples[0]["loglik"] == samples[1]["loglik"] == samples[0]["other"]["loglik"]
            and samples[0]["margin"] == -samples[1]["margin"] != 0)
    run("alone", f"--mcq={tmp_path / 'q.jsonl'}")
    assert json.loads((tmp_path / "alone/eval.json").read_text()).keys() == {"policy", "mcq"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | dict(answer_index=2)))
    for flags, says in (([f"--mcq={tmp_path / 'bad.jsonl'}"], "bad.jsonl:1: answer_index: expected 0 … 1, found 2"),
                        ([f"--compare={work.policy_path}"], "give --mcq=FILE too"),
                        ([f"--mcq={tmp_path / 'gone.jsonl'}"], "there is no file"),
                        ([f"--mcq={tmp_path / 'q.jsonl'}", "--mcq_camera=left"], "there is no camera 'left'"),
                        ([f"--mcq={tmp_path / 'q.jsonl'}", "--compare=/nowhere/at/all"],
                         "no policy at /nowhere/at/all"),
                        ([f"--dataset.repo_id={work.root}", "--action_frames=-1"], "action_frames")):
        with pytest.raises(SystemExit) as stop: run("no", *flags)
        assert says in str(stop.value.code), stop.value.code
        assert not (tmp_path / "no").exists() or not list((tmp_path / "no").glob("eval*"))
