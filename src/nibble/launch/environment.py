"""Who started this process, and as which of how many.

Every launcher tells its processes in environment variables who they are, each in words of its own.
Here is a table of them, and one pure function a row, from an environment to a `Launch`. The first
row that applies counts: a launcher started by another one (torchrun inside SLURM) knows better.

Launchers come in two kinds. torchrun, accelerate, mpirun and srun start every process of a run.
SageMaker, Kubernetes' PyTorchJob and srun with one task a machine start one process on each
machine, which then starts one for each of its GPUs.

Sources: torchrun's environment variables (docs.pytorch.org, elastic/run), Open MPI's
OMPI_COMM_WORLD_*, MPICH's and Intel's PMI_* and MPI_LOCAL*, srun(1) "OUTPUT ENVIRONMENT VARIABLES",
the SageMaker training toolkit's ENVIRONMENT_VARIABLES.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nibble.errors import ConfigError

Environment = Mapping[str, str]
OWN_GPU = "NIBBLE_OWN_GPU"
"""Set where each process sees one GPU, another one in each."""
LOOPBACK = ("", "localhost", "127.0.0.1", "::1")
DEFAULT_PORT = 29500
SAGEMAKER_PORT = 7777
FIRST_PORT, NUM_PORTS = 15000, 15000
"""Ports that are made from a job's number, below those that Linux hands out by itself."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process (`rank` of `world`, `local_rank` of `local_world` on its machine) among those
    that `launcher` started on `nodes` machines; the first one listens at `master`:`port`.

    `starts` says whether that are all processes of the run, or one on each machine. `own_gpu`: the
    launcher shows each process one GPU and hides the others.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    master: str
    port: int
    nodes: int
    starts: Literal["processes", "machines"] = "processes"
    own_gpu: bool = False

    def environment(self) -> dict[str, str]:
        """The same in torchrun's words, and in one of our own (place/devices.py)."""
        own = {OWN_GPU: "1"} if self.own_gpu else {}
        return {
            **own,
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


def detect(environment: Environment) -> Launch | None:
    """What the environment says of this process; None where nobody launched it.

    Raises ConfigError for words that contradict each other or leave out what is needed.
    """
    for read in LAUNCHERS.values():
        launch = read(environment)
        if launch is not None:
            _check(launch)
            return launch
    return None


def from_torchrun(environment: Environment) -> Launch | None:
    """torchrun, `accelerate launch`, deepspeed, and whoever speaks their words."""
    if "RANK" not in environment or "LOCAL_RANK" not in environment:
        return None
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_world = _number(environment, "LOCAL_WORLD_SIZE", default=world)
    return Launch(
        launcher="torchrun",
        rank=rank,
        world=world,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_world=local_world,
        master=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environment, "MASTER_PORT", default=DEFAULT_PORT),
        nodes=max(1, world // max(1, local_world)),
    )


def from_ranks(environment: Environment) -> Launch | None:
    """RANK and WORLD_SIZE alone: Kubernetes' PyTorchJob counts machines (pods); on one machine
    somebody started the processes by hand.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    master = environment.get("MASTER_ADDR", "127.0.0.1")
    here = master in LOOPBACK
    return Launch(
        launcher="the environment (RANK, WORLD_SIZE)",
        rank=rank,
        world=world,
        local_rank=rank if here else 0,
        local_world=world if here else 1,
        master=master,
        port=_number(environment, "MASTER_PORT", default=DEFAULT_PORT),
        nodes=1 if here else world,
        starts="processes" if here else "machines",
    )


MPI_WORDS = (
    # rank, world, local rank, local world, a job's name
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
     "MV2_COMM_WORLD_LOCAL_SIZE", "PMI_ID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "I_MPI_HYDRA_HOST_FILE"),
)  # fmt: skip


def from_mpi(environment: Environment) -> Launch | None:
    """mpirun of Open MPI, MVAPICH, MPICH and Intel MPI.

    None of them says where rank 0 runs: on several machines MASTER_ADDR has to.
    """
    for rank_word, world_word, local_rank, local_world, job in MPI_WORDS:
        if not {rank_word, world_word, local_rank} <= environment.keys():
            continue
        world = _number(environment, world_word)
        here = _number(environment, local_world, default=world)
        master = environment.get("MASTER_ADDR")
        if master is None:
            if here < world:
                raise ConfigError(
                    f"mpirun started {world} processes, {here} of them here, but does not say "
                    "where rank 0 is: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..."
                )
            master = "127.0.0.1"
        name = environment.get(job, "")
        port = FIRST_PORT + sum(name.encode()) % NUM_PORTS if name else DEFAULT_PORT
        return Launch(
            launcher="mpirun",
            rank=_number(environment, rank_word),
            world=world,
            local_rank=_number(environment, local_rank),
            local_world=here,
            master=master,
            port=_number(environment, "MASTER_PORT", default=port),
            nodes=max(1, world // max(1, here)),
        )
    return None


def from_slurm(environment: Environment) -> Launch | None:
    """srun. A batch script itself, or a shell that salloc opened, is no task of a step."""
    if "SLURM_PROCID" not in environment or not (
        {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys()
    ):
        return None
    world = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    counts = tasks_per_node(
        environment.get("SLURM_STEP_TASKS_PER_NODE")
        or environment.get("SLURM_TASKS_PER_NODE")
        or str(world)
    )
    node = _number(environment, "SLURM_NODEID", default=0)
    local_world = counts[node] if node < len(counts) else max(1, world // nodes)
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    master = expand_nodes(hosts)[0] if hosts else "127.0.0.1"
    job = _number(environment, "SLURM_JOB_ID", "SLURM_JOBID", default=0)
    step = _number(environment, "SLURM_STEP_ID", "SLURM_STEPID", default=0)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return Launch(
        launcher="srun",
        rank=_number(environment, "SLURM_PROCID"),
        world=world,
        local_rank=_number(environment, "SLURM_LOCALID", default=0),
        local_world=local_world,
        master=environment.get("MASTER_ADDR", master if nodes > 1 else "127.0.0.1"),
        port=_number(environment, "MASTER_PORT", default=FIRST_PORT + (job * 7 + step) % NUM_PORTS),
        nodes=nodes,
        starts="machines" if world == nodes else "processes",
        own_gpu=local_world > 1 and visible != "" and "," not in visible,
    )


def from_sagemaker(environment: Environment) -> Launch | None:
    """A training job of SageMaker without torch_distributed or MPI: one process on each host."""
    if "SM_HOSTS" not in environment:
        return None
    text = environment["SM_HOSTS"]
    try:
        hosts = sorted(str(host) for host in json.loads(text))
    except (ValueError, TypeError):
        raise ConfigError(f"SM_HOSTS={text} is not a JSON list of hosts") from None
    here = environment.get("SM_CURRENT_HOST", hosts[0] if hosts else "")
    if here not in hosts:
        raise ConfigError(f"SM_CURRENT_HOST={here} is not one of SM_HOSTS={text}")
    return Launch(
        launcher="SageMaker",
        rank=hosts.index(here),
        world=len(hosts),
        local_rank=0,
        local_world=1,
        master=hosts[0] if len(hosts) > 1 else "127.0.0.1",
        port=_number(environment, "MASTER_PORT", default=SAGEMAKER_PORT),
        nodes=len(hosts),
        starts="machines",
    )


LAUNCHERS: dict[str, Callable[[Environment], Launch | None]] = {
    "torchrun": from_torchrun,
    "ranks": from_ranks,
    "mpi": from_mpi,
    "slurm": from_slurm,
    "sagemaker": from_sagemaker,
}


def expand_nodes(text: str) -> list[str]:
    """The hosts of SLURM's node list: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login.

    Raises ConfigError for brackets that do not close and ranges that are no numbers.
    """
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            ends = [plain] if plain else [n for piece in ranges.split(",") for n in _range(piece)]
            names = [name + end for name in names for end in ends]
        found += [name for name in names if name]
    if text.count("[") != text.count("]") or not found:
        raise ConfigError(f"{text!r} is not a node list of SLURM, such as gpu[01-04],gpu7")
    return found


def _range(piece: str) -> list[str]:
    first, dash, last = piece.partition("-")
    if not dash:
        return [piece]
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"{piece!r} is not a range of nodes, such as 01-04")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's counts: `4(x2),3` is 4, 4, 3."""
    counts: list[int] = []
    for piece in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece.strip())
        if found is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text} is not such as 4(x2),3")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(environment: Environment, *names: str, default: int | None = None) -> int:
    """The first of these variables that is set."""
    for name in names:
        if environment.get(name, "") != "":
            if not re.fullmatch(r"\d+", environment[name]):
                raise ConfigError(f"the environment has {name}={environment[name]}: not a number")
            return int(environment[name])
    if default is None:
        raise ConfigError(f"the environment has no {names[0]}, which goes with what is set there")
    return default


def _check(launch: Launch) -> None:
    right = (
        0 <= launch.rank < launch.world
        and 0 <= launch.local_rank < launch.local_world <= launch.world
    )
    if not right:
        raise ConfigError(
            f"{launch.launcher} says: process {launch.rank} of {launch.world}, and "
            f"{launch.local_rank} of {launch.local_world} on this machine: numbers count from 0 to "
            "below how many there are"
        )
