"""A real CraftTrainer on a linear policy: milliseconds a step, for tests and benchmarks of what surrounds it."""
import time

import torch
from torch import nn

from craft_nb import CraftConfig, CraftTrainer, Retention
from craft_nb.features import Features
from craft_nb.losses import make_views


class Linear(nn.Module):
    def __init__(self, width, pace, fail_at):
        super().__init__()
        self.w, self.pace, self.fail_at, self.calls = nn.Linear(width, width, bias=False), pace, fail_at, 0

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.fail_at: raise RuntimeError("the camera is upside down")
        time.sleep(self.pace)
        return (self.w(batch["x"]) - batch["y"]).square().mean(), {}


class LinearAdapter:
    def prepare(self, policy, anchors): return anchors
    def features(self, policy, anchors, layers, actions, logits):
        ones = torch.ones(len(anchors["input_ids"]), 1, dtype=torch.bool)
        return Features({-1: policy.w(anchors["input_ids"])[:, None]}, ones, ~ones)


def make_run(
    callbacks=(),
    steps=200,
    pace=0.0,  # seconds a step sleeps
    fail_at=0,  # the step that raises
    width=6,
    rows=16,  # a batch
    **config,  # fields of CraftConfig
):
    "A trainer whose old and new task are two random matrices."
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, width, width, generator=g)/width**.5
    policy = Linear(width, pace, fail_at)
    policy.w.weight.data.copy_(old)

    def batches():
        while True:
            x = torch.randn(rows, width, generator=g)
            yield {"x": x, "y": x @ new.T}

    def anchors():
        while True:
            x = torch.randn(rows, width, generator=g)
            yield {"input_ids": x, "teacher_hidden": (x @ old.T)[:, None, None]}

    config = dict(retention_freq=1, epsilon_start=.5, epsilon_end=.5, lambda_lr=.05, initial_lambda=0.,
                  projection_gate="never") | config
    views = make_views(["pooled"], layers=[-1], pooling=["vision_token_mean"], distance="mse")
    retention = Retention(policy, anchors(), views, LinearAdapter(), CraftConfig(**config), steps)
    return CraftTrainer(policy, batches(), torch.optim.SGD(policy.parameters(), .05), steps=steps, retention=retention,
                        callbacks=callbacks)
