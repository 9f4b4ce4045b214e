"""Parts of scripts/benchmark.py: the jobs, the peers that run in processes of their own, the comparisons, the tables."""
