"""Short trainings of every algorithm, estimate, estimator and critic, and what is kept of each: digests of its bits.

    python tests/golden/cases.py        # makes tests/golden/digests.json anew, for the kind of processor that runs it

Moves and refactorings change no bits. A change that does is a commit of its own that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as tests/conftest.py and the commands set them
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

KEPT = Path(__file__).with_name("digests.json")
PACKAGES = ("torch", "numpy", "mujoco", "gymnasium")
ITERATIONS = 3

DIRECTION = {
    "fisher": "compatible",
    "cg_damping": 0.1,
    "curvature_memory": 0.0,
    "critic": "gauss_newton",
    "critic_steps": 1,
    "critic_cg_max_steps": 8,
    "critic_epochs": 10,
    "target_kl": 0.02,
    "target_kl_end": None,
    "log_std_min": None,
    "gamma": 0.99,
    "gamma_end": None,
    "gae_lambda": 0.95,
    "reused_rollouts": 0,
}
NPG = {**DIRECTION, "n_steps": 24, "net_arch": (16, 8), "log_std_init": -0.5}
PPO = {"n_steps": 16, "net_arch": (16,), "batch_size": 32, "n_epochs": 2}
PES = {"n_steps": 20, "num_envs": 12, "learning_rate": 0.05}
META = {"meta_batch_size": 3, "num_envs": 12, "n_steps": 10, "net_arch": (8,)}
POINT = {"env": "families/Point-v0", "env_kwargs": {"horizon": 10}}

CASES: dict[str, dict[str, Any]] = {
    "npg": {"algorithm": "npg", **NPG},
    "npg defaults": {"algorithm": "npg", "n_steps": 16},
    "npg reuse": {"algorithm": "npg", **NPG, "reused_rollouts": 1, "reuse_until": None},
    "npg many parameters": {"algorithm": "npg", **NPG, "net_arch": (64, 64), "curvature_samples": 100},
    "npg analytic": {"algorithm": "npg", **NPG, "fisher": "analytic", "curvature_samples": 100},
    "npg kfac": {"algorithm": "npg", **NPG, "fisher": "kfac", "curvature_samples": 100},
    "npg ekfac": {"algorithm": "npg", **NPG, "fisher": "ekfac", "target_kl_end": 0.001, "critic_steps": 3},
    "npg diagonal": {"algorithm": "npg", **NPG, "fisher": "diagonal"},
    "npg empirical": {"algorithm": "npg", **NPG, "fisher": "empirical"},
    "npg adaptive": {"algorithm": "npg", **NPG, "fisher": "adaptive"},
    "npg cholesky": {"algorithm": "npg", **NPG, "solver": "cholesky"},
    "npg gram": {"algorithm": "npg", **NPG, "solver": "gram"},
    "npg cg": {"algorithm": "npg", **NPG, "solver": "cg", "cg_warm_start": True},
    **{
        f"npg cg {name}": {"algorithm": "npg", **NPG, "solver": "cg", "cg_preconditioner": name}
        for name in ("diagonal", "kfac", "ekfac", "gram")
    },
    "npg ridge": {"algorithm": "npg", **NPG, "critic": "ridge", "value_network": "quadratic"},
    "npg ridge rbf": {"algorithm": "npg", **NPG, "critic": "ridge", "value_network": "rbf", "rbf_features": 20},
    "npg adam": {"algorithm": "npg", **NPG, "critic": "adam"},
    "npg adabound": {"algorithm": "npg", **NPG, "critic": "adabound", "critic_epochs": 2, "critic_batch_size": 50},
    "npg linear": {"algorithm": "npg", **NPG, "policy": "LinearPolicy", "log_std_min": -0.51},
    "npg rbf": {"algorithm": "npg", **NPG, "policy": "RBFPolicy", "rbf_features": 20},
    "npg relu, raw": {
        "algorithm": "npg",
        **NPG,
        "activation_fn": "relu",
        "normalize_observations": False,
        "normalize_advantage": False,
    },
    "npg contact forces": {"algorithm": "npg", **NPG, "env": "Ant-v5", "num_envs": 4},
    "npg discrete": {"algorithm": "npg", **DIRECTION, "n_steps": 16, "env": "CartPole-v1"},
    "npg discrete analytic": {
        "algorithm": "npg",
        **DIRECTION,
        "n_steps": 16,
        "env": "CartPole-v1",
        "fisher": "analytic",
    },
    "npg several discrete": {"algorithm": "npg", **DIRECTION, "n_steps": 16, "env": "probes/MultiDiscreteBandit-v0"},
    "npg binary": {"algorithm": "npg", **DIRECTION, "n_steps": 16, "env": "probes/MultiBinaryBandit-v0"},
    "trpo": {"algorithm": "trpo", **NPG},
    "ppo": {"algorithm": "ppo", **PPO, "handover": 10.0},
    "ppo target_kl": {"algorithm": "ppo", **PPO, "target_kl": 0.003, "optimizer": "adam", "ent_coef": 0.01},
    **{
        f"ppo {name}": {"algorithm": "ppo", **PPO, "optimizer": name}
        for name in ("adam", "adamw", "amsbound", "clipup", "rmsprop", "sgd")
    },
    "ppo raw": {
        "algorithm": "ppo",
        **PPO,
        "optimizer": "adam",
        "normalize_observations": False,
        "normalize_returns": False,
        "normalize_advantage": False,
    },
    "ppo discrete": {"algorithm": "ppo", **PPO, "env": "CartPole-v1"},
    "pes": {"algorithm": "pes", **PES},
    "pes mlp": {"algorithm": "pes", **PES, "policy": "MlpPolicy", "net_arch": (8,), "momentum": 0.5},
    "pes nres": {"algorithm": "pes", **PES, "estimator": "nres", "sigma_end": 0.05, "learning_rate_end": 0.0},
    "pes gpes": {"algorithm": "pes", **PES, "estimator": "gpes", "resample_every": 2, "gamma": 0.99},
    "pes truncated_es": {"algorithm": "pes", **PES, "estimator": "truncated_es"},
    "pes es": {"algorithm": "pes", **PES, "estimator": "es", "n_steps": 1000, "top_directions": 3, "reward_memory": 0},
    "pes ranks": {"algorithm": "pes", **PES, "estimator": "es", "n_steps": 1000, "reward_scaling": "ranks"},
    "pes whitened log_ranks, trials": {
        "algorithm": "pes",
        **PES,
        "estimator": "es",
        "n_steps": 1000,
        "reward_scaling": "log_ranks",
        "whitening_memory": 100,
        "trials": (2,),
        "trial_steps": (100,),
        "alive_bonus_offset": -1.0,
    },
    **{f"pes {name}": {"algorithm": "pes", **PES, "optimizer": name} for name in ("adam", "clipup", "adabound")},
    "pes discrete": {"algorithm": "pes", **PES, "env": "CartPole-v1", "staggered": False},
    "reptile": {"algorithm": "reptile", **META, **POINT},
    "fomaml": {"algorithm": "fomaml", **META, **POINT},
    "fomaml each": {
        "algorithm": "fomaml",
        **META,
        **POINT,
        "inner_steps": 2,
        "inner_lr_later": 0.5,
        "outer_losses": "each",
        "normalize_advantage": False,
        "gae_lambda": 0.5,
        "anneal": True,
        "log_std_min": -1.0,
    },
    "maml": {"algorithm": "maml", **META, **POINT},
    "maml dice": {"algorithm": "maml", **META, **POINT, "inner_surrogate": "dice", "outer_optimizer": "sgd"},
    "fomaml ordinary": {"algorithm": "fomaml", "n_steps": 8, "num_envs": 8, "net_arch": (8,), "env": "CartPole-v1"},
}


def digest(tensors: Mapping[str, Tensor] | list[Tensor]) -> str:
    """Of the tensors' bits, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors.values() if isinstance(tensors, Mapping) else tensors:
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def run(name: str) -> str:
    """The digest of a case's policy, its episodes and its steps after ITERATIONS iterations on one thread."""
    from agents import REGISTRY
    from envs import make_vec

    settings = {"env": "Hopper-v5", "num_envs": 8, "policy": None, "env_kwargs": {}, **CASES[name]}
    algorithm = REGISTRY[settings.pop("algorithm")]
    policy = settings.pop("policy") or next(iter(algorithm.policy_aliases))
    kwargs = settings.pop("env_kwargs")
    env = make_vec(settings.pop("env"), settings.pop("num_envs"), seed=5, autoreset=algorithm.autoreset, **kwargs)
    agent = algorithm(policy, env, seed=3, device="cpu", **settings)
    for iteration in agent.iterations(4000):
        if iteration == ITERATIONS:
            break
    env.close()
    policy = agent.policy
    counts = torch.tensor([agent.num_timesteps, *agent.episode_lengths])
    returns = torch.tensor(agent.episode_returns, dtype=torch.float64)
    normalizer = [policy.normalizer.count, policy.normalizer.mean, policy.normalizer.m2]
    critic = list(policy.critic.state_dict().values()) if hasattr(policy, "critic") else []
    return digest([*policy.actor.parameters(), *normalizer, *critic, counts, returns])


def processor() -> str:
    """What this kind of processor makes of some fixed products, sums and decompositions on one thread."""
    parts: list[Tensor] = []
    for n, m, dtype in ((7, 64, torch.float32), (384, 64, torch.float32), (17, 33, torch.float64)):
        x = torch.sin(torch.arange(n * m, dtype=dtype)).view(n, m)
        square = x.T @ x + torch.eye(m, dtype=dtype)
        parts += [x @ x.T, square, torch.linalg.cholesky(square), torch.linalg.eigh(square)[0], x.exp(), x.sigmoid()]
        parts += [x.sum(0), x.sum(1), x.tanh(), torch.linalg.solve(square, x.T)]
    versions = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{digest(parts)}, {versions}"


def kept() -> dict[str, dict[str, str]]:
    """Processor -> case -> digest."""
    found: dict[str, dict[str, str]] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    return found


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or list(CASES)
    digests = kept()
    here = digests.setdefault(processor(), {})
    for name in asked:
        before, here[name] = here.get(name), run(name)
        print(here[name], name)
        if before not in (None, here[name]):  # it has other bits now on every processor
            for others in digests.values():
                if others is not here:
                    others.pop(name, None)
    for name in here.keys() - CASES.keys():
        del here[name]
    KEPT.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
