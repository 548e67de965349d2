"""Frames that are kept in memory are the frames that were read: the same losses and weights with them and without."""
import multiprocessing
from pathlib import Path

import pytest
import torch


def trained(work, folder, keep, monkeypatch):
    """A run over several epochs, with old demonstrations, augmented pictures and held-out data. → what it left; frames
    read."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.datasets.dataset_reader import DatasetReader
    from lerobot.transforms import ImageTransformsConfig
    from safetensors.torch import load_file
    from craft_nb.config import CraftConfig
    from craft_nb.lerobot import CraftTrainConfig, train
    from craft_nb.monitor import read_records
    read, own = [], DatasetReader.get_item
    monkeypatch.setattr(DatasetReader, "get_item", lambda self, i: read.append((self._meta.root, i)) or own(self, i))
    monkeypatch.setattr("sys.argv", ["craft-train"])
    policy = PreTrainedConfig.from_pretrained(work.policy_path)
    policy.pretrained_path, policy.push_to_hub = Path(work.policy_path), False
    cfg = CraftTrainConfig(
        dataset=DatasetConfig(work.repo_id, root=str(work.root), episodes=[0, 1], eval_split=.5,
                              image_transforms=ImageTransformsConfig(enable=True)),
        policy=policy, output_dir=folder, steps=9, batch_size=16, eval_steps=4, num_workers=0, log_freq=0, save_freq=9,
        env_eval_freq=0, seed=7, dataloader_multiprocessing_context=None,
        craft=CraftConfig(method="replay", method_options="episodes:2,batch_size:16", keep_frames=keep))
    trainer = train(cfg, quiet=True)
    rows = [{k: x for k, x in r.items() if k not in ("time", "seconds")} for r in read_records(folder / "metrics.jsonl")
            if r.get("event") in (None, "eval_loss")]
    return rows, load_file(folder / "checkpoints" / "last" / "pretrained_model" / "model.safetensors"), read, trainer


def test_kept_frames_change_nothing(work, tmp_path, monkeypatch):
    with monkeypatch.context() as m: rows, weights, read, _ = trained(work, tmp_path / "anew", "none", m)
    with monkeypatch.context() as m:
        kept_rows, kept_weights, kept_read, trainer = trained(work, tmp_path / "kept", "auto", m)
    assert kept_rows == rows and len(rows) == 9 + 2
    assert weights.keys() == kept_weights.keys() and all(torch.equal(weights[k], x) for k, x in kept_weights.items())
    training, held_out, old = (len(k) for k in trainer.frames.kept)
    assert len(kept_read) == training + held_out + old < len(read) // 1.5  # each once
    assert sum(k.rows.filled for k in trainer.frames.kept) == len(kept_read)
    assert trainer.frames.here() == trainer.frames.held


def test_every_item_of_pictures_is_lerobots_own(work):
    from craft_nb.frames import PlainFrames, Room
    ds = work.dataset(episodes=[1, 3])
    kept = Room().keep(ds, 2 * len(ds), "the test's")
    for i in range(0, len(ds), 7):
        want = ds[i]
        for x in (PlainFrames(ds)[i], kept[i], kept[i]):
            assert list(x) == list(want)
            for k, v in want.items():
                if not isinstance(v, torch.Tensor): assert x[k] == v, k
                else: assert torch.equal(x[k], v) and (x[k].dtype, x[k].stride()) == (v.dtype, v.stride()), k
    assert kept.rows.filled == len(range(0, len(ds), 7))


def test_processes_share_rows():
    from craft_nb.frames import CAN_SHARE, FrameTable
    if not CAN_SHARE: pytest.skip("this system shares no memory between processes")
    table = FrameTable(4, 64)
    table.put(0, dict(x=torch.full((3,), 7.0)))
    other = multiprocessing.get_context("spawn").Process(target=add_other_row, args=(table,))
    other.start()
    try: other.join(120)
    finally: other.kill(), other.join()
    assert other.exitcode == 0 and table.get(1)["x"].tolist() == [1.0] * 3 and table.get(2) is None


def add_other_row(table):
    "What this process wrote is not of its own form until it has seen one; then both see both."
    assert table.get(0) is None and table.put(1, dict(x=torch.full((3,), 1.0)))
    assert table.get(0)["x"].tolist() == [7.0] * 3
