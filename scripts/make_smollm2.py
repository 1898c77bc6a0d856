#!/usr/bin/env python
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from redrafter.cli.make_smollm2 import main

if __name__ == "__main__":
    sys.exit(main())
