"""Does a safety vector carry refusals to a fine-tune, at what price, and what does each part do?

    make bench-transfer [REDUCED=1 | SEEDS=1,2]

What is measured, and what came of it: docs/transfer.md.
"""
