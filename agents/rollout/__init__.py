"""A rollout: collecting it, storing it, and what its steps were worth."""
