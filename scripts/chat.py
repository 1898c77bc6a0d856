#!/usr/bin/env python
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from redrafter.cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
