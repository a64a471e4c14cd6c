"""What differs between operating systems, each thing in one place.

The rest of the project asks these modules and knows no system by name. What a system lacks is
replaced here by what it has, or left out, and docs/machines.md says what is then missing.

    locks      a file that one process holds
    processes  whether a process lives, how it is started apart, asked to stop and ended
    limits     what a process may take
    memory     what it has taken, and what there is
    disk       files that are synced, put in place, or read at an offset
    windows    the calls of Windows that Python does not offer
"""
