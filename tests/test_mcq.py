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
        rows.append(dict(image_path=f"{i}.png", question=["Push a button", "open the window from the top", "Press"][i], choices=CHOICES[: 2 + i], answer_index=i))
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_questions(folder / "q.jsonl")


def pictures(q): return torch.from_numpy(np.array(Image.open(q.image))).permute(2, 0, 1)[None].float() / 255


def test_a_policys_likelihoods_are_those_of_a_plain_loop(work, asked):
    from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
    policy = work.policy().train()
    samples = score_questions(PolicyScorer(policy), asked, batch_size=4)
    assert policy.training and [len(s["loglik"]) for s in samples] == [2, 3, 4]
    for s, t in zip(samples, score_questions(PolicyScorer(policy), asked, batch_size=1), strict=True): assert np.allclose(s["loglik"], t["loglik"], atol=1e-4)
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
                    x, seen, attends, *_ = m.embed_prefix_fast(images, masks, prompt, torch.ones_like(prompt).bool(), ids, torch.ones_like(ids).bool())
                    (out, _), _ = m.paligemma_with_expert.forward(attention_mask=prepare_attention_masks_4d(attends, dtype=x.dtype), position_ids=seen.cumsum(1) - 1,
                                                                  inputs_embeds=[x, None], use_cache=False, adarms_cond=[None, None])
                    total += lm.lm_head(out[:, -1]).log_softmax(-1)[0, token].item()
                    fed.append(token)
                assert math.isclose(found, total, abs_tol=1e-3), (q.question, choice)


def test_what_cannot_be_asked_is_refused(work, asked):
    from craft_nb.zoo import zoo_policy
    scorer, q = PolicyScorer(work.policy()), asked[0]
    for x, says in ((Question(q.image, "open " * 40, q.choices, 0, 7), "line 7: the question takes 40 tokens, and the policy reads 20"),
                    (Question(None, "open", q.choices, 0, 8), "line 8: there is no image_path"), (Question(q.image, "open", ("xylophone", "zither"), 0, 9), "line 9: two of the choices")):
        with pytest.raises(ValueError, match=says): scorer([(x, x.choices[0])])
    with pytest.raises(ValueError, match="there is no camera 'left'"): PolicyScorer(work.policy(), "left")
    with pytest.raises(ValueError, match="act answers in actions and not in words"): PolicyScorer(zoo_policy(work, "act")[0])


def test_a_network_of_hugging_face_with_pictures(work, asked):
    from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMConfig
    from craft_nb.zoo import zoo_config
    folder = zoo_config(work, "smolvla").vlm_model_name
    torch.manual_seed(0)
    model, processor = AutoModelForImageTextToText.from_config(SmolVLMConfig.from_pretrained(folder)), AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = processor.image_processor.max_image_size = dict(longest_edge=64)
    samples = score_questions(HuggingFaceScorer(model, processor, "<image> {question} "), asked, batch_size=5)
    with torch.no_grad():
        for q, s in zip(asked, samples, strict=True):
            for choice, found in zip(q.choices, s["loglik"], strict=True):
                x, total = dict(processor(text=[f"<image> {q.question} "], images=[Image.open(q.image)], return_tensors="pt")), 0.0
                for token in processor.tokenizer(choice, add_special_tokens=False)["input_ids"]:
                    total += model.eval()(**x).logits[0, -1].log_softmax(-1)[token].item()
                    x["input_ids"], x["attention_mask"] = (torch.cat([x[k], torch.tensor([[v]])], 1) for k, v in (("input_ids", token), ("attention_mask", 1)))
                assert math.isclose(found, total, abs_tol=1e-3), (q.question, choice)
