"""Multiple-choice questions: a real small pi0_fast and a small SmolVLM against plain loops."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from craft_nb.mcq import HuggingFaceScorer, PolicyScorer, Question, read_questions, score_questions

CHOICES = ["Push and open a window", "window", "Press a button from the top", "button"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder, rng, rows = tmp_path_factory.mktemp("mcq"), np.random.default_rng(0), []
    for i, size in enumerate(((64, 64), (48, 80), (64, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(dict(image_path=f"{i}.png", question=["Push a button", "open the window from the top", "Press"][i],
                         choices=CHOICES[: 2 + i], answer_index=i))
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_questions(folder / "q.jsonl")


def pictures(q): return torch.from_numpy(np.array(Image.open(q.image))).permute(2, 0, 1)[None].float() / 255


def test_a_policys_likelihoods_are_those_of_a_plain_loop(work, asked):
    from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
    policy = work.policy().train()
    samples = score_questions(PolicyScorer(policy), asked, batch_size=4)
    assert policy.training and [len(s["loglik"]) for s in samples] == [2, 3, 4]
    for s, t in zip(samples, score_questions(PolicyScorer(policy), asked, batch_size=1), strict=True):
        assert np.allclose(s["loglik"], t["loglik"], atol=1e-4)
    m, words = policy.eval().model, policy._paligemma_tokenizer
    lm = m.paligemma_with_expert.paligemma
    with torch.no_grad():
        for q, s in zip(asked, samples, strict=True):  # token by token, no padding, one row
            images, masks = policy._preprocess_images({list(policy.config.image_features)[0]: pictures(q)})
            images = [((x + 1) * 127.5).round() / 127.5 - 1 for x in images]  # anchors hold bytes
            prompt = words([q.question], return_tensors="pt")["input_ids"]
            for choice, found in zip(q.choices, s["loglik"], strict=True):
                fed, total = [words.bos_token_id], 0.0
                for token in words(choice, add_special_tokens=False)["input_ids"]:
                    ids = torch.tensor([fed])
                    x, seen, attends, *_ = m.embed_prefix_fast(images, masks, prompt, torch.ones_like(prompt).bool(),
                                                               ids, torch.ones_like(ids).bool())
                    (out, _), _ = m.paligemma_with_expert.forward(attention_mask=prepare_attention_masks_4d(
                        attends, dtype=x.dtype), position_ids=seen.cumsum(1) - 1, inputs_embeds=[x, None],
                                                                  use_cache=False, adarms_cond=[None, None])
                    total += lm.lm_head(out[:, -1]).log_softmax(-1)[0, token].item()
                    fed.append(token)
                assert math.isclose(found, total, abs_tol=1e-3), (q.question, choice)


def test_what_cannot_be_asked_is_refused(work, asked):
    from craft_nb.zoo import zoo_policy
    scorer, q = PolicyScorer(work.policy()), asked[0]
    for x, says in ((Question(q.image, "open " * 40, q.choices, 0, 7),
                     "line 7: the question takes 40 tokens, and the policy reads 20"),
                    (Question(None, "open", q.choices, 0, 8), "line 8: there is no image_path"),
                    (Question(q.image, "open", ("xylophone", "zither"), 0, 9), "line 9: two of the choices")):
        with pytest.raises(ValueError, match=says): scorer([(x, x.choices[0])])
    with pytest.raises(ValueError, match="there is no camera 'left'"): PolicyScorer(work.policy(), "left")
    with pytest.raises(ValueError, match="act answers in actions and not in words"):
        PolicyScorer(zoo_policy(work, "act")[0])


def test_a_network_of_hugging_face_with_pictures(work, asked):
    from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMConfig
    from craft_nb.zoo import zoo_config
    folder = zoo_config(work, "smolvla").vlm_model_name
    torch.manual_seed(0)
    model, processor = (AutoModelForImageTextToText.from_config(SmolVLMConfig.from_pretrained(folder)),
                        AutoProcessor.from_pretrained(folder))
    processor.image_processor.size = processor.image_processor.max_image_size = dict(longest_edge=64)
    samples = score_questions(HuggingFaceScorer(model, processor, "<image> {question} "), asked, batch_size=5)
    with torch.no_grad():
        for q, s in zip(asked, samples, strict=True):
            for choice, found in zip(q.choices, s["loglik"], strict=True):
                x, total = dict(processor(text=[f"<image> {q.question} "], images=[Image.open(q.image)],
                                          return_tensors="pt")), 0.0
                for token in processor.tokenizer(choice, add_special_tokens=False)["input_ids"]:
                    total += model.eval()(**x).logits[0, -1].log_softmax(-1)[token].item()
                    x["input_ids"], x["attention_mask"] = (torch.cat([x[k], torch.tensor([[v]])], 1)
                                                           for k, v in (("input_ids", token), ("attention_mask", 1)))
                assert math.isclose(found, total, abs_tol=1e-3), (q.question, choice)


@pytest.mark.parametrize("kind", ("pi0", "pi05"))
def test_the_paligemma_inside_is_asked_as_a_plain_loop_asks_it(work, asked, kind):
    from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
    from craft_nb.mcq import policy_scorer
    from craft_nb.zoo import zoo_policy
    policy, pre, _ = zoo_policy(work, kind)
    with pytest.raises(ValueError, match=f"{kind}_small keeps its tokenizer in its preprocessor"): policy_scorer(policy)
    scorer = policy_scorer(policy.train(), pre)
    samples = score_questions(scorer, asked, batch_size=4)
    assert policy.training
    for s, t in zip(samples, score_questions(scorer, asked, batch_size=1), strict=True):
        assert np.allclose(s["loglik"], t["loglik"], atol=1e-4)
    inner = policy.eval().model.paligemma_with_expert
    with torch.no_grad():
        for q, s in zip(asked, samples, strict=True):  # token by token, no padding, one row
            shown = policy._preprocess_images({list(policy.config.image_features)[0]: pictures(q)})
            prompt = scorer.tokenizer([q.question + "\n"], return_tensors="pt")["input_ids"]
            for choice, found in zip(q.choices, s["loglik"], strict=True):
                x, seen, _ = policy.model.embed_prefix(*shown, prompt, torch.ones_like(prompt).bool())
                n, total = x.shape[1], 0.0
                for token in scorer.tokenizer(choice, add_special_tokens=False)["input_ids"]:
                    attends = torch.ones(x.shape[1], x.shape[1]).tril().bool()
                    attends[:n, :n] = True
                    (out, _), _ = inner.forward(attention_mask=prepare_attention_masks_4d((attends & seen[:, None, :])),
                                                position_ids=seen.cumsum(1) - 1, inputs_embeds=[x, None],
                                                use_cache=False)
                    total += inner.paligemma.lm_head(out[:, -1]).log_softmax(-1)[0, token].item()
                    x, seen = (torch.cat([x, inner.embed_language_tokens(torch.tensor([[token]]))], 1),
                               torch.cat([seen, torch.ones(1, 1).bool()], 1))
                assert math.isclose(found, total, abs_tol=1e-3), (q.question, choice)
    with pytest.raises(ValueError, match="line 7: the question takes 40 tokens, and the policy reads 24"):
        scorer([(Question(asked[0].image, "open " * 40, ("Push", "button"), 0, 7), "Push")])


def test_a_smolvla_is_asked_where_its_language_model_is_whole(work, asked):
    from craft_nb.mcq import policy_scorer
    from craft_nb.zoo import zoo_policy
    policy, pre, _ = zoo_policy(work, "smolvla")
    scorer = policy_scorer(policy, pre)
    assert scorer.model is policy.model.vlm_with_expert.vlm and scorer.prompt == "<image> {question} "
    assert all(math.isfinite(x) for s in score_questions(scorer, asked) for x in s["loglik"])
    policy, pre, _ = zoo_policy(work, "smolvla", num_vlm_layers=2)
    with pytest.raises(ValueError, match="smolvla keeps 2 of the 4 layers of its language model .num_vlm_layers."):
        policy_scorer(policy, pre)


def test_questions_become_anchors_behind_those_of_actions(work, asked, tmp_path, capsys):
    from craft_nb.anchors import AnchorCacheDataset
    from craft_nb.cli import build_cache
    from craft_nb.lerobot import anchor_drift
    from craft_nb.losses import make_views
    from craft_nb.policies import adapter_for
    teacher, file = f"--policy.path={work.policy_path}", f"--mcq={asked[0].image.parent / 'q.jsonl'}"
    build_cache([teacher, f"--dataset.repo_id={work.repo_id}", f"--dataset.root={work.root}", "--num_anchors=4",
                 "--views=action_logits", "--allow_undecodable=true", f"--out_dir={tmp_path / 'a'}"])
    build_cache([teacher, file, "--views=action_logits", f"--append={tmp_path / 'a'}", f"--out_dir={tmp_path / 'b'}"])
    both, policy = AnchorCacheDataset(tmp_path / "b"), work.policy()
    assert both.manifest["dataset"]["fps"] == 80  # pictures have none
    assert len(both) == 7 and both.instructions()[4:] == [q.question for q in asked] and not list(tmp_path.glob(".b*"))
    words, said = policy._paligemma_tokenizer, [s["said"] for s in score_questions(PolicyScorer(policy), asked)]
    rows = both.batch(range(4, 7))
    for i, text in enumerate(said):
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert (rows["action_ids"][i][rows["action_mask"][i]].tolist() == [words.bos_token_id, *ids]
                and rows["predict_mask"][i].sum() == len(ids))
    assert anchor_drift(policy, str(tmp_path / "b"), 3)["losses"]["action_logits"] < 1e-6  # the student is the teacher
    views, adapter = make_views(["action_logits"]), adapter_for(policy)
    batch = adapter.prepare(policy, both.batch([0, 5]))
    f = adapter.features(policy, batch, [-1], True, True)
    # "Action" does not count, the first word of a choice does
    assert (f.action_mask == batch["predict_mask"]).all() and not f.action_mask[0, 0] and f.action_mask[1, 0]
    for more, says in (("--views=pooled", "holds nothing of an answer in words"),
                       ("--num_anchors=3", "leave num_anchors out"), (f"--image_dir={tmp_path}", "leave image_dir out"),
                       ("--mcq_camera=left", "there is no camera 'left'")):
        with pytest.raises(SystemExit, match=says): build_cache([teacher, file, more, f"--out_dir={tmp_path / 'c'}"])
        assert not (tmp_path / "c").exists()
    from craft_nb.zoo import zoo_checkpoint
    with pytest.raises(SystemExit, match="pi0_small answers in actions; anchors of questions"):
        build_cache([f"--policy.path={zoo_checkpoint(work, 'pi0')}", file, f"--out_dir={tmp_path / 'c'}"])


def test_the_bench_of_coloured_shapes_runs_small(tmp_path, monkeypatch, capsys):
    "Teacher, plain fine-tuning and anchors of both kinds, through the commands; it learns nothing at this size."
    from pathlib import Path
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    import mcq_shapes
    threads = torch.get_num_threads()
    try: rows = mcq_shapes.main(["--size=tiny", f"--out={tmp_path}", "--arms=plain,both"])
    finally: torch.set_num_threads(threads)
    assert [r["arm"] for r in rows] == ["teacher", "plain", "both"] and "| both " in capsys.readouterr().out
    for r in rows:
        assert r["mcq"]["n"] == 8 and math.isfinite(r["mcq"]["margin"]) and 0 < min(r["task_loss"].values()) < 20
    # the teacher beside itself
    assert (rows[0]["mcq"]["mcnemar"], rows[0]["mcq"]["margin"]) == (dict(only_first=0, only_second=0, p=1.0),
                                                                     rows[0]["mcq"]["other"]["margin"])
    assert json.loads((tmp_path / "mcq.json").read_text())["rows"] == json.loads(json.dumps(rows))
