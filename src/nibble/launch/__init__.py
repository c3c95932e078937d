"""From one command to the processes of a run: who is who, how many, and what becomes of them.

    environment.py  what a launcher (torchrun, mpirun, srun, SageMaker) says of this process
    devices.py      how many GPUs there are to run on, without torch
    meeting.py      how the machines of one run find each other
    processes.py    starting the processes of this machine and seeing them to their end
    signals.py      a context that takes signals over
    leaving.py      the last thing that such a process does

No torch until machines meet: what can be refused is refused before it is imported.
"""
