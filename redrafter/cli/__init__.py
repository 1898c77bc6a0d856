"""One `main()` per launcher, so that an installed wheel has the commands too."""

from redrafter.threads import wait_asleep

wait_asleep()  # here, because every command comes by before it imports torch
