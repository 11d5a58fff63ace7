"""Exit codes of every command."""

OK = 0
FAILED = 1  # the search cannot go on: loss not finite, not enough memory
BAD_INPUT = 2
TARGET_MISSED = 3
NOISY = 3  # `tfnas lut build --strict` and `tfnas lut check --strict`
INTERRUPTED = 130
TERMINATED = 143
