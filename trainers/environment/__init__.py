"""The machine around a process: where it may write, and what it may use.

    limits    CPUs, memory and open files, within affinity, quotas and cgroups
    places    folders for temporary files, sockets and caches
    network   the addresses at which processes of one machine meet
    findings  what hinders this process, and the variables that mend it

Commands apply the findings before they start Ray; `mimray doctor` reports the same ones.
"""
