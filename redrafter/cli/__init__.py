"""One `main()` per launcher, so that an installed wheel has the commands too."""
