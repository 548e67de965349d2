"""Instructions longer than a policy reads: counted and refused wherever they come from, or shortened so that the state
survives."""
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from craft_nb import cli

# 12 words; the small policy reads 20 tokens, 10 of them words
CHAT = "push the button and then open the window and push the button"


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    "A folder with data sets that say long things."
    folder = tmp_path_factory.mktemp("told")
    retold(work.root, folder / "long", lambda i, t: f"{CHAT} again" if i == 0 else t)
    retold(work.root, folder / "both",
           lambda i, t: f"push the button and then open the window and close {'door it' if i else 'it then'}")
    retold(work.root, folder / "at_limit", lambda i, t: "a b c d e f g h i j" if i == 0 else t)
    return folder


def retold(root, out, say):
    "A copy of a data set with other instructions."
    shutil.copytree(root, out)
    tasks = pd.read_parquet(out / "meta/tasks.parquet")
    new = {t: say(i, t) for t, i in tasks["task_index"].items()}
    tasks.index = pd.Index([new[t] for t in tasks.index], name=tasks.index.name)
    tasks.to_parquet(out / "meta/tasks.parquet")
    for f in (out / "meta/episodes").rglob("*.parquet"):
        e = pd.read_parquet(f)
        e["tasks"] = [[new[t] for t in ts] for ts in e["tasks"]]
        e.to_parquet(f)


@pytest.fixture
def inside(place, work, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["craft"])
    return [f"--policy.path={work.policy_path}"]


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop: main(list(flags))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


RUN = ["--craft.enabled=false", "--steps=1", "--batch_size=2", "--num_workers=0", "--env_eval_freq=0",
       "--save_checkpoint=false"]


@pytest.mark.parametrize(
    "data,says", [("long", "1 of 2 instructions in the data set are longer than the 20 tokens that the policy reads"),
                  ("both", "2 of 2 instructions")])
def test_every_command_counts_and_refuses(inside, data, says):
    for main, more in ((cli.build_cache, ["--out_dir=no", "--num_anchors=4"]), (cli.train, ["--output_dir=no", *RUN]),
                       (cli.evaluate, ["--out_dir=no"])):
        said = refused(main, *inside, f"--dataset.repo_id={data}", *more)
        assert says in said and ("has 23 tokens" if data == "long" else "has 22 tokens") in said, said
        flag = "--craft.long_instructions=shorten" if main is cli.train else "--long_instructions=shorten"
        assert f" {flag}" in said and not Path("no").exists()


def test_what_just_fits_is_taken(inside):
    cli.build_cache([*inside, "--dataset.repo_id=at_limit", "--out_dir=fits", "--num_anchors=4"])
    cli.train([*inside, "--dataset.repo_id=at_limit", "--output_dir=fitting", *RUN])


def test_only_instructions_of_the_selected_episodes_count(inside, place, work):
    first = json.loads(pd.read_parquet(next((place / "long/meta/episodes").rglob("*.parquet")))
                       .to_json(orient="records"))
    short = [e["episode_index"] for e in first if CHAT not in e["tasks"][0]]
    cli.build_cache([*inside, "--dataset.repo_id=long", f"--dataset.episodes={short}", "--out_dir=selected",
                     "--num_anchors=4"])
    long = [e["episode_index"] for e in first if CHAT in e["tasks"][0]]
    assert "1 of 1 instructions" in refused(cli.build_cache, *inside, "--dataset.repo_id=long",
                                            f"--dataset.episodes={long}", "--out_dir=no", "--num_anchors=4")


@pytest.mark.parametrize("lines,says", [([CHAT], "1 of 1 instructions in said.txt"),
                                        (["push", CHAT, CHAT + " now", "open"], "2 of 4 instructions in said.txt"),
                                        (["supercalifragilistic " * 11], "has 21 tokens")])
def test_a_file_of_prompts_is_counted(inside, work, lines, says):
    Path("said.txt").write_text("\n".join(lines) + "\n")
    line = [*inside, f"--dataset.repo_id={work.root}", "--out_dir=no", "--num_anchors=4", "--prompts_file=said.txt"]
    assert says in refused(cli.build_cache, *line) and not Path("no").exists()
    if len(lines) > 1:
        assert ("both become" in refused(cli.build_cache, *line, "--long_instructions=shorten")
                and not Path("no").exists())


def test_shortened_the_state_survives(inside, work):
    from craft_nb.anchors import AnchorCacheDataset, read_manifest
    Path("one.txt").write_text(f"{CHAT}\nopen\n")
    shorter = " ".join(CHAT.split()[:10])
    for name, more in (("said", [f"--dataset.repo_id={work.root}", "--prompts_file=one.txt"]),
                       ("told", ["--dataset.repo_id=long"])):
        cli.build_cache([*inside, *more, f"--out_dir={name}", "--num_anchors=16", "--long_instructions=shorten"])
        x = AnchorCacheDataset(name).batch(range(16))
        long = [tuple(r.tolist()) for r, m in zip(x["input_ids"], x["attention_mask"]) if m.sum() == 20]
        assert len(long) >= 6 and len(set(long)) > len(long) / 2  # the states behind the same words differ
    assert read_manifest("said")["prompts"] == [shorter, "open"]
    run = [*inside, "--dataset.repo_id=long", *RUN[1:]]
    cli.train([*run, "--output_dir=run", "--craft.anchor_cache_dir=told", "--craft.anchor_batch_size=4",
               "--craft.long_instructions=shorten"])
    cli.evaluate([*inside, "--dataset.repo_id=long", "--anchors=told", "--max_frames=8", "--out_dir=seen",
                  "--long_instructions=shorten"])
    for main, word in ((cli.build_cache, "--long_instructions=cut"), (cli.evaluate, "--long_instructions=shortn"),
                       (cli.train, "--craft.long_instructions=cut")):
        assert ("long_instructions: expected one of refuse, shorten"
                in refused(main, *run[:2], "--output_dir=no" if main is cli.train else "--out_dir=no", word,
                           *(["--craft.enabled=false"] if main is cli.train else [])))


def test_what_a_simulator_asks_is_heeded(work):
    "It comes with the observations, after all checks."
    from craft_nb.lerobot import heed
    from lerobot.configs.policies import PreTrainedConfig
    cfg, pre = PreTrainedConfig.from_pretrained(work.policy_path), work.processors()[0]
    seen = {"observation.image": torch.zeros(1, 3, 64, 64), "observation.state": torch.zeros(1, 4), "task": [CHAT]}
    heed(pre, cfg, [], "refuse")
    with pytest.raises(ValueError,
                       match="1 of 1 instructions in what the policy is told are longer than the 20 tokens"):
        pre(dict(seen))
    assert pre(dict(seen) | {"task": ["open the window"]})["observation.language.attention_mask"].sum() == 13
    heed(pre, cfg, [], "shorten")
    a, b = (pre(dict(seen) | {"observation.state": torch.full((1, 4), v)})["observation.language.tokens"]
            for v in (0., .3))
    assert not torch.equal(a, b) and a.shape == (1, 20)


def test_tokens_of_parts_of_words(work):
    "The limit is that of the policy's own tokenizer, whatever it makes of words and numbers."
    from craft_nb.instructions import check_instructions, prompt_reader, shorten
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    pre = work.processors()[0]
    step = next(s for s in pre.steps if hasattr(s, "input_tokenizer"))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.train_from_iterator([f"Task: {CHAT}, State: ;"] * 9,
                            trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>"], show_progress=False,
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    step.input_tokenizer, step.max_length = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>"), 48
    reader = prompt_reader(pre, 4)
    for text in (CHAT * 3, "öffne das Fenster " * 20, "q" * 200):
        found, = check_instructions(reader, [text])
        assert found.level == "refuse" and found.data["longest"] > 48
        short = shorten(reader, text)
        for state in (-1., 0., .99, 1.):  # normalised: none of them is cut
            ids = tok.encode(reader.texts([short], torch.full((1, 4), state))[0]).ids
            assert len(ids) <= 48, (text, state)
        assert text.startswith(short) or " ".join(text.split()).startswith(short)
