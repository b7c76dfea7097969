"""The commands by name: what each does, and where its options and its code are.

A new command is a module in this folder, with a frozen dataclass of its options, which tyro reads, and a function that
takes them and what was typed and returns the exit code; and one entry in COMMANDS. Help, errors, near names,
`geodesic-rl NAME` and `python train.py NAME` follow from it. Its options have `debug: Flag = False`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand, whose module is imported when it is typed."""

    module: str
    options: str
    """The dataclass of its options, in that module."""
    action: str
    """The function in that module that is called with the options and with what was typed, for records."""
    summary: str
    """One sentence, for help."""
    examples: tuple[str, ...] = ()
    """What follows its name, for the end of its help; {0} stands for an algorithm."""


COMMANDS: dict[str, Command] = {
    "train": Command(
        "agents.run.training",
        "",  # each algorithm has options of its own
        "start",
        "Train an agent: train ALGORITHM --env ID.",
        (
            "{0} --env Hopper-v5",
            "{0} --env Hopper-v5 --steps 1e6 --seed 3 --num-envs 32",
            "{0} --env Hopper-v5 --seeds 10 --jobs 2",
            "{0} --env Hopper-v5 --minutes 15",
        ),
    ),
    "resume": Command(
        "agents.run.resume",
        "Resume",
        "resume",
        "Go on with runs from their last checkpoints.",
        ("runs/Hopper-v5/npg/<run>", "runs/Hopper-v5/npg/<run> --steps 2e6", "runs/Hopper-v5/npg/* --jobs 2"),
    ),
    "runs": Command(
        "agents.run.runs",
        "Runs",
        "list_runs",
        "List runs, newest first, choose among them, and remove them.",
        ("--env Hopper-v5 --algorithm npg --last 10", "--state stopped --paths", "--state killed --remove"),
    ),
    "evaluate": Command(
        "agents.run.assessment",
        "Assessment",
        "assess",
        "Run whole episodes with a trained agent, one for each seed, and say what it is worth.",
        ("runs/Hopper-v5/npg/<run> --episodes 100", "runs/Hopper-v5/npg/<run> --best --video hopper.mp4"),
    ),
    "adapt": Command(
        "agents.run.adaptation",
        "Adaptation",
        "adapt",
        "Let a policy adapt to tasks that it was not trained on, and say what each update is worth.",
        ("runs/families_HalfCheetahVel-v0/fomaml/<run> --updates 3",),
    ),
    "compare": Command(
        "agents.run.comparison",
        "Comparison",
        "compare",
        "Compare runs over their seeds: tables, figures, and one sentence.",
        ("runs/Hopper-v5 --plot hopper.png", "--compare runs/Hopper-v5/npg runs/Hopper-v5/ppo"),
    ),
    "tune": Command(
        "agents.run.tuning",
        "Tune",
        "tune",
        "Look for hyperparameters with Optuna, and write the best as a preset.",
        ("npg --env Hopper-v5 --trials 50", "ppo --env Hopper-v5 --search learning_rate=1e-5..1e-2"),
    ),
    "export": Command(
        "agents.run.export",
        "Export",
        "export",
        "Write a run's deterministic policy to a file that acts without this package.",
        ("runs/Hopper-v5/npg/<run> policy.onnx", "runs/Hopper-v5/npg/<run> policy.safetensors --best"),
    ),
    "selftest": Command(
        "agents.run.selftest",
        "Selftest",
        "selftest",
        "Try on this machine that killed runs go on exactly: a minute.",
        ("npg", "npg trpo copos ppo pes --env Walker2d-v5"),
    ),
}
