"""The dual against Cooper's trajectories and exact KKT points; budgets; state; the probe."""
import copy
import json
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from craft_nb.config import CHOICES, CraftConfig
from craft_nb.dual import CONTROLLERS, Budget, Dual, epsilon_schedule, no_trace, probe_drift, update_lambda
from craft_nb.surgery import Surgery


def config(**kw): return CraftConfig(**dict(retention_freq=1, epsilon_schedule="constant", epsilon_end=0.1) | kw)


# Cooper

def cooper_lambda(optimizer, losses, eps, init):
    "λ after each step of Cooper's own constrained optimizer, for a constraint whose violation is given."
    cooper = pytest.importorskip("cooper")
    value = torch.tensor(0.0)
    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            self.budget = cooper.Constraint(
                cooper.ConstraintType.INEQUALITY,
                multiplier=cooper.multipliers.DenseMultiplier(init=torch.tensor([init])),
                formulation_type=cooper.formulations.Lagrangian)
        def compute_cmp_state(self):
            return cooper.CMPState(loss=theta.sum() * 0, observed_constraints={
                self.budget: cooper.ConstraintState(violation=(value - eps).view(1) + 0 * theta)})
    theta, problem = nn.Parameter(torch.zeros(1)), Problem()
    roll = cooper.optim.SimultaneousOptimizer(cmp=problem, primal_optimizers=torch.optim.SGD([theta], lr=0.0),
                                              dual_optimizers=optimizer(problem.dual_parameters()))
    out = []
    for loss in losses:
        value = torch.tensor(loss)
        roll.roll()
        out.append(problem.budget.multiplier.weight.item())
    return out


@pytest.mark.parametrize("controller", ["ascent", "pi"])
def test_trajectories_are_coopers(controller):
    cooper = pytest.importorskip("cooper")
    rng = random.Random(0)
    losses = [max(0.0, 0.3 * math.sin(t / 7) + 0.15 + 0.05 * rng.gauss(0, 1)) for t in range(120)]
    make = {"ascent": lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),
            "pi": lambda p: cooper.optim.nuPI(p, lr=0.05, Kp=4.0, Ki=0.7, ema_nu=0.6,
                                              init_type=cooper.optim.nuPIInitType.ZEROS, maximize=True)}[controller]
    want = cooper_lambda(make, losses, 0.25, 0.2)
    dual = Dual(config(controller=controller, epsilon_end=0.25, lambda_lr=0.05, initial_lambda=0.2, lambda_max=1e6,
                       pi_kp=4.0, pi_ki=0.7, pi_nu=0.6), 120)
    got = [dual.update(t, loss)["lambda"] for t, loss in enumerate(losses)]
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6) and min(got) == 0 < max(got)


def test_pi_defaults_are_ascent_and_ema_is_its_formula():
    rng = random.Random(1)
    duals = {c: Dual(config(controller=c, lambda_lr=0.5, ema_beta=0.8), 50) for c in ("ascent", "pi", "ema")}
    lam, m = 1.0, 0.0
    for t in range(50):
        loss = rng.random()
        out = {c: d.update(t, loss)["lambda"] for c, d in duals.items()}
        m = 0.8 * m + 0.2 * (loss - 0.1)
        lam = min(max(lam + 0.5 * m, 0), 10)
        assert out["pi"] == pytest.approx(out["ascent"], rel=1e-12) and out["ema"] == pytest.approx(lam, rel=1e-12)


# KKT: min ½‖θ−a‖² subject to ½(θ−b)ᵀH(θ−b) ≤ ε has (θ−a) + λH(θ−b) = 0;
# for a given λ the solution is closed form, so ε is chosen to make λ* exact

H, A, B, LAM = (torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
                torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64),
                torch.tensor([0.0, -0.5, 0.3], dtype=torch.float64), 1.5)
STAR = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + LAM * H, A + LAM * H @ B)
EPS = (0.5 * (STAR - B) @ H @ (STAR - B)).item()


def descend(gate, steps, K=1, compensate=False, noise=0.0, lr=0.02, lambda_lr=0.05, seed=0):
    """SGD on the convex problem, with surgery and dual as the trainer uses them.
    → means of θ and λ over the retention steps of the second half."""
    gen = torch.Generator().manual_seed(seed)
    theta = nn.Parameter(B.clone())
    dual = Dual(config(retention_freq=K, k_compensation=compensate, epsilon_end=EPS, lambda_lr=lambda_lr,
                       initial_lambda=0.0, lambda_max=100.0), steps)
    surgery = Surgery([("theta", theta)], gate=gate, conflict_threshold=0.0)
    tail_theta, tail_lam, n = torch.zeros(3, dtype=torch.float64), 0.0, 0
    for t in range(steps):
        def jitter(): return noise * torch.randn(3, generator=gen, dtype=torch.float64)
        g = [(theta - A).detach() + jitter()]
        if t % K == 0:
            if t >= steps // 2: tail_theta += theta.detach(); tail_lam += dual.lam; n += 1
            r, loss = [(H @ (theta - B)).detach() + jitter()], (0.5 * (theta - B) @ H @ (theta - B)).item()
            surgery.merge_(g, r, dual.weight, loss > EPS)
            dual.update(t, loss)
        with torch.no_grad(): theta -= lr * g[0]
    return tail_theta / n, tail_lam / n


@pytest.mark.parametrize("K", [1, 5])
def test_gate_never_reaches_the_kkt_point(K):
    theta, lam = descend("never", **{1: dict(steps=1200, lr=0.03, lambda_lr=0.2),
                                     5: dict(K=5, compensate=True, steps=8000, lr=0.002, lambda_lr=0.2)}[K])
    assert (theta - STAR).norm() < 1e-3 and lam == pytest.approx(LAM, rel=0.01)


def test_without_compensation_lambda_is_k_times_higher():
    theta, lam = descend("never", 8000, 5, compensate=False, lr=0.002, lambda_lr=1.0)
    assert (theta - STAR).norm() < 1e-3 and lam == pytest.approx(5 * LAM, rel=0.01)


@pytest.mark.parametrize("K", [1, 5])
def test_kkt_under_gradient_noise(K):
    theta, lam = descend("never", 1500 * K, K, compensate=True, noise=0.3, lr=0.02 / K, lambda_lr=0.05)
    assert (theta - STAR).norm() < 0.05 * STAR.norm() and lam == pytest.approx(LAM, rel=0.05)


def test_gate_violated_reaches_theta_and_always_does_not():
    theta, lam = descend("violated", 3000, lr=0.01, lambda_lr=1.0)
    # derived in the ablation notebook
    assert (theta - STAR).norm() < 0.02 * STAR.norm() and lam == pytest.approx(LAM / 2, rel=0.1)
    theta, lam = descend("always", 1000, lr=0.01, lambda_lr=0.1)
    assert (theta - STAR).norm() > 0.2 * STAR.norm() and lam == 0


def test_inactive_budget_lets_lambda_go():
    for controller in CONTROLLERS:
        dual = Dual(config(controller=controller, lambda_lr=0.2), 500)
        for t in range(500): dual.update(t, 0.001, grad_norms=(1.0, 0.1))
        # the share has a floor
        assert dual.lam == (0.0 if controller != "share" else pytest.approx(0.3 * 1.0 / 0.1)), controller


# landing

@settings(max_examples=60, deadline=None)
@given(st.floats(-6, 4), st.floats(-3, 3), st.floats(0.02, 0.5), st.integers(0, 999))
def test_landing_lands(unit, force, share, seed):
    """A drift that the task pushes up and λ pushes down, in any unit, for any strength, under noise of 20 %:
    mean of the last 50 steps in [0.7, 1.1] ε."""
    unit, force, rng = 10.0**unit, 10.0**force, random.Random(seed)
    reach = 0.6  # where 300 unconstrained steps would end
    eps = share * reach**2 / 2 * unit
    dual = Dual(config(controller="landing", epsilon_end=eps, lambda_max=1e30), 300)
    x, tail = 1e-3, []
    for t in range(300):
        lr = 0.01 * (1 + math.cos(math.pi * t / 300)) * reach / 3
        loss, norm = unit * x * x / 2 * math.exp(rng.gauss(0, 0.2)), unit * x
        pull = (force - dual.weight * norm) / force
        dual.update(t, loss, grad_norms=(force, norm))
        if t >= 250: tail.append(unit * x * x / 2)
        x = max(x + lr * max(-3, min(3, pull)), 1e-3)
    assert 0.7 <= sum(tail) / len(tail) / eps <= 1.1


@settings(max_examples=30, deadline=None)
@given(st.floats(-6, 6), st.sampled_from([1, 5]), st.booleans(), st.integers(0, 999))
def test_landing_is_scale_free(unit, K, compensate, seed):
    "L_ret, ε and r in another unit: λ in the inverse unit, nothing else; and `weight` does not depend on compensation."
    unit, rng = 10.0**unit, random.Random(seed)
    one, two = (Dual(config(controller="landing", retention_freq=K, k_compensation=c, epsilon_end=0.1 * u,
                            lambda_max=1e30), 300) for c, u in ((False, 1.0), (compensate, unit)))
    for t in range(60):
        loss, g, r = rng.lognormvariate(-2, 1), rng.uniform(1, 2), rng.uniform(0.1, 1)
        one.update(t, loss, grad_norms=(g, r)); two.update(t, loss * unit, grad_norms=(g, r * unit))
        assert two.weight * unit == pytest.approx(one.weight, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 5]), st.floats(-6, 6), st.floats(-3, 3), st.floats(-1, 1),
       st.lists(st.floats(-3, 6), min_size=1, max_size=60))
def test_landing_never_drowns_the_task(K, unit, force, cosine, losses):
    """Whatever the drift does, r weighs at most K (1 + max(0, −cos)) times g; where it stays far below the budget, λ is
    exactly 0."""
    g, r = 10.0**force, 10.0**unit
    dual = Dual(config(controller="landing", retention_freq=K, epsilon_end=1.0, lambda_max=1e30), 300)
    for t, x in enumerate(losses):
        dual.update(t * K, 10.0**x, grad_norms=(g, r), cosine=cosine)
        assert dual.weight * r <= (1 + max(0, -cosine)) * K * g * (1 + 1e-9)
    for t in range(30): dual.update((len(losses) + t) * K, 0.1, grad_norms=(g, r), cosine=cosine)
    assert dual.lam == 0.0


def test_landing_without_norms_or_loss_keeps_lambda():
    dual = Dual(config(controller="landing"), 10)
    assert dual.update(0, 0.0, grad_norms=(1.0, 0.0))["lambda"] == dual.update(1, 0.5)["lambda"] == 1.0
    assert dual.update(2, 0.5, grad_norms=(1.0, 8.0))["lambda"] < 1.0


# budgets

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(0, 300),
       st.sampled_from(CHOICES["epsilon_schedule"]))
def test_schedules_stay_between_their_ends(step, start, end, decay, kind):
    eps = epsilon_schedule(step, start, end, decay, kind)
    assert min(start, end) * (1 - 1e-9) <= eps <= max(start, end) * (1 + 1e-9)
    last = end + (start - end) * math.exp(-5) if kind == "exponential" else end
    assert step < decay or eps == pytest.approx(last, rel=1e-12)
    if step:
        assert ((eps - epsilon_schedule(step - 1, start, end, decay, kind)) * (end - start)
                >= -1e-12 * max(start, end) ** 2)


def test_units_and_live_scale():
    base = dict(epsilon_schedule="linear", epsilon_start=1.0, epsilon_end=0.2)
    assert Budget(config(**base), 10).epsilon(5) == pytest.approx(0.6)
    assert Budget(config(**base, epsilon_decay_steps=5), 10).epsilon(5) == 0.2
    assert Budget(config(**base, epsilon_unit="relative"), 10, scale=3.0).epsilon(10) == pytest.approx(0.6)
    assert Budget(config(**base), 10, epsilon_end=0.02).epsilon(0) == pytest.approx(0.1)
    dual = Dual(config(**base), 10)
    dual.epsilon_scale = 0.5
    assert dual.update(10, 0.3)["violation"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="above 0"): Budget(config(), 10, scale=0.0)
    with pytest.raises(RuntimeError, match="calibrate"): Dual(config(epsilon_unit="auto"), 10).update(0, 1.0)


# updates

def test_every_n_updates_use_the_mean():
    dual = Dual(config(lambda_update_every=4, lambda_lr=1.0), 100)
    out = [dual.update(t, loss)["lambda"] for t, loss in enumerate((0.1, 0.2, 0.3, 0.8))]
    assert out[:3] == [1.0] * 3 and out[3] == pytest.approx(1.25)


def test_warm_up_holds_lambda():
    dual = Dual(config(lambda_warmup_steps=3), 100)
    assert [dual.update(t, 0.6)["lambda"] == 1.0 for t in range(5)] == [True, True, True, False, False]


def test_non_finite_losses_change_nothing():
    for controller in CONTROLLERS:
        dual = Dual(config(controller=controller), 100)
        for t in range(5): dual.update(t, 0.4, grad_norms=(1.0, 1.0))
        before = dual.state_dict()
        for bad in (math.nan, math.inf): dual.update(6, bad, grad_norms=(1.0, 1.0))
        assert dual.state_dict() == before


def test_one_warning_an_episode():
    dual = Dual(config(lambda_max=2.0, lambda_lr=10.0, lambda_clip_patience=5), 100)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        flags = [dual.update(t, 0.0 if t == 20 else 1.0)["pinned"] for t in range(40)]
    assert len(seen) == 2 and "lambda_max=2" in str(seen[0].message)
    assert not flags[3] and flags[4] and not flags[20] and flags[39]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(CONTROLLERS)), st.integers(1, 3), st.integers(0, 30), st.integers(0, 9999))
def test_state_survives_json_exactly(controller, every, cut, seed):
    rng = random.Random(seed)
    losses = [rng.lognormvariate(-2, 1) for _ in range(40)]
    cfg = config(controller=controller, lambda_update_every=every, pi_kp=2.0, pi_nu=0.3, epsilon_unit="auto")
    a, b = Dual(cfg, 40), Dual(cfg, 40)
    a.calibrate(1 / 3)
    a.lambda_lr, a.epsilon_scale = 0.7, 1.1
    for t in range(cut): a.update(t, losses[t], grad_norms=(1.0, losses[t]))
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    for t in range(cut, 40):
        assert (a.update(t, losses[t], grad_norms=(1.0, losses[t]))
                == b.update(t, losses[t], grad_norms=(1.0, losses[t])))


def test_origin_rule():
    assert update_lambda(1.0, 2.0, 1.0, 0.01, 10.0) == 1.01 and update_lambda(0.0, 0.0, 1.0, 0.01, 10.0) == 0.0


# the probe

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_probe_leaves_no_trace(optimizer, steps_before):
    import numpy as np
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    opt, gen = optimizer(net.parameters(), lr=0.01), torch.Generator().manual_seed(3)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1 / (1 + s))
    def step(i):
        opt.zero_grad()
        (net(torch.randn(16, 4, generator=gen)).square().mean()
         * (1 + np.random.rand() + random.random() + torch.rand(()))).backward()
        opt.step(); sched.step()
    for i in range(steps_before): step(i)
    def state():
        return (copy.deepcopy((net.state_dict(), opt.state_dict(), sched.state_dict(),
                               [p.grad for p in net.parameters()])), torch.get_rng_state(), gen.get_state(),
                random.getstate()[1], np.random.get_state()[1].tolist(), [m.training for m in net.modules()])
    def run():
        for i in range(4): step(i)
        return state()
    with no_trace(net, opt, sched, generators=[gen]): want = run()
    before = state()
    def drift(): net.eval(); return net(torch.ones(2, 4)).square().sum()
    assert probe_drift(step, drift, 6, net, opt, sched, generators=[gen]) > 0
    assert equal(before, state())
    with pytest.raises(ZeroDivisionError):
        probe_drift(lambda i: (step(i), 1 / 0), drift, 6, net, opt, sched, generators=[gen])
    assert equal(before, state())
    assert equal(want, run()), "training after the probe is not what it would have been"


@pytest.mark.parametrize("controller", ["landing", "share"])
def test_a_small_weight_keeps_its_digits(controller):
    "λ starts at 1 and is 1e-8 or 1e-15 a step later: as exact as where it starts near there."
    for r in (1e6, 1e13):
        near, far = (Dual(config(controller=controller, epsilon_end=1.0, lambda_max=1e30, initial_lambda=x), 300)
                     for x in (1e-2 / r, 1.0))
        for dual in (near, far): dual.update(0, 1.0, grad_norms=(1e-2, r), cosine=0.0)
        assert far.lam == near.lam > 0
