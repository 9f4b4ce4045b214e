"""Parts of scripts/benchmark.py: jobs, peers that run in processes of their own, comparisons, tables."""
