"""CRaFT, Constrained Retention Fine-Tuning: teach a robot policy a new task under an explicit drift budget."""

__version__ = "0.1.0"

from craft_nb.anchors import AnchorCacheDataset, build_anchor_dataloader
from craft_nb.builder import build_anchor_cache
from craft_nb.config import CraftConfig
from craft_nb.dual import Dual, epsilon_schedule, update_lambda
from craft_nb.losses import compute_retention_loss_hidden
from craft_nb.monitor import CraftMonitor
from craft_nb.policies import compute_retention_loss, extract_student_hidden_with_pooling
from craft_nb.surgery import Surgery, compute_dot, merge_grads, project_if_conflict
from craft_nb.trainer import Callback, CraftTrainer, Retention

__all__ = [
    "AnchorCacheDataset", "Callback", "CraftConfig", "CraftMonitor", "CraftTrainer", "Dual", "Retention", "Surgery", "build_anchor_cache",
    "build_anchor_dataloader", "compute_dot", "compute_retention_loss", "compute_retention_loss_hidden", "epsilon_schedule",
    "extract_student_hidden_with_pooling", "merge_grads", "project_if_conflict", "update_lambda",
]
