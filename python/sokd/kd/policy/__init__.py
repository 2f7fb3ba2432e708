"""The policy: what it draws, what a draw becomes, and both gradients of its choices."""

from sokd.kd.policy.policy import Draw, Policy, Sample, fresh_seed, manual_seed

__all__ = ["Draw", "Policy", "Sample", "fresh_seed", "manual_seed"]
