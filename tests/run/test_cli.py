import dataclasses
import importlib
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import agents
from agents import NPG, REGISTRY
from agents.run import cli, training
from agents.run.commands import COMMANDS
from agents.run.errors import UsageError
from agents.run.help import GROUPS
from agents.run.options import RunOptions, check_device
from agents.run.process import program, typed


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Arguments of training.start, in place of training; Hopper's preset is {"gamma": 0.995, "n_steps": 32}."""
    calls: list[tuple] = []
    preset = {"gamma": 0.995, "n_steps": 32}

    def values(algorithm: str, env_id: str) -> dict:
        return preset if env_id == "Hopper-v5" else {}

    def start(*arguments: object) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr("agents.config.preset_values", values)
    monkeypatch.setattr("agents.base.preset_values", values)
    monkeypatch.setattr(cli, "preset_values", values)
    monkeypatch.setattr(training, "start", start)
    return calls


def train(*arguments: str) -> int:
    return cli.train(["npg", *arguments])


def test_defaults_then_preset_then_flags(started: list[tuple]) -> None:
    assert train("--env", "Hopper-v5", "--n-steps", "8", "--target-kl", "0.5") == 0
    algorithm, run, config, origins, command = started[0]
    assert algorithm == "npg"
    assert (config.gamma, config.n_steps, config.target_kl) == (0.995, 8, 0.5)
    assert config == NPG.Config(gamma=0.995, n_steps=8, target_kl=0.5)
    assert (origins["gamma"], origins["n_steps"], origins["target_kl"]) == ("preset", "flag", "flag")
    assert origins["gae_lambda"] == "default"
    assert origins.keys() == {field.name for field in dataclasses.fields(NPG.Config)}
    assert run == RunOptions(env="Hopper-v5")
    assert command == "python train.py npg --env Hopper-v5 --n-steps 8 --target-kl 0.5"


def test_another_environment_has_no_preset(started: list[tuple]) -> None:
    train("--env=Ant-v5")
    assert started[0][2] == NPG.Config()
    assert set(started[0][3].values()) == {"default"}


def test_no_preset_is_the_defaults(started: list[tuple]) -> None:
    train("--env=Hopper-v5", "--preset=none", "--n-steps=8")
    assert started[0][2] == NPG.Config(n_steps=8)
    assert started[0][3]["gamma"] == "default"


@pytest.mark.parametrize("spelling", [["--env=Hopper-v5"], ["--env", "Hopper-v5"]])
def test_the_preset_is_found_however_env_is_spelled(started: list[tuple], spelling: list[str]) -> None:
    train("--steps", "1_000", *spelling)
    assert started[0][2].gamma == 0.995
    assert started[0][1].steps == 1000


def test_a_flag_equal_to_the_default_is_a_flag(started: list[tuple]) -> None:
    train("--env", "Ant-v5", "--target_kl=0.02", "--no-normalize-advantage")
    origins = started[0][3]
    assert (origins["target_kl"], origins["normalize_advantage"]) == ("flag", "flag")
    assert not started[0][2].normalize_advantage


def test_a_sequence_is_a_flag(started: list[tuple]) -> None:
    train("--env", "Ant-v5", "--net-arch", "32", "16")
    assert started[0][2].net_arch == (32, 16)


def test_environment_arguments_are_yaml(started: list[tuple]) -> None:
    pairs = [
        "frame_skip=2",
        "reset_noise_scale=1e-3",
        "terminate_when_unhealthy=false",
        "xml_file=a=b.xml",
        "r=[1, 2.5]",
    ]
    train("--env", "Ant-v5", *(word for pair in pairs for word in ("--env-kwargs", pair)))
    assert started[0][1].parsed_env_kwargs() == {
        "frame_skip": 2,
        "reset_noise_scale": 1e-3,
        "terminate_when_unhealthy": False,
        "xml_file": "a=b.xml",
        "r": [1, 2.5],
    }


@pytest.mark.parametrize("pair", ["frame_skip", "=3", "a b=1", "a=[1"])
def test_a_bad_environment_argument_is_shown(pair: str) -> None:
    with pytest.raises(UsageError, match="--env-kwargs is"):
        RunOptions(env="Ant-v5", env_kwargs=(pair,)).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("seed", -1), ("eval_every", 0), ("eval_episodes", 0), ("threads", 0), ("checkpoint_every", -1.0)],
)
def test_an_impossible_option_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is {value}; give at least"):
        RunOptions(**{"env": "Ant-v5", name: value}).check()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 2**63, "--seed is 9223372036854775808; give at most 4,294,967,295"),
        ("threads", 100_000, "--threads is 100000; give at most 4,096"),
        ("steps", 10**30, "--steps is 1.*; give at most 1,000,000,000,000,000"),
        ("step_timeout", 0.0, r"--step-timeout is 0\.0; give a number above 0"),
        ("step_timeout", float("nan"), "--step-timeout is nan; give a number above 0"),
        ("policy", "", "--policy is empty"),
        ("run_dir", "", "--run-dir is empty"),
        ("env_kwargs", ("seed=1",), "--env-kwargs has seed, which the option --seed decides; leave it out"),
        ("env_kwargs", ("num_envs=5",), "--env-kwargs has num_envs, which the option --num-envs decides"),
        ("env_kwargs", ("autoreset=disabled",), "--env-kwargs has autoreset, which the run itself decides"),
    ],
)
def test_an_option_that_no_run_can_have_is_named(name: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RunOptions(**{"env": "Ant-v5", name: value}).check()  # type: ignore[arg-type]


def test_a_device_that_holds_no_numbers_is_none() -> None:
    with pytest.raises(UsageError, match="--device is 'meta', which is not possible here"):
        check_device("meta")


def test_an_impossible_hyperparameter_is_one_sentence(started: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--env", "Ant-v5", "--target-kl", "-1") == 2
    assert capsys.readouterr().err == "train.py: error: target_kl is -1.0; give a number above 0.\n"
    assert not started


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["npg", "--env", "Ant-v5", "--target_lk", "1"], "--target-kl"),
        (["npg"], "--env"),
        ([], "npg"),
        (["npg", "--env", "Ant-v5", "--steps", "many"], "--steps"),
    ],
)
def test_a_mistyped_command_exits_with_2_and_what_is_near(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.train(arguments)
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nqg", "ngp", "resum", "adopt"])
def test_a_mistyped_algorithm_is_one_sentence(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([word, "--env", "Ant-v5"]) == 2
    assert re.fullmatch(rf"train\.py: error: There is no '{word}'; did you mean .*\?\n", capsys.readouterr().err)


def test_every_command_has_its_options_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert callable(getattr(importlib.import_module(command.module), command.action))
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0
        assert program(name) in capsys.readouterr().out


def test_the_command_lists_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        out, err = capsys.readouterr()
        assert all(name in out + err for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evalute", "a"], "There is no command 'evalute'; did you mean 'evaluate'"),
        (["npg", "--env", "Ant-v5"], "There is no command 'npg'; type python train.py npg."),
        (["train", "nqg"], "There is no 'nqg'; did you mean 'npg'"),
    ],
)
def test_a_mistyped_command_suggests_the_near_one(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started", "train", "resume", "evaluate"),
    [
        ("/usr/bin/geodesic-rl", "geodesic-rl train", "geodesic-rl resume", "geodesic-rl evaluate"),
        ("/a/agents/run/__main__.py", *(f"python -m agents.run {name}" for name in ("train", "resume", "evaluate"))),
        ("train.py", "python train.py", "python train.py resume", "python evaluate.py"),
        ("evaluate.py", "python train.py", "python train.py resume", "python evaluate.py"),
    ],
)
def test_advice_names_the_command_that_the_person_has(
    started: str, train: str, resume: str, evaluate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [started])
    assert [typed(name) for name in ("train", "resume", "evaluate")] == [train, resume, evaluate]


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{agents.__version__}\n"


def test_errors_are_about_the_algorithm_that_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--steps", "many"], ["--gama", "1"]):
        with pytest.raises(SystemExit):
            train("--env", "Ant-v5", *wrong)
        text = capsys.readouterr().err
        assert "train.py npg --help" in text
        assert "copos" not in text


@pytest.mark.parametrize("steps", ["1e6", "1.0E6", "1000000", "1_000_000"])
def test_whole_numbers_are_written_as_people_do(started: list[tuple], steps: str) -> None:
    train("--env", "Ant-v5", "--steps", steps, f"--n-steps={steps}", "--name", "1e6", "--net-arch", "1e2", "64")
    _, run, config, *_ = started[0]
    assert (run.steps, config.n_steps, run.name, config.net_arch) == (1_000_000, 1_000_000, "1e6", (100, 64))
    with pytest.raises(SystemExit):
        train("--env", "Ant-v5", "--steps", "1.5e0")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_reader_that_goes_away_is_no_error(script: str) -> None:
    arguments = ["npg", "--help"] if script == "train.py" else ["--help"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, script, *arguments], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


def test_help_shows_every_option_with_the_presets_values(
    started: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("--env", "Hopper-v5", "--help")
    text = capsys.readouterr().out
    for field in (*dataclasses.fields(NPG.Config), *dataclasses.fields(RunOptions)):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "(default: 0.995)" in text


def test_unexpected_errors_keep_their_traceback(started: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise KeyError("a defect")

    monkeypatch.setattr(training, "start", broken)
    with pytest.raises(KeyError):
        train("--env", "Ant-v5")


def test_debug_shows_the_traceback(started: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise UsageError("no")

    monkeypatch.setattr(training, "start", refused)
    assert train("--env", "Ant-v5") == 2
    with pytest.raises(UsageError):
        train("--env", "Ant-v5", "--debug")


HEADING = r"^\W+(\w+) options\b"
"""Of a group, in a box or, where the terminal has no such characters, without."""


def width_of(text: str) -> int:
    return max(len(line.replace("\u200b", "")) for line in text.splitlines())


@pytest.mark.parametrize("algorithm", REGISTRY)
def test_help_is_grouped_fits_80_columns_and_ends_in_examples(
    algorithm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.train([algorithm, "--env", "Hopper-v5", "--help"])
    text = capsys.readouterr().out
    assert width_of(text) <= 80
    groups = re.findall(HEADING, text, flags=re.M)
    assert groups == [name for name in GROUPS if name in groups]
    assert {"run", "environment", "policy", "logging"} < set(groups)
    boxes = dict(zip(groups, re.split(HEADING, text, flags=re.M)[2::2], strict=True))
    assert all(option in boxes["run"] for option in ("--steps", "--minutes", "--seed ", "--seeds", "--jobs"))
    assert all(option in boxes["environment"] for option in ("--env ", "--num-envs", "{auto,mujoco,gymnasium,warp}"))
    assert ("direction" in boxes) == (algorithm in ("npg", "trpo", "copos"))
    if "direction" in boxes:
        assert "--fisher {compatible,analytic," in boxes["direction"]
    examples = text.partition("examples:\n")[2].splitlines()
    assert all(line.startswith(f"  python train.py {algorithm} --env ") for line in examples)
    assert len(examples) > 2


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_command_helps_in_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text, _, examples = capsys.readouterr().out.partition("examples:\n")
    assert width_of(text) <= 80
    assert all(line.startswith(f"  {typed(name)} ") for line in examples.splitlines())
    assert bool(examples) == bool(COMMANDS[name].examples)
    with pytest.raises(SystemExit):
        cli.main([])
    assert width_of("".join(capsys.readouterr())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_are_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    module = importlib.import_module(COMMANDS[name].module)
    monkeypatch.setattr(module, COMMANDS[name].action, lambda *arguments: asked.append(arguments) or 0)
    monkeypatch.setattr(cli, "train_seeds", lambda *arguments: asked.append(arguments) or 0)
    for example in COMMANDS[name].examples:
        assert cli.main([name, *shlex.split(example.format("npg"))]) == 0
    assert len(asked) == len(COMMANDS[name].examples)


def test_resume_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume"]) == 2
    assert "resume needs RUN, the folder of a run; python train.py runs lists them." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["a" * 5000], r"There is no 'a{147}\.\.\.a+"),
        (["npg", "--env", "Hopper-v5", "--preset", "x" * 5000], r"--preset is x{148}\.\.\.x+"),
        (["evaluate", "x" * 5000], r"x{148}\.\.\.x+ cannot be read or written \(File name too long\)"),
        (["evaluate", "x", "--csv", "a\n\x1b[31mb"], r"--csv is a \\x1b\[31mb; give a name"),
        (["word " * 1000], r"There is no '(word )+\w*\.\.\.\w* (word )+'; "),
    ],
)
def test_what_was_typed_is_repeated_in_short_and_plainly(
    typed: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train(typed) > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: {shown}", line)
    assert len(line) < 1500


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["train", "npg", "--env", "Hopper-v5", "--env-kwargs", "a=" + "[" * 3000], "its value is not YAML"),
        (
            ["train", "npg", "--env", "planted.module:Evil-v0"],
            "'planted', which the environment needs; install",
        ),
        (["evaluate", "x", "--seed", "9" * 25], "--seed is 9{25}; give at most 4,294,967,295"),
        (["evaluate", "x", "--threads", "100000"], "--threads is 100000; give at most 4,096"),
    ],
)
def test_what_no_command_can_do_is_one_sentence(
    typed: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"error: .*{shown}", line)
