"""The command line: old and new forms, and what the Trainer is told."""

import shlex

import pytest
import torch
import yaml

from taming.training.arguments import build_parser, parse
from taming.training.legacy_arguments import translate_trainer_arguments
from taming.training.trainer_arguments import (
    describe_devices,
    device_count,
    resolve_trainer_arguments,
    with_devices,
)


def read(line):
    return parse(shlex.split(line))


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has this many GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU model {'ab'[index // 2]}")

    def _pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return _pretend


# ---- flags ----


def test_defaults():
    options, trainer, dotlist, notes = read("")
    assert vars(options) == {
        "base": [], "train": False, "resume": None, "name": None, "project": None, "seed": None,
        "postfix": "", "logdir": "logs", "debug": False, "no_test": False, "scale_lr": True, "dry_run": False,
        "ignore_base_data": False, "allow": [],
    }
    assert (trainer, dotlist, notes) == ({}, [], [])


@pytest.mark.parametrize("line", [
    "-b a.yaml b.yaml -t", "--base a.yaml b.yaml", "-b a.yaml -b b.yaml", "--base=a.yaml --base=b.yaml",
    "-b a.yaml b.yaml model.x=1", "-t -b a.yaml b.yaml --max_epochs 3",
])
def test_config_files_in_every_form(line):
    assert read(line)[0].base == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize("line, value", [
    ("-t", True), ("-t True", True), ("-t true -n x", True), ("--train=yes", True), ("-t=1", True),
    ("--train", True), ("-t model.params.n=8", True), ("-t --gpus 0", True),
    ("-t False", False), ("--train 0", False), ("-n x", False),
])
def test_train_with_and_without_a_value(line, value):
    assert read(line)[0].train is value


def test_every_flag_and_both_spellings():
    long = read("--resume r --project p --seed 5 --postfix _f --debug --no-test --scale_lr False --dry-run "
                "--logdir d --allow one --allow two --ignore_base_data")[0]
    assert vars(long) == {
        "base": [], "train": False, "resume": "r", "name": None, "project": "p", "seed": 5, "postfix": "_f",
        "logdir": "d", "debug": True, "no_test": True, "scale_lr": False, "dry_run": True,
        "ignore_base_data": True, "allow": ["one", "two"],
    }
    short = read("-r r -p p -s5 -f _f -d --no_test --scale-lr False --dry_run -l d --allow one --allow=two "
                 "--ignore-base-data")[0]
    assert short == long


def test_overrides_may_stand_anywhere():
    line = 'model.a=1 -b x.yaml data.b=[1,2] -t l.c=3 data="{target: main.D, params: {n: 1}}" --gpus 0'
    assert read(line)[2] == [
        "model.a=1", "data.b=[1,2]", "l.c=3", "data={target: main.D, params: {n: 1}}",
    ]


@pytest.mark.parametrize("line, message", [
    ("--max_epoch 3", "unknown option '--max_epoch' .did you mean --max_epochs"),
    ("--bse x.yaml", "unknown option '--bse' .did you mean --base"),
    ("--something_else", "unknown option '--something_else'; --help lists all"),
    ("-x", "unknown option '-x'; short ones are -b, -t"),
    ("--model.params.n=1", "without dashes, model.params.n=1"),
    ("-t word", "'word' belongs to no option"),
    ("-n x words.yaml", "'words.yaml' belongs to no option"),
    ("-b", "-b needs the name of a YAML file"),
    ("--base -t", "--base needs the name of a YAML file"),
    ("--max_epochs", "--max_epochs needs a value"),
    ("--max_epochs model.x=3", "--max_epochs needs a value"),
    ("--gpus -t", "--gpus needs a value"),
    ("-r", "-r needs a value"),
    ("--seed many", "invalid int value: 'many'"),
    ("--train=maybe", "'maybe' is neither True nor False"),
    ("--max_time [1,", "is not a YAML value"),
    ("-r run -n name", "exclude each other"),
    ("-r run --resume_from_checkpoint x", "give only --resume"),
])
def test_what_is_wrong_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        read(line)


def test_help_lists_flags_and_trainer_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        read("-h")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name} " in text for name in ("base", "gpus", "allow", "max_epochs", "precision"))
    assert "weights_summary" not in text and text == build_parser().format_help()
    assert "Stop training once this number of epochs is reached (default: None)" in " ".join(text.split())
    assert build_parser("taming train").format_help().startswith("usage: taming train -b CONFIG")


# ---- arguments of the Trainer ----


def test_trainer_arguments_are_yaml_scalars():
    _, trainer, _, notes = read(
        "--max_epochs 3 --limit_val_batches=0.5 --fast_dev_run --deterministic warn --max_steps -1 "
        "--benchmark True --max_time 00:12:00:00 --gradient_clip_val 1e-1 --accumulate_grad_batches 4 "
        "--log-every-n-steps 5"
    )
    assert trainer == {
        "max_epochs": 3, "limit_val_batches": 0.5, "fast_dev_run": True, "deterministic": "warn",
        "max_steps": -1, "benchmark": True, "max_time": "00:12:00:00", "gradient_clip_val": 0.1,
        "accumulate_grad_batches": 4, "log_every_n_steps": 5,
    }
    assert notes == []


@pytest.mark.parametrize("value, expected", [
    ("0,", {"accelerator": "gpu", "devices": [0]}),
    ("0,1", {"accelerator": "gpu", "devices": [0, 1]}),
    ("'0, 1,'", {"accelerator": "gpu", "devices": [0, 1]}),
    ("[2,3]", {"accelerator": "gpu", "devices": [2, 3]}),
    ("2", {"accelerator": "gpu", "devices": 2}),
    ("-1", {"accelerator": "gpu", "devices": -1}),
    ("0", {"accelerator": "cpu", "devices": 1}),
    ("null", {}),
])
def test_gpus_in_all_old_forms(value, expected):
    _, trainer, _, notes = read(f"--gpus {value}")
    assert trainer == expected and len(notes) == (1 if expected else 0)
    assert read(f"--gpus={value}")[1] == expected


@pytest.mark.parametrize("value", ["x", "1.5", "-2", "0,x", "true", "0,-1"])
def test_gpus_that_are_no_number_nor_list(value):
    with pytest.raises(ValueError, match="gpus: .* is neither a number"):
        read(f"--gpus={value}")


@pytest.mark.parametrize("old, new, note", [
    ({"gpus": "0,"}, {"accelerator": "gpu", "devices": [0]}, "gpus: 0, -> accelerator: gpu, devices: [0]"),
    ({"distributed_backend": "ddp"}, {"strategy": "ddp"}, "distributed_backend: ddp -> strategy: ddp"),
    ({"accelerator": "ddp"}, {"strategy": "ddp"}, "accelerator: ddp -> strategy: ddp"),
    ({"accelerator": "ddp_spawn"}, {"strategy": "ddp_spawn"}, "strategy: ddp_spawn"),
    ({"accelerator": "dp"}, {"strategy": "ddp"}, "a process per GPU"),
    ({"strategy": "ddp2"}, {"strategy": "ddp"}, "ddp2 is gone"),
    ({"accelerator": "ddp_cpu", "num_processes": 2},
     {"strategy": "ddp", "accelerator": "cpu", "devices": 2}, "processes on the CPU"),
    ({"gpus": 2, "num_processes": 8}, {"accelerator": "gpu", "devices": 2}, "gpus: 2"),
    ({"precision": 16}, {"precision": "16-mixed"}, "precision: 16 -> precision: 16-mixed"),
    ({"precision": "bf16"}, {"precision": "bf16-mixed"}, "bf16-mixed"),
    ({"precision": 32}, {"precision": "32-true"}, "32-true"),
    ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}, "use_distributed_sampler"),
    ({"checkpoint_callback": True}, {"enable_checkpointing": True}, "enable_checkpointing"),
    ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}, "enable_progress_bar"),
    ({"progress_bar_refresh_rate": 20}, {}, "ignored"),
    ({"weights_summary": None}, {"enable_model_summary": False}, "enable_model_summary"),
    ({"weights_summary": "full"}, {}, "ignored"),
    ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1}, "every_n_epochs"),
    ({"profiler": True}, {"profiler": "simple"}, "simple"),
    ({"track_grad_norm": 2}, {}, "train/grad_norm is logged"),
    ({"terminate_on_nan": True}, {}, "always stops"),
    ({"auto_select_gpus": True}, {}, "--gpus 0,1"),
    ({"tpu_cores": 8}, {}, "ignored"),
    ({"flush_logs_every_n_steps": 100}, {}, "ignored"),
    ({"truncated_bptt_steps": 5}, {}, "ignored"),
    ({"amp_backend": "native", "precision": 64}, {"precision": "64-true"}, "ignored"),
    ({"amp_level": "O2"}, {}, "ignored"),
    ({"prepare_data_per_node": True}, {}, "ignored"),
    ({"resume_from_checkpoint": "x.ckpt"}, {}, "-r RUN"),
    ({"logger": False}, {}, "lightning.logger"),
    ({"default_root_dir": "x"}, {}, "--logdir"),
])
def test_old_arguments_become_new_ones_with_a_note(old, new, note):
    before = dict(old)
    translated, notes = translate_trainer_arguments(old)
    assert translated == new and note in "\n".join(notes)
    assert old == before, "the input is left alone"


@pytest.mark.parametrize("arguments", [
    {"benchmark": True, "max_steps": 7, "num_nodes": 2, "precision": "bf16-mixed", "strategy": "ddp"},
    {"accelerator": "gpu", "devices": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
])
def test_present_arguments_pass_unchanged_and_unmentioned(arguments):
    assert translate_trainer_arguments(arguments) == (arguments, [])


def test_old_defaults_are_not_worth_a_note():
    old = {"gpus": None, "distributed_backend": None, "auto_select_gpus": False, "track_grad_norm": -1,
           "num_processes": 1, "tpu_cores": None, "resume_from_checkpoint": None, "profiler": None}
    assert translate_trainer_arguments(old) == ({"profiler": None}, [])


def test_present_names_win_over_old_ones():
    old_first = {"distributed_backend": "ddp", "strategy": "fsdp", "gpus": 4, "devices": 2}
    expected = {"strategy": "fsdp", "accelerator": "gpu", "devices": 2}
    assert translate_trainer_arguments(old_first)[0] == expected
    assert translate_trainer_arguments(dict(reversed(old_first.items())))[0] == expected


def test_names_that_never_were():
    with pytest.raises(ValueError, match="no argument 'max_epoch' .did you mean max_epochs"):
        translate_trainer_arguments({"max_epoch": 3})
    with pytest.raises(ValueError, match="accumulate_grad_batches: .* must be a number"):
        translate_trainer_arguments({"accumulate_grad_batches": {0: 8, 4: 4}})


def test_resume_from_checkpoint_is_resume():
    options, trainer, _, notes = read("--resume_from_checkpoint logs/run/last.ckpt")
    assert options.resume == "logs/run/last.ckpt" and trainer == {}
    assert notes == ["--resume_from_checkpoint is now --resume logs/run/last.ckpt"]


def test_old_switches_may_stand_alone():
    assert read("--auto_select_gpus --checkpoint_callback -t")[1] == {"enable_checkpointing": True}


# ---- devices ----


def devices_of(from_yaml, line):
    """What the Trainer is told, given the YAML and the command line."""
    return with_devices(resolve_trainer_arguments(from_yaml, read(line)[1])[0])


@pytest.mark.parametrize("from_yaml, line, expected", [
    ({}, "", {"accelerator": "gpu", "devices": 1}),
    ({}, "--gpus 0", {"accelerator": "cpu", "devices": 1}),
    ({}, "--accelerator cpu", {"accelerator": "cpu", "devices": 1}),
    ({"gpus": None}, "", {"accelerator": "gpu", "devices": 1}),
    ({"gpus": "0,1"}, "", {"accelerator": "gpu", "devices": [0, 1]}),
    ({"gpus": "0,1"}, "--gpus 3,", {"accelerator": "gpu", "devices": [3]}),
    ({"gpus": "0,1"}, "--gpus 0", {"accelerator": "cpu", "devices": 1}),
    ({"gpus": "0,1"}, "--accelerator cpu", {"accelerator": "cpu", "devices": 1}),
    ({"gpus": "0,1"}, "--devices 1", {"accelerator": "gpu", "devices": 1}),
    ({"accelerator": "gpu", "devices": 2}, "--devices 2,3", {"accelerator": "gpu", "devices": [2, 3]}),
    ({"accelerator": "ddp", "gpus": 2, "max_epochs": 9}, "--max_epochs 1",
     {"accelerator": "gpu", "devices": 2, "strategy": "ddp", "max_epochs": 1}),
    ({}, "--accelerator gpu", {"accelerator": "gpu", "devices": "auto"}),
    ({}, "--devices 2", {"accelerator": "auto", "devices": 2}),
    ({}, "--accelerator cpu --devices 2", {"accelerator": "cpu", "devices": 2}),
])
def test_the_command_line_wins_over_the_yaml(gpus, from_yaml, line, expected):
    gpus(4)
    assert devices_of(from_yaml, line) == expected


@pytest.mark.parametrize("from_yaml, line", [({}, "--gpus 0,"), ({"gpus": 1}, ""), ({}, "--accelerator gpu")])
def test_gpus_without_cuda_are_refused_with_the_remedy(gpus, from_yaml, line):
    gpus(0)
    with pytest.raises(ValueError, match=r"CUDA is not available here: use --gpus 0 or --accelerator cpu"):
        devices_of(from_yaml, line)
    for remedy in ("--gpus 0", "--accelerator cpu"):
        assert devices_of(from_yaml, remedy) == {"accelerator": "cpu", "devices": 1}


@pytest.mark.parametrize("line", ["--gpus 0,2", "--gpus 3"])
def test_more_gpus_than_there_are(gpus, line):
    gpus(2)
    with pytest.raises(ValueError, match="this machine has 2 GPU"):
        devices_of({}, line)
    assert devices_of({}, "--gpus -1")["devices"] == -1


@pytest.mark.parametrize("arguments, count", [
    ({}, (3, 1)), ({"accelerator": "cpu"}, (1, 1)), ({"accelerator": "cpu", "devices": 2}, (2, 1)),
    ({"accelerator": "gpu", "devices": [0, 2]}, (2, 1)), ({"accelerator": "gpu", "devices": -1}, (3, 1)),
    ({"accelerator": "gpu", "devices": "auto", "num_nodes": 4}, (3, 4)), ({"devices": "0,1"}, (2, 1)),
    ({"devices": "0,"}, (1, 1)), ({"devices": "2", "num_nodes": 2}, (2, 2)), ({"devices": (0, 1)}, (2, 1)),
])
def test_devices_are_counted(gpus, arguments, count):
    gpus(3)
    assert device_count(arguments) == count


def test_devices_are_counted_without_gpus(gpus):
    gpus(0)
    assert device_count({"devices": "auto"}) == (1, 1)
    with pytest.raises(ValueError, match="devices: 0 is neither"):
        device_count({"devices": 0})
    with pytest.raises(ValueError, match="devices: 'two' is neither"):
        device_count({"devices": "two"})


@pytest.mark.parametrize("count, line, expected", [
    (0, "", "device: CPU (1 threads)"),
    (0, "--accelerator cpu --devices 2", "device: CPU (2 processes of 1 threads)"),
    (4, "", "device: GPU 0 (GPU model a)"),
    (4, "--gpus 0", "device: CPU (1 threads)"),
    (4, "--gpus 1,3", "device: GPUs 1, 3 (GPU model a, GPU model b)"),
    (4, "--gpus -1", "device: GPUs 0, 1, 2, 3 (GPU model a, GPU model b)"),
    (4, "--gpus 2 --num_nodes 3", "device: GPUs 0, 1 (GPU model a) on each of 3 nodes"),
    (0, "--accelerator tpu --devices 8", "device: tpu, 8"),
])
def test_devices_are_described(gpus, count, line, expected):
    gpus(count)
    assert describe_devices(devices_of({}, line)) == expected


@pytest.mark.parametrize("line, message", [
    ("--max_steps -3", "max_steps: -3; it must be a whole number of at least -1"),
    ("--max_epochs 1e1", "max_epochs: 10.0; it must be a whole number or null"),
    ("--max_epochs -2", "max_epochs: -2; it must be a whole number of at least -1"),
    ("--max_epochs abc", "max_epochs: 'abc'"),
    ("--precision fp16", "precision: 'fp16'; it must be one of .*bf16-mixed"),
    ("--accumulate_grad_batches 0", "accumulate_grad_batches: 0 must be a number of batches"),
    ("--gradient_clip_val abc", "gradient_clip_val: 'abc'; it must be a whole number or a number"),
    ("--limit_train_batches -1", "limit_train_batches: -1; it must be"),
    ("--limit_val_batches 7.5", "limit_val_batches: 7.5; it must be .* or a number from 0 to 1"),
    ("--val_check_interval 0", "val_check_interval: 0; it must be"),
    ("--check_val_every_n_epoch 0", "check_val_every_n_epoch: 0"),
    ("--log_every_n_steps -1", "log_every_n_steps: -1"),
    ("--num_nodes 0", "num_nodes: 0"),
    ("--detect_anomaly foo", "detect_anomaly: 'foo'; it must be True or False"),
    ("--max_time 5", "max_time: 5"),
    ("--deterministic 3", "deterministic: 3; it must be one of warn or True or False or null"),
])
def test_values_of_the_wrong_type_or_range(line, message):
    with pytest.raises(ValueError, match=message):
        resolve_trainer_arguments({}, read(line)[1])
    name, _, value = line[2:].partition(" ")
    with pytest.raises(ValueError, match=message):
        resolve_trainer_arguments({name: float(value) if value == "1e1" else yaml.safe_load(value)}, {})


@pytest.mark.parametrize("line", [
    "--max_steps -1 --max_epochs -1", "--limit_train_batches 0", "--limit_val_batches 1.0",
    "--overfit_batches 3", "--val_check_interval 0.25", "--val_check_interval 500",
    "--num_sanity_val_steps -1",
    "--gradient_clip_val -1", "--gradient_clip_val 0.5", "--max_time 00:01:00:00", "--precision 16",
])
def test_values_at_the_edge_pass(line):
    resolve_trainer_arguments({}, read(line)[1])


def test_lightning_accepts_what_comes_out(tmp_path):
    import pytorch_lightning as pl

    old = {"gpus": 0, "distributed_backend": None, "precision": 32, "weights_summary": None, "max_epochs": 2,
           "progress_bar_refresh_rate": 0, "checkpoint_callback": False, "benchmark": True}
    arguments, _ = resolve_trainer_arguments(old, read("--max_epochs 1 --num_processes 1")[1])
    trainer = pl.Trainer(logger=False, default_root_dir=str(tmp_path), **with_devices(arguments))
    assert trainer.max_epochs == 1 and trainer.num_devices == 1 and trainer.precision == "32-true"


@pytest.mark.parametrize("words", [["--run", "logs/x"], ["--run=logs/x"], ["--resume", "logs/x"]])
def test_the_run_has_the_name_that_it_has_in_all_commands(words):
    assert parse(["-t", *words])[0].resume == "logs/x"
