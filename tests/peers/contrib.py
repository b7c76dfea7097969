"""sb3-contrib's own tests with our classes in place of its TRPO and ARS, and what fails, by cause.

    python tests/peers/contrib.py stable-baselines3-contrib/tests

Its tests are read from a folder that you give, of the version that is installed; they are not part of its wheel, and
none is copied here. A test counts if it makes one of our agents. Not run with our own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import causes
import gymnasium
import sb3_contrib

sys.path.insert(0, str(Path(__file__).parents[2]))

from sb3 import CAUSES as OF_SB3

from agents import PES, TRPO

OTHERS = {
    sb3_contrib.QRDQN, sb3_contrib.TQC, sb3_contrib.CrossQ, sb3_contrib.MaskablePPO, sb3_contrib.RecurrentPPO,
}  # fmt: skip
NOT_HERE = (
    "learning_rate", "batch_size", "sub_sampling_factor", "line_search_shrinking_factor", "line_search_max_iter",
    "n_critic_updates",
)  # fmt: skip
"""Of its TRPO's critic, and of what ours does in another way."""


class AdaptedTRPO(causes.Adapted, TRPO):
    """TRPO for TRPO."""

    def __init__(self, policy: Any, env: Any, **keywords: Any) -> None:
        super().__init__(policy, env, **{name: value for name, value in keywords.items() if name not in NOT_HERE})


class AdaptedPES(causes.Adapted, PES):
    """Random search for ARS, n_delta pairs of one rollout each."""

    def __init__(self, policy: Any, env: Any, **keywords: Any) -> None:
        pairs, best = keywords.pop("n_delta", 8), keywords.pop("n_top", None)
        keywords |= {"sigma": keywords.pop("delta_std", 0.05)}
        keywords.pop("zero_policy", None)
        if not hasattr(env, "num_envs"):
            keywords["num_envs"] = 2 * pairs
        spec = gymnasium.spec(env) if isinstance(env, str) else getattr(env, "spec", None)
        if spec is not None and spec.max_episode_steps is not None:
            keywords |= {"estimator": "es", "n_steps": spec.max_episode_steps, "top_directions": best}
        super().__init__(policy, env, **keywords)

    def learn(self, total_timesteps: int, *arguments: Any, async_eval: Any = None, **keywords: Any) -> Any:
        return super().learn(total_timesteps, *arguments, **keywords)


CAUSES = OF_SB3 | {
    "its TRPO warns of its critic's minibatches, which are the whole rollout here": ("test_trpo_warnings",),
    "its ARS warns of as many directions as there are, and takes 1 environment": (
        "test_ars_n_top",
        "particles come in",
        r"test_deterministic_training_common.*truth value of an array",
    ),
}
PLUGIN = causes.Chooses(CAUSES, {AdaptedTRPO, AdaptedPES}, OTHERS, "TRPO|ARS")


def main() -> int:
    asked = causes.parse(__doc__, "sb3-contrib")
    sb3_contrib.TRPO, sb3_contrib.ARS = AdaptedTRPO, AdaptedPES
    return causes.run(PLUGIN, "agents", [asked.tests], asked.tests, asked.k)


if __name__ == "__main__":
    sys.exit(main())
