"""SoKD: features, adapter, policy and DAM, the loss they make, and the policy's search."""

from sokd.kd.adapter import Adapter
from sokd.kd.attention import AttentionDAM
from sokd.kd.dam import DAM
from sokd.kd.plugin import wrap
from sokd.kd.policy import Policy, manual_seed
from sokd.kd.search import PolicySearch
from sokd.kd.sokd import Match, SoKD, loss

__all__ = [
    "DAM", "Adapter", "AttentionDAM", "Match", "Policy", "PolicySearch", "SoKD", "loss",
    "manual_seed", "wrap",
]  # fmt: skip
