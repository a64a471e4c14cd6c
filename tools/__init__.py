"""Programs for those who work on PhiSight; nothing imports them but tests and each other."""
