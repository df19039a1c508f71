"""Random calls against float64, for minutes or hours: ``python -m tests.fuzz``."""
