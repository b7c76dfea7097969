"""Collecting: the loops that fill a rollout, and who owns the acting policy, the counting and the callbacks."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents import noise
from agents.devices import fetched, resolved, sent
from agents.policy.base import named_as_in
from agents.rollout.buffer import FieldSpec, Rollout, RunningEpisodes, check_numbers, numbers
from agents.rollout.device_steps import DeviceSteps
from envs.infos import plain, row_of
from envs.sb3 import LazyInfos
from envs.vector import VectorEnv

Sample = Callable[[Tensor, Tensor], Tensor]
"""Observations [N, *O] and noise [N, *noise_shape] to actions [N, *A]."""
Act = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Step t and observations [N, *O] to the actions that the rollout keeps and those that the environment takes."""
ActSome = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same for some environments: step t, observations [k, *O] and ids [k], a new tensor whenever they change."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of all environments gave."""

    t: int
    actions: Tensor
    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    info: dict[str, Any]
    """Of the environments that were stepped, in the order of ids."""
    ids: Tensor | None = None
    """The environments that were stepped, or None for all; the others' rewards are 0, and they did not end."""


class Collector:
    """Fills an agent's rollouts from its environments, counts its steps and episodes, and tells its callbacks.

    Args:
        agent: who is counted for, under SB3's names: num_timesteps, ep_info_buffer; its `policy` trains on its
            `device`, its `stream_seed` keys the noise of actions.
        vector: the environments.
        fields: what is kept of each step.
        n_steps: T, steps of a rollout.
        first: number of the first environment among all of the run's, where these are a shard of them.

    Attributes:
        policy: the one that acts, where the environments live: the agent's own, or a copy of it.
        rollout: where the environments live; overwritten by the next one.
        observations: current in the environments, [N, *O]; None before episodes have begun.
        episodes: returns and lengths of the episodes that run.
        listener: SB3's callback, or None where nobody wants to see single steps.
        brought: what the agent's policy became by its last update, where that has come from its device already.
    """

    def __init__(
        self, agent: BaseAlgorithm, vector: VectorEnv, fields: dict[str, FieldSpec], n_steps: int, first: int = 0
    ) -> None:
        self.agent, self.vector, self.first = agent, vector, first
        self.device = resolved(agent.device)
        shared = resolved(vector.device) == self.device
        self.policy: Any = agent.policy if shared else copy.deepcopy(agent.policy).to(vector.device)
        pin = self.device.type == "cuda" and not shared
        if vector.masked and vector.autoreset.name == "SAME_STEP" and "observations" in fields:
            fields = fields | {"final_observations": fields["observations"]}
        self._allocate = partial(Rollout, num_envs=vector.num_envs, fields=fields, device=vector.device, pin_memory=pin)
        self.lengthen(n_steps)
        self.observations: Tensor | None = None
        self.episodes = RunningEpisodes(vector.num_envs, vector.device)
        self.listener: BaseCallback | None = None
        self.brought: dict[str, Tensor] = {}
        self._owed: dict[str, Tensor] = {}  # of the last rollout, still on the device
        self._told: list[dict[str, Any]] = []  # by infos, of episodes that ended and are not counted yet

    def lengthen(self, n_steps: int) -> None:
        """Collect rollouts of n_steps from now on."""
        made = self.rollout = self._allocate(n_steps)
        self.steps = DeviceSteps.of(self.vector, self.policy, made) if "final_observations" in made.specs else None

    def begin(self, observations: Any) -> None:
        """Forget the episodes that ran: all environments have just been reset, to observations [N, *O]."""
        self.observations = torch.as_tensor(observations, device=self.vector.device)
        self.episodes = RunningEpisodes(self.vector.num_envs, self.vector.device)

    def follow(self, policy: Any) -> None:
        """Act as the policy that was trained does."""
        if self.policy is not policy:
            state, self.brought = self.brought or fetched(policy.state_dict()), {}
            self.policy.load_state_dict(named_as_in(self.policy, state))

    def bring(self, tensors: dict[str, Tensor], final: bool = False) -> dict[str, Tensor]:
        """Bring tensors from the device that trains, by one copy; with them comes what the last rollout has to tell
        and, if the policy is final, what `follow` needs.
        """
        policy = self.agent.policy
        state = policy.state_dict() if final and policy is not self.policy else {}
        given = {"": tensors, "owed": self._owed, "policy": state}
        found = fetched({(part, name): x for part, some in given.items() for name, x in some.items()})
        numbers, owed, self.brought = ({name: found[part, name] for name in some} for part, some in given.items())
        self.settle(owed)
        return numbers

    def fill(self, counter: int, sample: Sample | None = None) -> Rollout | None:
        """Collect T steps of all environments.

        Args:
            counter: which of the run's rollouts this is, which decides its noise.
            sample: chooses actions; None is the policy's sampler.

        Returns:
            The rollout, where the policy trains; None if a callback asked to stop.
        """
        self.settle()
        assert self.observations is not None
        T, N, seed = self.rollout.n_steps, self.vector.num_envs, self.agent.stream_seed  # type: ignore[attr-defined]
        # Callbacks, where there are any, see ordinary tensors.
        with single_thread(), torch.inference_mode(self.listener is None), torch.no_grad():
            block = noise.action_noise(self.policy, seed, counter, T, N, self.first, self.vector.device)
            block = sent(block, self.vector.device)
            choose = self.policy.sampler() if sample is None else sample

            def act(t: int, observations: Tensor) -> tuple[Tensor, Tensor]:
                actions = choose(observations, block[t])
                return actions, self.policy.to_environment(actions)

            if self.steps is not None and sample is None and self.listener is None:
                taken = self.steps.fill(self.observations, block), True
            else:
                on_step = None if self.listener is None else self._on_step
                on_end = self._on_end if self.vector.tells_of_episodes else None
                taken = collect(self.vector, act, self.rollout, self.observations, on_step, on_end)
            complete = self._take(*taken)
        return self.rollout.to(self.device) if complete else None

    def fill_some(self, act: ActSome, ids: Tensor) -> bool:
        """Collect at most T steps of the environments ids [k], each of which stands still once it has ended.

        Returns:
            Whether the rollout is complete; not if a callback asked to stop.
        """
        assert self.observations is not None
        on_step = None if self.listener is None else self._on_step
        on_end = self._on_end if self.vector.tells_of_episodes else None
        given = self.vector, act, self.rollout, self.observations, ids, on_step
        with single_thread(), torch.inference_mode(self.listener is None), torch.no_grad():
            if self.steps is not None and self.listener is None:
                return self._take(self.steps.fill(self.observations, ids=ids), True)
            return self._take(*(collect_masked(*given) if self.vector.masked else collect_some(*given, on_end)))

    def leave(self, error: BaseException) -> None:
        """Give up a rollout that an error ended: episodes begin anew, and if the environments gave numbers that the
        error comes of, a ValueError says so.
        """
        self.observations, self._told = None, []  # the environments stand somewhere within the rollout
        if isinstance(error, ValueError):
            check_numbers(self.rollout, self.first)

    def _take(self, observations: Tensor, complete: bool) -> bool:
        """Take the observations to go on from, and count steps and episodes where nobody listened to single steps."""
        with torch.inference_mode(False):
            # An ordinary tensor, and one that the next step does not overwrite.
            self.observations = self.rollout.last_observations = observations.clone()
            rollout = self.rollout
            fine = [torch.stack(torch.aminmax(given.values)).abs() <= given.most for given in numbers(rollout)]
            found = {"fine": torch.cat(fine).all()}
            # A policy that trains on the environments' device brings this to the host with its update's numbers.
            later = self.listener is None and rollout.device.type != "cpu" and rollout.device == self.device
            if self.listener is None:
                ended = rollout["terminated"] | rollout["truncated"]
                stepped = rollout["stepped"] if "stepped" in rollout.specs else None
                found |= self.episodes.update_rollout(rollout["rewards"], ended, stepped)
                if later and stepped is None:
                    del found["steps"]
                    self.agent.num_timesteps += ended.numel()
            self._owed = found | (self.vector.counts() if self.vector.masked else {})
            if not later:
                self.settle(self._owed if rollout.device.type == "cpu" else None)
        return complete

    def settle(self, found: dict[str, Tensor] | None = None) -> None:
        """Count what the last rollout has to tell, if that has not been done; found: on the host already.

        Raises:
            ValueError: it has numbers that training cannot use.
        """
        owed, self._owed = self._owed, {}
        if not owed:
            return
        found = fetched(owed) if found is None else found
        observations, self.observations = self.observations, None  # begin anew if the rollout is of no use
        if not found["fine"]:
            check_numbers(self.rollout, self.first)
        if self.vector.masked:
            self.vector.heed(found)
        self.observations = observations
        if "returns" in found:
            self.agent.num_timesteps += int(found.get("steps", 0))
            self._finish(found["returns"][found["ended"]], found["lengths"][found["ended"]])

    def _finish(self, returns: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
        """Keep the statistics of the episodes that ended, [k] each; returns them as SB3's infos do."""
        agent = self.agent
        assert agent.ep_info_buffer is not None
        assert agent.ep_success_buffer is not None
        seconds = (time.time_ns() - agent.start_time) * 1e-9
        told, self._told = self._told or [{}] * len(returns), []
        rows = zip(returns.tolist(), lengths.tolist(), told, strict=True)
        # A Monitor's own come first, as in SB3: they may be of rewards before a wrapper changed them.
        episodes = [{"r": total, "l": length, "t": seconds} | own.get("episode", {}) for total, length, own in rows]
        agent._episode_num += len(episodes)
        agent.ep_info_buffer.extend(episodes)
        agent.ep_success_buffer.extend(own["is_success"] for own in told if "is_success" in own)
        return episodes

    def _on_end(self, ended: Tensor, info: dict[str, Any]) -> None:
        """Keep what a step's info says of the episodes that ended in it, ended [n], as SB3 does."""
        info = info.get("final_info", info)
        own = {key: info[key] for name in ("episode", "is_success") for key in (name, f"_{name}") if key in info}
        rows = (row_of(own, i) for i in ended.nonzero()[:, 0].tolist())
        self._told += [{key: plain(value) for key, value in row.items()} for row in rows]

    def _on_step(self, step: Step) -> bool:
        """Count a step and show it to the callbacks; False if one asks to stop."""
        assert self.listener is not None
        self.agent.num_timesteps += self.vector.num_envs if step.ids is None else len(step.ids)
        ended = step.terminated | step.truncated
        finished = self.episodes.update(step.rewards, ended, step.ids)
        episodes: dict[int, dict[str, Any]] = {}
        if finished is not None:
            episodes = dict(zip(ended.nonzero()[:, 0].tolist(), self._finish(*finished), strict=True))
        return self._tell(self.listener, step, ended, episodes)

    def _tell(self, listener: BaseCallback, step: Step, ended: Tensor, episodes: dict[int, dict[str, Any]]) -> bool:
        """Show a step to the callbacks, under the names that SB3 uses; False if one asks to stop."""
        # Without autoreset, the observations of a step are the last ones of episodes that ended in it.
        final: Tensor | None = step.observations
        if step.ids is None:
            final = step.info["final_obs"] if episodes else None
        rows: list[int] | None = None
        if step.ids is not None:
            places = {i: row for row, i in enumerate(step.ids.tolist())}
            rows = [places.get(i, -1) for i in range(self.vector.num_envs)]
        dones = ended.cpu().numpy()
        timed_out = (step.truncated & ~step.terminated).cpu().numpy()
        last = None if final is None else final.cpu().numpy()
        listener.update_locals(
            {
                "self": self.agent,
                "total_timesteps": self.agent._total_timesteps,
                "n_steps": step.t + 1,
                "actions": step.actions.cpu().numpy(),
                "new_obs": step.observations.cpu().numpy(),
                "rewards": step.rewards.cpu().numpy(),
                "dones": dones,
                "infos": LazyInfos(step.info, dones, timed_out, last, episodes, rows),
            }
        )
        return listener.on_step()


def collect(
    env: VectorEnv,
    act: Act,
    rollout: Rollout,
    observations: Tensor,
    on_step: Callable[[Step], bool] | None = None,
    on_end: Callable[[Tensor, dict[str, Any]], None] | None = None,
) -> tuple[Tensor, bool]:
    """Fill a rollout with T steps of N environments.

    Only the fields that the rollout declares are kept. Where an episode was truncated and another began, the
    observation that it really ended in is kept too, if the rollout keeps observations.

    Args:
        env: num_envs = N, in SAME_STEP mode.
        act: chooses actions.
        rollout: begins anew.
        observations: [N, *O], current in env.
        on_step: called after each step; False stops collecting.
        on_end: called before it with the mask of the environments that ended, if any did, and the info.

    Returns:
        The observations to go on from, valid until the next step, and whether all T steps were made.
    """
    keeps = rollout.specs.keys()
    for t in range(rollout.n_steps):
        actions, environment_actions = act(t, observations)
        # Before the step, which may reuse the observations' memory.
        before = {"observations": observations, "actions": actions}
        rollout.add(t, **{name: value for name, value in before.items() if name in keeps})
        observations, reward, terminated, truncated, info = env.step(environment_actions)
        after = {"rewards": reward, "terminated": terminated, "truncated": truncated}
        rollout.add(t, **{name: value for name, value in after.items() if name in keeps})
        if "final_observations" in keeps:
            rollout.add(t, final_observations=info["final_obs"])
        elif "observations" in keeps and truncated.any():
            ended = truncated.nonzero()[:, 0]
            rollout.add_final(t, ended, info["final_obs"][ended])
        if on_end is not None and bool((ended := terminated | truncated).any()):
            on_end(ended, info)
        if on_step is not None and not on_step(Step(t, actions, observations, reward, terminated, truncated, info)):
            return observations, False
    return observations, True


def collect_some(
    env: VectorEnv,
    act: ActSome,
    rollout: Rollout,
    observations: Tensor,
    ids: Tensor,
    on_step: Callable[[Step], bool] | None = None,
    on_end: Callable[[Tensor, dict[str, Any]], None] | None = None,
) -> tuple[Tensor, bool]:
    """Fill a rollout with steps of some environments, each of which stands still once it has ended.

    A step costs what the environments that go on cost: only their rows are worked on. Where environments stand still,
    the fields "rewards", "terminated", "truncated" and "stepped" hold 0, and what the others hold means nothing.
    Collecting ends after T steps, or when all have ended.

    Args:
        env: N environments in DISABLED mode.
        act: chooses the actions of those that go on.
        rollout: is cleared first.
        observations: [N, *O], current in env.
        ids: the environments to step, int64 [k] in ascending order.
        on_step: called after each step; False stops collecting.
        on_end: called before it with the mask of the environments that ended, if any did, and the info.

    Returns:
        The observations to go on from [N, *O], and whether on_step let all steps be made.
    """
    rollout.clear()
    keeps = rollout.specs.keys()
    for name in keeps & {"rewards", "terminated", "truncated"}:
        rollout[name].zero_()

    def keep(name: str, t: int, values: Tensor) -> None:
        if name in keeps:
            rollout.put(name, t, ids, values)

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(env.num_envs, *values.shape[1:]).index_copy_(0, ids, values)

    observations = observations.clone()
    current = observations[ids]
    lengths = torch.zeros(env.num_envs, dtype=torch.int64, device=ids.device)
    # Cast once a step: between two steps of the physics every operation finds cold caches.
    observed = rollout["observations"].dtype if "observations" in keeps else current.dtype
    for t in range(rollout.n_steps):
        seen = current.to(observed)
        actions, environment_actions = act(t, seen, ids)
        keep("observations", t, seen)
        keep("actions", t, actions)
        everyone = len(ids) == env.num_envs
        current, reward, terminated, truncated, info = env.step(environment_actions, None if everyone else ids)
        keep("rewards", t, reward)
        ends = True in terminated.tolist() or True in truncated.tolist()
        if ends:
            keep("terminated", t, terminated)
            keep("truncated", t, truncated)
            if on_end is not None:
                on_end(terminated | truncated, info)
        if on_step is not None:
            shown = observations.index_copy(0, ids, current)
            rewards, terminations, truncations = (whole(x) for x in (reward, terminated, truncated))
            if not on_step(Step(t, whole(actions), shown, rewards, terminations, truncations, info, ids)):
                return shown, False
        if ends:
            # Of all, those that go on too: what these reach later replaces it.
            observations.index_copy_(0, ids, current)
            lengths.index_fill_(0, ids, t + 1)
            going = (~(terminated | truncated)).nonzero()[:, 0]
            ids, current = ids.index_select(0, going), current.index_select(0, going)
            if not len(ids):
                break
    observations.index_copy_(0, ids, current)
    lengths.index_fill_(0, ids, rollout.n_steps)
    if "stepped" in keeps:
        steps = torch.arange(rollout.n_steps, device=ids.device)
        torch.lt(steps[:, None], lengths, out=rollout["stepped"])
    return observations, True


def collect_masked(
    env: VectorEnv,
    act: ActSome,
    rollout: Rollout,
    observations: Tensor,
    ids: Tensor,
    on_step: Callable[[Step], bool] | None = None,
) -> tuple[Tensor, bool]:
    """Do as `collect_some` without asking who has ended: all environments are stepped, always T times, and masked.

    Args: as of `collect_some`; env is `masked`, and environments that are not in ids have ended.
    """
    rollout.clear()
    keeps, everyone = rollout.specs.keys(), torch.arange(env.num_envs, device=env.device)
    going = torch.zeros_like(everyone, dtype=torch.bool).index_fill_(0, ids, True)
    for t in range(rollout.n_steps):
        actions, environment_actions = act(t, observations, everyone)
        current, rewards, terminated, truncated, info = env.step(environment_actions)
        kept = {"observations": observations, "actions": actions, "rewards": rewards, "stepped": going}
        kept |= {"terminated": terminated, "truncated": truncated}
        rollout.add(t, **{name: value for name, value in kept.items() if name in keeps})
        seen = going.view(-1, *(1,) * (current.ndim - 1))
        observations = torch.where(seen, current, observations)
        if on_step is not None:
            stepped = going.nonzero()[:, 0]
            if not on_step(Step(t, actions, observations, rewards, terminated, truncated, info, stepped)):
                return observations, False
        going = going & ~(terminated | truncated)
    return observations, True


_outside: list[int] = []
"""Torch's numbers of threads outside the `single_thread` that run."""


@contextmanager
def single_thread() -> Iterator[None]:
    """Keep torch on one thread: more would not act faster on small networks, and wait by spinning on the physics'
    cores.
    """
    _outside.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.pop())


def outside_threads() -> int:
    """Give the number of torch's threads outside `single_thread`."""
    return _outside[0] if _outside else torch.get_num_threads()
