"""Draw configs over every field of CraftConfig: `python tests/fuzz_configs.py 500`.
Each is refused by the name of a field that was drawn, or trains two steps."""
import itertools
import math
import sys
import warnings
from dataclasses import fields

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craft_nb.config import CHOICES, RANGES, AnchorData, CraftConfig
from craft_nb.losses import make_views
from craft_nb.trainer import CraftTrainer, Retention
from linear_run import Linear, LinearAdapter

TEXTS = dict(views=["", "pooled", "pooled:0.5", " pooled : 2 ", "tokens", "pooled,tokens:3"],
             view_epsilons=["", "pooled:0.3", "nose:1"], layer_weights=["", "-1:1", "-1:0.25", "-2:0.5"],
             keep_looks=["none", "30MB", "2GB", "2.0", "0"])
SPOILT = dict(views=["pooled:heavy", "pooled,pooled", ":1", "pooled:-1"], view_epsilons=["pooled:x"],
              layer_weights=["-1:nan"], keep_frames=["much", "0"], keep_looks=["auto", "-1", "nan"])
COSTLY = dict(probe_steps=3, gradient_accumulation_steps=3)  # their size is time


def kind(f): return f.type if isinstance(f.type, str) else f.type.__name__


def good(f):
    lo, hi = RANGES.get(f.name, (0, math.inf))
    if f.name in CHOICES: return st.sampled_from(CHOICES[f.name])
    if f.name in TEXTS: return st.sampled_from(TEXTS[f.name])
    if f.name == "anchor_dataset":
        return st.builds(AnchorData, st.just("me/old"), episodes=st.none() | st.lists(st.integers(0, 9)))
    if kind(f) == "bool": return st.booleans()
    if kind(f) == "int": return st.integers(lo, COSTLY.get(f.name, 60)) | st.integers(lo, COSTLY.get(f.name, 2**40))
    if kind(f) == "float": return st.floats(lo, min(hi, 3)) | st.floats(lo, hi, allow_infinity=False, allow_nan=False)
    return st.text(max_size=8)


def bad(f):
    lo, hi = RANGES.get(f.name, (0, math.inf))
    wrong = [st.none(), st.just([1])]
    if kind(f) == "bool": return st.one_of(*wrong, st.sampled_from(["yes", 1, 0.0]))
    if kind(f) == "int":
        return st.one_of(*wrong, st.integers(max_value=lo - 1), st.sampled_from([True, 1.5, "5", math.nan]))
    if kind(f) == "float":
        above = [st.floats(hi, 1e300, exclude_min=True)] if hi < math.inf else []
        return st.one_of(*wrong, *above, st.floats(-1e300, lo, exclude_max=True),
                         st.sampled_from([math.nan, math.inf, -math.inf, "0.1", False]))
    words = [st.text(min_size=1).filter(lambda x: x not in CHOICES[f.name])] if f.name in CHOICES else []
    numbers = [st.integers()] if f.name != "keep_looks" else []  # GB, in earlier configs
    return st.one_of(*wrong, *numbers, *words, *([st.sampled_from(SPOILT[f.name])] if f.name in SPOILT else []))


FIELDS = {f.name: f for f in fields(CraftConfig)}


@st.composite
def drawn(draw):  # → fields, the spoilt ones among them
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=12))
    spoilt = draw(st.sets(st.sampled_from(names), max_size=2)) if names and draw(st.booleans()) else set()
    return {n: draw((bad if n in spoilt else good)(FIELDS[n])) for n in names}, spoilt


def tiny_run(config):
    """A trainer on a linear policy, as `10k_training` would make it. Raises `ValueError` for what does not fit the
    cache."""
    from craft_nb.config import parse_weights
    g = torch.Generator().manual_seed(0)
    policy = Linear(4, 0, 0)
    draws = lambda make: (make(torch.randn(6, 4, generator=g)) for _ in itertools.count())
    old, new = policy.w.weight.detach().clone(), torch.randn(4, 4, generator=g)
    weights = {int(k): v for k, v in parse_weights(config.layer_weights, "layer_weights").items()} or None
    views = make_views(["pooled"], layers=[-1], pooling=["vision_token_mean"], distance=config.distance or "mse",
                       layer_weights=weights)
    stream = (config.projection_scope == "layer" and not config.anchor_micro_batch
              and config.gradient_accumulation_steps == 1)
    ret = Retention(policy, draws(lambda x: {"input_ids": x, "teacher_hidden": (x @ old.T)[:, None, None]}), views,
                    LinearAdapter(), config, 2, {"pooled": 1.0}, stream=stream)
    return CraftTrainer(policy, draws(lambda x: {"x": x, "y": x @ new.T}), torch.optim.SGD(policy.parameters(), 0.05),
                        steps=2, retention=ret if config.enabled else None,
                        accumulate=config.gradient_accumulation_steps, max_nonfinite_steps=config.max_nonfinite_steps)


def check(case) -> str:
    "→ refused | trained. Anything else is an error."
    values, spoilt = case
    try: trainer = tiny_run(CraftConfig(**values))
    except ValueError as e:
        assert any(n in str(e)
                   for n in spoilt or values), f"{values}: refused without naming {spoilt or 'a field'}: {e}"
        return "refused"
    assert not spoilt, f"{ {n: values[n] for n in spoilt} } was accepted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit()
    lams = [d.lam for d in trainer.retention.duals.values()] if trainer.retention else [0.0]
    assert trainer.step == 2 and trainer.ended == "done" and all(math.isfinite(x) for x in lams), (values, lams)
    assert all(torch.isfinite(p).all() for p in trainer.policy.parameters()), values
    return "trained"


def fuzz(n, tally=None):
    tally = {} if tally is None else tally

    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn())
    def run(case):
        how = check(case)
        tally[how] = tally.get(how, 0) + 1
    run()
    return tally


if __name__ == "__main__": print(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
