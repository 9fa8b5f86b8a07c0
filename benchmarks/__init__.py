"""What this project measures of itself: ``python -m benchmarks --help``.

One module for each benchmark: ``verify`` proves that what is about to be timed is right,
``measure`` times it, and no figure exists before the first has passed. `harness` is what they
share. Rows go to ``results/NAME.csv`` with what made them; the tables and plots of README.md and
docs/ are made of those rows by a command, never by hand.
"""
