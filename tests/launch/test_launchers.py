"""Environments as launchers make them, shortened to the variables that matter and some that do
not."""

from __future__ import annotations

import pytest

from nibble.errors import ConfigError
from nibble.launch.environment import Launch, detect, expand_nodes, tasks_per_node

TORCHRUN = {
    "LOCAL_RANK": "1", "RANK": "5", "GROUP_RANK": "1", "ROLE_RANK": "5", "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu-a", "MASTER_PORT": "29400", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1", "SLURMD_NODENAME": "gpu04",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip
SBATCH = {
    # A batch script before srun: the same job, and PROCID, but no step.
    name: value
    for name, value in SRUN.items()
    if "STEP" not in name
} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2", "PMIX_NAMESPACE": "prterun-gpu01-3512@1", "PMIX_RANK": "1",
}  # fmt: skip
SAGEMAKER = {
    "SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "4",
    "SM_NUM_CPUS": "48", "SM_CHANNELS": '["train"]', "SM_CHANNEL_TRAIN": "/opt/ml/input/data/train",
    "SM_MODEL_DIR": "/opt/ml/model", "SM_CURRENT_INSTANCE_TYPE": "ml.g5.12xlarge",
}  # fmt: skip


def who(launch: Launch | None) -> tuple[object, ...]:
    assert launch is not None
    return (
        launch.rank, launch.world, launch.local_rank, launch.local_world, launch.master,
        launch.port, launch.nodes, launch.starts,
    )  # fmt: skip


def test_nobody_launched_a_plain_shell() -> None:
    assert detect({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}) is None
    assert detect(SBATCH) is None, "a batch script is not a task: it may use srun, or be alone"
    salloc = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu01"}
    assert detect(salloc) is None


def test_torchrun() -> None:
    assert who(detect(TORCHRUN)) == (5, 8, 1, 4, "gpu-a", 29400, 2, "processes")


def test_torchrun_inside_slurm_knows_better() -> None:
    assert who(detect(SRUN | TORCHRUN)) == who(detect(TORCHRUN))


def test_srun_with_a_task_for_each_gpu() -> None:
    rank, world, local_rank, local_world, master, port, nodes, starts = who(detect(SRUN))
    assert (rank, world, local_rank, local_world) == (6, 8, 2, 4)
    assert (master, nodes, starts) == ("gpu03", 2, "processes")
    ports = {who(detect({**SRUN, "SLURM_JOB_ID": str(job)}))[5] for job in range(4711, 4731)}
    assert port in ports and len(ports) == 20, "jobs that share a machine do not share a port"
    assert all(15000 <= p < 30000 for p in ports)
    assert who(detect({**SRUN, "MASTER_ADDR": "ib03", "MASTER_PORT": "5"}))[4:6] == ("ib03", 5)


def test_srun_with_unequal_tasks_and_one_gpu_each() -> None:
    unequal = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "5,3", "CUDA_VISIBLE_DEVICES": "0"}
    launch = detect(unequal)
    assert launch is not None
    assert (launch.local_world, launch.own_gpu) == (3, True)
    assert launch.environment()["NIBBLE_OWN_GPU"] == "1"
    plain = detect(SRUN)
    assert plain is not None and not plain.own_gpu


def test_srun_with_a_task_for_each_machine_leaves_the_gpus_to_us() -> None:
    one_each = {
        **SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    assert who(detect(one_each))[:5] == (1, 2, 0, 1, "gpu03")
    assert who(detect(one_each))[-1] == "machines"


def test_mpirun() -> None:
    rank, world, local_rank, local_world, master, _, nodes, starts = who(detect(MPIRUN))
    assert (rank, world, local_rank, local_world) == (1, 2, 1, 2)
    assert (master, nodes, starts) == ("127.0.0.1", 1, "processes")
    other = {**MPIRUN, "PMIX_NAMESPACE": "prterun-gpu01-3513@1"}
    assert who(detect(other))[5] != who(detect(MPIRUN))[5]
    far = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(ConfigError, match=r"2 processes, 1 of them here.*-x MASTER_ADDR"):
        detect(far)
    assert who(detect({**far, "MASTER_ADDR": "gpu01"}))[4:7] == (
        "gpu01", who(detect(MPIRUN))[5], 2,
    )  # fmt: skip
    intel = {
        "PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2",
    }  # fmt: skip
    assert who(detect(intel))[:5] == (0, 2, 0, 2, "127.0.0.1")


def test_sagemaker() -> None:
    assert who(detect(SAGEMAKER)) == (1, 2, 0, 1, "algo-1", 7777, 2, "machines")
    alone = {**SAGEMAKER, "SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}
    assert who(detect(alone))[:5] == (0, 1, 0, 1, "127.0.0.1")
    assert who(detect(SAGEMAKER | TORCHRUN)) == who(detect(TORCHRUN)), "torch_distributed is on"
    with pytest.raises(ConfigError, match="SM_CURRENT_HOST=algo-3 is not one of"):
        detect({**SAGEMAKER, "SM_CURRENT_HOST": "algo-3"})
    with pytest.raises(ConfigError, match="not a JSON list"):
        detect({**SAGEMAKER, "SM_HOSTS": "algo-1"})


def test_kubernetes_counts_machines() -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert who(detect(pod)) == (1, 3, 0, 1, "job-master-0", 23456, 3, "machines")
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "2000"}
    assert who(detect(by_hand)) == (1, 2, 1, 2, "127.0.0.1", 2000, 1, "processes")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "process 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=-1: not a number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect(environment)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu01", ["gpu01"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[1,4-5],login", ["gpu1", "gpu4", "gpu5", "login"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("p5-dy-queue-1-[1-2]", ["p5-dy-queue-1-1", "p5-dy-queue-1-2"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_nodes(text) == hosts


@pytest.mark.parametrize("text", ["gpu[1-", "gpu[3-1]", "gpu[a-b]", ""])
def test_node_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        expand_nodes(text)


def test_task_counts() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("1") == [1]
    with pytest.raises(ConfigError):
        tasks_per_node("4(y2)")
