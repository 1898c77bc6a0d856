import os
import sys

# Python puts this folder first on its path, where train/redrafter.py would hide the library.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE)] + [p for p in sys.path if os.path.realpath(p) != HERE]

from redrafter.cli.stream import main

if __name__ == "__main__":
    sys.exit(main())
