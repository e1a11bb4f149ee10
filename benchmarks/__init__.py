"""Speed, as ratios within one run: `python -m benchmarks [NAME ...]`. Not tests: they fail on nothing."""
