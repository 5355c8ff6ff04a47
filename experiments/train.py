"""The command that runs experiments: `python -m experiments.train +experiment=NAME key=value ...`.

It may be copied elsewhere and run there, as `ray submit` does: all it needs is the installed project.
"""

import sys

from experiments.entry import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:], program="python -m experiments.train"))
