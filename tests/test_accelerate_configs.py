"""Every file of accelerate_configs/ is read by Accelerate's own loader and launcher; those for the CPU really run."""

from __future__ import annotations

import argparse
import os
import re
import socket
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from forked import ROOT, run_command
from small_data import write_texts
from tiny_models import write_tiny_text_model

CONFIGS = ROOT / "accelerate_configs"
LOCAL = {  # file: how the processes are distributed, how many
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 2),
    "fsdp2": (DistributedType.FSDP, 2),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 2),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 2),
    "cpu": (DistributedType.NO, 1),
    "cpu_2_processes": (DistributedType.MULTI_GPU, 2),
}
EXPECTED = {**LOCAL, "multi_node": (DistributedType.MULTI_GPU, 16)}


def config_file(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


def launch_arguments(name: str, *flags: str) -> argparse.Namespace:
    """What `accelerate launch` makes of the file, up to starting processes."""
    args = launch_command_parser().parse_args(["--config_file", config_file(name), *flags, "script.py"])
    return _validate_launch_command(args)[0]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def _environment():
    """Accelerate's plugins set variables of the process that makes them."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def test_every_file_is_known():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_loads_it(name):
    config = load_config_from_file(config_file(name))  # raises on a key that Accelerate does not know
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes) == EXPECTED[name]
    assert config.use_cpu == name.startswith("cpu")


@pytest.mark.parametrize("name", EXPECTED)
def test_nested_keys_are_flags_of_the_launcher(name):
    """Accelerate checks the names at the top of a file, and takes any name in `fsdp_config` or `deepspeed_config`."""
    known = {action.dest for action in launch_command_parser()._actions}
    raw = yaml.safe_load(Path(config_file(name)).read_text(encoding="utf-8"))
    nested = {key for value in raw.values() if isinstance(value, dict) for key in value}
    assert nested <= known


def test_unknown_key_is_an_error(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(Path(config_file("cpu")).read_text(encoding="utf-8") + "num_procesess: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("name", ["single_gpu", "cpu"])
def test_simple_launcher(name):
    args = launch_arguments(name)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (False, False, False)
    _, env = prepare_simple_launcher_cmd_env(args)
    assert env["ACCELERATE_USE_CPU"] == str(name == "cpu")
    assert env["ACCELERATE_MIXED_PRECISION"] == ("no" if name == "cpu" else "bf16")


def test_multi_gpu_launcher():
    args = launch_arguments("multi_gpu", "--num_processes", "4")
    env = prepare_multi_gpu_env(args)
    assert args.multi_gpu
    assert args.nproc_per_node == "4"
    assert int(args.master_port) > 0  # a free port was chosen
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_launcher():
    args = launch_arguments("fsdp2", "--fsdp_transformer_layer_cls_to_wrap", "Block")
    env = prepare_multi_gpu_env(args)
    assert args.use_fsdp
    assert not args.multi_gpu
    assert env["FSDP_VERSION"] == "2"
    assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert env["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Block"
    assert env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_fsdp2_plugin_takes_it(monkeypatch):
    """Accelerate builds its FSDP plugin from the launcher's variables without a warning about FSDP1 options."""
    from accelerate import FullyShardedDataParallelPlugin

    args = launch_arguments("fsdp2")
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True


@pytest.mark.parametrize(("name", "stage"), [("deepspeed_zero2", "2"), ("deepspeed_zero3", "3")])
def test_deepspeed_launcher(name, stage):
    args = launch_arguments(name)
    args.deepspeed_fields_from_accelerate_config = ""
    _, env = prepare_deepspeed_cmd_env(args)
    assert args.use_deepspeed
    assert args.nproc_per_node == "2"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    # Trainer fills these in from the training arguments, and refuses a value here that differs from them.
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & set(env)
    if stage == "3":
        assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_multi_node_launcher():
    port = str(free_port())
    args = launch_arguments("multi_node", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 0)
    assert args.rdzv_endpoint == f"127.0.0.1:{port}"


@pytest.mark.parametrize("name", LOCAL)
def test_header_shows_a_command_that_uses_the_file(name):
    text = Path(config_file(name)).read_text(encoding="utf-8")
    assert f"accelerate launch --config_file accelerate_configs/{name}.yaml" in text
    if name.startswith(("fsdp", "deepspeed")):  # whose weights are in pieces, which adapters do not take
        assert set(re.findall(r"--method (\w+)", text)) == {"full"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cpu_2_processes"])
def test_a_recipe_runs_on_a_cpu(tmp_path, name):
    """With the reader's data and model, small."""
    write_texts(tmp_path / "texts", {"train": 16, "dev": 6})
    write_tiny_text_model(tmp_path / "bert")
    flags = ["--model=bert", "--dataset=texts", "--method=full", "--max_steps=2", "--output_dir=run"]
    recipe = str(ROOT / "recipes" / "text_classification.py")
    done = run_command(["accelerate.commands.launch", "--config_file", config_file(name), recipe, *flags], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert settings["task"] == "text-classification"
    assert done.stdout.count("saved in:   run ") == 1
