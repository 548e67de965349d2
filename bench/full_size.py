"""Policies at the sizes that people run, random weights, through the commands: cache of 16 anchors, training with and
without CRaFT, resume, drift.

    python bench/full_size.py                        SmolVLA in full and with LoRA, pi0_fast with LoRA, both also with the teacher inside
    python bench/full_size.py --only smolvla_lora    one of them: smolvla, smolvla_lora, smolvla_lora_inside, pi0_fast_lora, pi0_fast_lora_inside;
                                                     for a GPU besides: pi0_fast (in full), pi0_lora, pi0_lora_inside
    python bench/full_size.py --device cuda --batch 16 --anchors 8 --steps 8     on a GPU, half as many anchors as samples

Nothing is downloaded: the VLM's shape is written down here, tokenizers are made from the data. SmolVLA: 450 M
parameters, float32; pi0_fast: 2.9 B, bfloat16. Needs about 12 GiB of memory, pi0_fast 16. Writes
outputs/bench/full_size.json: {policy: {"parameters", "peak_over_estimate", "step_ratio", "first_loss", "bytes", …}}:
the peak of the training process over the estimate it printed before its first step; a retention step (K = 1) over a
plain step, medians of two runs of the same length, first step left out; L_ret of the first step. A frozen vision tower
looks at each of the 16 anchors once (`--craft.keep_looks`): with more than 16 / anchors steps (`--batch 4 --anchors 2
--steps 11`) those that show them for the first time are left out, and `step_ratio` is that of a long run.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SMOLVLM2_500M = dict(  # shape of HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    text=dict(model_type="llama", hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
              num_key_value_heads=5, head_dim=64, vocab_size=49280, pad_token_id=0, max_position_embeddings=8192),
    vision=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
                image_size=512), scale_factor=4)
LORA = ["--peft.method_type=LORA", "--peft.r=16"]
LANGUAGE = "--peft.target_modules=.*language_model.*(q_proj|v_proj)"
SMOLVLA, FAST = (dict(kind="smolvla", view="answer"),
                 dict(kind="pi0_fast", view="action_logits", flags=[*LORA, LANGUAGE]))
PI0 = dict(kind="pi0", view="answer", flags=LORA)
RUNS = {
    "smolvla": SMOLVLA | dict(flags=["--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false"],
                              cache=True), "smolvla_lora": SMOLVLA | dict(flags=LORA, cache=True),
    "smolvla_lora_inside": SMOLVLA | dict(flags=LORA, cache=False),
    "pi0_fast_lora": FAST | dict(cache=True), "pi0_fast_lora_inside": FAST | dict(cache=False)}
USUAL = ",".join(RUNS)
RUNS |= {"pi0_fast": FAST | dict(flags=[], cache=True), "pi0_lora": PI0 | dict(cache=True),
         "pi0_lora_inside": PI0 | dict(cache=False)}


def checkpoint(work, kind: str, device: str):
    "Folder of the policy with random weights, made in a process of its own so that its memory is not counted."
    import torch
    from lerobot.policies import make_policy
    from craft_nb.small import save_checkpoint_folder
    torch.manual_seed(0)
    if kind == "smolvla":
        from transformers import AutoConfig
        from craft_nb.zoo import save_small_vlm
        from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
        vlm = save_small_vlm(work.tokenizers / "vlm_500m", list(work.meta.tasks.index))
        c = AutoConfig.from_pretrained(vlm)
        for part, size in ((c.text_config, SMOLVLM2_500M["text"]), (c.vision_config, SMOLVLM2_500M["vision"])):
            for k, v in size.items():
                if k != "model_type": setattr(part, k, v)
        c.scale_factor = SMOLVLM2_500M["scale_factor"]
        c.save_pretrained(vlm)
        config = SmolVLAConfig(vlm_model_name=str(vlm), chunk_size=50, n_action_steps=50, push_to_hub=False,
                               device=device)
    elif kind == "pi0":
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
        config = PI0Config(dtype="bfloat16", gradient_checkpointing=True, push_to_hub=False, device=device)
    else:
        from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
        config = PI0FastConfig(text_tokenizer_name=str(work.tokenizers / "text"),
                               action_tokenizer_name=str(work.tokenizers / "action"), dtype="bfloat16",
                               chunk_size=10, n_action_steps=10, max_action_tokens=64, gradient_checkpointing=True,
                               push_to_hub=False, device=device)
    policy = make_policy(config, ds_meta=work.meta)
    save_checkpoint_folder(policy, *processors(policy.config, work), work.folder / kind)
    (work.folder / f"{kind}.json").write_text(json.dumps(sum(p.numel() for p in policy.parameters())))


def processors(config, work):
    "LeRobot's, with the tokenizer of the data where the type names one of the hub."
    from types import SimpleNamespace
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.pi0 import processor_pi0
    from craft_nb.zoo import local_tokenizer
    with local_tokenizer(processor_pi0, SimpleNamespace(text_tokenizer_name=str(work.tokenizers / "text"))):
        return make_pre_post_processors(config, dataset_stats=work.meta.stats)


def command(name: str, *flags: str) -> str:
    "What a command says, on success."
    print("+", name, *flags, flush=True)
    start = time.time()
    done = subprocess.run([str(Path(sys.executable).parent / name), *flags], capture_output=True, text=True)
    print(f"  {time.time() - start:.0f} s", flush=True)
    if done.returncode: sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def device_name(device: str) -> str:
    import torch
    return torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"


def rows(run: Path) -> list[dict]: return [json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()]
def seconds(run: Path, first: int) -> float:  # steps that are left out
    return statistics.median(r["seconds"] for r in rows(run)[1:] if "event" not in r and r["step"] > first)


def measure(name: str, folder: Path, steps: int, batch: int, anchors: int, device: str, brief: bool) -> dict:
    from craft_nb.small import tiny_workload
    how = RUNS[name]
    work = tiny_workload(folder)
    teacher = folder / how["kind"]
    if not (folder / f"{how['kind']}.json").exists():
        subprocess.run([sys.executable, __file__, "--make", how["kind"], "--folder", str(folder), "--device", device],
                       check=True)
    cache, data = folder / f"{how['kind']}-anchors", f"--dataset.repo_id={work.root}"
    out = dict(parameters=json.loads((folder / f"{how['kind']}.json").read_text()))
    if not (cache / "anchors.json").exists():
        command("craft-build-cache", f"--policy.path={teacher}", data, f"--out_dir={cache}", "--num_anchors=16",
                f"--views={how['view']}", "--batch_size=4",
                *(["--actions=dataset", "--undecodable=keep"] if how["kind"] == "pi0_fast" else []))
    out["bytes"] = round(sum(f.stat().st_size for f in cache.glob("*.safetensors")) / 16)
    common = [f"--policy.path={teacher}", data, f"--batch_size={batch}", f"--steps={steps}", "--num_workers=0",
              "--env_eval_freq=0", "--craft.check=false", "--log_freq=1", *how["flags"]]
    craft = [f"--craft.views={how['view']}", f"--craft.anchor_cache_dir={cache}",
             f"--craft.anchor_batch_size={anchors}", "--craft.retention_freq=1",
             *([] if how["cache"] else ["--craft.teacher=inside"])]
    plain, kept = folder / f"{name.removesuffix('_inside')}-plain", folder / f"{name}-craft"
    if not (plain / "metrics.jsonl").exists():
        command("craft-train", *common, "--craft.enabled=true", "--craft.method=sft", f"--output_dir={plain}",
                "--save_checkpoint=false")
    if not (kept / "metrics.jsonl").exists():
        command("craft-train", *common, *craft, f"--output_dir={kept}", f"--save_freq={steps - 1}",
                *["--save_checkpoint=false"] * (brief and how["flags"][:1] != LORA[:1]))  # adapters are small
    found, shown = rows(kept), -(-16 // anchors)  # steps that show every anchor once
    first = shown if shown < steps else 1
    used = next(r for r in found if r.get("event") == "memory_used")
    mine = [r for r in found if "event" not in r]
    out |= dict(first_loss=mine[0]["retention_loss"], step_ratio=seconds(kept, first) / seconds(plain, first),
                peak_over_estimate=used["used"] / used["expected"],
                peak_gib=used["used"] / 2**30, batch=batch, anchors=anchors, steps=steps, device=device_name(device))
    if brief: return out
    config = kept / f"checkpoints/{steps - 1:06d}/pretrained_model/train_config.json"
    again = folder / f"{name}-again"
    if not (again / "metrics.jsonl").exists():
        command("craft-train", "--resume", f"--config_path={config}", f"--output_dir={again}")
    last = [r for r in rows(again) if "event" not in r][-1]
    out["resumed_as_unbroken"] = all(abs(last[k] - mine[-1][k]) <= 1e-6 * abs(mine[-1][k])
                                     for k in ("task_loss", "retention_loss"))
    command("craft-eval", f"--policy.path={kept}/checkpoints/last/pretrained_model", f"--anchors={cache}",
            f"--out_dir={folder / (name + '-eval')}")
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--only", default=USUAL)
    ap.add_argument("--folder", type=Path, default=Path("outputs/full_size"))
    ap.add_argument("--out", type=Path, default=Path("outputs/bench/full_size.json"))
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--batch", type=int, default=2)
    ap.add_argument("--anchors", type=int, help="a retention step; as many as samples if not given")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--brief", action="store_true", help="neither resume nor craft-eval")
    ap.add_argument("--make", help=argparse.SUPPRESS)
    a = ap.parse_args()
    folder = a.folder.resolve()
    if a.make:
        from craft_nb.small import tiny_workload
        return checkpoint(tiny_workload(folder), a.make, a.device)
    if wrong := set(a.only.split(",")) - set(RUNS):
        ap.error(f"--only: expected some of {', '.join(RUNS)}, found {', '.join(sorted(wrong))}")
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name in a.only.split(","):
        found[name] = measure(name, folder, a.steps, a.batch, a.anchors or a.batch, a.device, a.brief)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found[name]), flush=True)


if __name__ == "__main__": main()
