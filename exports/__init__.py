"""Ways out of PhiSight and into it: one file a format that another program reads or wrote."""
