"""CRaFT, Constrained Retention Fine-Tuning: teach a robot policy a new task under an explicit drift budget."""

__version__ = "0.1.0"

from importlib import import_module

_HOME = {  # public name → module; loaded when first used, so that commands which need no torch do not wait for it
    "CraftConfig": "config",
    "compute_retention_loss_hidden": "losses",
    "Surgery": "surgery", "compute_dot": "surgery", "merge_grads": "surgery", "project_if_conflict": "surgery",
    "Dual": "dual", "epsilon_schedule": "dual", "update_lambda": "dual",
    "AnchorCacheDataset": "anchors", "build_anchor_dataloader": "anchors",
    "compute_retention_loss": "policies", "extract_student_hidden_with_pooling": "policies",
    "build_anchor_cache": "builder",
    "Callback": "trainer", "CraftTrainer": "trainer", "Retention": "trainer",
    "CraftMonitor": "monitor",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'craft_nb' has no attribute {name!r}")
    return getattr(import_module(f"craft_nb.{_HOME[name]}"), name)


def __dir__(): return [*globals(), *_HOME]
