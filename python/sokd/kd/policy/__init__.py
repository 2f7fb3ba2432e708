"""The policy: draws, plans, and two gradient estimators of its discrete choices."""

from sokd.kd.policy.policy import Draw, Policy, Sample, fresh_seed, manual_seed

__all__ = ["Draw", "Policy", "Sample", "fresh_seed", "manual_seed"]
