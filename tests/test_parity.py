"""With CRaFT switched off, craft-train is LeRobot's own training: the same losses and weights, bit for bit."""
from pathlib import Path

import pytest
import torch

STEPS = 20


@pytest.fixture(scope="module")
def config_of(work, tmp_path_factory):
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    root = tmp_path_factory.mktemp("parity")
    def make(cls, name, **more):
        policy = PreTrainedConfig.from_pretrained(work.policy_path)
        policy.pretrained_path, policy.push_to_hub = Path(work.policy_path), False
        return cls(dataset=DatasetConfig(repo_id=work.repo_id, root=str(work.root)), policy=policy, output_dir=root
                   / name, steps=STEPS, batch_size=4, num_workers=0, dataloader_multiprocessing_context=None,
                   log_freq=1, save_freq=STEPS, env_eval_freq=0, seed=7, **more)
    return make


def weights_at(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "model.safetensors")


def final_weights(cfg): return weights_at(Path(cfg.output_dir) / "checkpoints" / "last" / "pretrained_model")


def test_disabled_craft_is_stock_lerobot(config_of, monkeypatch):
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.scripts import lerobot_train
    from craft_nb.config import CraftConfig
    from craft_nb.lerobot import CraftTrainConfig, train
    from craft_nb.monitor import read_records
    monkeypatch.setattr("sys.argv", ["lerobot-train"])

    stock, losses = config_of(TrainPipelineConfig, "stock"), []
    own = lerobot_train.update_policy
    def watched(tracker, *args, **kw):
        out = own(tracker, *args, **kw)
        losses.append((tracker.loss.val, tracker.grad_norm.val, tracker.lr.val))
        return out
    monkeypatch.setattr(lerobot_train, "update_policy", watched)
    lerobot_train.train.__wrapped__(stock)

    ours = config_of(CraftTrainConfig, "ours", craft=CraftConfig(enabled=False))
    train(ours, quiet=True)
    rows = [r for r in read_records(Path(ours.output_dir) / "metrics.jsonl") if "event" not in r]
    assert len(losses) == len(rows) == STEPS
    for step, ((loss, norm, lr), row) in enumerate(zip(losses, rows, strict=True)):
        assert (loss, norm) == (row["task_loss"], row["grad_norm"]), step
        assert row["retention"] is False and row["cache_type"] is None
    a, b = final_weights(stock), final_weights(ours)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # and they did train
    assert not all(torch.equal(a[k], v) for k, v in weights_at(ours.policy.pretrained_path).items())

