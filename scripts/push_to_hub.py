#!/usr/bin/env python
"""Publish a head: python scripts/push_to_hub.py --head RUN --repo USER/NAME [--dry-run]"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from redrafter.cli.push import main

if __name__ == "__main__":
    sys.exit(main())
